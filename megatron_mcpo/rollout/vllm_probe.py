"""Find out from vLLM's kernels with which weights a model computes: its CPU backend keeps no readable copy of them.

A linear module whose packed weight is hidden is given the unit vectors: row i of the answer is exactly column i of the
weight, since one product with 1 and sums of zeros are not rounded. A module's parameter is read if the kernel
multiplies with it; if it is packed in a reproducible way, the expected values are packed, too. Only attributes of the
modules are read; vllm is not imported.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatron_mcpo.rollout.blockwise import BLOCK, dequantize, quantize
from megatron_mcpo.rollout.engine import Comparison

_CHUNK = 256
"""Unit vectors per call; bounds the memory of the answer (for an output embedding this times the vocabulary)."""
_PACKED_ROWS = 32
"""vLLM's CPU kernels pack a matrix in independent groups of this many rows."""
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.weight")
_EXPERT_PARTS = {"gate_proj": ("w13", 0), "up_proj": ("w13", 1), "down_proj": ("w2", 0)} | {
    "w1": ("w13", 0), "w3": ("w13", 1), "w2": ("w2", 0)
}  # fmt: skip
_READABLE_EXPERTS = ("TRITON", "BATCHED_TRITON")
"""GPU kernels that use the experts' weights as they were loaded."""


@dataclass(frozen=True)
class _Matrix:
    """A matrix of the engine, made of one or more tensors. expert: the number of the expert it belongs to"""

    module: Any
    attribute: str
    num_parts: int
    expert: int | None = None

    @property
    def held(self) -> Tensor:
        held = getattr(self.module, self.attribute)
        return held if self.expert is None else held[self.expert]

    @property
    def scales(self) -> Tensor:
        scales = getattr(self.module, f"{self.attribute}_scale_inv")
        return scales if self.expert is None else scales[self.expert]

    @property
    def is_quantized(self) -> bool:
        return self.held.dtype == torch.float8_e4m3fn


@dataclass(frozen=True)
class _Part:
    """The part of a tensor that this rank holds, and the row of the matrix where it begins."""

    name: str
    first_row: int
    local: Tensor

    @property
    def rows(self) -> slice:
        return slice(self.first_row, self.first_row + len(self.local))


def compare(model: Any, named_tensors: Iterable[tuple[str, Tensor]]) -> Comparison:
    """Compare full tensors with the slices that vLLM's `model` has on this rank (see engine.Engine.compare)."""
    different: list[str] = []
    unread: list[str] = []
    waiting: dict[_Matrix, list[_Part]] = {}
    num_tensors = 0

    def judge(matrix: _Matrix) -> None:
        parts = waiting.pop(matrix)
        wrong_R = _wrong_rows(matrix, parts)
        if wrong_R is None:
            unread.extend(part.name for part in parts)
        else:
            different.extend(part.name for part in parts if wrong_R[part.rows].any())

    for name, tensor in named_tensors:
        num_tensors += 1
        found = [*_places(model, name, tensor)]
        if not found:
            unread.append(name)
        for matrix, part in found:
            waiting.setdefault(matrix, []).append(part)
            if len(waiting[matrix]) == matrix.num_parts:
                judge(matrix)
    for matrix in list(waiting):
        judge(matrix)
    return Comparison(different=tuple(different), unread=tuple(unread), num_tensors=num_tensors)


def _places(model: nn.Module, name: str, full: Tensor) -> Iterator[tuple[_Matrix, _Part]]:
    """Yield where the engine has a tensor; a tied embedding also as the output's, which a CPU packs separately."""
    expert = _EXPERT.fullmatch(name)
    if expert is not None:
        yield from _expert_place(model, expert, name, full)
        return
    path, _, attribute = name.rpartition(".")
    module, part, num_parts = _locate(model, path)
    if module is None or getattr(module, attribute, None) is None:
        return
    rows, columns, first_row = _local_slice(module, part, full)
    local = full[rows] if full.dim() == 1 else full[rows, columns]
    yield _Matrix(module, attribute, num_parts), _Part(name, first_row, local)
    head: Any = getattr(model, "lm_head", None)
    tied = getattr(getattr(model, "config", None), "tie_word_embeddings", False)
    if tied and head is not None and name.endswith("embed_tokens.weight"):
        yield _Matrix(head, "weight", 1), _Part("lm_head.weight", 0, full[_vocabulary_slice(head)])


