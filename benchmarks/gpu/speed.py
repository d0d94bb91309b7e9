"""Measure speed and memory on one GPU: kernels against their lower bound, steps against the device's own rates."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu import models
from benchmarks.gpu.models import QWEN3_1_7B, QWEN3_8B_LAYERS, Shape, seconds_of, signed_loss
from benchmarks.gpu.outcome import Band, Outcome
from megatron_mcpo.algo.contrastive import contrastive
from megatron_mcpo.config.hf_config import from_folder
from megatron_mcpo.config.layout import Layout
from megatron_mcpo.config.model import ModelConfig
from megatron_mcpo.config.schema import ContrastiveConfig
from megatron_mcpo.data.batch import make_batch
from megatron_mcpo.distributed import parallel
from megatron_mcpo.distributed.device import device
from megatron_mcpo.mcore.logprob import linear_logprobs
from megatron_mcpo.planner.timing import attention_flops, layer_flops
from megatron_mcpo.types import RolloutLabels

_TERA, _GIGA = 1e12, 1e9
_LENGTH, _TOKENS = 4096, 8192
"""Tokens of a rollout in the steps, half of them prompt, and of a micro-batch."""
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "B200": 2250.0}
"""Dense bf16 TFLOP/s of the data sheets, for the model FLOPs utilisation."""


def ceilings() -> Outcome:
    """Measure the device's rates for the planner: products of a layer, causal attention, a large copy."""
    products = {}
    for name, (inner, outer) in {"8192": (8192, 8192), "layer": (4096, 12288)}.items():
        left, right = (_random(_TOKENS, inner), _random(inner, outer))
        taken = seconds_of(lambda left=left, right=right: left @ right)  # type: ignore[misc]
        products[name] = 2 * _TOKENS * inner * outer / taken / _TERA
    query, key, value = (_random(2, 32, _LENGTH, 128).requires_grad_() for _ in range(3))
    grad = _random(2, 32, _LENGTH, 128)
    forward = seconds_of(lambda: F.scaled_dot_product_attention(query, key, value, is_causal=True))
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    backward = seconds_of(lambda: torch.autograd.grad(out, (query, key, value), grad, retain_graph=True))
    flops = 2 * 32 * 2 * _LENGTH * _LENGTH * 128  # the causal half of two products
    source = torch.empty(2**30, dtype=torch.uint8, device=device())
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / seconds_of(lambda: target.copy_(source)) / _TERA
    rates = {
        "gemm_tflops": products["layer"],
        "attention_forward_tflops": flops / forward / _TERA,
        "attention_backward_tflops": 2.5 * flops / backward / _TERA,
        "copy_tbs": copied,
    }
    return Outcome(figures={"gemm_8192_tflops": products["8192"], **rates}, rates=rates)


