"""Rounding to FP8 moves products as far as its mantissas say, in a trained model's every layer, and its log-probs.

Bands have a lower end: an error that is too small means that FP8 is not on. All of it is computed in fp32, where
processors agree. Not covered: any FP8 product of a GPU, which tests/support/fp8_emulation.py emulates; gradients
after many layers in FP8 (those of a random model are a row of tools/gpu_check.sh): in a trained model as small as this
one errors grow until they are as large from one order of sums to another (cosines of 0.85 to 0.97 were measured).
"""

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from megatron_mcpo.config.hf_config import from_folder
from megatron_mcpo.config.layout import Layout
from megatron_mcpo.data.batch import make_batch
from megatron_mcpo.distributed import parallel
from megatron_mcpo.mcore.policy import LossInput, Policy
from megatron_mcpo.types import Completion, Prompt, RolloutGroup, StopReason, TrainBatch
from tests.support import fp8_emulation, tiny_models
from tests.support.fp8_emulation import Recipe
from tests.support.paths import EMBEDDED_MODEL
from tests.support.ranks import run_ranks

SECONDS = 280.0  # a busy machine needs a minute for a pass
RECIPES: tuple[Recipe, ...] = ("blockwise", "tensorwise")
PRODUCTS = ("output", "gradient of the input", "gradient of the weight")
TEXTS = {
    "The capital of France is": (
        " Paris. It lies on the Seine and is known for the Eiffel Tower.",
        " a city in the south of Spain, where it rains all year.",
    ),
    "To add 17 and 25,": (
        " add 7 and 5 to get 12, write 2 and carry 1; 1 plus 2 plus 1 is 4, so the sum is 42.",
        " take 25 away from 17, which leaves 33.",
    ),
    "def add(a, b):": ("\n    return a + b\n\n\nprint(add(2, 3))\n", "\n    return a - a\n"),
}


def _outliers(*shape: int) -> Tensor:
    return torch.randn(*shape) * torch.where(torch.rand(shape[-1]) < 0.01, 20.0, 1.0)


