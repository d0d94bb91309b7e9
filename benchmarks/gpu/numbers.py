"""Compare what the trainer computes on this device with float64, or with another way of computing it."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu import models
from benchmarks.gpu.models import (
    FEW_EXPERTS,
    MEDIUM,
    QWEN3_30B_A3B_LAYERS,
    SMALL,
    Shape,
    batch_of,
    cosine,
    norm,
    seconds_of,
    signed_loss,
    sized,
)
from benchmarks.gpu.outcome import Band, Outcome, Target
from megatron_mcpo.config.config import Config
from megatron_mcpo.config.schema import Fp8
from megatron_mcpo.distributed.device import device
from megatron_mcpo.distributed.parallel import Groups
from megatron_mcpo.mcore.model import unwrap
from megatron_mcpo.mcore.packing import num_micro_batches
from megatron_mcpo.mcore.policy import Policy
from megatron_mcpo.mcore.spec import uses_transformer_engine


def logprobs() -> Outcome:
    """Compare scores in bf16 with transformers in float64, packed together and one by one."""
    groups = models.alone()
    with TemporaryDirectory() as name:
        folder = Path(name)
        models.save_model(folder, SMALL, dtype=torch.bfloat16)
        sampled = models.rollouts(SMALL.vocab, prompts=6, samples=4, prompt=(20, 60), response=(1, 30))
        scores = []
        for tokens in (1024, 96):
            learner = models.policy(models.settings(folder, tokens=tokens), groups)
            scores.append(learner.score(batch_of(sampled, learner)).logp_R)
        exact_R = models.exact_logprobs(folder, sampled)
    error_R, apart_R = (scores[0].double() - exact_R).abs(), (scores[0] - scores[1]).abs()
    return Outcome(
        bands=(
            Band(name="mean error", value=error_R.mean().item(), low=1e-5, high=0.02),
            Band(name="largest error", value=error_R.max().item(), low=1e-5, high=0.2),
            Band(name="packed or one by one, largest difference", value=apart_R.max().item(), low=0.0, high=0.1),
        ),
    )


def recompute() -> Outcome:
    """Compare gradients with full and selective recompute to those without."""
    groups = models.alone()
    found = {kind: _learn(groups, SMALL, {"recompute": kind})[2] for kind in ("none", "selective", "full")}
    return Outcome(
        bands=tuple(
            Band(
                name=f"{kind}: relative difference",
                value=norm(found[kind] - found["none"]) / norm(found["none"]),
                low=0.0,
                high=1e-2,
            )
            for kind in ("selective", "full")
        )
    )


def fp8() -> Outcome:
    """Compare log-probs, loss and gradient of FP8 layers with bf16; too close means that FP8 is not on."""
    if problem := models.fp8_problem():
        return Outcome(skipped=problem)
    groups = models.alone()
    loss, logp_R, gradient = _learn(groups, MEDIUM, {})
    bands = []
    recipes: tuple[Fp8, ...] = ("blockwise", "tensorwise")
    for recipe in recipes:
        loss_8, logp_8_R, gradient_8 = _learn(groups, MEDIUM, {"fp8": recipe})
        bands += [
            Band(
                name=f"{recipe}: log-probs, mean difference",
                value=(logp_8_R - logp_R).abs().mean().item(),
                low=1e-4,
                high=0.05,
            ),
            Band(name=f"{recipe}: cosine of gradients", value=cosine(gradient, gradient_8), low=0.95, high=0.9999),
            Band(
                name=f"{recipe}: ratio of gradient norms",
                value=norm(gradient_8) / norm(gradient),
                low=0.95,
                high=1.05,
            ),
            Band(name=f"{recipe}: loss", value=abs(loss_8 - loss), low=0.0, high=0.02),
        ]
    return Outcome(bands=tuple(bands))


def fp8_products() -> Outcome:
    """Compare all three products of a linear layer with fp32, for each recipe, in the Frobenius norm."""
    if problem := models.fp8_problem():
        return Outcome(skipped=problem)
    import transformer_engine.pytorch as te
    from transformer_engine.common import recipe as recipes

    kinds = {
        "tensorwise": recipes.Float8CurrentScaling(fp8_format=recipes.Format.HYBRID),
        "blockwise": recipes.Float8BlockScaling(fp8_format=recipes.Format.E4M3),
    }
    tokens, inner, outer = 4096, 2048, 6144
    torch.manual_seed(0)
    linear = te.Linear(inner, outer, bias=False, params_dtype=torch.bfloat16, device="cuda")
    x = torch.randn(tokens, inner, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(tokens, outer, device="cuda", dtype=torch.bfloat16)
    weight_32, x_32, grad_32 = (each.detach().float() for each in (linear.weight, x, grad))
    exact = (x_32 @ weight_32.T, grad_32 @ weight_32, grad_32.T @ x_32)
    bands = []
    for kind, recipe in kinds.items():
        linear.weight.grad = x.grad = None
        with te.fp8_autocast(enabled=True, fp8_recipe=recipe):
            out = linear(x)
        out.backward(grad)
        found = {"output": out, "input's gradient": x.grad, "weight's gradient": linear.weight.grad}
        for (name, product), right in zip(found.items(), exact, strict=True):
            error = norm(product.detach().float() - right) / norm(right)
            bands.append(Band(name=f"{kind}: error of the {name}", value=error, low=0.015, high=0.09))
    return Outcome(bands=tuple(bands))


def grouped_experts() -> Outcome:
    """Compare all experts of a layer of Qwen3-30B-A3B's shapes, some without tokens, with float64; and their gradient.

    The gradients of their weights are in the row `experts`.
    """
    shape = replace(sized(QWEN3_30B_A3B_LAYERS, FEW_EXPERTS), layers=1)
    with TemporaryDirectory() as name:
        models.save_model(Path(name), shape, dtype=torch.bfloat16)
        frozen = models.reference(models.settings(Path(name)), models.alone())
    weights = dict(frozen.weights())
    torch.manual_seed(0)
    counts_E = torch.randint(sized(512, 32), (shape.experts,)) * (torch.rand(shape.experts) < 0.9)
    x_NH = torch.randn(int(counts_E.sum()), shape.hidden, device=device()).bfloat16().requires_grad_()
    weight_N, grad_NH = torch.rand(len(x_NH), device=device()), torch.randn_like(x_NH)
    experts = unwrap(frozen.chunks[0]).decoder.layers[0].mlp.experts
    out_NH, _ = experts(x_NH, counts_E.to(device()), weight_N)
    out_NH.backward(grad_NH)
    exact_NH = x_NH.detach().double().requires_grad_()
    outs = []
    for number, part in enumerate(exact_NH.split(counts_E.tolist())):
        gate, up, down = (
            weights[f"model.layers.0.mlp.experts.{number}.{kind}_proj.weight"].double()
            for kind in ("gate", "up", "down")
        )
        outs.append((F.silu(part @ gate.T) * (part @ up.T)) @ down.T)
    (torch.cat(outs) * weight_N[:, None]).backward(grad_NH.double())
    assert x_NH.grad is not None and exact_NH.grad is not None
    expected = torch.cat(outs).detach() * weight_N[:, None]
    pairs = {"output": (out_NH.detach(), expected), "input's gradient": (x_NH.grad, exact_NH.grad)}
    return Outcome(
        bands=tuple(
            Band(name=f"error of the {kind}", value=norm(found.double() - exact) / norm(exact), low=1e-5, high=0.02)
            for kind, (found, exact) in pairs.items()
        ),
        figures={"experts": type(experts).__name__, "without tokens": int((counts_E == 0).sum())},
    )


def short_rollouts() -> Outcome:
    """Measure packs of 20 to 60 short rollouts: rotary embedding fused or not, and against packs of two long ones."""
    groups, shape = models.alone(), sized(MEDIUM, SMALL)
    tokens, prompt, response = sized((8192, (40, 120), (40, 240)), (512, (4, 8), (4, 24)))
    half = tokens // 4
    with TemporaryDirectory() as name:
        models.save_model(Path(name), shape, dtype=torch.bfloat16)
        learner = models.policy(models.settings(Path(name), tokens=tokens, prompt=half, response=half), groups)
    short, long = (
        batch_of(models.rollouts(shape.vocab, prompts=number, samples=8, prompt=p, response=r), learner)
        for number, p, r in ((20, prompt, response), (1, (half, half), (half, half)))
    )
    scores, seconds = {}, {}
    for way in ("fused", "unfused") if uses_transformer_engine() else ("unfused",):
        for module in learner.chunks[0].modules():
            if hasattr(module, "config"):
                module.config.apply_rope_fusion = way == "fused"
        scores[way] = learner.score(short).logp_R
        seconds[way] = seconds_of(lambda: learner.backward(short, signed_loss(short)), repeats=5, warm_up=2)
        if len(scores) == 1:  # the way that a run takes
            seconds["long"] = seconds_of(lambda: learner.backward(long, signed_loss(long)), repeats=5, warm_up=2)
    best = next(iter(scores))
    packs = num_micro_batches(short, max_tokens=tokens, layout=groups.layout)
    pace = (short.num_tokens / seconds[best]) / (long.num_tokens / seconds["long"])
    figures: dict[str, float | str] = {f"seconds_{way}": taken for way, taken in seconds.items()}
    figures |= {"rollouts_a_pack": len(short) / packs, "tokens_a_second_over_those_of_long_ones": pace}
    if best == "unfused":
        return Outcome(figures=figures)
    apart_R = (scores["fused"] - scores["unfused"]).abs()
    return Outcome(
        bands=(
            Band(name="log-probs, mean difference", value=apart_R.mean().item(), low=0.0, high=0.02),
            Band(name="log-probs, largest difference", value=apart_R.max().item(), low=0.0, high=0.2),
        ),
        targets=(
            Target(name="fused, times faster", value=seconds["unfused"] / seconds["fused"], goal=1.5, at_least=True),
        ),
        figures=figures,
    )


def offload() -> Outcome:
    """Check that keeping optimizer and reference in host memory changes no bit; measure seconds and memory of both."""
    models.make_deterministic()  # else two runs of the same updates may differ, and the comparison shows nothing
    groups, shape = models.alone(), sized(MEDIUM, SMALL)
    with TemporaryDirectory() as name:
        folder = Path(name)
        models.save_model(folder, shape, dtype=torch.bfloat16)
        kept, moved = (
            models.settings(folder, model={"offload_reference": on}, optimizer={"offload": on}) for on in (False, True)
        )
        expected, seconds, held = _updated(kept, groups, shape)
        again, _, _ = _updated(kept, groups, shape)
        found, seconds_moved, held_moved = _updated(moved, groups, shape)
        logp_R, scoring, weights = _scored(kept, groups, shape)
        logp_moved_R, scoring_moved, weights_moved = _scored(moved, groups, shape)
    figures: dict[str, float | str] = {
        "tensors_that_differ_without_offload": _different(expected, again),
        "seconds_update": seconds,
        "seconds_update_offloaded": seconds_moved,
        "gib_saved_optimizer": (held - held_moved) / 2**30,
        "seconds_reference": scoring,
        "seconds_reference_offloaded": scoring_moved,
        "gib_saved_reference": (weights - weights_moved) / 2**30,
    }
    return Outcome(
        bands=(
            Band(name="tensors that differ", value=_different(expected, found), low=0, high=0),
            Band(name="reference's log-probs that differ", value=(logp_R != logp_moved_R).sum().item(), low=0, high=0),
        ),
        figures=figures,
    )


def _updated(config: Config, groups: Groups, shape: Shape) -> tuple[dict[str, Tensor], float, int]:
    """Return the weights after four updates, the seconds of a later one, and the bytes that are held between two."""
    before = models.bytes_in_use()
    learner = models.policy(config, groups)
    batch = batch_of(models.rollouts(shape.vocab, prompts=6, samples=4, prompt=(20, 60), response=(10, 30)), learner)
    loss = signed_loss(batch)
    seconds = seconds_of(lambda: learner.update(batch, loss), repeats=3, warm_up=1)
    held = models.bytes_in_use() - before
    return {name: tensor.cpu() for name, tensor in learner.weights()}, seconds, held


def _scored(config: Config, groups: Groups, shape: Shape) -> tuple[Tensor, float, int]:
    """Return the reference's log-probs, the seconds of scoring, and the bytes that it holds afterwards."""
    before = models.bytes_in_use()
    frozen = models.reference(config, groups)
    batch = batch_of(models.rollouts(shape.vocab, prompts=6, samples=4, prompt=(20, 60), response=(10, 30)), frozen)
    seconds = seconds_of(lambda: frozen.score(batch), repeats=3, warm_up=1)
    held = models.bytes_in_use() - before
    return frozen.score(batch).logp_R.cpu(), seconds, held


def _different(some: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> int:
    """Count the tensors that differ in any bit."""
    return sum(not torch.equal(tensor, others[name]) for name, tensor in some.items())


def _learn(groups: Groups, shape: Shape, model: dict[str, str | bool]) -> tuple[float, Tensor, Tensor]:
    """Return loss, log-probs, and the gradient of all weights but the head's, of random rollouts."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        models.save_model(folder, shape, dtype=torch.bfloat16)
        learner: Policy = models.policy(models.settings(folder, model=model), groups)
    sampled = models.rollouts(shape.vocab, prompts=6, samples=4, prompt=(20, 60), response=(10, 30))
    batch = batch_of(sampled, learner)
    loss = signed_loss(batch)
    value = learner.backward(batch, loss)[0]["loss"]
    logp_R = learner.score(batch).logp_R
    return value, logp_R, learner.trunk_gradient(batch, loss)
