"""Measure speed and memory on one GPU: kernels against their lower bound, steps against the device's own rates."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu import models
from benchmarks.gpu.models import QWEN3_1_7B, QWEN3_8B_LAYERS, SMALL, Shape, on_gpu, seconds_of, signed_loss, sized
from benchmarks.gpu.outcome import Band, Outcome, Target
from benchmarks.measure import forget_peak, memory
from megatron_mcpo.algo.contrastive import contrastive
from megatron_mcpo.config.hf_config import from_folder
from megatron_mcpo.config.model import ModelConfig
from megatron_mcpo.config.schema import ContrastiveConfig
from megatron_mcpo.data.batch import make_batch
from megatron_mcpo.distributed import parallel
from megatron_mcpo.distributed.device import device, uses_gpu
from megatron_mcpo.mcore.logprob import linear_logprobs
from megatron_mcpo.planner.timing import attention_flops, layer_flops
from megatron_mcpo.types import RolloutLabels

TERA, GIGA = 1e12, 1e9
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "B200": 2250.0}
"""Dense bf16 TFLOP/s of the data sheets, for the model FLOPs utilisation (MFU)."""
MFU_GOAL = 0.45
"""What good code reaches with the shapes of Qwen3-1.7B and larger ones."""


def ceilings() -> Outcome:
    """Measure the device's rates for the planner: products of a layer, causal attention, a large copy."""
    tokens, square, (inner, outer) = sized((8192, 8192, (4096, 12288)), (256, 256, (128, 384)))
    products = {}
    for name, (rows, columns) in {"square": (square, square), "layer": (inner, outer)}.items():
        left, right = (_random(tokens, rows), _random(rows, columns))
        taken = seconds_of(lambda left=left, right=right: left @ right)  # type: ignore[misc]
        products[name] = 2 * tokens * rows * columns / taken / TERA
    heads, length = sized((32, 4096), (2, 128))
    query, key, value = (_random(2, heads, length, 128).requires_grad_() for _ in range(3))
    grad = _random(2, heads, length, 128)
    forward = seconds_of(lambda: F.scaled_dot_product_attention(query, key, value, is_causal=True))
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    backward = seconds_of(lambda: torch.autograd.grad(out, (query, key, value), grad, retain_graph=True))
    flops = 2 * heads * 2 * length * length * 128  # the causal half of two products
    source = torch.empty(sized(2**30, 2**24), dtype=torch.uint8, device=device())
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / seconds_of(lambda: target.copy_(source)) / TERA
    rates = {
        "gemm_tflops": products["layer"],
        "attention_forward_tflops": flops / forward / TERA,
        "attention_backward_tflops": 2.5 * flops / backward / TERA,
        "copy_tbs": copied,
    }
    return Outcome(figures={"gemm_square_tflops": products["square"], **rates}, rates=rates)


def logprob() -> Outcome:
    """Measure log-probs of 8,192 tokens of 151,936 words, forward and backward, against four products and float64."""
    rows, vocab, hidden = sized((8192, 151_936, 2048), (512, 4096, 64))
    groups = models.alone()
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
    before, most = _peak_bytes(once)
    extra = most - before - hidden_RH.nbytes - weight_VH.nbytes
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
            *on_gpu(Band(name="extra memory, GiB", value=extra / 2**30, low=0.0, high=0.5)),
            Band(name="mean error", value=error.mean().item(), low=0.0, high=0.02),
        ),
        targets=on_gpu(Target(name="time over four products", value=seconds / floor, goal=1.15, at_least=False)),
        figures={"seconds": seconds, "seconds_floor": floor},
    )


def contrastive_terms() -> Outcome:
    """Measure loss and gradient of N rollouts of five domains, against the products of anchors with all rollouts."""
    figures: dict[str, float | str] = {}
    bands = []
    for n in sized((4096, 8192, 65536), (64, 128, 256)):
        z_MD = F.normalize(torch.randn(n, 512, device=device()), dim=1)
        prompt_M = torch.arange(n, device=device()) // 8
        labels = RolloutLabels(domain_M=prompt_M % 5, prompt_M=prompt_M, correct_M=torch.rand(n, device=device()) < 0.5)
        anchors = int(labels.correct_M.sum())
        some_AD, tile_AM = z_MD[: min(anchors, 4096)], torch.rand(min(anchors, 4096), n, device=device())
        products = (lambda: some_AD @ z_MD.T, lambda: tile_AM @ z_MD, lambda: tile_AM.T @ some_AD)  # noqa: B023
        floor = sum(seconds_of(product) for product in products) * anchors / len(some_AD)
        terms = lambda: contrastive(z_MD, labels, ContrastiveConfig())  # noqa: B023, E731
        before, most = _peak_bytes(terms)
        extra, seconds = most - before, seconds_of(terms, repeats=3, warm_up=1)
        figures |= {f"seconds_{n}": seconds, f"seconds_floor_{n}": floor}
        bands.append(Band(name=f"extra memory of {n}, GiB", value=extra / 2**30, low=0.0, high=1.0))
    targets = on_gpu(
        Target(name="seconds of the largest", value=seconds, goal=0.02, at_least=False),
        Target(name="extra GiB of the largest", value=extra / 2**30, goal=2.0, at_least=False),
    )
    return Outcome(bands=on_gpu(*bands), targets=targets, figures=figures)


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
    faster = {kind: seconds["off"] / seconds[kind] for kind in ("blockwise", "tensorwise")}
    return Outcome(
        bands=(
            Band(name="blockwise, times faster", value=faster["blockwise"], low=1.05, high=2.0),
            Band(name="tensorwise, times faster", value=faster["tensorwise"], low=1.12, high=2.0),
        ),
        targets=(
            Target(name="blockwise", value=faster["blockwise"], goal=1.12, at_least=True),
            Target(name="tensorwise", value=faster["tensorwise"], goal=1.25, at_least=True),
        ),
        figures={f"seconds_{kind}": taken for kind, taken in seconds.items()},
    )