def logprob() -> Outcome:
    """Measure log-probs of 8,192 tokens of 151,936 words, forward and backward, against four products and float64."""
    rows, vocab, hidden = 8192, 151_936, 2048
    groups = parallel.init(Layout(), seed=0, timeout_seconds=600)
    hidden_RH = _random(rows, hidden).requires_grad_()
    weight_VH = (_random(vocab, hidden) / 30).requires_grad_()
    target_R = torch.randint(vocab, (rows,), device=device())

    def once() -> Tensor:
        hidden_RH.grad = weight_VH.grad = None
        logp_R, _ = linear_logprobs(hidden_RH, weight_VH, target_R, first_token=0, temperature=1.0, group=groups.tensor)
        logp_R.sum().backward()
        return logp_R.detach()

    some = slice(0, 256)
    logits = hidden_RH.detach()[some].double() @ weight_VH.detach().double().T
    exact_R = logits.log_softmax(-1).gather(1, target_R[some, None]).squeeze(1)
    error = (once()[some].double() - exact_R).abs()
    extra = _peak_bytes(once) - hidden_RH.nbytes - weight_VH.nbytes
    grad_RV = torch.empty(rows, vocab // 8, dtype=torch.bfloat16, device=device()).normal_()
    part_VH = weight_VH.detach()[: vocab // 8]
    floor = 8 * (
        2 * seconds_of(lambda: hidden_RH.detach() @ part_VH.T)
        + seconds_of(lambda: grad_RV @ part_VH)
        + seconds_of(lambda: grad_RV.T @ hidden_RH.detach())
    )
    seconds = seconds_of(once)
    return Outcome(
        bands=(
            Band(name="extra memory, GiB", value=extra / 2**30, low=0.0, high=0.5),
            Band(name="mean error", value=error.mean().item(), low=0.0, high=0.02),
        ),
        figures={"seconds": seconds, "seconds_floor": floor, "time_over_floor": seconds / floor},
    )


def contrastive_terms() -> Outcome:
    """Measure loss and gradient of N rollouts of five domains, against the products of anchors with all rollouts."""
    figures: dict[str, float | str] = {}
    bands = []
    for n in (4096, 8192, 65536):
        z_MD = F.normalize(torch.randn(n, 512, device=device()), dim=1)
        prompt_M = torch.arange(n, device=device()) // 8
        labels = RolloutLabels(domain_M=prompt_M % 5, prompt_M=prompt_M, correct_M=torch.rand(n, device=device()) < 0.5)
        anchors = int(labels.correct_M.sum())
        some_AD, tile_AM = z_MD[: min(anchors, 4096)], torch.rand(min(anchors, 4096), n, device=device())
        products = (lambda: some_AD @ z_MD.T, lambda: tile_AM @ z_MD, lambda: tile_AM.T @ some_AD)  # noqa: B023
        floor = sum(seconds_of(product) for product in products) * anchors / len(some_AD)
        terms = lambda: contrastive(z_MD, labels, ContrastiveConfig())  # noqa: B023, E731
        extra = _peak_bytes(terms)
        figures |= {f"seconds_{n}": seconds_of(terms, repeats=3, warm_up=1), f"seconds_floor_{n}": floor}
        bands.append(Band(name=f"extra memory of {n}, GiB", value=extra / 2**30, low=0.0, high=1.0))
    return Outcome(bands=tuple(bands), figures=figures)


def step_1_7b() -> Outcome:
    """Measure an update of a model with Qwen3-1.7B's shapes."""
    return _step(QWEN3_1_7B, {})


def step_8b() -> Outcome:
    """Measure an update of eight layers of Qwen3-8B's shapes."""
    return _step(QWEN3_8B_LAYERS, {})


def fp8_speed() -> Outcome:
    """Measure how much faster an update is if six of eight layers of Qwen3-8B's shapes are in FP8."""
    if problem := models.fp8_problem():
        return Outcome(skipped=problem)
    seconds = {
        kind: float(_step(QWEN3_8B_LAYERS, {"fp8": kind}).figures["seconds"])
        for kind in ("off", "blockwise", "tensorwise")
    }
    return Outcome(
        bands=(
            Band(name="blockwise, times faster", value=seconds["off"] / seconds["blockwise"], low=1.05, high=2.0),
            Band(name="tensorwise, times faster", value=seconds["off"] / seconds["tensorwise"], low=1.12, high=2.0),
        ),
        figures={f"seconds_{kind}": taken for kind, taken in seconds.items()},
    )


def export() -> Outcome:
    """Check that all exported tensors equal the loaded ones in every bit, and measure the export."""
    groups = parallel.init(Layout(), seed=0, timeout_seconds=600)
    with TemporaryDirectory() as name:
        folder = Path(name)
        saved = models.save_model(folder, QWEN3_1_7B, dtype=torch.bfloat16).state_dict()
        learner = models.policy(models.settings(folder), groups)
    different = sum(not torch.equal(tensor, saved[each]) for each, tensor in learner.weights())
    size = sum(tensor.nbytes for _, tensor in learner.weights())
    seconds = seconds_of(lambda: sum(1 for _ in learner.weights()))
    copying = seconds_of(lambda: [tensor.clone() for tensor in saved.values()])
    return Outcome(
        bands=(
            Band(name="tensors that differ", value=different, low=0, high=0),
            Band(name="times a copy's seconds", value=seconds / copying, low=0.0, high=3.0),
        ),
        figures={"seconds": seconds, "gigabytes_a_second": size / seconds / _GIGA},
    )


def _step(shape: Shape, model_keys: dict[str, str]) -> Outcome:
    """Measure an update over four micro-batches, and the share of the device's bf16 rate in the model's own products.

    These are layers, causal attention and logits of response tokens, three times forward, none for recomputing.
    """
    parallel.destroy()
    groups = parallel.init(Layout(), seed=0, timeout_seconds=600)
    half = _LENGTH // 2
    with TemporaryDirectory() as name:
        folder = Path(name)
        models.save_model(folder, shape, dtype=torch.bfloat16)
        config = models.settings(folder, tokens=_TOKENS, prompt=half, response=half, model=model_keys)
        model = from_folder(folder)
        learner = models.policy(config, groups)
    sampled = models.rollouts(shape.vocab, prompts=4, samples=2, prompt=(half, half), response=(half, half))
    # Every rollout has its own copy of the prompt, as `training_flops` counts them.
    batch = make_batch(sampled, num_data_ranks=1, data_rank=0, share_prompts=False)
    loss = signed_loss(batch)
    torch.cuda.reset_peak_memory_stats()
    seconds = seconds_of(lambda: learner.update(batch, loss), repeats=5, warm_up=2)
    peak = next((rate for kind, rate in PEAK_TFLOPS.items() if kind in torch.cuda.get_device_name()), float("nan"))
    share = training_flops(model, rollouts=len(batch), length=_LENGTH, response=half) / seconds / (peak * _TERA)
    return Outcome(
        bands=(Band(name="model FLOPs utilisation", value=share, low=0.2, high=0.8),),
        figures={
            "seconds": seconds,
            "tokens_a_second": batch.num_tokens / seconds,
            "model_flops_utilisation": share,
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        },
    )


def training_flops(model: ModelConfig, *, rollouts: int, length: int, response: int) -> float:
    """Count the FLOPs of one forward and one backward pass, which is twice as much."""
    layers = length * model.num_layers * (layer_flops(model) + attention_flops(model, length))
    return 3.0 * rollouts * (layers + 2.0 * response * model.hidden_size * model.vocab_size)


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, device=device(), dtype=torch.bfloat16)


def _peak_bytes(work: object) -> int:
    assert callable(work)
    models.wait()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    models.wait()
    return torch.cuda.max_memory_allocated() - before
