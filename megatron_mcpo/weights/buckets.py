"""Group items in order into buckets of limited size."""

from collections.abc import Iterable, Iterator, Sequence


def fill_buckets[Item](items: Iterable[tuple[Item, Sequence[int]]], limit: int) -> Iterator[list[Item]]:
    """Yield the items in order, as many to a bucket as fit.

    Args:
        items: each with its size on every rank, or with one size where it is the same on all ranks.
        limit: the most that a rank's items of one bucket may add up to. An item above it gets a bucket of its own.
    """
    bucket: list[Item] = []
    filled: list[int] = []
    for item, sizes in items:
        together = [a + b for a, b in zip(filled, sizes, strict=True)] if bucket else list(sizes)
        if bucket and max(together) > limit:
            yield bucket
            bucket, together = [], list(sizes)
        bucket.append(item)
        filled = together
    if bucket:
        yield bucket
