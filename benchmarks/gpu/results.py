"""Keep the results of the check in files: one of all rows of a device, and one of its rates for the planner."""

import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu.rows import ROWS
from megatron_mcpo.storage.files import write_atomically

Results = dict[str, dict[str, Any]]
"""What was found, by the name of the row."""
REHEARSAL = "rehearsal on a CPU"
"""The name of the device in the files of a rehearsal."""
_DONE = ("passed", "failed")
"""States of a row that --resume does not run again."""


def read(file: Path, device: str) -> Results:
    """Return the rows in a file of this device. Raises ValueError for a file of something else, or a damaged one."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # neither JSON nor UTF-8
        raise _unusable(file, device, str(error)) from error
    if not isinstance(content, dict) or content.get("device") != device:
        raise _unusable(file, device, "it names another device or none")
    rows = content.get("rows")
    if not isinstance(rows, dict):
        raise _unusable(file, device, "it has no table of rows")
    if broken := [name for name, row in rows.items() if not _is_result(row)]:
        raise _unusable(file, device, f"incomplete: {', '.join(broken)}")
    return {name: row for name, row in rows.items() if name in ROWS}


def _unusable(file: Path, device: str, why: str) -> ValueError:
    return ValueError(
        f"{file}: must be what a check of this {device} wrote ({why}). Move it away, or name another file or folder."
    )


def _is_result(row: object) -> bool:
    if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("state", "why")):
        return False
    found = [row.get(key, {}) for key in ("figures", "rates", "bands", "targets")]
    lists = [value for each in found[2:] if isinstance(each, dict) for value in each.values()]
    sizes = [len(value) >= 2 if isinstance(value, list) else False for value in lists]
    return all(isinstance(each, dict) for each in found) and all(sizes)


def done(results: Results) -> Results:
    """Return the rows that passed or failed."""
    return {name: row for name, row in results.items() if row["state"] in _DONE}


def merged(earlier: Results, later: Results) -> Results:
    """Return both, in the order of the check. A row that was skipped does not replace one that passed or failed."""
    both = {**earlier, **later, **{name: row for name, row in done(earlier).items() if name not in done(later)}}
    return {name: both[name] for name in ROWS if name in both}


def make_writable(folder: Path) -> None:
    """Make the folder of the results. Raises OSError if no file can be written there."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def results_path(folder: Path, device: str) -> Path:
    """Return the path of the file of a device's rows."""
    return folder / f"gpu-{_slug(device)}.json"


def write(results: Results, device: str, folder: Path) -> list[Path]:
    """Write the figures, and the rates if they were measured on a GPU; return the paths."""
    name = _slug(device)
    files: dict[Path, Mapping[str, Any]] = {results_path(folder, device): {"device": device, "rows": results}}
    rates = results.get("ceilings", {}).get("rates")
    if rates and device != REHEARSAL:
        source = f"measured by tools/gpu_check.sh on one {device}"
        base = next((kind for kind in ("h200", "a100", "b200") if kind in name), "h100")
        files[folder / f"rates-{name}.json"] = {"base": base, "sources": [source], **rates}
    for path, content in files.items():
        write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())
    return list(files)


def _slug(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
