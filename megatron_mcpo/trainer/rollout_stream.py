"""Hand finished groups to the training loop, sampled for a step or ahead of it. All ranks call it together."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_mcpo.config.config import Config
from megatron_mcpo.data.stream import PromptStream
from megatron_mcpo.trainer.choice import choose
from megatron_mcpo.trainer.collector import Collector, Sampling
from megatron_mcpo.trainer.dynamic_sampling import Collected, num_seeds, with_nonzero_advantage
from megatron_mcpo.trainer.jobs import Job, Key
from megatron_mcpo.trainer.unfinished import Unfinished
from megatron_mcpo.types import Completion, Prompt, RolloutGroup

_STEPS_PER_SEED = 1_000_003
"""Two runs with neighbouring seeds share no sampling seed before this many steps."""
_TRAINING = 1
"""The first part of the keys of jobs here: those of evaluations, with 0, come before them."""


@dataclass(frozen=True, kw_only=True)
class _Ticket:
    """A prompt under way. number: in the order of drawing, from 0"""

    number: int
    prompt: Prompt

    @property
    def key(self) -> Key:
        return (_TRAINING, self.number)


class RolloutStream:
    """The groups that every step learns from.

    With engine.staleness = 0 a step's prompts are drawn, completed and verified when it asks for them. Otherwise
    prompts of later steps are under way while the trainer learns, 1 + engine.prompts_ahead times those of a step in
    all. No step learns from tokens that are more than `staleness` steps older than its weights (choice.py).

    metrics: of the last step, which reporting/metric_table.py describes
    """

    def __init__(self, config: Config, collector: Collector, prompts: PromptStream, *, first_step: int):
        """Begin with nothing under way. first_step: the step after which the run goes on"""
        self.config = config
        self.collector = collector
        self.prompts = prompts
        self.metrics: dict[str, float] = {}
        ahead = config.engine.prompts_ahead
        self._slack = math.floor(config.engine.staleness - ahead)
        self._most = math.ceil((1 + ahead) * config.batch.prompts)
        self._tickets: list[_Ticket] = []
        self._jobs: list[Job] = []
        self._next_number = first_step * config.batch.prompts
        self._looked, self._busy = time.monotonic(), 0.0

    @property
    def is_ahead(self) -> bool:
        """Return whether prompts of later steps are sampled while the trainer learns."""
        return self._most > self.config.batch.prompts

    def start_ahead(self) -> None:
        """Begin with prompts of later steps, as far as they may be begun with the weights that the engine has."""
        if self.is_ahead:
            self._draw()

    def next(self, step: int) -> Collected:
        """Return the groups that a step learns from, in the order in which their prompts were drawn."""
        self._draw()
        chosen = self._wait(step)
        groups = self.collector.take([ticket.key for ticket in chosen])
        self._tickets = [ticket for ticket in self._tickets if ticket not in chosen]
        self.metrics = self._passed_over(chosen[-1].number) | self._engine_busy() if self.is_ahead else {}
        collected = with_nonzero_advantage(
            groups, self.collector, self.prompts, self._sampling(step), rounds=self.config.data.resample
        )
        self.metrics |= _staleness(collected.groups, step - 1)
        self.prompts.observe(collected.sampled)
        return collected

    def state_dict(self) -> dict[str, Any]:
        """Return, as JSON, what decides whether a run can go on with prompts under way."""
        config = self.config
        return {
            "prompts": config.batch.prompts,
            "samples": config.group_sizes,
            "limits": [config.rollout.max_prompt_tokens, *config.response_limits],
            "staleness": config.engine.staleness,
            "ahead": config.engine.prompts_ahead,
            **({"experts": True} if config.model.replays_engine else {}),
        }

    def unfinished(self) -> list[Unfinished]:
        """Return what is under way, on rank 0; nothing on the others. Collective."""
        if not self._tickets:
            return []
        found = self.collector.so_far([ticket.key for ticket in self._tickets])
        if self.collector.groups.rank > 0:
            return []
        return [
            Unfinished(
                number=ticket.number,
                item=self.prompts.identity(ticket.prompt),
                completions=found.get(ticket.key, ()),
            )
            for ticket in self._tickets
        ]

    def resume(self, state: Any, unfinished: Sequence[Unfinished]) -> list[str]:
        """Go on with what was under way; return what a user should know of it.

        Responses go on where they were; complete ones are verified again. An item that has changed gives way to the
        next one of its domain. Under other settings all of it is dropped.

        state, unfinished: what `state_dict` and `unfinished` have returned
        """
        if not unfinished:
            return []
        if state != self.state_dict():
            return [
                f"WARNING: {len(unfinished)} prompts were under way at the checkpoint; they are dropped, because "
                "batch.prompts, batch.samples, the limits of prompts or responses, engine.staleness, "
                "engine.oversample or model.router_replay has changed"
            ]
        found = [self.prompts.find(one.item) for one in unfinished]
        changed = [one.item.domain for one, prompt in zip(unfinished, found, strict=True) if prompt is None]
        others = iter(self.prompts.replacements(changed))
        for one, prompt in zip(unfinished, found, strict=True):
            begun = one.completions if prompt is not None else ()
            self._begin(one.number, prompt or next(others), begun)
        self._next_number = unfinished[-1].number + 1
        whole = sum(all(c.stop_reason.is_end for c in one.completions) for one in unfinished if one.completions)
        return [f"{len(found)} prompts were under way at the checkpoint and go on, {whole} of them completely sampled"]

    def _draw(self) -> None:
        """Draw prompts until as many are under way as may be, those of a step together."""
        prompts_a_step = self.config.batch.prompts
        while len(self._tickets) < self._most and self._next_number < self.config.run.steps * prompts_a_step:
            rest = prompts_a_step - self._next_number % prompts_a_step
            for prompt in self.prompts.next(min(rest, self._most - len(self._tickets))):
                self._begin(self._next_number, prompt, ())
                self._next_number += 1
        jobs, self._jobs = self._jobs, []
        self.collector.submit(jobs)

    def _begin(self, number: int, prompt: Prompt, begun: tuple[Completion, ...]) -> None:
        """Keep a prompt as under way, for the next `_draw` to submit."""
        ticket = _Ticket(number=number, prompt=prompt)
        step, place = divmod(number, self.config.batch.prompts)
        request = self._sampling(step + 1).request(prompt, place, self.collector.stop_token_ids)
        self._tickets.append(ticket)
        self._jobs.append(Job(key=ticket.key, place=place, prompt=prompt, request=request, begun=begun))

    def _sampling(self, step: int) -> Sampling:
        """Return how the prompts of a step are completed, whatever step learns from them in the end."""
        config = self.config
        num = num_seeds(config.batch.prompts, config.group_sizes, rounds=config.data.resample)
        return Sampling(
            num_samples=config.group_sizes,
            max_tokens=config.response_limits,
            temperature=config.rollout.temperature,
            seed=(config.run.seed * _STEPS_PER_SEED + step) * num,
        )

    def _wait(self, step: int) -> list[_Ticket]:
        """Wait until the prompts that a step learns from are finished."""
        waiting = [ticket.number for ticket in self._tickets]
        chosen = None
        while chosen is None:
            finished = {number for kind, number in self.collector.poll() if kind == _TRAINING}
            chosen = choose(waiting, finished, step=step, prompts=self.config.batch.prompts, slack=self._slack)
        return [ticket for ticket in self._tickets if ticket.number in chosen]

    def _passed_over(self, last: int) -> dict[str, float]:
        """Return how many prompts are under way, and of how many older ones than `last` the step could not wait."""
        older = [ticket.key for ticket in self._tickets if ticket.number < last]
        lengths = self.collector.lengths_so_far(older) if self._slack else []
        found = {"rollouts/under_way": float(len(self._tickets)), "rollouts/passed_over": float(len(older))}
        return found | ({"rollouts/passed_over_length": sum(lengths) / len(lengths)} if lengths else {})

    def _engine_busy(self) -> dict[str, float]:
        """Return the share of the time since the last call in which a server had requests, averaged over servers."""
        now, busy = time.monotonic(), self.collector.busy_seconds()
        share = (busy - self._busy) / (now - self._looked)
        self._looked, self._busy = now, busy
        return {"engine/busy": share}


def _staleness(groups: Sequence[RolloutGroup], step: int) -> dict[str, float]:
    """Return how many steps older the weights are that sampled the tokens than those of `step`."""
    ages = [(step - version, count) for group in groups for o in group.outlines for version, count in o.versions]
    num_tokens = sum(count for _, count in ages)
    return {
        "staleness/mean": sum(age * count for age, count in ages) / num_tokens if num_tokens else 0.0,
        "staleness/max": float(max((age for age, _ in ages), default=0)),
    }
