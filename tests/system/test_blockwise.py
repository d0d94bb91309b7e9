"""FP8 in blocks of 128 x 128 against its error bounds, and against what vLLM makes of the same matrix.

Not covered: a GPU, where vLLM compiles its quantisation.
"""

import pytest
import torch
from torch import Tensor

from megatron_mcpo.rollout.blockwise import BLOCK, dequantize, quantize
from tests.support import vllm_cases as cases

SHAPES = [(128, 128), (256, 384), (192, 576), (100, 33)]


def example(shape: tuple[int, int]) -> Tensor:
    """Blocks of very different sizes, one of them all zeros."""
    generator = torch.Generator().manual_seed(shape[0])
    weight = torch.randn(shape, generator=generator)
    weight[:, BLOCK:] *= 1e-3
    weight[BLOCK:, :BLOCK] = 0
    return weight.bfloat16()


@pytest.mark.parametrize("shape", SHAPES)
def test_error_of_every_entry_is_bounded_by_itself_and_its_block(shape: tuple[int, int]) -> None:
    weight = example(shape)
    codes, scales = quantize(weight)
    assert codes.dtype == torch.float8_e4m3fn and codes.shape == shape
    assert scales.shape == (-(-shape[0] // BLOCK), -(-shape[1] // BLOCK))
    error = (dequantize(codes, scales) - weight.float()).abs()
    for row, column in torch.cartesian_prod(torch.arange(scales.shape[0]), torch.arange(scales.shape[1])):
        block = slice(row * BLOCK, (row + 1) * BLOCK), slice(column * BLOCK, (column + 1) * BLOCK)
        peak = weight[block].abs().max().float()
        bound = torch.maximum(weight[block].abs().float() / 16, peak.clamp_min(1e-4) / 448 / 1024)
        assert (error[block] <= bound * (1 + 1e-5)).all()
        assert error[block].max() <= peak / 16, "hence no entry is off by more than a sixteenth of its block's largest"
        assert (error[block].amax() > 0) == (peak > 0)


@pytest.mark.parametrize("shape", SHAPES)
def test_vllm_rounds_the_same(shape: tuple[int, int]) -> None:
    codes, scales = quantize(example(shape))
    vllm_codes, vllm_scales = cases.run(_vllm_quantize, shape)
    assert codes.view(torch.uint8).tolist() == vllm_codes
    assert scales.tolist() == vllm_scales


def _vllm_quantize(shape: tuple[int, int]) -> tuple[list[list[int]], list[list[float]]]:
    from vllm.utils.deep_gemm import per_block_cast_to_fp8

    with torch.compiler.set_stance("force_eager"):
        codes, scales = per_block_cast_to_fp8(example(shape), block_size=[BLOCK, BLOCK], use_ue8m0=False)
    return codes.view(torch.uint8).tolist(), scales.tolist()
