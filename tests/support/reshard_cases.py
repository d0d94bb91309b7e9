"""What test_transfer.py runs beside real vLLM engines, in processes of their own (vllm_cases.run).

vLLM's CPU build packs its weights; here it computes from its parameters as they are, as its GPU build does.
"""

from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import linear

from megatron_mcpo.config.hf_config import from_folder
from megatron_mcpo.config.layout import Layout
from megatron_mcpo.distributed import parallel
from megatron_mcpo.mcore.model import build_chunks
from megatron_mcpo.rollout.engine import SamplingRequest
from megatron_mcpo.rollout.vllm_engine import VllmEngine
from megatron_mcpo.weights.load import load_hf
from megatron_mcpo.weights.reshard_sync import FullTensorSync, choose_weight_sync
from tests.support import vllm_cases


def compute_plainly() -> None:
    """For engines built from here on in this process."""
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    any_linear: Any = LinearBase
    any_embedding: Any = UnquantizedEmbeddingMethod
    any_linear.skip_weight_relayout = True
    any_embedding.process_weights_after_loading = lambda self, layer: setattr(layer, "cpu_linear", linear)


def sampled(engine: VllmEngine) -> list[Any]:
    prompts = [[1, 2, 3, 4], [7] * 40 + [9], list(range(20, 45)), [199, 3]]
    requests = [SamplingRequest(token_ids=ids, num_samples=2, seed=11, max_tokens=8) for ids in prompts]
    return [(sample.token_ids, sample.logprobs) for group in engine.generate(requests) for sample in group]


def syncs_into_an_engine(folder: Path, layout: Layout, engine_ranks: int) -> tuple[str, str | None]:
    """Both syncs and a fresh start leave the same engine; one that packs its weights gets full tensors."""
    groups = parallel.init(layout, seed=0, timeout_seconds=240)
    model = from_folder(folder)
    chunks = build_chunks(model, groups, dtype=torch.float32, head=None)
    load_hf(chunks, model, folder, groups)
    packed = vllm_cases.build(folder, tensor_parallel=engine_ranks)
    packing, reason = choose_weight_sync(chunks, model, groups, packed, engine_ranks=engine_ranks)
    packed.close()
    compute_plainly()
    fresh = vllm_cases.build(folder, tensor_parallel=engine_ranks, load_weights=True)
    first = sampled(fresh)
    fresh.close()
    engine = vllm_cases.build(folder, tensor_parallel=engine_ranks)
    reshard, problem = choose_weight_sync(chunks, model, groups, engine, engine_ranks=engine_ranks)
    assert (reshard.name, problem) == ("reshard", None)
    assert "no weights" in vllm_cases.failure(lambda: sampled(engine))
    reshard.sync(1)
    assert sampled(engine) == first and engine.version == 1
    with torch.no_grad():
        for parameter in (each for chunk in chunks for each in chunk.parameters()):
            parameter.mul_(1.25)
    reshard.sync(2)
    second = sampled(engine)
    assert second != first
    engine.sleep()
    assert "asleep" in vllm_cases.failure(lambda: reshard.sync(3))
    engine.wake()
    assert "no weights" in vllm_cases.failure(lambda: sampled(engine))
    reshard.sync(3)
    assert sampled(engine) == second and engine.version == 3
    FullTensorSync(chunks=chunks, model=model, groups=groups, engine=engine).sync(4)
    assert sampled(engine) == second
    _check_a_half_written_engine(engine)
    engine.close()
    return packing.name, reason


def _check_a_half_written_engine(engine: VllmEngine) -> None:
    def interrupted() -> None:
        with engine.rewriting(5) as parameters:
            next(iter(parameters.values())).zero_()
            raise RuntimeError("the link broke")

    for call in (interrupted, lambda: sampled(engine), engine.parameters, interrupted):
        assert "the link broke" in vllm_cases.failure(call)
    assert engine.version == 4


def parameters_of_experts(folder: Path) -> bool:
    """Whether an engine with experts, of which everything else is plain, may be written into."""
    compute_plainly()
    return vllm_cases.build(folder).parameters() is not None
