"""Look into a package in a process of its own, which a broken package may end: what `mcpo doctor` starts.

`python -m megatron_mcpo.cli.probes NAME ARGUMENT ...` prints a line with a mark and one JSON object.
"""

import contextlib
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

SECONDS = 120.0
"""The longest wait for a probe; importing torch takes a second, from a slow disk half a minute."""


_MARK = "mcpo probe: "
"""Begins the line with the answer: a package that is imported may print lines of its own, before it and after it."""
_CUDA = re.compile(r"/.*/lib(cudart|cublas|cublasLt|cudnn|nccl)\.so[.\d]*")
_OF_APEX = ("apex", "apex.contrib.layer_norm.layer_norm", "apex.normalization.fused_layer_norm")

type Failure = Literal["import", "error", "ended"]


class ProbeError(Exception):
    """The error of a probe that failed, with the reason as its text.

    failure: what a program would see that does the same: an ImportError, another error (SystemExit counts as one), or
        none, because its process ended or did not go on
    """

    def __init__(self, reason: str, failure: Failure) -> None:
        super().__init__(reason)
        self.failure = failure


def ask(name: str, *arguments: str) -> dict[str, Any]:
    """Return what a probe found. Raises ProbeError with the reason where it fails, crashes or takes too long."""
    # The child finds what this process finds, wherever it was started.
    searched = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-W", "default", "-m", __name__, name, *arguments]
    try:
        answer = subprocess.run(
            command,
            env={**os.environ, "PYTHONPATH": searched},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise ProbeError(f"no answer within {SECONDS:g} s", "ended") from None
    if answer.returncode < 0:
        raise ProbeError(f"the process was ended by {signal.Signals(-answer.returncode).name}", "ended")
    answers = [line.removeprefix(_MARK) for line in answer.stdout.splitlines() if line.startswith(_MARK)]
    if not answers:
        said = " ".join((answer.stderr.strip().splitlines() or ["no reason given"])[-1].split())[:400]
        raise ProbeError(f"the process ended with exit status {answer.returncode}: {said}", "ended")
    found: dict[str, Any] = json.loads(answers[-1])
    if "failure" in found:
        raise ProbeError(found["reason"], found["failure"])
    return found


def of_torch() -> dict[str, Any]:
    """Describe torch, the GPUs that it finds, and what it says if it finds none."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        import torch

        from megatron_mcpo.distributed.device import uses_gpu

        uses = uses_gpu()
    properties = [
        torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count() if uses else 0)
    ]
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else None,
        "cudnn": torch.backends.cudnn.version(),
        "gpus": [
            {
                "name": each.name,
                "memory_gib": round(each.total_memory / 2**30, 1),
                "capability": f"{each.major}.{each.minor}",
            }
            for each in properties
        ],
        "said": [
            text.split(" (Triggered internally")[0] for text in (str(each.message) for each in said) if "CUDA" in text
        ],
        "libraries": loaded_libraries(),
    }


def of_module(name: str) -> dict[str, Any]:
    """Import a module beside torch, which loads the CUDA libraries that it needs; return those that are loaded then."""
    import torch  # noqa: F401

    importlib.import_module(name)
    return {"libraries": loaded_libraries()}


def of_apex() -> dict[str, Any]:
    """Import what Megatron-Core (0.19.2) imports of NVIDIA apex at every start; it expects ImportError and no other."""
    for name in _OF_APEX:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    return {}


def loaded_libraries() -> list[str]:
    """Return the files of CUDA's libraries that this process has loaded. Linux only: elsewhere there is no CUDA."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text(errors="replace").splitlines() if maps.exists() else []
    return sorted({found[0] for line in lines if (found := _CUDA.search(line))})


def of_run(asked: str) -> dict[str, Any]:
    """Return why this machine can't compute what a configuration asks for, as the ranks of a run would find it.

    asked: JSON with fp8, dtype, context, quantization, and whether the engines are servers
    """
    import torch

    from megatron_mcpo.config.config import ConfigError
    from megatron_mcpo.mcore.precision import check_context, check_fp8
    from megatron_mcpo.rollout.vllm_engine import check_hardware

    wanted = json.loads(asked)
    dtype = torch.bfloat16 if wanted["dtype"] == "bf16" else torch.float32
    checks: list[Callable[[], None]] = [
        lambda: check_fp8(wanted["fp8"]),
        lambda: check_context(wanted["context"], dtype),
    ]
    if not wanted["servers"]:
        checks.append(lambda: check_hardware(wanted["quantization"]))
    problems: list[str] = []
    for check in checks:
        try:
            check()
        except ConfigError as error:
            problems += error.problems
    return {"problems": problems}


PROBES: dict[str, Callable[..., dict[str, Any]]] = {
    "torch": of_torch,
    "module": of_module,
    "apex": of_apex,
    "run": of_run,
}


def main(arguments: Sequence[str]) -> None:
    try:
        found = PROBES[arguments[0]](*arguments[1:])
    except (Exception, SystemExit) as error:
        failure: Failure = "import" if isinstance(error, ImportError) else "error"
        found = {"reason": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}", "failure": failure}
    print(f"\n{_MARK}{json.dumps(found)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
