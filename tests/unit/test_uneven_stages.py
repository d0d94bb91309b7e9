"""Pipeline stages with different numbers of layers: what is proposed, what is refused, and which layer is where.

Not covered here: their gradients (benchmarks/gradient_table.py) and their checkpoints (tests/distributed).
"""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mcpo.config.layout import Layout, nearly_even
from megatron_mcpo.config.model import layout_problems
from megatron_mcpo.weights.mapping import parameters
from tests.support.families import MODEL as EIGHT_LAYERS

MODEL = replace(EIGHT_LAYERS, num_layers=12)


@given(st.integers(1, 100), st.data())
def test_the_proposal_differs_by_one_layer_and_has_fewer_at_the_ends(num_layers: int, data: st.DataObject) -> None:
    chunks = data.draw(st.integers(1, num_layers))
    found = nearly_even(num_layers, chunks)
    assert len(found) == chunks and sum(found) == num_layers and max(found) - min(found) <= 1
    if num_layers % chunks not in (0, chunks - 1):
        assert found[0] == found[-1] == min(found)


def test_the_proposal_is_accepted() -> None:
    [problem] = layout_problems(MODEL, Layout(pipeline=5), 1)
    assert "Possible products: 1, 2, 3, 4, 6, 12; or set layers_per_stage = [2, 3, 3, 2, 2]." in problem
    assert layout_problems(MODEL, Layout(pipeline=5, layers_per_stage=(2, 3, 3, 2, 2)), 1) == []


@pytest.mark.parametrize(
    ("layout", "found"),
    [
        (Layout(pipeline=5, layers_per_stage=(1, 2, 3, 4, 2)), []),
        (Layout(pipeline=2, virtual_pipeline=2, layers_per_stage=(1, 5, 5, 1)), []),
        (Layout(pipeline=2, layers_per_stage=(6, 7)), ["2 numbers", "12 layers", "add up to 13"]),
        (Layout(pipeline=4, layers_per_stage=(6, 6)), ["4 numbers", "they are 2"]),
        (Layout(pipeline=13), ["Possible products: 1, 2, 3, 4, 6, 12."]),
    ],
)
def test_numbers_that_do_not_fit_are_refused(layout: Layout, found: list[str]) -> None:
    problems = layout_problems(MODEL, layout, 1)
    assert len(problems) == bool(found)
    assert all(text in problems[0] for text in found)


@pytest.mark.parametrize(("virtual", "layers"), [(1, (1, 11)), (2, (1, 3, 2, 6))])
def test_every_stage_has_the_layers_that_it_is_given(virtual: int, layers: tuple[int, ...]) -> None:
    layout = Layout(pipeline=2, virtual_pipeline=virtual, layers_per_stage=layers)
    norms = [p for p in parameters(MODEL, layout) if "post_attention" in str(p)]
    chunks = [number for number, count in enumerate(layers) for _ in range(count)]
    assert [(p.stage, p.chunk) for p in norms] == [(number % 2, number // 2) for number in chunks]
    assert [int(p.megatron[0].split(".")[2]) for p in norms] == [n for count in layers for n in range(count)]
