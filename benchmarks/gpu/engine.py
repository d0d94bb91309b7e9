"""Check the engine in the trainer's process: its weights bit by bit, both ways of syncing them, experts."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
from torch import Tensor

from benchmarks.gpu import models
from benchmarks.gpu.models import FEW_EXPERTS, MEDIUM, QWEN3_30B_A3B_LAYERS, SMALL, batch_of, on_gpu, seconds_of, sized
from benchmarks.gpu.outcome import Band, Outcome, Target
from megatron_mcpo.distributed.device import uses_gpu
from megatron_mcpo.mcore.policy import Policy, Reference
from megatron_mcpo.rollout.engine import Engine, SamplingRequest
from megatron_mcpo.rollout.vllm_engine import VllmEngine
from megatron_mcpo.trainer.engine_check import TOLERANCE
from megatron_mcpo.types import Completion, RolloutGroup
from megatron_mcpo.weights.reshard_sync import FullTensorSync, WeightSync, choose_weight_sync

Learner = Policy | Reference
BF16_APART = (0.0, 0.04)
"""Least and greatest mean difference of log-probs. On a CPU it was 0.016 for MEDIUM; a GPU has other kernels."""
_GIGA = 1e9


def engine() -> Outcome:
    """Check an engine in this process: its weights bit by bit, its log-probs, seconds, memory while it sleeps."""
    return _in_process("none", BF16_APART)


def engine_fp8() -> Outcome:
    """Check an engine that rounds its layers to FP8. Log-probs as close as in bf16 mean that it did not round."""
    # On a CPU the difference was 0.126 for MEDIUM; for SMALL it is 0.02, ten times that in bf16.
    return _in_process("fp8_per_block", (sized(0.04, 0.01), TOLERANCE["fp8_per_block"]))


def moe_push() -> Outcome:
    """Measure what a tensor costs in a weight sync of 128 experts a layer; compare its engine bit by bit."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        models.save_model(folder, sized(QWEN3_30B_A3B_LAYERS, FEW_EXPERTS), dtype=torch.bfloat16)
        learner = models.reference(models.settings(folder), models.alone())
        sampler = start_engine(folder, "none")
    weight_sync = _ways(learner, sampler)[-1]
    weight_sync.sync(0)
    compared = sampler.compare(learner.weights())
    figures = speed(weight_sync, learner)
    num_tensors = sum(1 for _ in learner.weights())
    return Outcome(
        bands=(
            Band(name="tensors that differ", value=len(compared.different), low=0, high=0),
            *follows(weight_sync, learner, sampler),
        ),
        figures={
            **figures,
            "tensors": num_tensors,
            "milliseconds_a_tensor": 1000 * figures["seconds"] / num_tensors,
            "tensors that can't be read": len(compared.unread),  # some kernels keep experts rearranged
            "log-probs, mean difference": apart(learner, sampler),  # a router may choose another expert
        },
    )


def start_engine(folder: Path, quantization: Literal["none", "fp8_per_block"]) -> VllmEngine:
    """Build an engine without weights in this process, which has a process group."""
    return VllmEngine(
        folder,
        dtype="bf16",
        quantization=quantization,
        tensor_parallel=1,
        max_model_len=128,
        max_concurrent=64,
        kv_cache_gib=sized(1.0, 0.1),
        gpu_memory_utilization=0.3,
        distributed=True,
        job_tag="gpu-check",
    )


def _in_process(quantization: Literal["none", "fp8_per_block"], apart_in: tuple[float, float]) -> Outcome:
    """Check an engine in this process. apart_in: least and greatest mean difference of log-probs"""
    low, high = apart_in
    with TemporaryDirectory() as name:
        folder = Path(name)
        models.save_model(folder, sized(MEDIUM, SMALL), dtype=torch.bfloat16)
        learner = models.policy(models.settings(folder), models.alone())
        sampler = start_engine(folder, quantization)
    bands: list[Band] = []
    targets: list[Target] = []
    figures: dict[str, float | str] = {}
    for weight_sync in _ways(learner, sampler):
        way = weight_sync.name
        weight_sync.sync(0)
        same_weights, found = same(learner, sampler), speed(weight_sync, learner)
        if quantization != "none":  # its kernels may keep scales in a layout of their own, which is then not compared
            figures["tensors that can't be read"] = same_weights[1].value
            same_weights = same_weights[:1]
        before = Band(name="log-probs, mean difference", value=apart(learner, sampler), low=low, high=high)
        checks = (*same_weights, before, *follows(weight_sync, learner, sampler))
        bands += [Band(name=f"{way}: {each.name}", value=each.value, low=each.low, high=each.high) for each in checks]
        targets += on_gpu(
            Target(name=f"{way}: times a copy", value=found["seconds"] / found["copying"], goal=2.0, at_least=False)
        )
        figures |= {f"{way}: {key}": value for key, value in found.items()}
    free_awake = torch.cuda.mem_get_info()[0] if uses_gpu() else 0
    sleeping = seconds_of(sampler.sleep, repeats=1, warm_up=0)
    free_asleep = torch.cuda.mem_get_info()[0] if uses_gpu() else 0
    waking = seconds_of(sampler.wake, repeats=1, warm_up=0)
    weight_sync.sync(1)
    after = Band(name="log-probs after sleep, mean difference", value=apart(learner, sampler), low=low, high=high)
    memory = {"gib_free_asleep": (free_asleep - free_awake) / 2**30, "seconds_sleep": sleeping, "seconds_wake": waking}
    return Outcome(bands=(*bands, after), targets=tuple(targets), figures={**figures, **memory})


