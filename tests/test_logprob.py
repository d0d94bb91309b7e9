"""Log-probs of the output layer against the definition in float64, on one and on several tensor ranks; their memory.

Not covered: a GPU's kernels.
"""

import os

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mcpo import parallel
from megatron_mcpo.layout import Layout
from megatron_mcpo.mcore import logprob
from tools.ranks import run_ranks

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
    logp_R, entropy_R, grad_hidden_RH, grad_weight_VH = _definition(torch.float32)
    for each in found:
        torch.testing.assert_close(each[0].double(), logp_R, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(each[1].double(), entropy_R, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(each[2].double(), grad_hidden_RH, rtol=1e-5, atol=1e-5)
        assert torch.equal(each[0], found[0][0])
    torch.testing.assert_close(torch.cat([each[3] for each in found]).double(), grad_weight_VH, rtol=1e-5, atol=1e-5)


def test_bf16_sums_in_fp32() -> None:
    (found,) = run_ranks(1, _on_rank, 1, torch.bfloat16, 7 * ROWS)
    expected = _definition(torch.bfloat16)
    # A logit is rounded to 8 bits once; 60 of them are summed without another rounding.
    bound = (
        (_inputs(torch.bfloat16)[0].double() @ _inputs(torch.bfloat16)[1].double().T).abs().max() / TEMPERATURE * 2**-8
    )
    assert (found[0] - expected[0]).abs().max() <= 2 * bound
    for mine, exact in zip(found[2:], expected[2:], strict=True):
        assert (mine.double() - exact).norm() <= 0.02 * exact.norm()


def _peak_extra_bytes() -> int:
    """What a pass forward and back over a big vocabulary takes beside its inputs and their gradients."""
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
    (extra,) = run_ranks(1, _peak_extra_bytes, timeout=240)
    assert extra <= 2**29
