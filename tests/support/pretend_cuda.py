"""A pretend CUDA device: tensors that say they are on cuda:0 and hold their values in host memory.

Values are right, and mixing devices raises as on a GPU; so does a host tensor in a collective of NCCL, for which gloo
stands in. Everything above torch's operators is the real code: the package, Megatron-Core, torch.distributed.
A parameter that is made on the host and moved by `Module.to` loses its attributes, which it keeps on a GPU.
Not shown: kernels, streams (nothing is asynchronous here), memory of a GPU, pinned memory.

`install()` must be called in a process of its own, before Megatron-Core and the package are imported, and `Device()` be
active wherever tensors are made.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch._dynamo  # before the patches below, which confuse its tables
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

CUDA = torch.device("cuda", 0)
_UNDERNEATH = torch.device("lazy", 0)
"""What C++ takes the device for: one whose backward pass runs in the thread of the CPU."""
_COPIES = ("aten.copy_.default", "aten._to_copy.default", "aten.lift_fresh.default", "aten.lift_fresh_copy.default")
_INDEXED = ("aten.index.Tensor", "aten.index_put_.default", "aten.index_put.default", "aten._index_put_impl_.default")
"""Operators whose indices may be host tensors."""
_HOST_SCALARS = ("masked_fill", "fill_", "where", "scatter", "index_put", "equal", "_foreach", "_fused")
"""Parts of the names of operators, besides pointwise ones, that take a host tensor without dimensions."""

over_nccl: set[str] = set()
"""Names of process groups that would be NCCL's."""