def _locate(model: Any, path: str) -> tuple[Any, int, int]:
    """Return the module for a Hugging Face path, the index of the part in it and the number of its parts."""
    try:
        return model.get_submodule(path), 0, 1
    except AttributeError:
        parent, _, leaf = path.rpartition(".")
    for fused, parts in getattr(model, "packed_modules_mapping", {}).items():
        if leaf in parts:
            with suppress(AttributeError):
                return model.get_submodule(f"{parent}.{fused}"), parts.index(leaf), len(parts)
    return None, 0, 1


def _expert_place(model: Any, found: re.Match[str], name: str, full: Tensor) -> Iterator[tuple[_Matrix, _Part]]:
    """Yield where an expert's tensor is: w13 is gate above up, each cut by rows and padded; w2 is down, by columns."""
    with suppress(AttributeError):
        module: Any = model.get_submodule(f"{found[1]}.routed_experts")
        matrix, index = _EXPERT_PARTS[found[3]]
        held = getattr(module, f"{matrix}_weight")
        ranks = module.moe_config.moe_parallel_config
        local = full.chunk(ranks.tp_size, dim=0 if matrix == "w13" else 1)[ranks.tp_rank]
        first_row = index * held.shape[1] // 2
        num_parts = 2 if matrix == "w13" else 1
        yield _Matrix(module, f"{matrix}_weight", num_parts, expert=int(found[2])), _Part(name, first_row, local)


def _local_slice(module: Any, part: int, full: Tensor) -> tuple[slice, slice, int]:
    """Return rows and columns of the full tensor that this rank holds, and the module's row where they begin."""
    everything = slice(None)
    if hasattr(module, "shard_indices"):
        return _vocabulary_slice(module), everything, 0
    kind = {base.__name__ for base in type(module).__mro__}
    rank = getattr(module, "tp_rank", 0)
    if "RowParallelLinear" in kind and full.dim() == 2:
        size = module.input_size_per_partition
        return everything, slice(rank * size, (rank + 1) * size), 0
    if "ColumnParallelLinear" not in kind:
        return everything, everything, 0
    sizes = module.output_partition_sizes
    if "QKVParallelLinear" in kind and part > 0:
        rank //= module.num_kv_head_replicas
    return slice(rank * sizes[part], (rank + 1) * sizes[part]), everything, sum(sizes[:part])


def _vocabulary_slice(module: Any) -> slice:
    shard = module.shard_indices
    return slice(shard.org_vocab_start_index, shard.org_vocab_end_index)


@torch.no_grad()
def _wrong_rows(matrix: _Matrix, parts: Sequence[_Part]) -> Tensor | None:
    """Return which rows differ, where there are parts; None if the engine has them in a form that can't be read."""
    module, held = matrix.module, matrix.held
    if matrix.is_quantized:
        # A block may extend over the border of two parts.
        complete = len(parts) == matrix.num_parts
        return _wrong_codes(matrix, _assembled(parts, held.shape, module.orig_dtype)) if complete else None
    if matrix.expert is not None:
        return _wrong_expert_rows(matrix, parts)
    if hasattr(module, "shard_indices") and type(module).__name__ != "ParallelLMHead":
        return _wrong_embeddings(module, parts[0].local)
    if matrix.attribute == "weight" and hasattr(module, "cpu_linear"):
        shape = max(part.rows.stop for part in parts), parts[0].local.shape[1]
        return _wrong_answers(module, _assembled(parts, shape, module.params_dtype))
    expected = _assembled(parts, held.shape, held.dtype).to(held.device)
    return (expected != held).view(len(held), -1).any(1)


