"""Run vLLM in the trainer's process. vllm is imported when an engine is built, so that importing this file is fast."""

import gc
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import linear

from megatron_mcpo import progress
from megatron_mcpo.config.config import ConfigError
from megatron_mcpo.config.environment import vllm_on_cpu
from megatron_mcpo.config.hf_config import from_folder
from megatron_mcpo.data.routing import Routing
from megatron_mcpo.distributed.device import uses_gpu
from megatron_mcpo.rollout import vllm_cpu_fixes as fixes
from megatron_mcpo.rollout import vllm_probe
from megatron_mcpo.rollout.engine import Comparison, EngineError, SamplingRequest, check_request, checked
from megatron_mcpo.rollout.vllm_options import ENVIRONMENT, IN_PROCESS, engine_options, sampling_options
from megatron_mcpo.types import Completion, StopReason
from megatron_mcpo.weights.mapping import hf_shapes

STOP_REASONS = {"stop": StopReason.STOP, "length": StopReason.LENGTH}
_PLAIN_METHODS = ("UnquantizedLinearMethod", "UnquantizedEmbeddingMethod")
_LEAST_CAPABILITY = (8, 9)
"""The compute capability of GPUs that multiply in FP8 (Ada). On older ones vLLM only stores FP8, packed differently."""
_LESSER_ISA = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")
"""Values of ONEDNN_MAX_CPU_ISA below AVX512-BF16, with which vLLM's FP8 products (0.30.0) abort the process."""


