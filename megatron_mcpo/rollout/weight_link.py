"""Send tensors from one trainer rank to the workers of one engine server, in a process group of their own.

The group is separate from the default process groups of both programs. It uses gloo on a CPU, NCCL on GPUs.
"""

import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from threading import Lock, Thread
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

TIMEOUT = timedelta(seconds=60)
"""The longest wait for the other side, to connect and for one tensor."""
_UNWATCHED = {"TORCH_NCCL_BLOCKING_WAIT": "1", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}
"""Settings of torch (2.11, 2.13) with which no thread watches a group of NCCL, and `wait` raises what went wrong. By
default a watching thread ends the whole process when the other side dies or is late: a trainer, or vLLM's worker."""
_environment = Lock()
_POLL_SECONDS = 2e-4
_ALIGNMENT = 16
"""Bytes; a multiple of the size of every number."""


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """The address at which the workers find the trainer. tag: names this link among those that a server had before"""

    host: str
    port: int
    tag: str


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """The description of tensors that are about to be sent: names, dtypes as torch spells them, shapes."""

    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    tag: str

    @classmethod
    def of(cls, tensors: Iterable[tuple[str, Tensor]], tag: str) -> Self:
        pairs = list(tensors)
        return cls(
            names=[name for name, _ in pairs],
            dtypes=[str(tensor.dtype).removeprefix("torch.") for _, tensor in pairs],
            shapes=[list(tensor.shape) for _, tensor in pairs],
            tag=tag,
        )

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class Sender:
    """The trainer's side, which is the group's first rank."""

    def __init__(self, towards: tuple[str, int], tag: str):
        """Open a store at the address by which the server reaches this machine. towards: host and port of the server"""
        host = _own_address(*towards)
        self._store = _store_at(host)
        self.meeting = Meeting(host=host, port=self._store.port, tag=tag)
        self._group: Any = None

    def join(self, num_workers: int, device: torch.device) -> None:
        """Form the group; the workers call `Receiver` at the same time."""
        self._group = _group(self._store, self.meeting.host, rank=0, size=1 + num_workers, device=device)
        self._device = device
        _connect(self._group, device)

    def send(self, tensors: Sequence[Tensor], stop_when: Callable[[], bool]) -> None:
        """Broadcast the tensors of a bucket; return early once `stop_when` says that the receivers have failed.

        They travel as one: of a model with experts a bucket has thousands. Raises RuntimeError if a worker dies, or
        takes longer than TIMEOUT.
        """
        pieces = _pieces([(tensor.dtype, tensor.shape) for tensor in tensors])
        flat = torch.empty(pieces[-1].stop if pieces else 0, dtype=torch.uint8, device=self._device)
        for tensor, piece in zip(tensors, pieces, strict=True):
            flat[piece] = tensor.contiguous().view(-1).view(torch.uint8)
        _broadcast(self._group, flat, stop_when)

    def close(self) -> None:
        """Leave the group, also where a worker waits in it or has ended."""
        _abort(self._group)


class Receiver:
    """The side of a worker of the server."""

    def __init__(self, meeting: Meeting, *, worker: int, num_workers: int, device: torch.device):
        """Connect to the trainer and form the group. Raises RuntimeError if no trainer answers.

        worker: the number of this worker among the server's `num_workers`
        """
        self.tag = meeting.tag
        self._device = device
        self._store = dist.TCPStore(meeting.host, meeting.port, is_master=False, timeout=TIMEOUT)
        own = _own_address(meeting.host, meeting.port)
        self._group = _group(self._store, own, rank=1 + worker, size=1 + num_workers, device=device)
        _connect(self._group, device)

    def close(self) -> None:
        """Leave the group of a trainer that may be gone."""
        _abort(self._group)

    def receive(self, bucket: Bucket) -> list[tuple[str, Tensor]]:
        """Return all tensors of a bucket. Raises RuntimeError if the trainer dies, or another one sends."""
        if bucket.tag != self.tag:
            raise RuntimeError(f"this server now gets its weights from {self.tag}, not from {bucket.tag}")
        forms = [
            (getattr(torch, dtype), torch.Size(shape))
            for dtype, shape in zip(bucket.dtypes, bucket.shapes, strict=True)
        ]
        pieces = _pieces(forms)
        flat = torch.empty(pieces[-1].stop if pieces else 0, dtype=torch.uint8, device=self._device)
        _broadcast(self._group, flat, stop_when=lambda: False)
        return [
            (name, flat[piece].view(dtype).view(shape))
            for name, piece, (dtype, shape) in zip(bucket.names, pieces, forms, strict=True)
        ]