def _ways(learner: Learner, sampler: VllmEngine) -> list[WeightSync]:
    """Return the way that a run takes, if it writes into the engine's parameters, and that of full tensors."""
    chunks, model, groups = learner.chunks, learner.model_config, learner.groups
    chosen, _ = choose_weight_sync(chunks, model, groups, sampler, engine_ranks=1)
    full = FullTensorSync(chunks=chunks, model=model, groups=groups, engine=sampler)
    return [full] if chosen.name == full.name else [chosen, full]


def speed(weight_sync: WeightSync, learner: Learner) -> dict[str, float]:
    """Measure weight syncs after the first, and a copy of as many bytes on the device."""
    seconds = seconds_of(lambda: weight_sync.sync(0), repeats=5, warm_up=1)
    tensors = [tensor for _, tensor in learner.weights()]
    copying = seconds_of(lambda: [tensor.clone() for tensor in tensors], repeats=5, warm_up=1)
    size = sum(tensor.nbytes for tensor in tensors)
    return {"seconds": seconds, "copying": copying, "gigabytes_a_second": size / seconds / _GIGA}


def follows(weight_sync: WeightSync, learner: Learner, sampler: Engine) -> tuple[Band, ...]:
    """Push other weights, then the first ones again. The engine must follow both times, and a swap must be noticed.

    Equal weights in every push would hide one that does nothing, as where a CUDA graph reads the old addresses.
    """
    parameters = [parameter for chunk in learner.chunks for parameter in chunk.parameters()]
    kept = [parameter.detach().clone() for parameter in parameters]
    before = _sampled(sampler)
    with torch.no_grad():
        for parameter in parameters:
            parameter.mul_(1.01)
    weight_sync.sync(1)
    moved, different = _sampled(sampler), len(sampler.compare(learner.weights()).different)
    with torch.no_grad():
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.copy_(value)
    weight_sync.sync(2)
    swapped = dict(learner.weights())
    one, other = (f"model.layers.{layer}.self_attn.o_proj.weight" for layer in (0, 1))
    swapped[one], swapped[other] = swapped[other], swapped[one]
    return (
        Band(name="tensors that differ after moving", value=different, low=0, high=0),
        Band(name="responses that moved", value=_unequal(before, moved), low=len(before), high=len(before)),
        Band(name="responses that did not come back", value=_unequal(before, _sampled(sampler)), low=0, high=0),
        Band(name="tensors that differ of two swapped", value=_different(sampler, swapped), low=2, high=2),
    )


def _different(sampler: Engine, tensors: dict[str, Tensor]) -> int:
    return len(sampler.compare(tensors.items()).different)


def _unequal(some: Sequence[Completion], others: Sequence[Completion]) -> int:
    """Count the completions whose tokens or log-probs differ in any bit."""
    pairs = zip(some, others, strict=True)
    return sum((a.token_ids, a.logprobs) != (b.token_ids, b.logprobs) for a, b in pairs)


def _sampled(sampler: Engine) -> list[Completion]:
    return [completion for group in sampler.generate(_requests()) for completion in group]


def same(learner: Learner, sampler: Engine) -> tuple[Band, ...]:
    """Return the bands that hold if no tensor differs and every one could be compared."""
    compared = sampler.compare(learner.weights())
    return (
        Band(name="tensors that differ", value=len(compared.different), low=0, high=0),
        Band(name="tensors that can't be read", value=len(compared.unread), low=0, high=0),
    )


def apart(learner: Learner, sampler: Engine) -> float:
    """Return the mean difference of log-probs between engine and trainer on what the engine samples."""
    sampled = [
        type(group)(
            prompt=group.prompt,
            completions=completions,
            rewards=(0.0,) * len(completions),
            correct=(False,) * len(completions),
        )
        for group, completions in zip(_asked(), sampler.generate(_requests()), strict=True)
    ]
    batch = batch_of(sampled, learner)
    return (learner.score(batch).logp_R.cpu() - batch.engine_logp_R).abs().mean().item()


def _asked() -> list[RolloutGroup]:
    return models.rollouts(sized(MEDIUM, SMALL).vocab, prompts=8, samples=1, prompt=(20, 60), response=(1, 1))


def _requests() -> list[SamplingRequest]:
    return [
        SamplingRequest(
            token_ids=group.prompt.token_ids,
            num_samples=4,
            seed=number,
            max_tokens=30,
            temperature=1.0,
            stop_token_ids=(0,),
        )
        for number, group in enumerate(_asked())
    ]
