"""Divide work on files over processes, which fail together and never wait for each other for long."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from megatron_mcpo.config.config import ConfigError
from megatron_mcpo.distributed.peers import Peers, together

_THREADS = 2
"""Items that a process works on at once if it is the only one: hashing, which takes most time, is a core's work. More
need the memory of more items."""


@contextmanager
def together_on_files(peers: Peers) -> Iterator[None]:
    """Run a block as `together` does; what the file system refuses is a ConfigError, since the user can correct it."""
    with together(peers):
        try:
            yield
        except OSError as error:
            rule = "what was written so far is kept"
            raise ConfigError([f"{error.filename or 'files'}: {error.strerror}; {rule}"]) from error


def for_each_rank[T, R](
    items: Sequence[T], peers: Peers, work: Callable[[T], R], *, after: Callable[[int], None] = lambda _count: None
) -> list[R]:
    """Give every rank its items to work on, in turns; return the results of this rank.

    In a turn every rank works on one item, then all wait for each other, which takes no longer than an item does. A
    process alone has no turns and works on two items at once.

    Args:
        items: What is to be done, the same on every rank.
        peers: The ranks that share the work.
        work: Called with one item; by several threads if the process is alone.
        after: Called after every turn with the number of items that are done so far.
    """
    own: list[R] = []
    if peers.world_size == 1:
        with together_on_files(peers), ThreadPoolExecutor(_THREADS) as pool:
            for result in pool.map(work, items):
                own.append(result)
                after(len(own))
        return own
    for first in range(0, len(items), peers.world_size):
        turn = items[first : first + peers.world_size]
        with together_on_files(peers):
            own += [work(item) for item in turn[peers.rank : peers.rank + 1]]
        after(first + len(turn))
    return own