def _pieces(forms: Sequence[tuple[torch.dtype, torch.Size]]) -> list[slice]:
    """Return where each tensor lies in the bytes of a bucket, so that it can be viewed as what it is."""
    pieces, start = [], 0
    for dtype, shape in forms:
        start = -(-start // _ALIGNMENT) * _ALIGNMENT
        pieces.append(slice(start, start + shape.numel() * dtype.itemsize))
        start = pieces[-1].stop
    return pieces


def _broadcast(group: Any, tensor: Tensor, stop_when: Callable[[], bool]) -> None:
    """Broadcast a tensor from the first rank; return early as soon as `stop_when` says so.

    Raises RuntimeError where the other side does not take part within TIMEOUT. The group is of no use in both cases.
    """
    options = dist.BroadcastOptions()
    options.rootRank = 0
    work = group.broadcast([tensor], options)
    deadline = time.monotonic() + TIMEOUT.total_seconds()
    while not work.is_completed():
        if stop_when():
            _abort(group)
            return
        if time.monotonic() > deadline:
            _abort(group)
            raise RuntimeError(f"the other side has not taken part for {TIMEOUT.total_seconds():g} s")
        time.sleep(_POLL_SECONDS)
    work.wait()


def _connect(group: Any, device: torch.device) -> None:
    """Broadcast one byte: NCCL connects to the other side with its first message only, and waits without a limit.

    Raises RuntimeError if the other side does not come within TIMEOUT.
    """
    byte, errors = torch.zeros(1, dtype=torch.uint8, device=device), []

    def first() -> None:
        try:
            _broadcast(group, byte, stop_when=lambda: False)
        except RuntimeError as error:
            errors.append(error)

    thread = Thread(target=first, daemon=True)
    thread.start()
    thread.join(TIMEOUT.total_seconds())
    if thread.is_alive():
        raise RuntimeError(f"the other side has not connected within {TIMEOUT.total_seconds():g} s")
    if errors:
        raise errors[0]


def _abort(group: Any) -> None:
    """Give up a group of NCCL, whose kernels would wait for ever; gloo's threads end by themselves."""
    if group is not None and group.name() == "nccl":
        group.abort()


def _group(store: dist.Store, host: str, *, rank: int, size: int, device: torch.device) -> Any:
    named = dist.PrefixStore("weights", store)
    if device.type == "cuda":
        nccl = dist.ProcessGroupNCCL.Options()
        nccl._timeout = TIMEOUT
        with _unwatched():
            return dist.ProcessGroupNCCL(named, rank, size, nccl)
    # By default gloo takes the address of the host's name, which other hosts may not reach.
    backend: Any = dist.ProcessGroupGloo
    gloo = backend._Options()
    gloo._devices = [backend.create_device(hostname=host)]
    gloo._timeout = TIMEOUT
    gloo._threads = 2
    return backend(named, rank, size, gloo)


@contextmanager
def _unwatched() -> Iterator[None]:
    """Let the groups of NCCL that are made in a block have no watching thread; torch reads this when it makes one."""
    with _environment:  # servers are met in threads
        kept = {name: os.environ.get(name) for name in _UNWATCHED}
        os.environ.update(_UNWATCHED)
        try:
            yield
        finally:
            for name in _UNWATCHED:
                del os.environ[name]
            os.environ.update({name: value for name, value in kept.items() if value is not None})


def _store_at(host: str) -> dist.TCPStore:
    """Open a store that listens on one address of this machine; by itself it listens on all."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.create_server((host, 0), family=family)
    return dist.TCPStore(
        host,
        listening.getsockname()[1],
        is_master=True,
        wait_for_workers=False,
        timeout=TIMEOUT,
        master_listen_fd=listening.detach(),  # the store closes it
    )


def _own_address(host: str, port: int) -> str:
    """Return the address of this machine by which `host` reaches it; nothing is sent."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])
