"""Work on files that several processes share: it fails on all of them or on none, and nobody waits for long."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from megatron_mcpo.config.config import ConfigError
from megatron_mcpo.distributed.parallel import Peers, together


@contextmanager
def attempt(peers: Peers) -> Iterator[None]:
    """A block as `together`; what the file system refuses is for the user to mend (ConfigError)."""
    with together(peers):
        try:
            yield
        except OSError as error:
            rule = "what was written so far is kept"
            raise ConfigError([f"{error.filename or 'files'}: {error.strerror}; {rule}"]) from error


def share[T, R](
    items: Sequence[T], peers: Peers, work: Callable[[T], R], *, after: Callable[[int], None] = lambda _count: None
) -> list[R]:
    """Work on all items, each by one process; returns what this process has worked out.

    In turns: every process works on one item, then all wait for each other, which takes no longer than an item does.
    after: called after every turn with the number of items worked on so far
    """
    own: list[R] = []
    for first in range(0, len(items), peers.world_size):
        turn = items[first : first + peers.world_size]
        with attempt(peers):
            own += [work(item) for item in turn[peers.rank : peers.rank + 1]]
        after(first + len(turn))
    return own
