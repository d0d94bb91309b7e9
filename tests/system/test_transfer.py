"""Both ways of bringing weights into engines, on real gloo ranks, against what vLLM's own loaders make of the files.

Not covered: a GPU (NCCL, CUDA graphs over parameters that are written into), engines in other processes.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_mcpo.config.hf_config import from_folder
from megatron_mcpo.config.layout import Layout
from megatron_mcpo.config.model import layout_problems
from megatron_mcpo.distributed import parallel
from megatron_mcpo.mcore.model import build_chunks
from megatron_mcpo.weights.engine_layout import engine_shapes
from megatron_mcpo.weights.full_sync import TransferStats, export
from megatron_mcpo.weights.load import load_hf
from megatron_mcpo.weights.reshard_plan import SyncPlan
from megatron_mcpo.weights.reshard_sync import FullTensorSync, ReshardSync, choose_weight_sync
from tests.support import vllm_cases
from tests.support.ranks import run_ranks
from tests.support.reshard_cases import parameters_of_experts, syncs_into_an_engine
from tests.support.vllm_loading import save_loaded

SIZES: dict[str, Any] = dict(
    vocab_size=200,  # 256 rows in the engine: its last rank of four has 8 of 64
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=128,
    eos_token_id=2,
)
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {"tie_word_embeddings": True, "hidden_size": 128},
    "qwen3": {"tie_word_embeddings": False},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True},
    "mixtral": {"num_local_experts": 4},
}
CASES: list[tuple[str, Layout, int]] = [
    ("qwen3", Layout(tensor=2), 1),
    ("qwen3", Layout(tensor=4), 2),
    ("qwen2", Layout(data=2), 2),
    ("qwen2", Layout(pipeline=2), 2),
    ("qwen3", Layout(tensor=2, pipeline=2), 2),
    ("qwen3_moe", Layout(data=2, expert=2), 2),
    ("qwen2", Layout(data=4), 4),
    ("qwen2", Layout(tensor=2, pipeline=2, virtual_pipeline=2), 1),
    ("qwen3", Layout(context=2, pipeline=2), 4),
    ("mixtral", Layout(tensor=2, pipeline=2, expert=2, sequence=True), 4),
    ("qwen3_moe", Layout(tensor=2, data=2, expert=4, sequence=True), 1),
]
TWO = Layout(tensor=2)
BUCKET_BYTES = 40_000
BUCKET = 125_000


@dataclass(frozen=True)
class Files:
    folder: Path

    def model(self, family: str) -> Path:
        return self.folder / family

    def engine_rank(self, family: str, engine_ranks: int, rank: int) -> dict[str, Tensor]:
        """The parameters of vLLM's model, as its loaders leave them."""
        return load_file(self.folder / f"{family}-{engine_ranks}" / f"{rank}.safetensors")


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("transfer")
    for family, changes in FAMILIES.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SIZES, **changes}))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_()
        model.save_pretrained(folder / family)
        for ranks in sorted({engine for name, _, engine in CASES if name == family}):
            out = folder / f"{family}-{ranks}"
            out.mkdir()
            vllm_cases.run(save_loaded, folder / family, ranks, out, ranks=ranks)
    return Files(folder)