def _assembled(parts: Sequence[_Part], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Put the parts in their places, with zeros where there are none."""
    first = parts[0].local
    if len(parts) == 1 and first.shape == torch.Size(shape):
        return first.to(dtype)
    whole = first.new_zeros(tuple(shape), dtype=dtype)
    for part in parts:
        place = (part.rows, *(slice(size) for size in part.local.shape[1:]))
        whole[place] = part.local.to(dtype)
    return whole


def _wrong_embeddings(module: Any, expected: Tensor) -> Tensor:
    ids = torch.arange(len(expected), device=module.weight.device)
    wrong = []
    for chunk in ids.split(_CHUNK * 16):
        held = module.quant_method.embedding(module, chunk)
        wrong.append((held != expected[chunk.to(expected.device)].to(held)).any(1))
    return torch.cat(wrong)


def _wrong_answers(module: Any, expected: Tensor) -> Tensor:
    """Return the rows in which the module doesn't multiply by `expected` [rows, inputs]."""
    num_rows, num_inputs = expected.shape
    wrong_R = torch.zeros(num_rows, dtype=torch.bool)
    for begin in range(0, num_inputs, _CHUNK):
        end = min(begin + _CHUNK, num_inputs)
        units = torch.zeros(end - begin, num_inputs, dtype=expected.dtype)
        units[torch.arange(end - begin), torch.arange(begin, end)] = 1
        held = module.quant_method.apply(module, units, None)[:, :num_rows]
        wrong_R |= (held != expected[:, begin:end].T).any(0)
    return wrong_R


def _wrong_codes(matrix: _Matrix, expected: Tensor) -> Tensor | None:
    """Return the rows of a quantised matrix whose codes or scales differ from those of `expected`, by whole blocks.

    On a CPU the comparison is exact. On a GPU vLLM compiles its quantisation, whose scales may be rounded differently
    and then move an entry from the middle between two codes to either: values may differ by the step between codes.
    """
    held, scales = matrix.held, matrix.scales
    codes, wanted = quantize(expected)
    if scales.shape != wanted.shape or scales.dtype != wanted.dtype:
        return None
    if held.device.type != "cpu":
        if matrix.expert is not None and matrix.module.quant_method.fp8_backend.value not in _READABLE_EXPERTS:
            return None
        return _far_apart(dequantize(held, scales), dequantize(codes, wanted).to(held.device), wanted.to(held.device))
    packed = torch.ops._C.convert_weight_packed(codes)
    wrong_R = _in_groups((packed.view(torch.uint8) != held.view(torch.uint8)).any(1), _PACKED_ROWS)
    wrong_scales = (scales != wanted).any(1).repeat_interleave(BLOCK)[: len(held)]
    return wrong_R | wrong_scales


def _far_apart(held: Tensor, wanted: Tensor, scales: Tensor) -> Tensor:
    spread = scales.repeat_interleave(BLOCK, 0)[: len(held)].repeat_interleave(BLOCK, 1)[:, : held.shape[1]]
    step = wanted.abs() / 8 + spread / 512
    return ((held - wanted).abs() > step).any(1)


def _in_groups(wrong_R: Tensor, size: int) -> Tensor:
    groups = nn.functional.pad(wrong_R, (0, -len(wrong_R) % size)).view(-1, size)
    return groups.any(1).repeat_interleave(size)[: len(wrong_R)]


def _wrong_expert_rows(matrix: _Matrix, parts: Sequence[_Part]) -> Tensor | None:
    """Return which rows of one expert's matrix differ; a CPU kernel keeps it packed."""
    held, method = matrix.held, matrix.module.quant_method
    expected = _assembled(parts, held.shape, held.dtype).contiguous()
    if held.device.type != "cpu":
        readable = method.unquantized_backend.value in _READABLE_EXPERTS
        return (expected.to(held.device) != held).any(1) if readable else None
    packed = torch.empty_like(expected)
    isa = method.moe_kernel.fused_experts.isa
    torch.ops._C.prepack_moe_weight(expected.unsqueeze(0), packed.unsqueeze(0), isa)
    return _in_groups((packed != held).any(1), _PACKED_ROWS)
