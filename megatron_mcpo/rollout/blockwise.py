"""Quantise weights in blocks of 128 x 128 to FP8 (e4m3) with one fp32 scale per block, as vLLM's `fp8_per_block` does.

The largest entry of a block becomes 448, the largest number of e4m3: vllm.utils.deep_gemm.per_block_cast_to_fp8 of vLLM
0.30.0.
"""

import torch
from torch import Tensor

BLOCK = 128
_LARGEST = 448.0
_LEAST_PEAK = 1e-4
"""A block whose largest entry is smaller is scaled as if this were its largest entry."""


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes [rows, columns] (e4m3) and scales [rows / 128, columns / 128] (fp32, sizes rounded up).

    Codes times scales differ from an entry w of a block whose largest entry is `peak` by at most
    max(|w| / 16, peak / 448 / 1024): half a step of the three bits after the leading one, or of the smallest numbers.
    """
    rows, columns = weight.shape
    padded = weight.new_zeros(-(-rows // BLOCK) * BLOCK, -(-columns // BLOCK) * BLOCK)
    padded[:rows, :columns] = weight
    blocks = padded.view(-1, BLOCK, padded.shape[1] // BLOCK, BLOCK)
    peaks = blocks.abs().amax(dim=(1, 3), keepdim=True).float()
    scales = peaks.clamp_min(_LEAST_PEAK) / _LARGEST
    codes = (blocks * (1.0 / scales)).to(torch.float8_e4m3fn).view_as(padded)
    return codes[:rows, :columns].contiguous(), scales[:, 0, :, 0]


def dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    """Return the weight [rows, columns] in fp32 that codes and scales represent."""
    rows, columns = codes.shape
    spread = scales.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
    return codes.float() * spread