class VllmEngine:
    """The engine of `engine.Engine` on vLLM.

    Sampling is that of the plain model: no top-p, no top-k, and the checkpoint's generation_config.json is not read.
    A completion ends only at one of the request's `stop_token_ids` (not at the model's own end-of-sequence token unless
    it is among them); that token is the last of `token_ids` and has its log-prob, so that the trainer learns to stop.
    `text` is left empty.

    Between construction with `load_weights` False, or `wake`, and the next `update` the engine holds no weights and
    `generate` raises EngineError. This also holds on a CPU, where `sleep` has nothing to release.

    Construction is collective over all ranks of the default process group when `distributed`: consecutive
    `tensor_parallel` ranks form an engine. A process can hold engines of one tensor-parallel size only. It raises
    ValueError for invalid arguments, and EngineError where vLLM fails.
    """

    def __init__(
        self,
        model_path: Path,
        *,
        dtype: Literal["bf16", "fp32"],
        quantization: Literal["none", "fp8_per_block"],
        tensor_parallel: int,
        max_model_len: int,
        max_concurrent: int,
        kv_cache_gib: float,
        gpu_memory_utilization: float,
        distributed: bool,
        job_tag: str,
        load_weights: bool = False,
        routed_experts: bool = False,
        further: Mapping[str, Any] = MappingProxyType({}),
    ):
        """Build the engine from the folder's config.json, which also determines the tensors of an update.

        Args:
            model_path: A Hugging Face folder.
            dtype: Of weights and activations.
            quantization: How the layers' weights are quantised whenever they are loaded.
            tensor_parallel: Ranks of an engine.
            max_model_len: The most tokens of prompt and completion together.
            max_concurrent: The most sequences that are decoded together.
            kv_cache_gib: GiB of key-value cache, on a CPU.
            gpu_memory_utilization: The engine's share of a GPU's memory, on a GPU.
            distributed: Whether the engine belongs to the ranks of the default process group.
            job_tag: Begins the names of the job's shared-memory segments; must differ between jobs on a host.
            load_weights: Whether to read the folder's weights instead of waiting for an update.
            routed_experts: Whether completions say which experts their tokens were given.
            further: Fields of vLLM's EngineArgs, which `vllm_fields.option_problems` accepts.
        """
        _check_arguments(tensor_parallel=tensor_parallel, distributed=distributed, job_tag=job_tag)
        model = from_folder(model_path, with_weights=False)
        self._shapes = hf_shapes(model)
        self._routing = Routing.of(model) if routed_experts else None
        self._max_model_len, self._on_cpu = max_model_len, not uses_gpu()
        self._broken: str | None = None
        self._awake, self._cache_released = True, False
        self._has_weights, self.version = load_weights, 0
        options = engine_options(
            model_path,
            dtype=dtype,
            quantization=quantization,
            tensor_parallel=tensor_parallel,
            max_model_len=max_model_len,
            max_concurrent=max_concurrent,
            kv_cache_gib=kv_cache_gib,
            gpu_memory_utilization=gpu_memory_utilization,
            load_weights=load_weights,
            routed_experts=routed_experts,
            further=further,
            transport=IN_PROCESS,
            on_cpu=self._on_cpu,
        )
        with self._fatal("construction"):
            self._llm = _build(options, distributed=distributed, job_tag=job_tag)

    def generate(self, requests: Sequence[SamplingRequest]) -> list[tuple[Completion, ...]]:
        """Complete every request, as engine.Engine.generate says. The samples of a greedy request are copies of one.

        Raises ValueError for a request that can't be served; the engine stays usable.
        """
        self._require(weights=True)
        for request in requests:
            check_request(request, self._max_model_len)
        if not requests:
            return []
        with self._fatal("generation"):
            from vllm import SamplingParams

            params = [SamplingParams(**sampling_options(request)) for request in requests]
            prompts = [{"prompt_token_ids": list(request.token_ids)} for request in requests]
            # Earlier requests must not influence the rounding, because a resumed run has not made them.
            if not self._llm.reset_prefix_cache():
                raise EngineError("the prefix cache could not be emptied, because earlier requests still hold it")
            results = self._llm.generate(prompts, params, use_tqdm=False)
            return [self._completions(*pair) for pair in zip(requests, results, strict=True)]

    def update(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> int:
        """Replace all weights, as engine.Engine.update says. Tensors may come in any order and any float dtype."""
        arrived: dict[str, int] = {}
        with self._replacing(version):
            self._llm.start_weight_update()
            weights = checked(named_tensors, self._shapes, arrived)
            self._llm.update_weights({"update_info": {"weights": weights}})
            self._llm.finish_weight_update()
        return sum(arrived.values())

    def parameters(self) -> dict[str, Tensor] | None:
        """Return the live parameters (see weights.reshard_sync.Receiver); None if vLLM packs or quantises them."""
        self._require(weights=False)
        with self._fatal("reading the parameters"):
            (live,) = self._llm.apply_model(_plain_parameters)
        return live

    @contextmanager
    def rewriting(self, version: int) -> Iterator[dict[str, Tensor]]:
        """Provide the live parameters to a block that rewrites all of them (see weights.reshard_sync.Receiver).

        vLLM's weight-transfer API is not used, since it moves all parameters to the meta device.
        """
        with self._replacing(version):
            (live,) = self._llm.apply_model(_plain_parameters)
            assert live is not None, "parameters() returns None for an engine that can't be written into"
            yield live

    @contextmanager
    def _replacing(self, version: int) -> Iterator[None]:
        """Run a block that replaces all weights, then drop what was computed with the old ones."""
        self._require(weights=False)
        with self._fatal(f"update to version {version}"):
            yield
            if self._cache_released:
                self._llm.wake_up(tags=["kv_cache"])
                self._cache_released = False
            if not self._llm.reset_prefix_cache():
                raise EngineError("the prefix cache of the old weights could not be dropped: requests still hold it")
            if not self._on_cpu:
                # vLLM computes on a stream of its own, which doesn't wait for the stream that weights were written on.
                torch.cuda.synchronize()
        self._has_weights = True
        self.version = version

    def compare(self, named_tensors: Iterable[tuple[str, Tensor]]) -> Comparison:
        """Compare what this rank holds bit by bit, in the engine's dtype, as engine.Engine.compare says.

        A tied output embedding whose packed copy differs is reported as "lm_head.weight", although it is never sent.
        """
        self._require(weights=True)
        with self._fatal("comparison of weights"):
            (comparison,) = self._llm.apply_model(lambda model: vllm_probe.compare(model, named_tensors))
        assert isinstance(comparison, Comparison)
        return comparison

    def sleep(self) -> None:
        """Release accelerator memory, as engine.Engine.sleep says."""
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
        """Undo `sleep`. The memory of the key-value cache is allocated only after the next update."""
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
        """Run vLLM isolated; any error in it makes the engine unusable."""
        try:
            with fixes.isolated(compile_kernels=not self._on_cpu):
                yield
        except Exception as error:
            self._broken = f"{action} failed: {error}"
            raise EngineError(self._broken) from error
        except BaseException:
            self._broken = f"{action} was interrupted"
            raise

    def _completions(self, request: SamplingRequest, result: Any) -> tuple[Completion, ...]:
        completions = []
        for output in result.outputs:
            tokens = tuple(output.token_ids)
            num_read = len(request.token_ids) + len(tokens) - 1
            pairs = zip(tokens, output.logprobs, strict=True)
            completions.append(
                Completion(
                    token_ids=tokens,
                    logprobs=tuple(entry[token].logprob for token, entry in pairs),
                    stop_reason=STOP_REASONS.get(output.finish_reason, StopReason.ABORT),
                    versions=(self.version,) * len(tokens),
                    experts=self._routing.checked(output.routed_experts, num_tokens=num_read)
                    if self._routing
                    else None,
                )
            )
        copies = request.num_samples // len(completions)
        return tuple(completions) * copies


def check_hardware(quantization: Literal["none", "fp8_per_block"]) -> None:
    """Check that the installed vLLM can run such an engine on this machine. Raises ConfigError if it can't."""
    if not uses_gpu() and not vllm_on_cpu():
        raise ConfigError(
            [
                "engine: torch finds no GPU here, and vLLM's CPU build (vllm-cpu) is not installed; start on a machine "
                "with a GPU, or use the CPU environment (make env)"
            ]
        )
    if quantization == "none":
        return
    fix = "; use another machine, or set it to 'none'"
    if not uses_gpu():
        if problem := cpu_fp8_problem():
            raise ConfigError([f"engine.quantization = {quantization!r}: {problem}{fix}"])
    elif torch.cuda.get_device_capability() < _LEAST_CAPABILITY:
        major, minor = torch.cuda.get_device_capability()
        raise ConfigError(
            [f"engine.quantization = {quantization!r}: needs compute capability 8.9, the GPU has {major}.{minor}{fix}"]
        )


def cpu_fp8_problem() -> str | None:
    """Return what prevents vLLM's FP8 products from running on this CPU; None if nothing does."""
    if not torch.cpu._is_avx512_bf16_supported():
        return "this CPU lacks AVX512-BF16"
    held = os.environ.get("ONEDNN_MAX_CPU_ISA", "")
    if held.upper() in _LESSER_ISA:
        return f"ONEDNN_MAX_CPU_ISA = {held} keeps AVX512-BF16 from being used"
    return None


def _check_arguments(*, tensor_parallel: int, distributed: bool, job_tag: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,100}", job_tag):
        raise ValueError(
            f"job_tag = {job_tag!r}: must be 1-100 letters, digits, '.', '_', '-' (it names shared memory)"
        )
    if not distributed and tensor_parallel > 1:
        raise ValueError(
            f"tensor_parallel = {tensor_parallel}: must be 1 without a process group; set distributed = True"
        )
    if distributed and not dist.is_initialized():
        raise ValueError("distributed = True: needs the default process group; initialize it before the engine")
    if distributed and dist.get_world_size() % tensor_parallel:
        raise ValueError(f"tensor_parallel = {tensor_parallel}: must divide the world size {dist.get_world_size()}")


def _build(options: dict[str, Any], *, distributed: bool, job_tag: str) -> Any:
    for key, value in {**ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}.items():
        os.environ.setdefault(key, value)
    if distributed:
        os.environ["RANK"] = str(dist.get_rank())
        os.environ.setdefault("LOCAL_RANK", str(dist.get_rank() % max(torch.cuda.device_count(), 1)))
    with fixes.quiet_import():
        from vllm import LLM

        import megatron_mcpo.rollout.vllm_transfer  # noqa: F401 - registers our transport with vLLM
    with ExitStack() as stack:
        if not uses_gpu():
            stack.enter_context(fixes.cpu_start(job_tag))
            if "quantization" in options:
                stack.enter_context(fixes.cpu_fp8())
        llm = LLM(
            **options,
            distributed_executor_backend="external_launcher" if distributed else "uni",
            enable_sleep_mode=uses_gpu(),
        )
    _count_steps(llm.llm_engine)
    return llm


def _count_steps(engine: Any) -> None:
    """Count every decoding step as progress of this process."""
    step = engine.step

    def counted() -> Any:
        progress.tick()
        return step()

    engine.step = counted


def _plain_parameters(model: Any) -> dict[str, Tensor] | None:
    """Return all parameters by name, tied ones once; None if a module computes with something else than its `weight`.

    Attention and norms have no method of their own. What vLLM 0.30 does to weights after loading: on a GPU its
    unquantised methods for linear modules and embeddings leave them as they are, that for experts may rearrange them;
    on a CPU `cpu_linear` holds a packed copy.
    """
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if method is not None and type(method).__name__ not in _PLAIN_METHODS:
            return None
        if getattr(module, "cpu_linear", linear) is not linear:
            return None
    return dict(model.named_parameters())
