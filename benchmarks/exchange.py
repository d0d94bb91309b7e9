"""Measure how many bytes a rank receives until it has the rollouts that it learns from.

`.venv/bin/python -m benchmarks.exchange [--json] [--out benchmarks/results/NAME.json]`
The first row is measured with 8 processes of this machine, which sampled an equal share each. The others are counted
without a process, from the lengths alone: tests/distributed/test_exchange.py compares such counts with what real ranks
receive. `bytes_whole_groups` is what a rank would receive if all groups were sent to all ranks as Python objects.
"""

import pickle
import random
import sys
from array import array
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from benchmarks.measure import options, write_rows
from megatron_mcpo.config.layout import Layout
from megatron_mcpo.data.batch import divide
from megatron_mcpo.distributed import parallel
from megatron_mcpo.trainer.exchange import rank_batch, tell, told
from megatron_mcpo.types import Completion, Outline, Prompt, RolloutGroup, StopReason
from tests.support.ranks import run_ranks
from tests.support.traffic import Received

SAMPLES, PROMPT_TOKENS = 16, 200
MEASURED = (Layout(data=8), 2048, 3354)
COUNTED = (
    (Layout(tensor=4, data=2), 2048, 3354),
    (Layout(tensor=4, pipeline=2, data=8), 65536, 8192),
    (Layout(tensor=8, pipeline=4, data=16), 65536, 8192),
)
"""Layout, rollouts, and mean tokens of a response."""


def main(arguments: Sequence[str]) -> int:
    return write_rows("exchange", rows(), options(__doc__).parse_args(arguments))


def rows() -> Iterator[dict[str, Any]]:
    """Yield a row per layout and size."""
    layout, rollouts, tokens = MEASURED
    found = run_ranks(layout.world_size, _measured, layout, rollouts, tokens)
    received, whole = (max(each[place] for each in found) for place in range(2))
    yield _row(layout, rollouts, tokens, received) | {"bytes_whole_groups": whole}
    for layout, rollouts, tokens in COUNTED:
        groups = outlined(rollouts, tokens, num_holders=layout.world_size)
        yield _row(layout, rollouts, tokens, received_bytes(groups, layout, rank=0, data_rank=0))


def outlined(rollouts: int, tokens: int, *, num_holders: int) -> list[RolloutGroup]:
    """Return groups of random lengths, of which nothing but the outlines is here; prompts go to holders in turn."""
    draw = random.Random(0)
    prompt = Prompt(domain=0, source="made", index=0, token_ids=(1,) * PROMPT_TOKENS, entry={})
    return [
        RolloutGroup(
            prompt=prompt,
            told=tuple(_outline(draw.randint(1, 2 * tokens - 1)) for _ in range(SAMPLES)),
            holder=number % num_holders,
            rewards=(0.5,) * SAMPLES,
            correct=(False,) * SAMPLES,
        )
        for number in range(rollouts // SAMPLES)
    ]


def received_bytes(groups: Sequence[RolloutGroup], layout: Layout, *, rank: int, data_rank: int) -> int:
    """Count what a rank receives: all outlines, padded to the longest message, then what it lacks of its share."""
    parts = [
        [((0, number), told(group, rank)) for number, group in enumerate(groups) if group.holder == rank]
        for rank in range(layout.world_size)
    ]
    first = (layout.world_size - 1) * (8 + max(len(pickle.dumps(part)) for part in parts))
    division = divide(groups, num_data_ranks=layout.data, share_prompts=False)
    holder_M = [group.holder for group in groups for _ in group.outlines]
    lacking = [row for row in division.rank_rows[data_rank] if holder_M[row] != rank]
    return first + 8 * sum(division.response_lens_M[row] for row in lacking)


def _outline(length: int) -> Outline:
    return Outline(num_tokens=length, stop_reason=StopReason.STOP, versions=((0, length),))


def _row(layout: Layout, rollouts: int, tokens: int, received: float) -> dict[str, Any]:
    return {
        "ranks": layout.world_size,
        "data": layout.data,
        "rollouts": rollouts,
        "tokens": tokens,
        "bytes_per_rank": round(received),
    }


def _measured(layout: Layout, rollouts: int, tokens: int) -> tuple[float, int]:
    """Exchange the rollouts on a rank; return the bytes received, and those that whole groups would have."""
    torch.set_num_threads(1)
    ranks = parallel.init(layout, seed=0, timeout_seconds=240)
    groups = outlined(rollouts, tokens, num_holders=ranks.world_size)
    prompts = {(0, number): group.prompt for number, group in enumerate(groups)}
    made = {(0, n): _made(group, n) for n, group in enumerate(groups) if group.holder == ranks.rank}
    with Received(ranks) as received:
        found = tell(made, prompts, ranks)
        rank_batch([found[key] for key in prompts], ranks, share_prompts=False, routing=None)
    whole = (ranks.world_size - 1) * (8 + len(pickle.dumps(made)))
    return sum(received.bytes.values()), whole


def _made(group: RolloutGroup, seed: int) -> RolloutGroup:
    draw = random.Random(seed)
    completions = []
    for outline in group.told:
        tokens = tuple(array("H", draw.randbytes(2 * outline.num_tokens)))
        completions.append(
            Completion(
                token_ids=tokens,
                logprobs=tuple(token / -65536 for token in tokens),
                stop_reason=outline.stop_reason,
                versions=(0,) * outline.num_tokens,
                text="word " * outline.num_tokens,
            )
        )
    return RolloutGroup(
        prompt=group.prompt, completions=tuple(completions), rewards=group.rewards, correct=group.correct
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
