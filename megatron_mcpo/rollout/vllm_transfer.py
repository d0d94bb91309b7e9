"""Register our transports of weights with vLLM's weight-transfer API.

This module imports vllm: import it where an engine is built. A server's workers import it for `WorkerExtension`.
"""

import json
import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from megatron_mcpo.config.environment import vllm_on_cpu
from megatron_mcpo.config.hf_config import from_folder
from megatron_mcpo.distributed import cpu_bf16
from megatron_mcpo.rollout import vllm_cpu_fixes as fixes
from megatron_mcpo.rollout import vllm_probe
from megatron_mcpo.rollout.vllm_options import IN_PROCESS, OPTIONS, PROCESS_GROUP
from megatron_mcpo.rollout.weight_link import Bucket, Meeting, Receiver

if vllm_on_cpu():
    cpu_bf16.apply()  # here, because every process that computes with vLLM imports this module


class Reload[Init: WeightTransferInitInfo, Update: WeightTransferUpdateInfo](WeightTransferEngine[Init, Update]):
    """The worker's side of an update, independent of where the tensors come from."""

    updating = False
    """Whether an update has begun and neither finished nor failed."""

    def start_weight_update(self) -> None:
        if fixes.reload_is_stale_on_cpu():
            fixes.before_reload(self.model)
        initialize_layerwise_reload(self.model)
        self.updating = True

    def load(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Load full tensors under their Hugging Face names."""
        model: Any = self.model
        try:
            model.load_weights(named_tensors)
        except BaseException:
            # The next update needs the modules in their final form, and so does the next engine of the process, which
            # shares some of them (rotary embeddings).
            self.updating = False
            with suppress(Exception):
                finalize_layerwise_reload(model, self.model_config)
            raise

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        if fixes.reload_is_stale_on_cpu():
            fixes.after_reload(self.model)
        self.updating = False

    def shutdown(self) -> None:
        """Do nothing: there is nothing to close."""

    @staticmethod
    def trainer_send_weights(*_: Any, **__: Any) -> None:
        """Refuse: the trainer sends by its own means. vLLM below 0.28 demands the method."""
        raise TypeError("the trainer sends its weights itself (rollout/weight_link.py)")


@dataclass
class LiveTensors(WeightTransferUpdateInfo):
    """Tensors of this process."""

    weights: Any


class InProcess(Reload[WeightTransferInitInfo, LiveTensors]):
    """The transport of live tensors from a Python iterator in the same process."""

    init_info_cls = WeightTransferInitInfo
    update_info_cls = LiveTensors

    def init_transfer_engine(self, init_info: WeightTransferInitInfo) -> None:
        """Do nothing: there is nothing to connect."""

    def receive_weights(self, update_info: LiveTensors) -> None:
        self.load(update_info.weights)


class Broadcast(Reload[Any, Any]):
    """The transport of tensors that a trainer's rank broadcasts to the workers of a server."""

    init_info_cls = Meeting
    update_info_cls = Bucket
    receiver: Receiver | None = None

    def init_transfer_engine(self, init_info: Meeting) -> None:
        """Connect to a trainer, which replaces the previous one."""
        parallel = self.parallel_config
        if self.receiver is not None:
            self.receiver.close()
        self.receiver = Receiver(
            init_info, worker=parallel.rank, num_workers=parallel.world_size, device=torch.device(self.device)
        )

    def receive_weights(self, update_info: Bucket) -> None:
        self.load(self.received(update_info))

    def received(self, bucket: Bucket) -> Iterator[tuple[str, Tensor]]:
        """Receive a whole bucket, then yield its tensors, so that the trainer never waits for the loading."""
        if self.receiver is None:
            raise RuntimeError("no trainer has connected to this server")
        yield from self.receiver.receive(bucket)


class WorkerExtension:
    """The methods that a trainer may call in every worker of a server, mixed into vLLM's worker class."""

    vllm_config: Any
    device: Any
    weight_transfer_engine: Any

    def mcpo_describe(self) -> dict[str, Any]:
        """Describe what is served and how (see server_client.wanted_description)."""
        config, transport = self.vllm_config, self.weight_transfer_engine
        model = config.model_config
        return {
            "model": asdict(from_folder(Path(model.model), with_weights=False)),
            "dtype": str(model.dtype).removeprefix("torch."),
            "quantization": model.quantization or "none",
            "tensor_parallel": config.parallel_config.tensor_parallel_size,
            "workers": config.parallel_config.world_size_across_dp,
            "max_model_len": model.max_model_len,
            "logprobs_mode": str(model.logprobs_mode),
            "routed_experts": model.enable_return_routed_experts,
            "options": json.dumps((config.additional_config or {}).get(OPTIONS, {}), sort_keys=True),
            "device": torch.device(self.device).type,
            "process": f"{socket.gethostname()}:{os.getpid()}",
            "updating": transport.updating,
            "trainer": transport.receiver.tag if transport.receiver is not None else None,
        }

    def mcpo_compare(self, bucket: dict[str, Any]) -> dict[str, Any]:
        """Compare the weights with the tensors that the trainer broadcasts meanwhile (see engine.Engine.compare)."""
        transport = self.weight_transfer_engine
        return asdict(vllm_probe.compare(transport.model, transport.received(Bucket(**bucket))))


for _name, _transport in {IN_PROCESS: InProcess, PROCESS_GROUP: Broadcast}.items():
    if _name not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(_name, _transport)
