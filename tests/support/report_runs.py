"""Run folders for tests of the report, written by the run_logger as a run does, with pairs made by the real terms."""

import json
import os
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import normalize
from transformers import PreTrainedTokenizerFast

from megatron_mcpo.algo.advantage import group_advantages
from megatron_mcpo.algo.contrastive import contrastive
from megatron_mcpo.config.config import Config
from megatron_mcpo.data.batch import make_batch, rewards_of
from megatron_mcpo.reporting import accuracy
from megatron_mcpo.reporting.run_logger import RunLogger
from megatron_mcpo.reporting.selection import COLUMNS
from megatron_mcpo.reporting.step_metrics import BatchReport, step_metrics
from megatron_mcpo.storage.files import read_jsonl, step_file
from megatron_mcpo.storage.run_folder import RunFolder
from megatron_mcpo.types import Completion, Prompt, RolloutGroup, StopReason

NAMES = ["arithmetic", "logic", "cognition"]
OFF = {"cross_domain_weight": 0.0, "in_domain_weight": 0.0}
type Texts = Callable[[int, int], str]
"""(domain, number of the rollout in its step) -> a text."""


def config_of(runs: Path, *, name: str = "run", num_steps: int = 6, **contrastive_options: Any) -> Config:
    return Config.model_validate(
        {
            "run": {"name": name, "dir": str(runs), "steps": num_steps},
            "model": {"path": "model"},
            "batch": {"prompts": 6, "samples": 4},
            "optimizer": {"lr": 1e-5},
            "contrastive": contrastive_options,
            "domain": [{"name": name, "sources": [{"generator": "chain_sum"}]} for name in NAMES],
        }
    )


