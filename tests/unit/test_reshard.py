"""The plan of a weight sync, for random models and layouts, without process groups.

Not covered here: that vLLM lays its parameters out as the plan says, that Megatron numbers its ranks so, and the
transport (test_transfer.py).
"""

from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_mcpo.cli import push_plan
from megatron_mcpo.config.hf_config import from_folder
from megatron_mcpo.config.layout import Layout
from megatron_mcpo.config.model import ModelConfig, layout_problems
from megatron_mcpo.weights.engine_layout import engine_shapes
from megatron_mcpo.weights.mapping import Parameter, Split, hf_shapes, parameters
from megatron_mcpo.weights.reshard_plan import SyncPlan
from megatron_mcpo.weights.shards import cut_dim, fill, shard_shape
from tests.support import tiny_models
from tests.support.families import FAMILIES, MODEL, WITH_EXPERTS
from tests.support.paths import ROOT


@st.composite
def plans(draw: st.DrawFn) -> SyncPlan:
    """A model of any shape with any layout and engine that it may have."""
    with_experts = draw(st.booleans())
    tensor = draw(st.sampled_from([1, 1, 2, 3, 4]))
    pipeline = draw(st.sampled_from([1, 1, 2, 3]))
    layout = Layout(
        tensor=tensor,
        pipeline=pipeline,
        virtual_pipeline=draw(st.sampled_from([1, 2])) if pipeline > 1 else 1,
        context=draw(st.sampled_from([1, 1, 2])),
        data=draw(st.integers(1, 4)),
        sequence=with_experts and tensor > 1,
    )
    assume(layout.world_size <= 24)
    stage_ranks = layout.world_size // pipeline
    if with_experts:
        possible = [n for n in range(1, stage_ranks + 1) if stage_ranks % n == 0 and (n > 1 or tensor == 1)]
        layout = replace(layout, expert=draw(st.sampled_from(possible)))
    engine = draw(st.sampled_from([n for n in range(1, 9) if layout.world_size % n == 0]))
    common = int(np.lcm(tensor, engine))
    kv_heads = draw(st.sampled_from([n for n in range(1, 13) if divides(n, tensor) and divides(n, engine)]))
    model = draw(st.sampled_from(WITH_EXPERTS if with_experts else FAMILIES))
    model = replace(
        model,
        num_layers=pipeline * layout.virtual_pipeline * draw(st.integers(1, 2)),
        num_kv_heads=kv_heads,
        num_heads=int(np.lcm(common, kv_heads)) * draw(st.integers(1, 2)),
        head_dim=2 * draw(st.integers(1, 2)),
        hidden_size=draw(st.integers(1, 4)),
        ffn_hidden_size=common * draw(st.integers(1, 3)),
        vocab_size=draw(st.integers(1, 200)),
        tied_embeddings=draw(st.booleans()),
    )
    if model.experts:
        count = layout.expert * draw(st.integers(1, 2))
        experts = replace(model.experts, count=count, per_token=1, ffn_hidden_size=engine * draw(st.integers(1, 3)))
        model = replace(model, experts=experts)
    if layout.chunks > 1 and draw(st.booleans()):
        cuts = draw(st.lists(st.integers(1, 3), min_size=layout.chunks, max_size=layout.chunks))
        layout, model = replace(layout, layers_per_stage=tuple(cuts)), replace(model, num_layers=sum(cuts))
    assume(not layout_problems(model, layout, engine))
    whole = model.experts is not None and model.experts.count >= engine and draw(st.booleans())
    return SyncPlan(model=model, layout=layout, engine_ranks=engine, whole_experts=whole)


def divides(a: int, b: int) -> bool:
    return a % b == 0 or b % a == 0


def full_tensors(model: ModelConfig) -> dict[str, Tensor]:
    """Every Hugging Face tensor; no value occurs twice in the model, and none is 0."""
    tensors, next_value = {}, 1
    for name, shape in hf_shapes(model).items():
        size = torch.Size(shape).numel()
        tensors[name] = torch.arange(next_value, next_value + size, dtype=torch.int32).view(shape)
        next_value += size
    return tensors


