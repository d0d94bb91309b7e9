"""Compare what the trainer computes on this device with float64, or with another way of computing it."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from benchmarks.gpu import models
from benchmarks.gpu.models import MEDIUM, SMALL, Shape, batch_of, cosine, norm, signed_loss
from benchmarks.gpu.outcome import Band, Outcome
from megatron_mcpo.config.layout import Layout
from megatron_mcpo.config.schema import Fp8
from megatron_mcpo.distributed import parallel
from megatron_mcpo.distributed.parallel import Groups
from megatron_mcpo.mcore.policy import Policy
from megatron_mcpo.mcore.spec import uses_transformer_engine


def _alone() -> Groups:
    return parallel.init(Layout(), seed=0, timeout_seconds=600)


def logprobs() -> Outcome:
    """Compare scores in bf16 with transformers in float64, packed together and one by one."""
    groups = _alone()
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
        figures={"layers": "Transformer Engine" if uses_transformer_engine() else "torch"},
    )


def recompute() -> Outcome:
    """Compare gradients with full and selective recompute to those without."""
    groups = _alone()
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
    groups = _alone()
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


def _learn(groups: Groups, shape: Shape, model: dict[str, str]) -> tuple[float, Tensor, Tensor]:
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
