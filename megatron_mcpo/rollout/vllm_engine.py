"""vLLM in the trainer's process. This file and vllm_cpu_fixes.py are the only ones that import vllm, and only when an
engine is built: importing them is cheap.
"""

import gc
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mcpo.hf_files import read_headers
from megatron_mcpo.rollout import vllm_cpu_fixes as fixes
from megatron_mcpo.rollout.engine import EngineError, SamplingRequest
from megatron_mcpo.rollout.vllm_probe import find_mismatches
from megatron_mcpo.types import Completion, StopReason

_BACKEND = "megatron_mcpo"
_DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
_STOP_REASONS = {"stop": StopReason.STOP, "length": StopReason.LENGTH}
_CPU_BATCH_TOKENS = 4096
_VLLM_SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
}


class VllmEngine:
    """The engine of `engine.Engine` on vLLM.

    Sampling is that of the bare model: no top-p, no top-k, and the checkpoint's generation_config.json is not read.
    A completion ends at one of the request's `stop_token_ids` and at nothing else (not at the model's own
    end-of-sequence token unless it is among them); that token is the last of `token_ids` and has its log-prob, so
    that the trainer learns to stop. `text` is left empty.

    Between construction with `load_weights` False, or `wake`, and the next `update` the engine holds no weights and
    `generate` raises EngineError. This is so on a CPU too, where `sleep` has nothing to release.

    Construction is collective over all ranks of the default process group when `distributed`: consecutive
    `tensor_parallel` ranks form an engine. A process can hold engines of one tensor-parallel size only.
    """

    def __init__(
        self,
        model_path: Path,
        *,
        dtype: Literal["bf16", "fp32"],
        tensor_parallel: int,
        max_model_len: int,
        max_concurrent: int,
        kv_cache_gib: float,
        gpu_memory_utilization: float,
        distributed: bool,
        job_tag: str,
        load_weights: bool = False,
    ):
        """Build the engine from the folder's config.json; its safetensors tell which tensors an update must have.

        max_model_len: most tokens of prompt and completion together
        kv_cache_gib: GiB of key-value cache, on a CPU; gpu_memory_utilization: share of a GPU's memory, on a GPU
        job_tag: names the job's shared-memory segments; two jobs on a host must not have the same
        load_weights: read the folder's weights instead of waiting for an update

        Raises ValueError for arguments that can't work, EngineError when vLLM fails.
        """
        _check_arguments(tensor_parallel=tensor_parallel, distributed=distributed, job_tag=job_tag)
        self._shapes = {name: header.shape for name, header in read_headers(model_path).items()}
        self._max_model_len = max_model_len
        self._on_cpu = not torch.cuda.is_available()
        self._broken: str | None = None
        self._awake = True
        self._cache_released = False
        self._has_weights = load_weights
        self.version = 0
        options: dict[str, Any] = dict(
            model=str(model_path),
            dtype=_DTYPES[dtype],
            tensor_parallel_size=tensor_parallel,
            distributed_executor_backend="external_launcher" if distributed else "uni",
            max_model_len=max_model_len,
            max_num_seqs=max_concurrent,
            gpu_memory_utilization=gpu_memory_utilization,
            enable_sleep_mode=not self._on_cpu,
            load_format="auto" if load_weights else "dummy",
        )
        if self._on_cpu:
            # Compiling takes a minute and gains little on a CPU. A prompt that is prefilled in parts makes vLLM rewind
            # the request's generator, which a CPU's generator can't: the step would fail.
            options |= dict(
                enforce_eager=True,
                kv_cache_memory_bytes=int(kv_cache_gib * 2**30),
                enable_chunked_prefill=False,
                max_num_batched_tokens=max(_CPU_BATCH_TOKENS, max_model_len),
                # The smallest: with the usual 128, a shorter beginning that prompts have in common is never shared.
                block_size=32,
            )
        with self._fatal("construction"):
            self._llm = _build(options, distributed=distributed, job_tag=job_tag)
            if self._llm.llm_engine.model_config.hf_text_config.tie_word_embeddings:
                self._shapes.pop("lm_head.weight", None)

    def generate(self, requests: Sequence[SamplingRequest]) -> list[tuple[Completion, ...]]:
        """See engine.Engine.generate. The samples of a greedy request are copies of one.

        Raises ValueError for a request that can't be served (the engine stays usable).
        """
        self._require(weights=True)
        for request in requests:
            self._check_request(request)
        if not requests:
            return []
        with self._fatal("generation"):
            from vllm import SamplingParams

            params = [
                SamplingParams(
                    n=request.num_samples if request.temperature > 0 else 1,
                    seed=request.seed,
                    temperature=request.temperature,
                    max_tokens=request.max_tokens,
                    stop_token_ids=list(request.stop_token_ids),
                    ignore_eos=True,
                    logprobs=0,
                    detokenize=False,
                )
                for request in requests
            ]
            prompts = [{"prompt_token_ids": list(request.token_ids)} for request in requests]
            # What was asked before must not show in the rounding: a resumed run has not asked it.
            if not self._llm.reset_prefix_cache():
                raise EngineError("the prefix cache could not be emptied: earlier requests still hold it")
            results = self._llm.generate(prompts, params, use_tqdm=False)
            return [self._completions(*pair) for pair in zip(requests, results, strict=True)]

    def update(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> int:
        """See engine.Engine.update. Tensors may come in any order and any float dtype.

        vLLM keeps the old value of a tensor that isn't sent and loads garbage for a fused module of which only a
        part is sent, without a word: names and shapes must be exactly those of the checkpoint.
        """
        self._require(weights=False)
        arrived: dict[str, int] = {}
        with self._fatal(f"update to version {version}"):
            self._llm.start_weight_update()
            weights = _checked(named_tensors, self._shapes, arrived)
            self._llm.update_weights({"update_info": {"weights": weights}})
            self._llm.finish_weight_update()
            if self._cache_released:
                self._llm.wake_up(tags=["kv_cache"])
                self._cache_released = False
            if not self._llm.reset_prefix_cache():
                raise EngineError("the prefix cache of the old weights could not be dropped: requests still hold it")
        self._has_weights = True
        self.version = version
        return sum(arrived.values())

    def mismatches(self, named_tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
        """See engine.Engine.mismatches; what this rank holds is compared, bit for bit in the engine's dtype.

        A tied output embedding whose packed copy differs is reported as "lm_head.weight", though it is never sent.
        Experts of a mixture-of-experts layer, and tensors that vLLM keeps under other names than Hugging Face
        (other than fused projections), can't be probed and are never reported.
        """
        self._require(weights=True)
        with self._fatal("comparison of weights"):
            (names,) = self._llm.apply_model(lambda model: find_mismatches(model, named_tensors))
        return list(names)

    def sleep(self) -> None:
        """See engine.Engine.sleep."""
        self._require(weights=False, awake=False)
        if not self._awake:
            return
        if not self._on_cpu:
            with self._fatal("sleep"):
                self._llm.sleep(level=2)
            self._cache_released = True
        self._awake = False
        self._has_weights = False

    def wake(self) -> None:
        """See engine.Engine.wake. The memory of the key-value cache is taken only after the next update."""
        self._require(weights=False, awake=False)
        if self._awake:
            return
        if not self._on_cpu:
            with self._fatal("waking"):
                self._llm.wake_up(tags=["weights"])
        self._awake = True

    def close(self) -> None:
        """Free the model and the key-value cache; every later call raises EngineError.

        vLLM's own shutdown is not called: it destroys the default process group, which is the trainer's.
        """
        self._llm = None
        self._broken = "it was closed"
        gc.collect()
        if not self._on_cpu:
            torch.cuda.empty_cache()

    def _require(self, *, weights: bool, awake: bool = True) -> None:
        if self._broken is not None:
            raise EngineError(f"the engine can't be used: {self._broken}")
        if awake and not self._awake:
            raise EngineError("the engine is asleep: call wake() and update() first")
        if weights and not self._has_weights:
            raise EngineError("the engine holds no weights: call update() first")

    @contextmanager
    def _fatal(self, action: str) -> Iterator[None]:
        """Run vLLM isolated; whatever goes wrong in it ends the engine."""
        try:
            with fixes.isolated(compile_kernels=not self._on_cpu):
                yield
        except Exception as error:
            self._broken = f"{action} failed: {error}"
            raise EngineError(self._broken) from error
        except BaseException:
            self._broken = f"{action} was interrupted"
            raise

    def _check_request(self, request: SamplingRequest) -> None:
        num_prompt = len(request.token_ids)
        if num_prompt == 0 or request.num_samples < 1 or request.max_tokens < 1 or request.temperature < 0:
            raise ValueError(
                f"{num_prompt} prompt tokens, num_samples {request.num_samples}, max_tokens {request.max_tokens}, "
                f"temperature {request.temperature}: need at least one of each, and a temperature of 0 or more"
            )
        if num_prompt + request.max_tokens > self._max_model_len:
            raise ValueError(
                f"{num_prompt} prompt tokens + max_tokens {request.max_tokens} exceed the engine's max_model_len "
                f"{self._max_model_len}: shorten the prompt or build the engine with a larger one"
            )

    def _completions(self, request: SamplingRequest, result: Any) -> tuple[Completion, ...]:
        completions = []
        for output in result.outputs:
            tokens = tuple(output.token_ids)
            pairs = zip(tokens, output.logprobs, strict=True)
            completions.append(
                Completion(
                    token_ids=tokens,
                    logprobs=tuple(entry[token].logprob for token, entry in pairs),
                    stop_reason=_STOP_REASONS.get(output.finish_reason, StopReason.ABORT),
                    version=self.version,
                )
            )
        copies = request.num_samples // len(completions)
        return tuple(completions) * copies


def _check_arguments(*, tensor_parallel: int, distributed: bool, job_tag: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,100}", job_tag):
        raise ValueError(f"job_tag = {job_tag!r}: names shared memory; use 1-100 letters, digits, '.', '_', '-'")
    if not distributed and tensor_parallel > 1:
        raise ValueError(f"tensor_parallel = {tensor_parallel}: needs distributed=True and a process group")
    if distributed and not dist.is_initialized():
        raise ValueError("distributed = True: initialize the default process group before the engine")
    if distributed and dist.get_world_size() % tensor_parallel:
        raise ValueError(f"tensor_parallel = {tensor_parallel}: must divide the world size {dist.get_world_size()}")


def _build(options: dict[str, Any], *, distributed: bool, job_tag: str) -> Any:
    for key, value in _VLLM_SETTINGS.items():
        os.environ.setdefault(key, value)
    if distributed:
        os.environ["RANK"] = str(dist.get_rank())
        os.environ.setdefault("LOCAL_RANK", str(dist.get_rank() % max(torch.cuda.device_count(), 1)))
    with fixes.quiet_import():
        from vllm import LLM

        _register_backend()
    with fixes.cpu_start(job_tag) if not torch.cuda.is_available() else nullcontext():
        return LLM(
            **options,
            seed=0,
            skip_tokenizer_init=True,
            generation_config="vllm",
            logprobs_mode="processed_logprobs",
            enable_prefix_caching=True,
            disable_log_stats=True,
            use_tqdm_on_load=False,
            weight_transfer_config={"backend": _BACKEND},
        )


def _checked(
    named_tensors: Iterable[tuple[str, Tensor]], shapes: Mapping[str, tuple[int, ...]], arrived: dict[str, int]
) -> Iterator[tuple[str, Tensor]]:
    """Pass the tensors on, each checked before vLLM sees it; bytes by name end in `arrived`. Raises EngineError."""
    for name, tensor in named_tensors:
        if name not in shapes:
            raise EngineError(f"{name}: is no tensor of the checkpoint (tied output embeddings are not sent)")
        if name in arrived:
            raise EngineError(f"{name}: was sent twice")
        if tuple(tensor.shape) != shapes[name]:
            raise EngineError(f"{name}: has shape {tuple(tensor.shape)}, the checkpoint has {shapes[name]}")
        arrived[name] = tensor.numel() * tensor.element_size()
        yield name, tensor.detach()
    missing = sorted(set(shapes) - set(arrived))
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise EngineError(f"{len(missing)} of {len(shapes)} tensors were not sent: {', '.join(missing[:5])}{more}")


def _register_backend() -> None:
    """Tell vLLM's weight-transfer API of a backend whose transport is a Python iterator of live tensors."""
    from vllm.distributed.weight_transfer.base import (
        WeightTransferEngine,
        WeightTransferInitInfo,
        WeightTransferUpdateInfo,
    )
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    if _BACKEND in WeightTransferEngineFactory._registry:
        return

    @dataclass
    class UpdateInfo(WeightTransferUpdateInfo):
        weights: Any

    class InProcessTransfer(WeightTransferEngine[WeightTransferInitInfo, UpdateInfo]):
        init_info_cls = WeightTransferInitInfo
        update_info_cls = UpdateInfo

        def init_transfer_engine(self, init_info: WeightTransferInitInfo) -> None:
            """Nothing to connect."""

        def start_weight_update(self) -> None:
            if fixes.reload_is_stale_on_cpu():
                fixes.before_reload(self.model)
            initialize_layerwise_reload(self.model)

        def receive_weights(self, update_info: UpdateInfo) -> None:
            model: Any = self.model
            try:
                model.load_weights(update_info.weights)
            except BaseException:
                # Engines of a process share modules (rotary embeddings): the next engine needs them put together again.
                with suppress(Exception):
                    finalize_layerwise_reload(model, self.model_config)
                raise

        def finish_weight_update(self) -> None:
            finalize_layerwise_reload(self.model, self.model_config)
            if fixes.reload_is_stale_on_cpu():
                fixes.after_reload(self.model)

        def shutdown(self) -> None:
            """Nothing to close."""

    WeightTransferEngineFactory.register_engine(_BACKEND, InProcessTransfer)
