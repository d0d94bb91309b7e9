"""Make Megatron-Core run where there is no GPU: on CPU tensors, with gloo.

Megatron-Core asks for CUDA by name. Inside `megatron.core.*` the name `torch` is therefore bound to a copy of the torch
module in which `torch.cuda` means the CPU. All other code keeps the real torch, except that `Tensor.cuda()` and
`Tensor.type()` answer differently when the caller is Megatron-Core. On a GPU nothing is changed.

`apply()` should run before Megatron-Core is imported. It also works afterwards, but imports are then slow and functions
that Megatron already handed to the compiler stay there.
"""

import contextlib
import functools
import importlib.abc
import importlib.machinery
import logging
import os
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from megatron_mcpo.distributed import cpu_bf16
from megatron_mcpo.distributed.device import uses_gpu

TRIED_VERSIONS = ("0.19.2",)

_PACKAGE = "megatron.core"
_CPU = torch.device("cpu")
_FACTORIES = ("arange", "empty", "full", "ones", "tensor", "zeros")

_KNOWN_WARNINGS = (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    "Please use DTensor instead and we are deprecating ShardedTensor",
    "The argument order of load has been changed",
    "torch.distributed is disabled, unavailable or uninitialized, assuming the intent is to load in a single process",
    "If you are using transformer_engine as the transformer implementation",
    "The .grad attribute of a Tensor that is not a leaf Tensor is being accessed",
    "full scope is deprecated",
    "MimoModelConfig is experimental",
    "invalid escape sequence",
    "`torch.distributed.reduce_scatter_tensor` is deprecated",
    "`torch.distributed.all_gather_into_tensor` is deprecated",
)
_KNOWN_LOG_LINES = {
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    "megatron.core.distributed.distributed_data_parallel": "full_param_layout not provided",
    "megatron.core.dist_checkpointing.strategies.torch": "async save is deprecated",
    "megatron.core.tensor_parallel.random": "CPU RNG state changed within GPU RNG context",
    "torch.utils.cpp_extension": "No CUDA runtime is found",
}

_hits: dict[str, int] = {}
_torch_for_megatron: types.ModuleType | None = None


def apply() -> bool:
    """Make Megatron-Core run on the CPU unless a GPU is used; return whether it does. Later calls do nothing."""
    global _torch_for_megatron
    # Transformer Engine reads this when Megatron-Core imports it: scales of FP8 blocks are then any number, as those of
    # vLLM are, and not powers of two.
    os.environ.setdefault("NVTE_FP8_BLOCK_SCALING_FP32_SCALES", "1")
    if uses_gpu():
        return False
    if _torch_for_megatron is not None:
        return True
    _check_version()
    _silence()
    cpu_bf16.apply()
    _torch_for_megatron = _copy_of_torch()
    _answer_megatron_on_tensors()
    sys.meta_path.insert(0, _Finder())
    for name, module in list(sys.modules.items()):
        if _is_megatron(name):
            _adapt(module)
    return True


def interceptions() -> dict[str, int]:
    """Return how often each interception answered Megatron-Core in this process, also those that never did."""
    return dict(_hits)


def _check_version() -> None:
    try:
        found = version("megatron-core")
    except PackageNotFoundError:
        raise RuntimeError("megatron-core is not installed; pip install -r requirements.txt") from None
    if found not in TRIED_VERSIONS:
        tried = ", ".join(TRIED_VERSIONS)
        warnings.warn(f"megatron-core {found} has not been tried on the CPU; tried versions: {tried}", stacklevel=3)


def _silence() -> None:
    """Drop the warnings of Megatron-Core about which users can do nothing, and no others."""
    for message in _KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for logger, text in _KNOWN_LOG_LINES.items():
        logging.getLogger(logger).addFilter(functools.partial(_lacks, text))


def _lacks(text: str, record: logging.LogRecord) -> bool:
    return text not in record.getMessage()


def _is_megatron(module_name: str) -> bool:
    return module_name == _PACKAGE or module_name.startswith(_PACKAGE + ".")


def _intercept(name: str, answer: Callable[..., Any]) -> Callable[..., Any]:
    """Return `answer` as a function that counts its calls under `name`."""
    _hits[name] = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        _hits[name] += 1
        return answer(*args, **kwargs)

    return counted


class _Stream:
    """The CUDA stream or event of a device whose work is synchronous: nothing is ever pending, and all are equal."""

    def __init__(self, *_args: Any, **_kwargs: Any):
        _hits["cuda.Stream"] += 1

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream)

    def __hash__(self) -> int:
        return 0

    def wait_stream(self, _stream: "_Stream") -> None:
        """Do nothing, since nothing is pending on the other stream."""

    def wait_event(self, _event: "_Stream") -> None:
        """Do nothing, since the event has already happened."""

    def synchronize(self) -> None:
        """Do nothing, since nothing is pending."""

    def record_event(self, event: "_Stream | None" = None) -> "_Stream":
        return event or self


