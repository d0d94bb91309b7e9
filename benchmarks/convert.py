"""Measure seconds and peak memory of a conversion beside copying the same files. Needs 28 GB of disk.

`.venv/bin/python -m benchmarks.convert [--small] [--json] [--out benchmarks/results/NAME.json]`
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import ROOT, options, write_rows
from megatron_mcpo.config.hf_config import from_folder
from megatron_mcpo.weights.hf_write import file_names, spread, write_index, write_safetensors
from megatron_mcpo.weights.mapping import hf_shapes

SMALL = ROOT / ".cache" / "models" / "smollm2-135m-instruct"
_WORK = ROOT / ".cache"
LAYOUT = ("--tp", "4", "--pp", "2")
MAX_FILE_BYTES = 2 * 10**9
# A process between this one and the command: a process inherits the peak of its parent, and this one's is large.
_PEAK_OF = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""
SHAPES_OF_32B = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "dtype": "bfloat16",
    "vocab_size": 151936,
    "hidden_size": 5120,
    "intermediate_size": 25600,
    "num_hidden_layers": 4,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "eos_token_id": 151645,
}
"""Qwen3-32B with 4 of its 64 layers: 7.0 GB in bf16, of which the largest tensor is 1.6 GB."""


def main(arguments: Sequence[str]) -> int:
    parser = options(__doc__)
    parser.add_argument("--small", action="store_true", help="only the 135M model")
    known = parser.parse_args(arguments)
    return write_rows("convert", rows(small_only=known.small), known)


def rows(*, small_only: bool) -> Iterator[dict[str, Any]]:
    """Yield both directions for the quick start's model (if it was made) and for one with the shapes of a 32B model.

    The comparison of logits is left out. Needs four times the model on disk.
    """
    _WORK.mkdir(exist_ok=True)
    if SMALL.is_dir():
        yield from _both_ways("135M", SMALL)
    else:
        print(f"{SMALL}: no such folder, so the 135M model is left out; make it with `make model`", file=sys.stderr)
    if small_only:
        return
    with tempfile.TemporaryDirectory(prefix="bench-convert-", dir=_WORK) as name:
        folder = Path(name) / "source"
        make_large(folder)
        yield from _both_ways("32B shapes, 4 layers", folder)


def make_large(folder: Path, **changes: Any) -> None:
    """Write a model folder of random numbers, one tensor at a time."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(SHAPES_OF_32B | changes))
    shapes = hf_shapes(from_folder(folder, with_weights=False))
    sizes = {name: 2 * torch.Size(shape).numel() for name, shape in shapes.items()}
    groups = spread(sizes, MAX_FILE_BYTES)
    files = dict(zip(file_names(len(groups)), groups, strict=True))
    for file, names in files.items():
        wanted = {name: shapes[name] for name in names}
        write_safetensors(folder / file, wanted, torch.bfloat16, lambda name: [_noise(shapes[name])])
    write_index(folder, files, sum(sizes.values()))


def _noise(shape: tuple[int, ...]) -> Tensor:
    """Return numbers that are different everywhere, fast: a random row, shifted."""
    values = torch.empty(shape, dtype=torch.bfloat16)
    row = torch.randn(1 << 20).bfloat16()
    flat = values.view(-1)
    for start in range(0, len(flat), len(row)):
        part = flat[start : start + len(row)]
        part.copy_(row.roll(start // len(row))[: len(part)])
    return values


def _both_ways(case: str, source: Path) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory(prefix="bench-convert-", dir=_WORK) as name:
        megatron, back, copied = (Path(name) / part for part in ("megatron", "hf", "copy"))
        size = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
        seconds_cp = _copy(source, copied)
        for direction, given, made, options in (
            ("to-megatron", source, megatron, LAYOUT if case != "135M" else ("--tp", "3", "--pp", "2")),
            ("to-hf", megatron, back, ()),
        ):
            seconds, peak = measure(direction, given, made, *options)
            yield {
                "case": case,
                "direction": direction,
                "seconds": round(seconds, 2),
                "seconds_cp": round(seconds_cp, 2),
                "ratio_cp": round(seconds / seconds_cp, 2),
                "peak_rss_bytes": peak,
                "bytes": size,
                "largest_tensor_bytes": _largest(source),
            }


def measure(direction: str, given: Path, made: Path, *options: str, processes: int = 1) -> tuple[float, int]:
    """Return the seconds of a conversion's command, and the highest resident memory of any of its processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] * (processes > 1)
    command = [sys.executable, *launcher, "-m", "megatron_mcpo", "convert", direction, str(given), str(made), *options]
    command.append("--no-verify-forward")
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-I", "-S", "-c", _PEAK_OF, *command], stdout=subprocess.PIPE, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}")
    return time.perf_counter() - start, int(done.stdout) * 1024


def _copy(source: Path, target: Path) -> float:
    """Return the seconds of cp -r, with the files synced to the disk, as a conversion does."""
    start = time.perf_counter()
    subprocess.run(["cp", "-rL", str(source), str(target)], check=True)
    for path in target.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds


def _largest(folder: Path) -> int:
    model = from_folder(folder)
    return max(2 * torch.Size(shape).numel() for shape in hf_shapes(model).values())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