class OnDevice(torch.Tensor):
    """A tensor of the pretend device.

    content: the host tensor with its values
    on_host: whether its `.data` was set to a host tensor, or it was made of one of which that is true
    """

    content: torch.Tensor
    on_host: bool

    @staticmethod
    def __new__(cls, values: torch.Tensor, on_host: bool = False) -> "OnDevice":
        made: OnDevice = torch.Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=_UNDERNEATH,
        )
        made.content, made.on_host = values, on_host
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"OnDevice({self.content!r})"

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cpu") if self.on_host else CUDA

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return not self.on_host

    @property
    def is_cpu(self) -> bool:  # type: ignore[override]
        return self.on_host

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, new: torch.Tensor) -> None:
        if on_device(new):
            torch.Tensor.data.__set__(self, new)  # type: ignore[attr-defined]
        else:
            assert new.shape == self.shape, "a host tensor of another shape"
        self.content, self.on_host = inner(new), not on_device(new)

    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(_no_lists(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(_no_lists(index), value)

    def tolist(self) -> Any:
        return self.content.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        if self.on_host:
            return self.content.numpy()
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    def record_stream(self, stream: Any) -> None:
        """Do nothing: memory is freed when nothing refers to it."""

    def data_ptr(self) -> int:
        return self.content.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.content.untyped_storage()

    def storage(self) -> Any:
        return self.content.storage()

    def type(self, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return self.to(*args, **kwargs)
        return self.content.type().replace("torch.", "torch.cuda.", 1)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})


class Device(TorchDispatchMode):
    """The mode in which factories with device="cuda" make tensors of the pretend device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def on_device(x: Any) -> bool:
    return isinstance(x, OnDevice) and not x.on_host


def inner(x: Any) -> Any:
    """Return what an operator computes with: tensors of host memory, also within lists."""
    if isinstance(x, OnDevice):
        return x.content
    return type(x)(map(inner, x)) if type(x) in (list, tuple) else x


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for x in values:
        if isinstance(x, torch.Tensor):
            yield x
        elif isinstance(x, list | tuple):
            yield from _tensors(x)


def _no_lists(index: Any) -> Any:
    """Make a list an index on the device, as torch does: it would be a host tensor, which C++ moves to `lazy`."""
    if isinstance(index, tuple):
        return tuple(map(_no_lists, index))
    return torch.tensor(index, device=CUDA) if isinstance(index, list) else index


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operator on the values, after checking where they pretend to be."""
    name = str(func)
    tensors = [*_tensors(args), *_tensors(kwargs.values())]
    if name.startswith("c10d"):
        _check_group(name, args, tensors)
        return func(*inner(args), **{key: inner(value) for key, value in kwargs.items()})
    wanted = kwargs.get("device")
    if wanted is None:
        _check_devices(func, name, args, tensors)
        places = args[:1] if name in (*_COPIES, *_INDEXED) else tensors
        is_on_device = any(map(on_device, places))
    else:
        is_on_device = torch.device(wanted).type in ("cuda", "lazy")
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if kwargs.get("pin_memory"):
        kwargs = {**kwargs, "pin_memory": False}
    found = _compute(func, name, inner(args), {key: inner(value) for key, value in kwargs.items()})
    known = {id(x.content): x for x in tensors if isinstance(x, OnDevice)}
    # What is made of a tensor that was moved to the host may be moved to the device as that was.
    may_move = is_on_device or (wanted is None and bool(known))
    return _wrapped(found, known, make=partial(OnDevice, on_host=not is_on_device) if may_move else None)


def _wrapped(x: Any, known: dict[int, OnDevice], make: Callable[[torch.Tensor], OnDevice] | None) -> Any:
    """Return what an operator computed as its caller knows it: an operator in place returns the tensor that it got."""
    if isinstance(x, list | tuple):
        return type(x)(_wrapped(each, known, make) for each in x)
    if not isinstance(x, torch.Tensor) or isinstance(x, OnDevice):
        return x
    return known[id(x)] if id(x) in known else make(x) if make else x


def _compute(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    if name == "aten.addmm.dtype_out":  # a product of bf16 that is added in fp32: no kernel of a CPU does that
        added, left, right, dtype = args[:4]
        return kwargs["out"].copy_(added.to(dtype) + left.to(dtype) @ right.to(dtype))
    return func(*args, **kwargs)


def _check_devices(func: Any, name: str, args: Any, tensors: Sequence[torch.Tensor]) -> None:
    """Raise as torch does where an operator gets tensors of both places."""
    if name in _COPIES:
        return
    if name in _INDEXED and on_device(args[0]):
        tensors = [args[0], *args[2:3]]  # indices may be anywhere, values may not
    takes_scalars = torch.Tag.pointwise in func.tags or any(part in name for part in _HOST_SCALARS)
    places = {on_device(x) for x in tensors if x.dim() > 0 or on_device(x) or not takes_scalars}
    if len(places) == 2:
        shapes = [("cuda:0" if on_device(x) else "cpu", tuple(x.shape)) for x in tensors]
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! ({name} "
            f"of {shapes})"
        )


def _check_group(name: str, args: Any, tensors: Sequence[torch.Tensor]) -> None:
    """Raise where a collective gets tensors of a place that its backend can't reach."""
    groups = [x for x in args if isinstance(x, torch.ScriptObject) and "ProcessGroup" in str(x._type())]
    names = {dist.ProcessGroup.unbox(group).group_name for group in groups}
    expected = bool(names & over_nccl)
    if "barrier" not in name and any(on_device(x) is not expected for x in tensors):
        raise RuntimeError(f"No backend type associated with device type {'cpu' if expected else 'cuda'} ({name})")


class _Stream:
    """A stream or an event of a device on which nothing is ever pending."""

    def __init__(self, *_: Any, **__: Any):
        self.device = CUDA

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name in ("wait_stream", "wait_event", "synchronize", "record", "wait"):
            return lambda *_, **__: None
        if name == "record_event":
            return lambda *_, **__: _Stream()
        raise AttributeError(name)


def install() -> None:
    """Pretend, in this process and its forks, that there is a GPU and that vLLM's GPU build is installed."""
    from megatron_mcpo.config import environment

    environment.vllm_on_cpu = lambda: False  # type: ignore[assignment]
    torch.compile = lambda function=None, **_: function if function else lambda each: each  # type: ignore[assignment]
    torch._C._ensureCUDADeviceGuardSet()  # as torch does for fake tensors: C++ may ask which device is current
    cuda: Any = torch.cuda
    nothing: Callable[..., None] = lambda *_, **__: None  # noqa: E731
    for name in ("_lazy_init", "init", "set_device", "synchronize", "empty_cache", "set_stream", "ipc_collect"):
        setattr(cuda, name, nothing)
    for name in ("is_available", "is_initialized", "_is_compiled"):
        setattr(cuda, name, lambda: True)
    cuda._lazy_call = lambda function, **_: function()
    cuda.device_count = lambda: 1
    cuda.current_device = lambda: 0
    cuda.get_device_capability = lambda *_: (9, 0)
    cuda.mem_get_info = lambda *_: (2**33, 2**34)
    cuda.default_generators = (torch.default_generator,)
    cuda.manual_seed = cuda.manual_seed_all = torch.default_generator.manual_seed
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *_, **__: torch.default_generator.get_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, *_, **__: torch.default_generator.set_state(state)
    cuda.Stream = cuda.Event = _Stream
    cuda.current_stream = cuda.default_stream = _Stream
    cuda.stream = lambda *_: contextlib.nullcontext()
    cuda.cudart = lambda: SimpleNamespace(cudaHostRegister=lambda *_: 0, cudaHostUnregister=lambda *_: 0)
    cuda.check_error = nothing
    torch.tensor = _tensor  # type: ignore[assignment]
    torch.Tensor.cuda = lambda self, *_, **__: self.to(CUDA)  # type: ignore[method-assign]
    distributed: Any = dist
    device_of_objects = distributed.distributed_c10d._get_object_coll_device
    distributed.distributed_c10d._get_object_coll_device = lambda group=None: (
        "cuda" if (group or distributed.group.WORLD).group_name in over_nccl else device_of_objects(group)
    )
    distributed.init_process_group = _in_place_of_nccl(dist.init_process_group)
    distributed.new_group = _in_place_of_nccl(dist.new_group)


_real_tensor = torch.tensor


def _tensor(data: Any, **kwargs: Any) -> torch.Tensor:
    """Make a tensor as torch.tensor does: it would move the values past the dispatcher."""
    place = kwargs.pop("device", None)

    def plain(x: Any) -> Any:
        if isinstance(x, list | tuple):
            return [plain(each) for each in x]
        return x.item() if isinstance(x, OnDevice) and x.dim() == 0 else x

    made = _real_tensor(plain(data), **kwargs)
    return made if place is None else made.to(CUDA if torch.device(place).type == "cuda" else place)


def _in_place_of_nccl(real: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that makes a group of gloo and remembers if it would be NCCL's; the default is the world's."""

    def make(*args: Any, backend: Any = None, **kwargs: Any) -> Any:
        if args and isinstance(args[0], str):
            backend, args = args[0], args[1:]
        is_nccl = (backend or "nccl") == "nccl"
        kwargs.pop("pg_options", None)
        made = real(*args, backend="gloo", **kwargs)
        group = made if made is not None else dist.group.WORLD
        if is_nccl and isinstance(group, dist.ProcessGroup):
            over_nccl.add(group.group_name)
        return made

    return make