def _copy_of_torch() -> types.ModuleType:
    """Return a module like torch whose `cuda` is the CPU.

    It is a copy, attribute by attribute: what others do to the real `torch.cuda` later (vLLM replaces parts of it while
    it builds an engine) does not reach Megatron-Core, and looking up a name costs no more than before.
    """
    copy = types.ModuleType("torch")
    copy.__dict__.update(torch.__dict__)
    # Submodules that are imported later become attributes of the real torch only.
    copy.__dict__["__getattr__"] = functools.partial(getattr, torch)
    copy.__dict__["cuda"] = _copy_of_cuda()
    _hits["factory device"] = _hits["factory pin_memory"] = 0
    for name in _FACTORIES:
        copy.__dict__[name] = _factory(getattr(torch, name))
    return copy


def _copy_of_cuda() -> types.ModuleType:
    copy = types.ModuleType("torch.cuda")
    copy.__dict__.update(torch.cuda.__dict__)
    _hits["cuda.Stream"] = 0
    replaced: dict[str, Callable[..., Any]] = {
        # Megatron-Core passes the result as `device=`, so that a device does as well as an index.
        "current_device": lambda: _CPU,
        "synchronize": lambda _device=None: None,
        "current_stream": lambda _device=None: _Stream(),
        # The CPU's generator stands in for the CUDA generator: same seeds, same forks.
        "manual_seed": torch.default_generator.manual_seed,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
    }
    for name, answer in replaced.items():
        copy.__dict__[name] = _intercept(f"cuda.{name}", answer)
    copy.__dict__["Stream"] = copy.__dict__["Event"] = _Stream
    copy.__dict__["stream"] = lambda _stream: contextlib.nullcontext()
    random_state = _intercept("cuda.random.get_rng_state", lambda device=None: torch.get_rng_state())
    copy.__dict__["random"] = types.SimpleNamespace(get_rng_state=random_state)
    return copy


def _factory(real: Callable[..., Any]) -> Callable[..., Any]:
    """Return `real` with device="cuda" read as the CPU, and without pinned memory, which needs a CUDA driver."""

    @functools.wraps(real)
    def on_cpu(*args: Any, **kwargs: Any) -> Any:
        wanted = kwargs.get("device")
        if wanted is not None and wanted is not _CPU and torch.device(wanted).type == "cuda":
            _hits["factory device"] += 1
            kwargs["device"] = _CPU
        if kwargs.pop("pin_memory", False):
            _hits["factory pin_memory"] += 1
        return real(*args, **kwargs)

    return on_cpu


def _answer_megatron_on_tensors() -> None:
    """Make `tensor.cuda()` return the tensor and `tensor.type()` a CUDA type name, for callers in Megatron-Core only.

    Megatron-Core tells parameter dtypes apart by comparing with "torch.cuda.FloatTensor" and its like.
    """
    real_cuda, real_type = torch.Tensor.cuda, torch.Tensor.type
    _hits["Tensor.cuda"] = _hits["Tensor.type"] = 0

    def cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not _is_megatron(sys._getframe(1).f_globals.get("__name__", "")):
            return real_cuda(self, *args, **kwargs)
        _hits["Tensor.cuda"] += 1
        return self

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = real_type(self, *args, **kwargs)
        if args or kwargs or not _is_megatron(sys._getframe(1).f_globals.get("__name__", "")):
            return answer
        _hits["Tensor.type"] += 1
        return answer.replace("torch.", "torch.cuda.", 1)

    torch.Tensor.cuda = cuda  # type: ignore[assignment, method-assign]
    torch.Tensor.type = type_  # type: ignore[assignment, method-assign]


def _adapt(module: types.ModuleType) -> None:
    """Adapt a module of Megatron-Core, once, right after it was imported."""
    names = module.__dict__
    if names.get("torch") is torch:
        names["torch"] = _torch_for_megatron
    match module.__name__.removeprefix(_PACKAGE + "."):
        case "jit":
            # torch.compile would load the compiler at import and run it on every fused bias and activation.
            module.disable_jit_fuser()
        case "transformer.moe.moe_utils" | "transformer.moe.token_dispatcher":
            # Split sizes have to be numbers; the original makes numbers only of tensors on a GPU.
            names["maybe_move_tensor_to_cpu"] = _intercept("moe.maybe_move_tensor_to_cpu", _to_host)
        case "tensor_parallel.random":
            # The original queues the state until CUDA starts, which never happens here.
            names["_set_cuda_rng_state"] = _intercept("random._set_cuda_rng_state", _set_rng_state)


def _to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _set_rng_state(state: torch.Tensor, device: int = -1, graph_safe: bool = False) -> None:
    torch.set_rng_state(state)


class _Finder(importlib.abc.MetaPathFinder):
    """The finder of Megatron-Core's modules: Python's own, with a loader that adapts each module."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not _is_megatron(fullname):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or not isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            return spec
        spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(importlib.machinery.SourceFileLoader):
    def exec_module(self, module: types.ModuleType) -> None:
        # One decorator of the MoE router asks for the compiler at import, which takes seconds.
        with _no_compiler() if module.__name__.endswith("moe.router") else contextlib.nullcontext():
            super().exec_module(module)
        _adapt(module)


@contextlib.contextmanager
def _no_compiler() -> Iterator[None]:
    real = torch.compile
    torch.compile = lambda function: function  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = real