class Engine:
    """A receiver: empty tensors of these shapes, if any, and a place for full tensors."""

    version = 0

    def __init__(self, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.float32):
        self.own = {name: torch.full(shape, float("nan"), dtype=dtype) for name, shape in shapes.items()}
        self.full: dict[str, Tensor] = {}

    def update(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> int:
        for name, tensor in named_tensors:
            assert name not in self.full
            self.full[name] = tensor
        self.version = version
        return 0

    def parameters(self) -> dict[str, Tensor] | None:
        return self.own or None

    @contextmanager
    def rewriting(self, version: int) -> Iterator[dict[str, Tensor]]:
        yield self.own
        self.version = version


def policy(folder: Path, layout: Layout, dtype: torch.dtype = torch.float32) -> tuple[list[nn.Module], Any, Any]:
    groups = parallel.init(layout, seed=1, timeout_seconds=60)
    model = from_folder(folder)
    chunks = build_chunks(model, groups, dtype=dtype, head=None)
    load_hf(chunks, model, folder, groups)
    return chunks, model, groups


def sync_slices(files: Files, family: str, layout: Layout, engine_ranks: int) -> list[int]:
    """Return bytes received in a sync, in one with small buckets, and the most that the latter staged."""
    chunks, model, groups = policy(files.model(family), layout)
    assert layout_problems(model, layout, engine_ranks) == []
    expected = files.engine_rank(family, engine_ranks, groups.rank % engine_ranks)
    engine = Engine(engine_shapes(model, engine_ranks))
    first = ReshardSync(chunks, model, groups, engine, engine_ranks=engine_ranks).sync(1)
    check(engine.own, expected)
    with torch.no_grad():
        for parameter in (p for chunk in chunks for p in chunk.parameters()):
            parameter.mul_(2)
    small = ReshardSync(chunks, model, groups, engine, engine_ranks=engine_ranks, bucket_bytes=BUCKET_BYTES).sync(2)
    assert engine.version == 2
    check(engine.own, {name: 2 * tensor for name, tensor in expected.items()})
    return [first.received, small.received, small.staged]


def check(arrived: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert sorted(arrived) == sorted(expected)
    assert [name for name, tensor in expected.items() if not torch.equal(arrived[name], tensor)] == []


@pytest.mark.parametrize("family, layout, engine_ranks", CASES, ids=str)
def test_reshard_fills_what_vllm_would_load_with_the_fewest_bytes(
    files: Files, family: str, layout: Layout, engine_ranks: int
) -> None:
    results = run_ranks(layout.world_size, sync_slices, files, family, layout, engine_ranks)
    plan = SyncPlan(model=from_folder(files.model(family)), layout=layout, engine_ranks=engine_ranks)
    least = [4 * elements for elements in plan.totals().received]
    assert [received for received, _, _ in results] == least
    assert [received for _, received, _ in results] == least
    longest_index = 4 * 128  # what rounding a portion up can add
    assert max(staged for _, _, staged in results) <= BUCKET_BYTES + 8 * longest_index


@pytest.mark.parametrize(
    "family, layout, engine_ranks",
    [
        ("qwen2", Layout(tensor=2), 2),
        ("qwen3", Layout(pipeline=2), 2),
        ("qwen2", Layout(data=2), 1),
    ],
    ids=str,
)
def test_an_engine_that_was_written_into_is_as_one_that_loaded(
    files: Files, family: str, layout: Layout, engine_ranks: int
) -> None:
    found = vllm_cases.run(syncs_into_an_engine, files.model(family), layout, engine_ranks, ranks=2)
    assert found == [("full tensors", "the engine keeps its weights packed or quantised")] * 2


def test_an_engine_with_experts_is_not_written_into(files: Files) -> None:
    assert not vllm_cases.run(parameters_of_experts, files.model("qwen3_moe"))


def sync_full_tensors(files: Files, family: str, layout: Layout) -> tuple[int, int]:
    chunks, model, groups = policy(files.model(family), layout)
    expected = load_file(files.model(family) / "model.safetensors")
    engines = [Engine({}), Engine({})]
    full = FullTensorSync(chunks=chunks, model=model, groups=groups, engine=engines[0])
    one, many = full.sync(1), replace(full, engine=engines[1], bucket_bytes=BUCKET_BYTES).sync(2)
    for version, engine in enumerate(engines, start=1):
        check(engine.full, expected)
        assert engine.version == version
    assert many.received == one.received
    return many.received, many.staged


@pytest.mark.parametrize("family, layout", [case[:2] for case in CASES], ids=str)
def test_full_tensor_sync_gives_every_rank_every_full_tensor(files: Files, family: str, layout: Layout) -> None:
    results = run_ranks(layout.world_size, sync_full_tensors, files, family, layout)
    plan = SyncPlan(model=from_folder(files.model(family)), layout=layout, engine_ranks=1)
    assert sum(received for received, _ in results) >= 4 * sum(plan.totals().received)
    assert max(staged for _, staged in results) <= BUCKET_BYTES / 2
    assert (layout.model_parallel * layout.expert == 1) == (sum(staged for _, staged in results) == 0)


def stopped_early(files: Files) -> tuple[int, float]:
    """Bytes received when the first tensor was there, and a sum over the ranks after that was all they took."""
    chunks, model, groups = policy(files.model("qwen3"), TWO)
    stats = TransferStats()
    stream = export(chunks, model, groups, bucket_bytes=4 * BUCKET, stats=stats)
    next(stream)
    received = stats.received
    del stream
    total = torch.ones(1)
    dist.all_reduce(total, group=groups.world)
    again = Engine({})
    FullTensorSync(chunks=chunks, model=model, groups=groups, engine=again, bucket_bytes=4 * BUCKET).sync(1)
    check(again.full, load_file(files.model("qwen3") / "model.safetensors"))
    return received, total.item()


def test_the_next_bucket_is_under_way_and_an_engine_that_stops_taking_blocks_nobody(files: Files) -> None:
    results = run_ranks(2, stopped_early, files)
    assert [received > BUCKET / 2 for received, _ in results] == [True, True], "half of a bucket is the rank's own"
    assert [total for _, total in results] == [2.0, 2.0]


def chosen(
    files: Files, packed_rank: int, changes: dict[str, Any], family: str = "qwen3", layout: Layout = TWO
) -> tuple[str, str | None]:
    chunks, model, groups = policy(files.model(family), layout)
    shapes = {} if groups.rank == packed_rank else engine_shapes(model, 1) | changes
    engine = Engine(shapes, dtype=torch.bfloat16)
    weight_sync, reason = choose_weight_sync(chunks, model, groups, engine, engine_ranks=1)
    weight_sync.sync(1)
    return weight_sync.name, reason


def test_reshard_is_chosen_where_every_engine_rank_keeps_its_parameters_plain(files: Files) -> None:
    assert run_ranks(2, chosen, files, -1, {}) == [("reshard", None)] * 2
    packed = "the engine keeps its weights packed or quantised"
    assert run_ranks(2, chosen, files, 1, {}) == [("full tensors", f"rank 1: {packed}")] * 2
    name = "model.layers.0.self_attn.qkv_proj.weight"
    ((weight_sync, reason), _) = run_ranks(2, chosen, files, -1, {name: (3, 4)})
    assert weight_sync == "full tensors" and reason.startswith(f"{name}: the engine has (3, 4)")
    ((weight_sync, reason), _) = run_ranks(2, chosen, files, -1, {"scale": (1,)})
    assert (weight_sync, reason) == ("full tensors", "scale: only the engine has it")
    ((weight_sync, reason), _) = run_ranks(2, chosen, files, -1, {}, "mixtral", Layout(data=2, expert=2))
    assert (weight_sync, reason) == ("full tensors", "some of vLLM's kernels rearrange experts after loading")