def character_tokenizer() -> PreTrainedTokenizerFast:
    characters = [chr(code) for code in range(32, 127)]
    tokenizer = Tokenizer(models.WordLevel({character: i for i, character in enumerate(characters)}, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def plain_text(domain: int, number: int) -> str:
    return f"Because of {NAMES[domain]}, the answer is {number}."


def groups_of(step: int, *, prompts: int, samples: int, text: Texts, tokenizer: Any) -> list[RolloutGroup]:
    """Prompts of the domains by turns; about half of the rollouts are right, more of them in later steps."""
    draw = torch.rand(prompts, samples, generator=torch.Generator().manual_seed(step))
    rewards = (draw < 0.3 + 0.05 * min(step, 10)).float().tolist()
    groups = []
    for number in range(prompts):
        domain = number % len(NAMES)
        shown = text(domain, number * samples)[:200].encode("ascii", "replace").decode()
        question = tokenizer.encode(f"{shown} What is {number}?")
        completions = tuple(
            Completion(
                token_ids=(1,) * (2 + domain),
                logprobs=(-1.0,) * (2 + domain),
                stop_reason=StopReason.STOP,
                versions=(step,) * (2 + domain),
                text=text(domain, number * samples + sample),
            )
            for sample in range(samples)
        )
        prompt = Prompt(domain=domain, source="made", index=number, token_ids=tuple(question), entry={"answer": "42"})
        correct = tuple(reward == 1.0 for reward in rewards[number])
        groups.append(
            RolloutGroup(prompt=prompt, completions=completions, rewards=tuple(rewards[number]), correct=correct)
        )
    return groups


def report_of(config: Config, groups: list[RolloutGroup], step: int) -> BatchReport:
    batch = make_batch(groups, num_data_ranks=1, data_rank=0, share_prompts=False)
    z_MD = normalize(torch.randn(len(batch.labels), 16, generator=torch.Generator().manual_seed(step)), dim=1)
    on = config.contrastive.enabled
    return BatchReport(
        groups=groups,
        texts=[[completion.text for completion in group.completions] for group in groups],
        advantages_M=group_advantages(rewards_of(groups), batch.labels.prompt_M, batch.labels.domain_M),
        stats_MK=torch.rand(len(batch.labels), len(COLUMNS), generator=torch.Generator().manual_seed(step)),
        z_MD=z_MD if on else None,
        contrast=contrastive(z_MD, batch.labels, config.contrastive) if on else None,
        labels=batch.labels,
        num_tokens=batch.num_tokens,
        metrics={"loss/policy": 0.1 / step, "grad_norm": 2.0, "lr": 1e-5, "update/applied": 1.0},
    )


def work_metrics(step: int) -> dict[str, float]:
    phases = {"time/rollout": 1.0, "time/score": 0.5, "time/update": 1.5 / step, "sync/seconds": 0.1}
    return {**phases, "time/step": sum(phases.values()) + 0.05, "tokens/trained": 1000.0, "memory/peak_gib": 1.5}


class MadeRun:
    """A run folder and its reports by step; finished by `finish`."""

    def __init__(self, config: Config, *, num_minibatches: int = 2, prompts: int = 6, samples: int = 4):
        self.config = config
        self.folder = RunFolder.open(config)
        self.path = self.folder.path
        self.tokenizer = character_tokenizer()
        self.run_logger = RunLogger(
            config, self.folder, self.tokenizer, stop_token_ids=[], first_step=0, evaluated=False, verbose=False
        )
        self.sizes = {"prompts": prompts, "samples": samples}
        self.num_minibatches = num_minibatches
        self.reports: dict[int, list[BatchReport]] = {}

    def evaluate(self, step: int) -> None:
        """10, 20 and 30 % of ten held-out items are answered right."""
        items = {
            name: [accuracy.Item(correct=(item <= domain,), answers=("",)) for item in range(10)]
            for domain, name in enumerate(NAMES)
        }
        self.run_logger.evaluation(step, accuracy.accuracy_metrics(items))

    def step(self, step: int, *, text: Texts = plain_text, metrics: dict[str, float] | None = None) -> None:
        groups = groups_of(step, **self.sizes, text=text, tokenizer=self.tokenizer)
        parts = [groups[number :: self.num_minibatches] for number in range(self.num_minibatches)]
        self.reports[step] = [report_of(self.config, part, step) for part in parts]
        values = step_metrics(self.reports[step], groups, NAMES) | work_metrics(step) | (metrics or {})
        self.run_logger.step(step, values, self.reports[step])

    def repeat(self, steps: range, like: int) -> None:
        """Add steps that repeat metrics and dumps of the first `like` steps; files are shared to save disk space."""
        rows = read_jsonl(self.path / "metrics.jsonl")
        with (self.path / "metrics.jsonl").open("a") as file:
            file.writelines(json.dumps({**rows[step % like], "step": step}) + "\n" for step in steps)
        for step in steps:
            for kind, suffix in (("rollouts", ".jsonl"), ("representations", ".npz")):
                shared = step_file(self.path, kind, 1 + step % like, suffix)
                os.link(shared, step_file(self.path, kind, step, suffix))

    def finish(self) -> Path:
        """Write the report; return its path."""
        self.run_logger.finish()
        self.run_logger.close()
        self.folder.close()
        return self.path / "report.html"


def made_run(runs: Path, *, num_steps: int = 6, text: Texts = plain_text, name: str = "run", **options: Any) -> MadeRun:
    """Make a run of `num_steps` steps with an evaluation before and after; options: keys of [contrastive]."""
    run = MadeRun(config_of(runs, name=name, num_steps=max(1, num_steps), **options))
    if num_steps:
        run.evaluate(0)
    for step in range(1, num_steps + 1):
        run.step(step, text=text)
    if num_steps:
        run.evaluate(num_steps)
    return run


class Scripts(HTMLParser):
    """The contents of <script> elements by type, and all tags."""

    def __init__(self, text: str):
        super().__init__()
        self.scripts: list[tuple[str | None, str]] = []
        self.tags: Counter[str] = Counter()
        self._inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self._inside = tag == "script"
        if self._inside:
            self.scripts.append((dict(attrs).get("type"), ""))

    def handle_endtag(self, tag: str) -> None:
        self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            kind, text = self.scripts[-1]
            self.scripts[-1] = (kind, text + data)


def data_of(path: Path) -> dict[str, Any]:
    found = Scripts(path.read_text(encoding="utf-8"))
    [text] = [text for kind, text in found.scripts if kind == "application/json"]
    return json.loads(text)


def partners(entry: dict[str, Any], rollout: dict[str, Any]) -> tuple[list[int], list[int], list[int]]:
    """Return the places of the cross-domain positives, the in-domain positives and the negatives on the page."""
    rollouts = entry["rollouts"]
    _, num_in_domain, num_negatives = rollout["partners"]
    together = [
        o["place"] for o in rollouts if o["right"] and o["with"] == rollout["with"] and o["place"] != rollout["place"]
    ]
    against = [o["place"] for o in rollouts if not o["right"] and o["against"] == rollout["against"]]
    return rollout["positives"], together if num_in_domain else [], against if num_negatives else []
