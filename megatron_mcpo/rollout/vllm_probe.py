"""Which weights does a vLLM model really compute with? Asked of its kernels, because the CPU backend packs weights away
and keeps no readable copy.

Every linear module is fed the unit vectors: row i of the answer is column i of the weight, exactly, since one product
with 1 and sums of zeros round nowhere. Reads only attributes of the modules and does not import vllm.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

_CHUNK = 256
"""Unit vectors a call: bounds the memory of the answer (for an output embedding, this times the vocabulary)."""


def find_mismatches(model: Any, named_tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Hugging Face names of the full tensors whose slice on this rank differs from what `model` (vLLM's) holds.

    Names that can't be resolved to a module are skipped.
    """
    packed = getattr(model, "packed_modules_mapping", {})
    wrong = []
    for name, tensor in named_tensors:
        module, part = _locate(model, name, packed)
        if module is not None and not _holds(module, name.rpartition(".")[2], part, tensor):
            wrong.append(name)
        head = _tied_head(model, name)
        if head is not None and not _kernel_holds(head, tensor[_vocabulary_slice(head)], first_row=0):
            wrong.append("lm_head.weight")
    return wrong


def _locate(model: nn.Module, name: str, packed: dict[str, list[str]]) -> tuple[nn.Module | None, int | None]:
    """The module behind a Hugging Face name and, in a fused module, the index of the part."""
    path = name.rpartition(".")[0]
    modules = dict(_children_along(model, path))
    if path in modules:
        return modules[path], None
    parent, _, leaf = path.rpartition(".")
    for fused, parts in packed.items():
        if leaf in parts and parent in modules and hasattr(modules[parent], fused):
            return getattr(modules[parent], fused), parts.index(leaf)
    return None, None


def _children_along(model: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    module, walked = model, ""
    for step in path.split("."):
        child = getattr(module, step, None)
        if not isinstance(child, nn.Module):
            return
        module, walked = child, f"{walked}.{step}".lstrip(".")
        yield walked, module


def _tied_head(model: Any, name: str) -> nn.Module | None:
    head = getattr(model, "lm_head", None)
    tied = getattr(getattr(model, "config", None), "tie_word_embeddings", False)
    return head if tied and head is not None and name.endswith("embed_tokens.weight") else None


def _holds(module: Any, attribute: str, part: int | None, full: Tensor) -> bool:
    rows, columns, first_row = _local_slice(module, part, full)
    if hasattr(module, "shard_indices"):
        return _embedding_holds(module, full[rows])
    if attribute == "weight" and hasattr(module, "quant_method"):
        return _kernel_holds(module, full[rows, columns], first_row=first_row)
    held = getattr(module, attribute, None)
    if held is None:
        return True
    wanted = full[rows].to(held)
    return bool(torch.equal(held[first_row : first_row + len(wanted)], wanted))


def _local_slice(module: Any, part: int | None, full: Tensor) -> tuple[slice, slice, int]:
    """Rows and columns of the full tensor that this rank holds, and the row of the module they begin at."""
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
    index = part or 0
    if "QKVParallelLinear" in kind and index > 0:
        rank //= module.num_kv_head_replicas
    return slice(rank * sizes[index], (rank + 1) * sizes[index]), everything, sum(sizes[:index])


def _vocabulary_slice(module: Any) -> slice:
    shard = module.shard_indices
    return slice(shard.org_vocab_start_index, shard.org_vocab_end_index)


def _embedding_holds(module: Any, wanted: Tensor) -> bool:
    if type(module).__name__ == "ParallelLMHead":
        return _kernel_holds(module, wanted, first_row=0)
    ids = torch.arange(len(wanted), device=module.weight.device)
    for chunk in ids.split(_CHUNK * 16):
        held = module.quant_method.embedding(module, chunk)
        if not torch.equal(held, wanted[chunk.to(wanted.device)].to(held)):
            return False
    return True


@torch.no_grad()
def _kernel_holds(module: Any, wanted: Tensor, *, first_row: int) -> bool:
    """Whether the module multiplies by `wanted` [rows, inputs] in the rows from `first_row` on."""
    num_rows, num_inputs = wanted.shape
    for begin in range(0, num_inputs, _CHUNK):
        end = min(begin + _CHUNK, num_inputs)
        units = torch.zeros(end - begin, num_inputs, dtype=module.params_dtype, device=module.weight.device)
        units[torch.arange(end - begin), torch.arange(begin, end)] = 1
        held = module.quant_method.apply(module, units, None)[:, first_row : first_row + num_rows]
        if not torch.equal(held, wanted[:, begin:end].T.to(held)):
            return False
    return True