def export() -> Outcome:
    """Check that all exported tensors equal the loaded ones in every bit, and measure the export."""
    groups = models.alone()
    with TemporaryDirectory() as name:
        folder = Path(name)
        saved = models.save_model(folder, sized(QWEN3_1_7B, SMALL), dtype=torch.bfloat16).state_dict()
        learner = models.policy(models.settings(folder), groups)
    different = sum(not torch.equal(tensor, saved[each]) for each, tensor in learner.weights())
    size = sum(tensor.nbytes for _, tensor in learner.weights())
    seconds = seconds_of(lambda: sum(1 for _ in learner.weights()))
    copying = seconds_of(lambda: [tensor.clone() for tensor in saved.values()])
    return Outcome(
        bands=(
            Band(name="tensors that differ", value=different, low=0, high=0),
            *on_gpu(Band(name="times a copy's seconds", value=seconds / copying, low=0.0, high=3.0)),
        ),
        targets=on_gpu(Target(name="share of a copy's rate", value=copying / seconds, goal=0.6, at_least=True)),
        figures={"seconds": seconds, "gigabytes_a_second": size / seconds / GIGA},
    )


def _step(shape: Shape, model_keys: dict[str, str | bool]) -> Outcome:
    """Measure an update over four micro-batches, and the share of the device's bf16 rate in the model's own products.

    These are layers, causal attention and logits of response tokens, three times forward, none for recomputing.
    """
    parallel.destroy()
    groups = models.alone()
    half, shape = sized((2048, shape), (32, SMALL))  # half of a rollout's tokens are its prompt
    with TemporaryDirectory() as name:
        folder = Path(name)
        models.save_model(folder, shape, dtype=torch.bfloat16)
        config = models.settings(folder, tokens=4 * half, prompt=half, response=half, model=model_keys)
        model = from_folder(folder)
        learner = models.policy(config, groups)
    sampled = models.rollouts(shape.vocab, prompts=4, samples=2, prompt=(half, half), response=(half, half))
    # Every rollout has its own copy of the prompt, as `training_flops` counts them.
    batch = make_batch(sampled, num_data_ranks=1, data_rank=0, share_prompts=False)
    loss = signed_loss(batch)
    update = lambda: learner.update(batch, loss)  # noqa: E731
    _, most = _peak_bytes(update)
    seconds = seconds_of(update, repeats=5, warm_up=1)
    share = utilisation(training_flops(model, rollouts=len(batch), length=2 * half, response=half), seconds)
    return Outcome(
        bands=on_gpu(Band(name="model FLOPs utilisation", value=share, low=0.2, high=0.8)),
        targets=on_gpu(Target(name="MFU", value=share, goal=MFU_GOAL, at_least=True)),
        figures={
            "seconds": seconds,
            "tokens_a_second": batch.num_tokens / seconds,
            "peak_gib": most / 2**30,
        },
    )


def training_flops(model: ModelConfig, *, rollouts: int, length: int, response: float) -> float:
    """Count the FLOPs of one forward and one backward pass, which is twice as much."""
    return 3.0 * forward_flops(model, rollouts=rollouts, length=length, response=response)


def forward_flops(model: ModelConfig, *, rollouts: int, length: int, response: float) -> float:
    """Count the FLOPs of one forward pass with the logits of response tokens. length: of prompt and response"""
    layers = length * model.num_layers * (layer_flops(model) + attention_flops(model, length))
    return rollouts * (layers + 2.0 * response * model.hidden_size * model.vocab_size)


def utilisation(flops: float, seconds: float) -> float:
    """Return the share of this GPU's dense bf16 rate; NaN on a device whose rate is not known."""
    name = torch.cuda.get_device_name() if uses_gpu() else ""
    peak = next((rate for kind, rate in PEAK_TFLOPS.items() if kind in name), float("nan"))
    return flops / seconds / (peak * TERA)


def _peak_bytes(work: Callable[[], object]) -> tuple[int, int]:
    """Return the bytes in use before `work`, and the most while it runs: of tensors, on a CPU of all."""
    models.wait()
    if uses_gpu():
        torch.cuda.reset_peak_memory_stats()
    else:
        forget_peak()
    before = models.bytes_in_use()
    work()
    models.wait()
    return before, torch.cuda.max_memory_allocated() if uses_gpu() else memory("VmHWM")


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, device=device(), dtype=torch.bfloat16)
