"""Log-probs of the output layer against the definition in float64, on one and on several tensor ranks; their memory.

Not covered: a GPU's kernels.
"""

import os

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mcpo.config.layout import Layout
from megatron_mcpo.distributed import parallel
from megatron_mcpo.mcore import logprob
from tests.support.ranks import run_ranks

ROWS, HIDDEN, VOCAB, TEMPERATURE = 13, 8, 60, 0.7


def _inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits of very different sizes, so that the peak moves from chunk to chunk; every token is a target once."""
    generator = torch.Generator().manual_seed(3)
    hidden_RH = (
        torch.randn(ROWS, HIDDEN, generator=generator, dtype=torch.float64) * torch.logspace(-2, 1, ROWS)[:, None]
    )
    weight_VH = torch.randn(VOCAB, HIDDEN, generator=generator, dtype=torch.float64)
    target_R = torch.tensor([0, 7, 8, VOCAB - 1, *torch.randint(VOCAB, (ROWS - 4,), generator=generator).tolist()])
    grad_R = torch.randn(ROWS, generator=generator)
    return hidden_RH.to(dtype), weight_VH.to(dtype), target_R, grad_R


def _bounds(dtype: torch.dtype) -> list[Tensor]:
    """How far what _on_rank returns may be from _definition, element by element, whatever the order of the sums.

    With u = 2^-24, and u' = 2^-9 where products are rounded to bf16 (u in fp32):
    - A logit is a sum of H products, scaled; with S = max_v |h|.|w_v| / T it is off by at most d = ((H + 2) u + u') S,
      to which the rounding of its difference to the peak, at most 2 S, adds u S.
    - Every exp of a logit is then off by a factor e^d, and their sum of V terms by V u more: a log-prob, of size 2 S at
      most, by l = 2 d + (V + 4) u (1 + 2 S), and a probability by the factor 1 + r, with r = e^l - 1.
    - The entropy is log Z minus a mean of differences to the peak, of size 2 S at most, with weights off by r.
    - Gradients are sums of V or R terms, each a probability times a number, times the given gradient over T; factor and
      sum are rounded to u', and added up with V u or R u.
    """
    hidden_RH, weight_VH, _, grad_R = (x.double() for x in _inputs(dtype))
    u, rounded = 2.0**-24, 2.0**-9 if dtype is torch.bfloat16 else 2.0**-24
    size_R = (hidden_RH.abs() @ weight_VH.abs().T).amax(1) / TEMPERATURE
    logit_R = ((HIDDEN + 3) * u + rounded) * size_R
    logp_R = 2 * logit_R + (VOCAB + 4) * u * (1 + 2 * size_R)
    share_R = logp_R.expm1()
    entropy_R = logp_R + share_R * 2 * size_R
    # The target's share is 1 - p and the others' sum is 1 - p as well: 2 at most, each with its own rounding.
    gradient_R = grad_R.abs() / TEMPERATURE * (share_R + 2 * (2 * rounded + (VOCAB + ROWS) * u))
    hidden = gradient_R[:, None] * weight_VH.abs().amax(0)
    weight = (gradient_R[:, None] * hidden_RH.abs()).sum(0).expand_as(weight_VH)
    return [logp_R, entropy_R, hidden, weight]


def _worst(found: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> list[float]:
    """Return the largest error of each result as a share of its bound."""
    return [
        ((mine.double() - exact).abs() / bound).max().item()
        for mine, exact, bound in zip(found, expected, _bounds(dtype), strict=True)
    ]


def _definition(dtype: torch.dtype) -> list[Tensor]:
    hidden_RH, weight_VH, target_R, grad_R = _inputs(dtype)
    hidden_RH, weight_VH = (x.double().requires_grad_() for x in (hidden_RH, weight_VH))
    all_RV = (hidden_RH @ weight_VH.T / TEMPERATURE).log_softmax(-1)
    logp_R = all_RV.gather(1, target_R[:, None]).squeeze(1)
    (logp_R * grad_R).sum().backward()
    assert hidden_RH.grad is not None and weight_VH.grad is not None
    return [logp_R.detach(), -(all_RV.exp() * all_RV).sum(-1).detach(), hidden_RH.grad, weight_VH.grad]


def _on_rank(num_ranks: int, dtype: torch.dtype, most_logits: int) -> list[Tensor]:
    groups = parallel.init(Layout(tensor=num_ranks), seed=0, timeout_seconds=30)
    logprob.MOST_LOGITS = most_logits
    hidden_RH, weight_VH, target_R, grad_R = _inputs(dtype)
    weight_VH = weight_VH.chunk(num_ranks)[groups.tensor_rank].clone().requires_grad_()
    hidden_RH.requires_grad_()
    logp_R, entropy_R = logprob.linear_logprobs(
        hidden_RH,
        weight_VH,
        target_R,
        first_token=groups.tensor_rank * len(weight_VH),
        temperature=TEMPERATURE,
        group=groups.tensor,
    )
    assert not entropy_R.requires_grad
    (logp_R * grad_R).sum().backward()
    assert hidden_RH.grad is not None and weight_VH.grad is not None
    dist.all_reduce(hidden_RH.grad, group=groups.tensor)
    return [logp_R.detach(), entropy_R, hidden_RH.grad, weight_VH.grad]


@pytest.mark.parametrize("most_logits", [1, 7 * ROWS, 2**23], ids=["a token at a time", "uneven chunks", "one chunk"])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_values_and_gradients_follow_the_definition(num_ranks: int, most_logits: int) -> None:
    found = run_ranks(num_ranks, _on_rank, num_ranks, torch.float32, most_logits)
    expected = _definition(torch.float32)
    whole_weight = torch.cat([each[3] for each in found])
    for each in found:
        assert max(_worst([*each[:3], whole_weight], expected, torch.float32)) <= 1
        assert torch.equal(each[0], found[0][0])


def test_bf16_sums_in_fp32() -> None:
    """A logit is rounded to 8 bits once; 60 of them are summed without another rounding."""
    (found,) = run_ranks(1, _on_rank, 1, torch.bfloat16, 7 * ROWS)
    assert max(_worst(found, _definition(torch.bfloat16), torch.bfloat16)) <= 1


def _peak_extra_bytes() -> int:
    """Measure what a forward and backward pass over a big vocabulary takes beside its inputs and gradients."""
    groups = parallel.init(Layout(), seed=0, timeout_seconds=60)
    rows, vocab, hidden = 8192, 151_936, 32
    hidden_RH = torch.randn(rows, hidden, requires_grad=True)
    weight_VH = torch.randn(vocab, hidden, requires_grad=True)
    target_R = torch.randint(vocab, (rows,))
    gradients = hidden_RH.nbytes + weight_VH.nbytes
    before = _resident("VmRSS")
    logp_R, _ = logprob.linear_logprobs(
        hidden_RH, weight_VH, target_R, first_token=0, temperature=1.0, group=groups.tensor
    )
    logp_R.sum().backward()
    return _resident("VmHWM") - before - gradients


def _resident(key: str) -> int:
    with open(f"/proc/{os.getpid()}/status") as status:
        (line,) = [line for line in status if line.startswith(key)]
    return int(line.split()[1]) * 1024


def test_8192_tokens_of_151936_words_take_less_than_half_a_gibibyte() -> None:
    (extra,) = run_ranks(1, _peak_extra_bytes, timeout=540)
    assert extra <= 2**29
