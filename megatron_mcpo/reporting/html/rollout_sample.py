"""Choose the rollouts that the report of a run embeds: all of a short run, whole steps spread over a long one.

One step's file is in memory at a time, and a file that is not chosen is not read. The same files give the same sample.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mcpo.config.config import Config
from megatron_mcpo.storage.files import iterate_jsonl, step_files

MOST_BYTES = 12_000_000
"""Of all rollouts as JSON."""

LEAST_STEPS = 24
"""A step takes at most this part of MOST_BYTES (of a shorter run, its part), so that none crowds out the others."""

TEXT_CHARACTERS = 4000
"""Of a prompt or a completion; of a longer one the beginning and the last quarter of this, where the answer is."""

ANSWER_CHARACTERS = 400
PARTNERS = 8
"""Of each kind, that come along with an anchor where a step does not fit as a whole."""


@dataclass(frozen=True, kw_only=True)
class RolloutSample:
    """The rollouts of a report.

    steps: as returned by `_Step.entry`, ascending; num_steps: that were dumped; unreadable: steps whose file is damaged
    """

    steps: list[dict[str, Any]]
    num_steps: int
    unreadable: list[int]


def coarse_to_fine(count: int) -> list[int]:
    """Order 0 .. count - 1 so that every beginning is spread over the whole: the ends, then bits reversed."""
    bits = max(1, (count - 1).bit_length())
    inner = (int(f"{number:0{bits}b}"[::-1], 2) for number in range(2**bits))
    return list(dict.fromkeys([*[0, count - 1][:count], *(number for number in inner if number < count)]))


def sample_rollouts(folder: Path, config: Config, *, most_bytes: int = MOST_BYTES) -> RolloutSample:
    """Return the rollouts of a run folder; steps are taken coarse to fine until the bytes are used."""
    files = step_files(folder / "rollouts")
    step_bytes = most_bytes // max(1, min(len(files), LEAST_STEPS))
    taken: list[dict[str, Any]] = []
    unreadable = []
    left = most_bytes
    for place in coarse_to_fine(len(files)):
        step, path = files[place]
        try:
            entry = _Step(iterate_jsonl(path), config).entry(step, step_bytes)
        except (OSError, KeyError, TypeError, ValueError):
            unreadable.append(step)
            continue
        left -= _size(entry)
        if left < 0:
            break
        taken.append(entry)
    taken.sort(key=lambda entry: entry["step"])
    return RolloutSample(steps=taken, num_steps=len(files), unreadable=sorted(unreadable))


def shortened(text: str, most: int = TEXT_CHARACTERS) -> tuple[str, int]:
    """Return the text, or its beginning and end with a remark between them, and how many characters are left out."""
    if len(text) <= most:
        return text, 0
    tail = most // 4
    left_out = len(text) - most
    return f"{text[: most - tail]}\n[... {left_out:,} characters left out ...]\n{text[-tail:]}", left_out


class _Step:
    """The rollouts of one step: `groups` by (minibatch, group), `rollouts` in the order of the file.

    Two rollouts are of one class if a setting makes them partners: an anchor's negatives are the incorrect rollouts of
    its class "against", its in-domain positives are the correct ones of its class "with".
    """

    def __init__(self, rows: Iterable[dict[str, Any]], config: Config):
        """Read the rows. Raises KeyError, TypeError or ValueError if they are not a dump of this configuration."""
        self.groups: dict[tuple[int, int], dict[str, Any]] = {}
        self.rollouts: list[dict[str, Any]] = []
        self.domains: list[int] = []
        numbers: dict[Any, int] = {}
        places: dict[tuple[int, int], int] = {}
        listed = []
        for place, row in enumerate(rows):
            group = (row["minibatch"], row["group"])
            domain = config.domain_names.index(row["domain"])
            scopes = {"pool": group[:1], "domain": (*group[:1], "domain", domain), "prompt": group}
            against, along = (
                numbers.setdefault(scopes[scope], len(numbers))
                for scope in (config.contrastive.negatives, config.contrastive.in_domain_scope)
            )
            places[row["minibatch"], row["row"]] = place
            listed.append([(row["minibatch"], number) for number in row["positives"]])
            self.groups.setdefault(group, _group_entry(row, domain))
            self.domains.append(domain)
            self.rollouts.append({"place": place, "group": group, "against": against, "with": along, **_entry(row)})
        for rollout, positives in zip(self.rollouts, listed, strict=True):
            rollout["positives"] = [places[positive] for positive in positives]

    def entry(self, step: int, most_bytes: int) -> dict[str, Any]:
        """Return the step as the page gets it, with as many rollouts as the bytes allow.

        groups: prompts; rollouts: each with its `place` in the file and its `group`'s number; positives are places
        """
        kept = sorted(self._kept(most_bytes))
        groups = {self.rollouts[place]["group"]: None for place in kept}
        numbers = {group: number for number, group in enumerate(groups)}
        return {
            "step": step,
            "total": len(self.rollouts),
            "groups": [self.groups[group] for group in groups],
            "rollouts": [{**self.rollouts[place], "group": numbers[self.rollouts[place]["group"]]} for place in kept],
        }

    def _kept(self, most_bytes: int) -> set[int]:
        """Return all places, or those of rollouts with some partners until the bytes are used; at least one set."""
        sizes = [_size(rollout) for rollout in self.rollouts]
        group_sizes = {group: _size(entry) for group, entry in self.groups.items()}
        if sum(sizes) + sum(group_sizes.values()) <= most_bytes:
            return set(range(len(sizes)))
        kept: set[int] = set()
        groups: set[tuple[int, int]] = set()
        used = 0
        for together in self._bundles():
            new = set(together) - kept
            new_groups = {self.rollouts[place]["group"] for place in new} - groups
            used += sum(sizes[place] for place in new) + sum(group_sizes[group] for group in new_groups)
            if kept and used > most_bytes:
                break
            kept |= new
            groups |= new_groups
        return kept

    def _bundles(self) -> Iterator[list[int]]:
        """Yield rollouts with some of their partners: by turns a correct and an incorrect one of every domain."""
        right: dict[int, list[int]] = {}
        wrong: dict[int, list[int]] = {}
        kinds: dict[tuple[int, bool], list[int]] = {}
        for place, rollout in enumerate(self.rollouts):
            name, members = ("with", right) if rollout["right"] else ("against", wrong)
            members.setdefault(rollout[name], []).append(place)
            kinds.setdefault((self.domains[place], rollout["right"]), []).append(place)
        for members in (right, wrong):
            for number, places in members.items():
                members[number] = _spread(places)[:PARTNERS]
        queues = [_spread(kinds[kind]) for kind in sorted(kinds)]
        for turn in range(max(map(len, queues), default=0)):
            for place in (queue[turn] for queue in queues if turn < len(queue)):
                rollout = self.rollouts[place]
                _, num_in_domain, num_negatives = rollout["partners"]
                yield [
                    place,
                    *_spread(rollout["positives"])[:PARTNERS],
                    *(right[rollout["with"]] if num_in_domain else []),
                    *(wrong[rollout["against"]] if num_negatives else []),
                ]


def _spread(places: Sequence[int]) -> list[int]:
    return [places[number] for number in coarse_to_fine(len(places))]


def _group_entry(row: dict[str, Any], domain: int) -> dict[str, Any]:
    prompt, left_out = shortened(row["prompt"])
    answer = row["answer"] if isinstance(row["answer"], str) else json.dumps(row["answer"], ensure_ascii=False)
    item = f"{row['source']} {row['index']}"
    return {
        "domain": domain,
        "item": item,
        "prompt": prompt,
        "cut": left_out,
        "answer": shortened(answer, ANSWER_CHARACTERS)[0],
    }


def _entry(row: dict[str, Any]) -> dict[str, Any]:
    completion, left_out = shortened(row["completion"])
    return {
        "text": completion,
        "cut": left_out,
        "right": bool(row["correct"]),
        "reward": row["reward"],
        "advantage": row["advantage"],
        "stop": row["stop_reason"],
        "partners": [row["num_positives"], row["num_in_domain"], row["num_negatives"]],
    }


def _size(value: Any) -> int:
    return len(json.dumps(value))
