"""Ranks learn from tokens that other ranks sampled: the batches of all layouts are those of one process, bit for bit.

Not covered: engines and verifiers, which tests of the whole program have.
"""

import pickle
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import exchange as benchmark
from megatron_mcpo.config.layout import Layout
from megatron_mcpo.data.batch import make_batch
from megatron_mcpo.data.routing import Routing
from megatron_mcpo.distributed import parallel
from megatron_mcpo.trainer.exchange import rank_batch, tell, texts_on_first
from megatron_mcpo.types import Completion, RolloutGroup, TrainBatch
from tests.support import tiny_models
from tests.support.ranks import run_ranks
from tests.support.traffic import Received

ROUTING = Routing(num_layers=3, per_token=2, count=300)  # numbers of 16 bits


def sampled(num_prompts: int = 7) -> list[RolloutGroup]:
    """Groups of uneven sizes and lengths, some of them empty, each with a text of its own."""
    groups = tiny_models.uneven(tiny_models.rollout_groups(num_prompts=num_prompts, num_samples=3))
    return [
        replace(
            group,
            completions=tuple(
                with_experts(
                    group,
                    replace(c, text=f"{number}.{sample}", versions=range(len(c.token_ids)))
                    if (number + sample) % 5
                    else replace(c, token_ids=(), logprobs=(), versions=(), text=""),
                )
                for sample, c in enumerate(group.completions)
            ),
        )
        for number, group in enumerate(groups)
    ]


def with_experts(group: RolloutGroup, completion: Completion) -> Completion:
    """Add experts that depend on the tokens, and are not those of neighbours."""
    tokens = [*group.prompt.token_ids, *completion.token_ids][:-1]
    rows = [[[(token + layer) % 300, (7 * token + 150) % 300] for layer in range(3)] for token in tokens]
    return replace(completion, experts=torch.tensor(rows, dtype=ROUTING.dtype).view(-1, 3, 2))


def values(batch: TrainBatch) -> dict[str, Any]:
    """The fields of a batch, in a form that can be compared and sent."""
    found = {field.name: getattr(batch, field.name) for field in fields(batch)}
    labels = found.pop("labels")
    found |= {name: getattr(labels, name) for name in ("domain_M", "prompt_M", "correct_M")}
    return {
        name: (str(value.dtype), value.tolist()) if isinstance(value, torch.Tensor) else value
        for name, value in found.items()
    }


def exchanged(
    layout: Layout, holders: Sequence[int], share_prompts: bool, routing: Routing | None = None
) -> dict[str, Any]:
    """Exchange groups, each made by the rank that `holders` names; return what this rank has then."""
    ranks = parallel.init(layout, seed=0, timeout_seconds=120)
    groups = sampled(len(holders))
    keys = [(1, number) for number in range(len(holders))]
    made = {key: g for key, g, holder in zip(keys, groups, holders, strict=True) if holder == ranks.rank}
    prompts = {key: group.prompt for key, group in zip(keys, groups, strict=True)}
    with Received(ranks) as received:
        found = tell(made, prompts, ranks)
        told = [found[key] for key in keys]
        batch = rank_batch(told, ranks, share_prompts=share_prompts, routing=routing)
    return {
        "batch": values(batch),
        "data_rank": ranks.data_rank,
        "outlines": [group.outlines for group in told],
        "rewards": [(group.rewards, group.correct, group.holder, group.prompt.index) for group in told],
        "here": [number for number, group in enumerate(told) if group.completions],
        "texts": texts_on_first(told, ranks),
        "bytes": sum(received.bytes.values()),
    }


def expected(
    layout: Layout, num_prompts: int, data_rank: int, share_prompts: bool, routing: Routing | None
) -> dict[str, Any]:
    batch = make_batch(
        sampled(num_prompts), num_data_ranks=layout.data, data_rank=data_rank, share_prompts=share_prompts
    )
    has_experts = routing is not None and len(batch) > 0
    return values(batch if has_experts else replace(batch, experts_TXK=None))


@pytest.mark.parametrize(("share_prompts", "routing"), [(False, ROUTING), (True, None)])
@pytest.mark.parametrize(
    ("layout", "holders"),
    [
        (Layout(), [0] * 7),
        (Layout(data=4), [0, 1, 2, 3, 0, 1, 2]),
        (Layout(data=4), [3] * 7),  # one engine of four ranks, or one server
        (Layout(data=3), [2, 0]),  # a rank may have and get nothing
        (Layout(tensor=2, data=2), [0, 2, 0, 2, 0, 2, 0]),
        (Layout(tensor=2, pipeline=2), [1, 0, 3, 2, 1]),
    ],
    ids=str,
)
def test_every_rank_gets_the_batch_of_one_process(
    layout: Layout, holders: list[int], share_prompts: bool, routing: Routing | None
) -> None:
    groups = sampled(len(holders))
    for rank, found in enumerate(run_ranks(layout.world_size, exchanged, layout, holders, share_prompts, routing)):
        assert found["batch"] == expected(layout, len(holders), found["data_rank"], share_prompts, routing)
        assert found["outlines"] == [tuple(c.outline for c in group.completions) for group in groups]
        assert found["rewards"] == [
            (group.rewards, group.correct, holder, group.prompt.index)
            for group, holder in zip(groups, holders, strict=True)
        ]
        assert found["here"] == [number for number, holder in enumerate(holders) if holder == rank]
        assert found["texts"] == ([[c.text for c in group.completions] for group in groups] if rank == 0 else [])


@pytest.mark.parametrize("holders", [[0] * 8, [0, 1, 2, 3, 0, 1, 2, 3]], ids=str)
def test_a_rank_receives_outlines_and_its_own_share_alone(holders: list[int]) -> None:
    """Compare with what benchmarks/exchange.py counts without a rank."""
    layout = Layout(data=4)
    told = [
        RolloutGroup(
            prompt=group.prompt, told=group.outlines, holder=holder, rewards=group.rewards, correct=group.correct
        )
        for group, holder in zip(sampled(8), holders, strict=True)
    ]
    for rank, found in enumerate(run_ranks(4, exchanged, layout, holders, False)):
        who = 3 * (8 + len(pickle.dumps(rank)))  # which replica each other rank belongs to
        counted = benchmark.received_bytes(told, layout, rank=rank, data_rank=found["data_rank"])
        assert found["bytes"] == counted + who


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 6), max_size=12))
def test_an_outline_tells_which_weights_sampled_how_many_tokens(versions: list[int]) -> None:
    versions.sort()
    completion = replace(sampled()[0].completions[1], token_ids=versions, logprobs=versions, versions=versions)
    outline = completion.outline
    assert outline.num_tokens == len(versions)
    assert [version for version, count in outline.versions for _ in range(count)] == versions
    assert len(dict(outline.versions)) == len(outline.versions)