@pytest.mark.parametrize("data", [torch.randn, _outliers], ids=["normal", "outliers"])
@pytest.mark.parametrize("recipe", ["blockwise", "tensorwise"])
def test_products_are_off_by_what_fp8_is_off(recipe: Recipe, data: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    x, weight, grad = data(300, 500), data(384, 500) / 50, data(300, 384)
    mine = [tensor.clone().requires_grad_() for tensor in (x, weight)]
    out = fp8_emulation.linear(mine[0], mine[1], recipe)
    out.backward(grad)
    assert 0.02 < _error(out, x @ weight.T) < 0.05
    for tensor, exact in zip(mine, (grad @ weight, grad.T @ x), strict=True):
        assert tensor.grad is not None and 0.015 < _error(tensor.grad, exact) < 0.09


def _error(found: Tensor, exact: Tensor) -> float:
    """Relative, in the Frobenius norm."""
    return ((found - exact).norm() / exact.norm()).item()


def _groups() -> list[RolloutGroup]:
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    groups = []
    for number, (prompt, answers) in enumerate(TEXTS.items()):
        completions = [
            Completion(
                token_ids=ids, logprobs=(-1.0,) * len(ids), stop_reason=StopReason.STOP, versions=(0,) * len(ids)
            )
            for ids in map(tuple, tokenizer(list(answers), add_special_tokens=False)["input_ids"])
        ]
        ids = tuple(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        groups.append(
            RolloutGroup(
                prompt=Prompt(domain=number, source="text", index=number, token_ids=ids, entry={}),
                completions=tuple(completions),
                rewards=(1.0, 0.0),
                correct=(True, False),
            )
        )
    return groups


class _Recorder:
    """Stands in for a linear's `_forward_impl`: computes what it computes, and keeps operands and gradient."""

    def __init__(self, linear: Any):
        self.forward = linear._forward_impl
        self.x = self.weight = self.grad = torch.empty(0)
        linear._forward_impl = self

    def __call__(self, input: Tensor, weight: Tensor, bias: Tensor | None, **options: Any) -> Tensor:
        out: Tensor = self.forward(input, weight, bias, **options)
        self.x, self.weight = input.detach().flatten(0, -2), weight.detach()
        out.register_hook(self._keep)
        return out

    def _keep(self, grad: Tensor) -> None:
        self.grad = grad.detach().flatten(0, -2)

    def products(self, recipe: Recipe) -> tuple[Tensor, Tensor, Tensor]:
        """As PRODUCTS names them, in FP8."""
        x, weight = self.x.requires_grad_(), self.weight.requires_grad_()
        out = fp8_emulation.linear(x, weight, recipe)
        return out.detach(), *torch.autograd.grad(out, (x, weight), self.grad)


@dataclass(frozen=True)
class Found:
    """What FP8 does to a trained model: by recipe and product the errors of all layers, by recipe log-probs' distance.

    layers: relative errors of products, [112] each, every operand as it is in fp32
    logprobs: mean distance of tokens' log-probs from those in fp32, with all products in FP8
    """

    layers: dict[tuple[Recipe, str], Tensor]
    logprobs: dict[Recipe, float]


@pytest.fixture(scope="module")
def found() -> Found:
    return run_ranks(1, _measure, timeout=SECONDS)[0]


def _measure() -> Found:
    ranks = parallel.init(Layout(), seed=0, timeout_seconds=60)
    config = tiny_models.config(
        EMBEDDED_MODEL, batch={"micro_batch_tokens": 512}, rollout={"max_prompt_tokens": 64, "max_response_tokens": 64}
    )
    policy = Policy(config, from_folder(EMBEDDED_MODEL), ranks)
    batch = make_batch(_groups(), num_data_ranks=1, data_rank=0, share_prompts=policy.shares_prompts)
    logp_R = policy.score(batch).logp_R
    layers = _errors_of_layers(policy, batch)
    logprobs = {}
    for recipe in RECIPES:
        assert fp8_emulation.emulate(policy.chunks, recipe) == 4 * 28
        logprobs[recipe] = (policy.score(batch).logp_R - logp_R).abs().mean().item()
    return Found(layers=layers, logprobs=logprobs)


def _errors_of_layers(policy: Policy, batch: TrainBatch) -> dict[tuple[Recipe, str], Tensor]:
    """All products of a policy gradient step between the first and the last layer, with the operands that it has."""
    sign_N = torch.tensor([1.0, -0.5]).repeat(len(TEXTS))

    def loss(x: LossInput) -> tuple[Tensor, dict[str, Tensor]]:
        value = -(x.logp_r * sign_N[batch.rollout_R[x.response_r]]).mean()
        return value, {"loss": value}

    recorders = [_Recorder(linear) for linear in fp8_emulation.linears(policy.chunks)]
    policy.backward(batch, loss)
    errors: dict[tuple[Recipe, str], list[float]] = defaultdict(list)
    for seen in recorders:
        exact = seen.x @ seen.weight.T, seen.grad @ seen.weight, seen.grad.T @ seen.x
        for recipe in RECIPES:
            for name, product, right in zip(PRODUCTS, seen.products(recipe), exact, strict=True):
                errors[recipe, name].append(_error(product, right))
    return {key: torch.tensor(values) for key, values in errors.items()}


_THREE_BITS, _TWO_BITS = 0.0245, 0.0491


@pytest.mark.parametrize(
    ("recipe", "product", "operands"),
    [
        *(("blockwise", product, (_THREE_BITS, _THREE_BITS)) for product in PRODUCTS),
        ("tensorwise", "output", (_THREE_BITS, _THREE_BITS)),
        *(("tensorwise", product, (_TWO_BITS, _THREE_BITS)) for product in PRODUCTS[1:]),
    ],
)
def test_every_layer_of_a_trained_model_is_off_by_what_its_mantissas_say(
    found: Found, recipe: Recipe, product: str, operands: tuple[float, float]
) -> None:
    """Rounding m 2^e, 1 <= m < 2, to b bits errs evenly by up to 2^e 2^-(b+1): by 2^e 2^-b / sqrt(12) root mean square.

    With log(m) even, m^2 is 3 / (2 log 2) on average, so that a number is off by 0.0245 of itself with the three bits
    of e4m3 and by 0.0491 with the two of e5m2. A product that sums many terms is off by what both operands are,
    independently. A layer in which one large activation decides has less (0.004 was seen), one whose small gradients
    fall below e5m2's range more; a bit of a mantissa more or less would halve or double all of them.
    """
    expected = math.hypot(*operands)
    errors = found.layers[recipe, product]
    assert len(errors) == 4 * 28
    assert 0.7 * expected < errors.mean() < 1.3 * expected, errors.mean() / expected
    assert errors.max() < 2 * expected, errors.max() / expected


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_trained_models_log_probs_move_and_stay_near(found: Found, recipe: Recipe) -> None:
    """Compare with fp32: through 28 layers a model as small as this amplifies rounding into an error of its own size.

    Every change of the last bit of fp32 is therefore another draw: with all weights moved by 1e-6 of themselves, twelve
    times, and with sums in the order of two processors, it was 0.14 to 0.23. FP8 that is off has 0.
    """
    assert 0.05 < found.logprobs[recipe] < 0.5