def trainer_shards(plan: SyncPlan, full: dict[str, Tensor]) -> list[dict[tuple[str, int], Tensor]]:
    """Return what every rank holds, by Megatron's name and chunk. A rank is taken apart digit by digit."""
    layout = plan.layout
    ranks = []
    for rank in range(layout.world_size):
        stage, within = divmod(rank, layout.world_size // layout.pipeline)
        shards = {}
        for parameter in parameters(plan.model, layout):
            absent = parameter.mapping.tied and layout.pipeline == 1
            if parameter.stage == stage and parameter.expert_rank in (None, within % layout.expert) and not absent:
                key = (parameter.megatron[0], parameter.chunk)
                shards[key] = trainer_shard(parameter, layout, full, within % layout.tensor)
        ranks.append(shards)
    return ranks


def trainer_shard(parameter: Parameter, layout: Layout, full: dict[str, Tensor], tensor_rank: int) -> Tensor:
    mapping, dim = parameter.mapping, cut_dim(parameter.mapping)
    num_ranks = mapping.num_shards(layout)
    shard = torch.zeros(shard_shape(mapping, num_ranks), dtype=torch.int32)
    tensors = [full[name] for name in parameter.hugging_face]
    rank = tensor_rank if num_ranks > 1 else 0
    fill(mapping, shard, lambda s: tensors[s.tensor].narrow(dim, s.start, len(s)), rank=rank, num_ranks=num_ranks)
    return shard


def engine_parameters(plan: SyncPlan, full: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    """Return what vLLM's rank holds, written down once more: with chunks of whole tensors instead of slices."""
    model, num_ranks = plan.model, plan.engine_ranks
    base, more = divmod(model.experts.count, num_ranks) if model.experts else (0, 0)
    first = rank * base + min(rank, more)
    mine = range(first, first + base + (rank < more))

    def part(tensor: Tensor, dim: int = 0) -> Tensor:
        return tensor.chunk(num_ranks, dim)[rank]

    def heads(tensor: Tensor) -> Tensor:
        return part(tensor) if model.num_kv_heads >= num_ranks else one_head(tensor)

    def one_head(tensor: Tensor) -> Tensor:
        return tensor.chunk(model.num_kv_heads)[rank * model.num_kv_heads // num_ranks]

    def rows(tensor: Tensor) -> Tensor:
        padding = -len(tensor) % 64
        return part(torch.cat([tensor, tensor.new_zeros(padding, tensor.shape[1])]))

    def expert_part(tensor: Tensor, dim: int = 0) -> Tensor:
        return tensor if plan.whole_experts else part(tensor, dim)

    found: dict[str, Tensor] = {}
    experts: dict[str, list[Tensor]] = defaultdict(list)
    for name, tensor in full.items():
        module, _, kind = name.rpartition(".")
        parent, _, leaf = module.rpartition(".")
        if plan.whole_experts and ".experts." in name and int(parent.rpartition(".")[2]) not in mine:
            continue
        if leaf == "q_proj":
            k, v = (full[f"{parent}.{x}_proj.{kind}"] for x in "kv")
            found[f"{parent}.qkv_proj.{kind}"] = torch.cat([part(tensor), heads(k), heads(v)])
        elif ".experts." in name and leaf in ("gate_proj", "w1"):
            fused = f"{parent.rpartition('.')[0]}.routed_experts.w13_weight"
            up = full[f"{parent}.{'up_proj' if leaf == 'gate_proj' else 'w3'}.weight"]
            experts[fused].append(torch.cat([expert_part(tensor), expert_part(up)]))
        elif ".experts." in name and leaf in ("down_proj", "w2"):
            experts[f"{parent.rpartition('.')[0]}.routed_experts.w2_weight"].append(expert_part(tensor, 1))
        elif leaf == "gate_proj":
            up = full[f"{parent}.up_proj.weight"]
            found[f"{parent}.gate_up_proj.weight"] = torch.cat([part(tensor), part(up)])
        elif leaf in ("o_proj", "down_proj"):
            found[name] = part(tensor, 1)
        elif leaf in ("embed_tokens", "lm_head"):
            found[name] = rows(tensor)
        elif leaf not in ("k_proj", "v_proj", "up_proj", "w3"):
            found[name] = tensor
    return found | {name: torch.stack(parts) for name, parts in experts.items()}


@settings(deadline=None, max_examples=300)
@given(plans())
def test_every_element_arrives_once_from_the_right_place_and_no_byte_too_many_travels(plan: SyncPlan) -> None:
    full = full_tensors(plan.model)
    held = trainer_shards(plan, full)
    world = range(plan.layout.world_size)
    wanted = [engine_parameters(plan, full, rank % plan.engine_ranks) for rank in world]
    if not plan.whole_experts:
        shapes = engine_shapes(plan.model, plan.engine_ranks)
        assert [{name: tuple(tensor.shape) for name, tensor in each.items()} for each in wanted] == [
            shapes for _ in world
        ]
    arrived = [{name: torch.zeros_like(tensor) for name, tensor in each.items()} for each in wanted]
    writes = [{name: torch.zeros_like(tensor) for name, tensor in each.items()} for each in wanted]
    for step in plan.steps():
        dim = cut_dim(step.parameter.mapping)
        name, expert = plan.engine_name(step.parameter)
        for message in step.messages:
            places = [p for p in (step.parameter, step.copy) if p]
            keys = [(place.megatron[0], place.chunk) for place in places]
            (shard,) = [held[message.source][key] for key in keys if key in held[message.source]]
            for each in message.slices:
                values = shard.narrow(dim, each.source_start, len(each))
                hf = full[step.parameter.hugging_face[each.tensor]].narrow(dim, each.start, len(each))
                assert torch.equal(values, hf)
                for target, value in ((arrived[message.target][name], values), (writes[message.target][name], 1)):
                    part = target if expert is None else target[expert]
                    part.narrow(dim, each.target_start, len(each)).add_(value)
    totals = plan.totals()
    for rank in world:
        expected = wanted[rank]
        for name, tensor in expected.items():
            assert torch.equal(arrived[rank][name], tensor), name
            assert torch.equal(writes[rank][name], (tensor != 0).int()), name
        needed = np.concatenate([tensor.flatten().numpy() for tensor in expected.values()])
        own = np.concatenate([tensor.flatten().numpy() for tensor in held[rank].values()])
        missing = np.setdiff1d(needed, own)
        assert totals.received[rank] == np.count_nonzero(missing)
        assert totals.received[rank] + totals.local[rank] == np.count_nonzero(needed)
    assert sum(totals.sent) == sum(totals.received)


@settings(deadline=None, max_examples=100)
@given(plans())
def test_ranks_that_hold_the_same_send_the_same(plan: SyncPlan) -> None:
    """To within one message; experts lie across the groups that share everything else, so they are left out."""
    assume(plan.model.experts is None)
    sent = plan.totals().sent
    largest = max((step.elements(message) for step in plan.steps() for message in step.messages), default=0)
    stage_ranks = plan.layout.world_size // plan.layout.pipeline
    for stage in range(plan.layout.pipeline):
        for shard in range(plan.layout.tensor):
            same = sent[stage * stage_ranks + shard : (stage + 1) * stage_ranks : plan.layout.tensor]
            assert max(same) - min(same) <= largest


@settings(deadline=None, max_examples=30)
@given(plans())
def test_a_plan_is_the_same_every_time(plan: SyncPlan) -> None:
    assert str(list(plan.steps())) == str(list(replace(plan).steps()))


def test_nothing_travels_where_every_rank_holds_what_its_engine_rank_needs() -> None:
    for layout, engine in ((Layout(data=3), 1), (Layout(tensor=2, data=2), 2)):
        model = replace(MODEL, vocab_size=128)  # no padding on either side
        assert sum(SyncPlan(model=model, layout=layout, engine_ranks=engine).totals().received) == 0


def test_a_tied_embedding_is_taken_from_the_nearer_end_of_the_pipeline() -> None:
    tied = SyncPlan(model=replace(MODEL, tied_embeddings=True), layout=Layout(pipeline=2), engine_ranks=1)
    embedding = next(iter(tied.steps()))
    assert [(message.source, message.target) for message in embedding.messages] == [(0, 0), (1, 1)]
    assert embedding.copy is not None and embedding.copy.mapping.split is Split.ROWS


@pytest.mark.parametrize("engine, refused", [(1, False), (2, False), (3, True)])
def test_engines_that_vllm_could_not_divide_the_vocabulary_over_are_refused(engine: int, refused: bool) -> None:
    """vLLM pads to 64 rows, whatever the number of ranks."""
    model = replace(MODEL, num_heads=6, num_kv_heads=6, ffn_hidden_size=12, vocab_size=100)
    problems = layout_problems(model, Layout(data=6), engine)
    assert bool(problems) == refused
    assert not refused or ("128 padded rows" in problems[0] and problems[0].endswith("Possible: 1, 2."))


def test_the_plan_of_a_configuration_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_models.save_model(tmp_path, "experts")
    config = ROOT / "examples" / "quickstart" / "config.toml"
    arguments = [str(config), "--ranks", "4", "--model.path", str(tmp_path), "--model.dtype", "bf16"]
    arguments += ["--parallel.pipeline", "2"]
    arguments += ["--parallel.expert", "2", "--engine.tensor_parallel", "2"]
    assert push_plan.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    plan = SyncPlan(model=from_folder(tmp_path), layout=Layout(pipeline=2, data=2, expert=2), engine_ranks=2)
    assert lines[-1] == f"lower bound of what travels in a push: {2 * sum(plan.totals().received)} bytes"
    assert [line.split()[:2] for line in lines if "w2_weight" in line] == [
        ["model.layers.N.mlp.experts.routed_experts.w2_weight", "16"]
    ]
    assert push_plan.main([*arguments, "--messages"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == sum(len(message.slices) for step in plan.steps() for message in step.messages)
    name = "model.layers.3.mlp.experts.3.down_proj.weight [20:40] rank 3 at 20 -> rank 1"
    assert f"{name} model.layers.3.mlp.experts.routed_experts.w2_weight[3] at 0" in lines
    assert push_plan.main([*arguments, "--expert-parallel", "--messages"]) == 0
    name = "model.layers.3.mlp.experts.3.down_proj.weight [0:40] rank 3 at 0 -> rank 3"
    assert f"{name} model.layers.3.mlp.experts.routed_experts.w2_weight[1] at 0" in capsys.readouterr().out.splitlines()
    assert push_plan.main([*arguments, "--engine.tensor_parallel", "4", "--parallel.expert", "3"]) == 2
    assert "parallel.expert = 3" in capsys.readouterr().err


def test_a_plan_needs_no_weights(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """config.json alone, as of the models that the recipes name."""
    monkeypatch.chdir(ROOT)
    assert push_plan.main(["examples/qwen3_32b/h100_32.toml", "--ranks", "32"]) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    assert "4 engine(s) on 8 rank(s) each" in printed
    assert "lower bound of what travels in a push:" in printed
