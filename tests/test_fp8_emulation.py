"""What rounding to FP8 does to products, log-probs, loss and gradients: in the bands that FP8 on a GPU is judged by.

Bands have a lower end: an error that is too small means that FP8 is not on. Not covered: any FP8 product of a GPU, for
which tools/fp8_emulation.py is an emulation.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from megatron_mcpo import parallel
from megatron_mcpo.batch import make_batch
from megatron_mcpo.hf_config import from_folder
from megatron_mcpo.layout import Layout
from megatron_mcpo.mcore.policy import LossInput, Policy
from megatron_mcpo.types import Completion, Prompt, RolloutGroup, StopReason
from tools import fp8_emulation, tiny_model
from tools.fp8_emulation import Recipe
from tools.ranks import run_ranks

SECONDS = 280.0  # bf16 is slow on a CPU without AVX-512
MODEL = Path(__file__).parent.parent / ".cache/models/smollm2-135m-instruct"
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
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    groups = []
    for number, (prompt, answers) in enumerate(TEXTS.items()):
        completions = [
            Completion(token_ids=ids, logprobs=(-1.0,) * len(ids), stop_reason=StopReason.STOP, version=0)
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


def _learn(recipe: Recipe | None) -> tuple[float, Tensor, Tensor]:
    """(loss, log-probs, gradient of all weights but the head's) of a policy gradient step in bf16 on real text."""
    ranks = parallel.init(Layout(), seed=0, timeout_seconds=60)
    config = tiny_model.config(
        MODEL,
        model={"dtype": "bf16"},
        batch={"micro_batch_tokens": 512},
        rollout={"max_prompt_tokens": 64, "max_response_tokens": 64},
    )
    policy = Policy(config, from_folder(MODEL), ranks)
    if recipe:
        assert fp8_emulation.emulate(policy.chunks, recipe) == 4 * 28
    batch = make_batch(_groups(), num_data_ranks=1, data_rank=0, share_prompts=policy.shares_prompts)
    sign_N = torch.tensor([1.0, -0.5]).repeat(len(TEXTS))

    def loss(x: LossInput) -> tuple[Tensor, dict[str, Tensor]]:
        value = -(x.logp_r * sign_N[batch.rollout_R[x.response_r]]).mean()
        return value, {"loss": value}

    value = policy.backward(batch, loss)["loss"]
    return value, policy.score(batch).logp_R, policy.trunk_gradient(batch, loss)


@pytest.fixture(scope="module")
def in_bf16() -> tuple[float, Tensor, Tensor]:
    return run_ranks(1, _learn, None, timeout=SECONDS)[0]


@pytest.mark.parametrize(
    ("recipe", "least_cosine", "norm_within"), [("blockwise", 0.95, 0.03), ("tensorwise", 0.88, 0.10)]
)
def test_a_trained_models_loss_and_gradients_stay_in_the_bands(
    in_bf16: tuple[float, Tensor, Tensor], recipe: Recipe, least_cosine: float, norm_within: float
) -> None:
    """Measured: cosines 0.964 and 0.914, log-probs 0.18 and 0.19 apart. A model as small as this feels any rounding:
    between bf16 and fp32 the cosine is 0.989, and log-probs are 0.04 apart.
    """
    loss, logp_R, gradient = in_bf16
    ((loss_8, logp_8_R, gradient_8),) = run_ranks(1, _learn, recipe, timeout=SECONDS)
    assert loss_8 == pytest.approx(loss, rel=0.05)
    assert 0.06 < (logp_8_R - logp_R).abs().mean() < 0.3
    norm, norm_8 = (_dot(each, each) ** 0.5 for each in (gradient, gradient_8))
    assert norm_8 == pytest.approx(norm, rel=norm_within)
    assert least_cosine < _dot(gradient, gradient_8) / (norm * norm_8) < 0.985


def _dot(left: Tensor, right: Tensor) -> float:
    """Summed in float64: 135M numbers in fp32 lose the second digit."""
    return (left * right).sum(dtype=torch.float64).item()
