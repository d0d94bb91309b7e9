"""Keep what a run's items are and how they were divided; tell what has changed when it goes on. Imports no torch."""

import io
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_mcpo.config.config import ConfigError
from megatron_mcpo.storage.files import write_atomically

ITEMS = "items.npz"
_TRAIN, _SHOTS, _HELD_OUT = "train/", "shots/", "held_out/"

Digests = Mapping[str, Sequence[int]]
"""A 64-bit digest of every training item, in their order, by source (DOMAIN/SOURCE)."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """The questions of a source that are not trained on, each as 64 bits of its key.

    shots: those of the worked examples, in order; held_out: those that are only evaluated
    """

    shots: tuple[int, ...] = ()
    held_out: frozenset[int] = frozenset()


def write(folder: Path, digests: Digests, splits: Mapping[str, Split]) -> None:
    """Replace what a run's folder holds, of the same sources."""
    arrays: dict[str, npt.NDArray[np.uint64]] = {}
    for source, values in digests.items():
        split = splits[source]
        parts = ((_TRAIN, values), (_SHOTS, split.shots), (_HELD_OUT, sorted(split.held_out)))
        arrays |= {part + source: np.array(numbers, dtype=np.uint64) for part, numbers in parts}
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)  # type: ignore[arg-type]
    write_atomically(folder / ITEMS, content.getvalue())


def read_splits(folder: Path | None) -> dict[str, Split]:
    """Return how a run has divided its sources, so that what it held out stays so; nothing without such a file."""
    if folder is None or not (folder / ITEMS).is_file():
        return {}
    found = _read(folder)
    return {
        source: Split(shots=tuple(found[_SHOTS + source]), held_out=frozenset(found[_HELD_OUT + source]))
        for source in _sources(found)
    }


def notes_of_changes(folder: Path, digests: Digests, changed: Sequence[str] = (), *, allowed: bool) -> list[str]:
    """Return a line for each source whose training items are not those that a run had.

    Args:
        folder: of the run
        digests: of the items now
        changed: the sources whose items are not those of the run's checkpoint, where that is known; an earlier start
            that saved no checkpoint may have written the file since
        allowed: items may have been removed or changed

    Raises:
        ConfigError: they may not, with counts; or something has changed and the run's file can't be read.
    """
    if not changed and not (folder / ITEMS).is_file():
        return []
    found = _read(folder)
    notes, problems = [], []
    for source in _sources(found):
        before, now = found[_TRAIN + source], list(digests.get(source, ()))
        if before == now:
            if source in changed:
                notes.append(f"{source}: the items have changed since the checkpoint; the source begins its next epoch")
            continue
        removed, added = len(set(before) - set(now)), len(set(now) - set(before))
        counts = f"{removed} of {len(before)} items were removed or changed, {added} were added"
        notes.append(f"{source}: {counts}; the source begins its next epoch")
        if removed and not allowed:
            problems.append(
                f"domain: {source}: must have the items that the run had ({counts}). Restore them, or go on with "
                "--data.allow_changed true"
            )
    if problems:
        raise ConfigError(problems)
    return notes


def _sources(found: Mapping[str, Sequence[int]]) -> list[str]:
    return [name.removeprefix(_TRAIN) for name in found if name.startswith(_TRAIN)]


def _read(folder: Path) -> dict[str, list[int]]:
    """Return all arrays of a run's file. Raises ConfigError where it can't be read."""
    try:
        with np.load(folder / ITEMS) as found:
            return {name: found[name].tolist() for name in found.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ConfigError(
            [f"{folder / ITEMS}: can't be read ({error}); put it back, or begin a new run with --run.resume never"]
        ) from error
