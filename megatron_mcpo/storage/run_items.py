"""Keep digests of the items that a run trains on, and tell what has changed when it is resumed. Imports no torch."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from megatron_mcpo.config.config import ConfigError
from megatron_mcpo.storage.files import write_atomically

ITEMS = "items.npz"

Digests = Mapping[str, Sequence[int]]
"""A 64-bit digest of every item, by source (DOMAIN/SOURCE)."""


def write(folder: Path, digests: Digests) -> None:
    """Replace the digests that a run's folder holds."""
    content = io.BytesIO()
    arrays = {source: np.array(values, dtype=np.uint64) for source, values in digests.items()}
    np.savez_compressed(content, **arrays)  # type: ignore[arg-type]
    write_atomically(folder / ITEMS, content.getvalue())


def notes_of_changes(folder: Path, digests: Digests, changed: Sequence[str], *, allowed: bool) -> list[str]:
    """Return a line for each source whose items have changed since the run's folder got its digests.

    changed: the sources whose items are not those of the checkpoint; allowed: items may have been removed or changed.
    Raises ConfigError where they may not, with counts.
    """
    if not changed:
        return []
    notes, problems = [], []
    before = _read(folder)
    for source in changed:
        old, new = set(before.get(source, [])), set(digests[source])
        removed, added = len(old - new), len(new - old)
        counts = f"{removed} of {len(old)} items were removed or changed, {added} were added"
        notes.append(f"{source}: {counts}; the source begins its next epoch")
        if removed and not allowed:
            problems.append(
                f"domain: {source}: must have the items that the run had ({counts}). Restore them, or go on with "
                "--data.allow_changed true"
            )
    if problems:
        raise ConfigError(problems)
    return notes


def _read(folder: Path) -> dict[str, list[int]]:
    """Return the digests of a run's folder. Raises ConfigError where they can't be read."""
    try:
        with np.load(folder / ITEMS) as found:
            return {source: found[source].tolist() for source in found.files}
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(
            [f"{folder / ITEMS}: can't be read ({error}); put it back, or begin a new run with --run.resume never"]
        ) from error
