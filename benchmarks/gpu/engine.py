"""Check what surrounds the model: weight syncs to vLLM, checkpoints during training, the whole program."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
from torch import Tensor

from benchmarks.gpu import models
from benchmarks.gpu.models import MEDIUM, SMALL, batch_of, seconds_of, signed_loss
from benchmarks.gpu.outcome import Band, Outcome
from benchmarks.measure import ROOT
from megatron_mcpo.config.config import dump, load
from megatron_mcpo.config.layout import Layout
from megatron_mcpo.distributed import parallel
from megatron_mcpo.distributed.device import device
from megatron_mcpo.mcore.checkpoint import Checkpoints
from megatron_mcpo.mcore.policy import Policy
from megatron_mcpo.rollout.engine import Engine, SamplingRequest
from megatron_mcpo.rollout.vllm_engine import VllmEngine
from megatron_mcpo.rollout.vllm_server import VllmServers
from megatron_mcpo.trainer.engine_check import TOLERANCE
from megatron_mcpo.types import Completion, RolloutGroup
from megatron_mcpo.weights.reshard_sync import FullTensorSync, WeightSync, choose_weight_sync
from tests.support.engine_server import Server

BF16_APART, FP8_APART = (0.0, 0.04), (0.04, TOLERANCE["fp8_per_block"])
"""Least and greatest mean difference of log-probs. On a CPU they were 0.016 in bf16 and 0.126 in FP8; a GPU has other
kernels."""
_GIGA = 1e9


def engine() -> Outcome:
    """Check an engine in this process: its weights bit by bit, its log-probs, seconds, memory while it sleeps."""
    return _in_process("none", BF16_APART)


def engine_fp8() -> Outcome:
    """Check an engine that rounds its layers to FP8. Log-probs as close as in bf16 mean that it did not round."""
    return _in_process("fp8_per_block", FP8_APART)


def _in_process(quantization: Literal["none", "fp8_per_block"], apart: tuple[float, float]) -> Outcome:
    """Check an engine in this process. apart: least and greatest mean difference of log-probs"""
    low, high = apart
    groups = parallel.init(Layout(), seed=0, timeout_seconds=600)
    with TemporaryDirectory() as name:
        folder = Path(name)
        models.save_model(folder, MEDIUM, dtype=torch.bfloat16)
        learner = models.policy(models.settings(folder), groups)
        sampler = VllmEngine(
            folder,
            dtype="bf16",
            quantization=quantization,
            tensor_parallel=1,
            max_model_len=128,
            max_concurrent=64,
            kv_cache_gib=1.0,
            gpu_memory_utilization=0.3,
            distributed=True,
            job_tag="gpu-check",
        )
    weight_sync, why = choose_weight_sync(learner.chunks, learner.model_config, groups, sampler, engine_ranks=1)
    weight_sync.sync(0)
    figures = _speed(weight_sync, learner)
    same_weights, before_sleep = _same_weights(learner, sampler), _apart(learner, sampler)
    if quantization != "none":  # its kernels may keep scales in a layout of their own, which is then not compared
        figures["tensors that can't be read"] = same_weights[1].value
        same_weights = same_weights[:1]
    follows = _follows(weight_sync, learner, sampler)
    free_awake = torch.cuda.mem_get_info()[0] if device().type == "cuda" else 0
    sampler.sleep()
    free_asleep = torch.cuda.mem_get_info()[0] if device().type == "cuda" else 0
    sampler.wake()
    weight_sync.sync(1)
    return Outcome(
        bands=(
            *same_weights,
            *follows,
            Band(name="log-probs, mean difference", value=before_sleep, low=low, high=high),
            Band(name="log-probs after sleep, mean difference", value=_apart(learner, sampler), low=low, high=high),
        ),
        figures={
            "weight_sync": weight_sync.name + (f" ({why})" if why else ""),
            "gib_free_asleep": (free_asleep - free_awake) / 2**30,
            **figures,
        },
    )


def servers() -> Outcome:
    """Check weight syncs to a server, which is a process of its own on the same GPU.

    NCCL refuses two ranks of one host on one GPU. Both sides therefore claim to be different hosts and communicate
    through sockets, which is slower than between GPUs.
    """
    os.environ["NCCL_HOSTID"] = "trainer"
    groups = parallel.init(Layout(), seed=0, timeout_seconds=600)
    with TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        models.save_model(folder, MEDIUM, dtype=torch.bfloat16)
        config = models.settings(folder, engine={"gpu_memory_utilization": 0.3, "kv_cache_gib": 1.0})
        (folder / "config.toml").write_text(dump(config))
        learner = models.policy(config, groups)
        # Start it last: vLLM measures the GPU's memory at its start and requires that no one else changes it meanwhile.
        server = Server(folder / "config.toml", folder / "log", {"NCCL_HOSTID": "server"})
        stack.callback(server.kill)
        server.wait_ready()
        sampler = VllmServers(
            [server.url],
            learner.model_config,
            max_model_len=config.rollout.max_prompt_tokens + config.rollout.max_response_tokens,
            max_concurrent=64,
            device=device(),
            tag="gpu-check",
        )
        stack.callback(sampler.close)
        weight_sync = FullTensorSync(chunks=learner.chunks, model=learner.model_config, groups=groups, engine=sampler)
        weight_sync.sync(0)
        figures = _speed(weight_sync, learner)
        same_weights, apart = _same_weights(learner, sampler), _apart(learner, sampler)
        follows = _follows(weight_sync, learner, sampler)
    return Outcome(
        bands=(
            *same_weights,
            *follows,
            Band(name="log-probs, mean difference", value=apart, low=BF16_APART[0], high=BF16_APART[1]),
        ),
        figures=figures,
    )


def _speed(weight_sync: WeightSync, learner: Policy) -> dict[str, float | str]:
    """Measure weight syncs after the first."""
    seconds = seconds_of(lambda: weight_sync.sync(0), repeats=5, warm_up=1)
    size = sum(tensor.nbytes for _, tensor in learner.weights())
    return {"seconds_push": seconds, "gigabytes_a_second": size / seconds / _GIGA}


def _follows(weight_sync: WeightSync, learner: Policy, sampler: Engine) -> tuple[Band, ...]:
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
    one, other = (f"model.layers.{layer}.mlp.gate_proj.weight" for layer in (0, 1))
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


def _same_weights(learner: Policy, sampler: Engine) -> tuple[Band, ...]:
    """Return the bands that hold if no tensor differs and every one could be compared."""
    compared = sampler.compare(learner.weights())
    return (
        Band(name="tensors that differ", value=len(compared.different), low=0, high=0),
        Band(name="tensors that can't be read", value=len(compared.unread), low=0, high=0),
    )


def _apart(learner: Policy, sampler: Engine) -> float:
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
    return models.rollouts(MEDIUM.vocab, prompts=8, samples=1, prompt=(20, 60), response=(1, 1))


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


def checkpoint() -> Outcome:
    """Check that a checkpoint written while training continues holds the state at the time of the call."""
    groups = parallel.init(Layout(), seed=0, timeout_seconds=600)
    with TemporaryDirectory() as name:
        folder = Path(name, "model")
        models.save_model(folder, SMALL, dtype=torch.bfloat16)
        learner = models.policy(models.settings(folder), groups)
        sampled = models.rollouts(SMALL.vocab, prompts=6, samples=4, prompt=(20, 60), response=(1, 30))
        batch = batch_of(sampled, learner)
        learner.update(batch, signed_loss(batch))
        saved = {each: tensor.clone() for each, tensor in learner.weights()}
        kept = _checkpoints(learner, Path(name, "checkpoints"))
        kept.save(1, {})
        following = learner.update(batch, signed_loss(batch))
        kept.finish()
        fresh = models.policy(models.settings(folder), groups)
        _checkpoints(fresh, Path(name, "checkpoints")).load()
    different = sum(not torch.equal(tensor, saved[each]) for each, tensor in fresh.weights())
    again = fresh.update(batch, signed_loss(batch))
    return Outcome(
        bands=(
            Band(name="tensors that differ", value=different, low=0, high=0),
            Band(
                name="gradient norm of the next update, relative difference",
                value=abs(again.grad_norm / following.grad_norm - 1),
                low=0.0,
                high=1e-3,
            ),
        )
    )


def _checkpoints(learner: Policy, folder: Path) -> Checkpoints:
    return Checkpoints(
        policy=learner,
        folder=folder,
        vocabulary="tokens",
        assets={},
        keep=2,
        keep_every=0,
        in_background=device().type != "cpu",
        say=print,
    )


def conversion() -> Outcome:
    """Check the conversion to Megatron's format and back, with the layers that the trainer has on this machine."""
    with TemporaryDirectory() as name:
        models.save_model(Path(name), SMALL, dtype=torch.bfloat16)
        command = [sys.executable, "-m", "megatron_mcpo", "convert", "check", name, "--layouts", "tp2pp2", "--json"]
        output = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
    row = json.loads(output)
    return Outcome(
        bands=(
            Band(name="bits that differ", value=row["bits"], low=0, high=0),
            Band(name="largest difference of logits", value=row["logits"], low=0.0, high=1e-4),
        )
    )


def program() -> Outcome:
    """Run the quick start's first steps as a user starts them, with every weight sync verified."""
    config = ROOT / "examples" / "quickstart" / "config.toml"
    model = ROOT / load(config).model.path
    if not model.exists():
        return Outcome(skipped=f"{model}: no such folder; make it with `python tools/embedded_model.py {model}`")
    with TemporaryDirectory() as name:
        arguments = ["--run.dir", name, "--run.steps", "3", "--engine.verify_sync", "true", "--evaluation.items", "4"]
        finished = subprocess.run(
            [sys.executable, "-m", "megatron_mcpo", "train", str(config), *arguments],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if finished.returncode:
            raise RuntimeError(finished.stdout[-2000:])
        (lines,) = [path.read_text().splitlines() for path in Path(name).glob("*/metrics.jsonl")]
    steps = [json.loads(line) for line in lines]
    apart = max(step["engine/logprob_diff_mean"] for step in steps)
    return Outcome(
        bands=(
            Band(name="steps", value=len(steps), low=3, high=3),
            Band(name="engine and trainer, mean difference of log-probs", value=apart, low=0.0, high=0.1),
        ),
        figures={"seconds_step": steps[-1]["time/step"], "peak_gib": steps[-1]["memory/peak_gib"]},
    )
