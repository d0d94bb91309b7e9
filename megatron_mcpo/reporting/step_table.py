"""Format training steps as rows of a table, one line per step, and the latest step's domains as another table."""

import math
import textwrap
from collections.abc import Mapping, Sequence

from megatron_mcpo.reporting.numbers import number, short

WIDTH = 120
"""Characters of the longest line."""

_BARS, _DIGITS = "▁▂▃▄▅▆▇█", "0123456789"

# After step, reward and domains: heading, width, key in metrics.jsonl.
_COLUMNS = (
    ("policy", 6, "loss/policy"),
    ("kl", 6, "loss/kl"),
    ("gain", 6, "contrast/gain_cross_domain"),
    ("auc", 6, "contrast/auc_cross_domain"),
    ("grad", 6, "grad_norm"),
    ("mismatch", 8, "engine/logprob_diff_mean"),
)

# Last: heading, width.
_WORK = (("tok/s", 7), ("sec", 6), ("GiB", 6), ("ETA", 8))

# Of a domain: heading, key without the domain, format.
_DOMAIN_COLUMNS = (
    ("reward", "reward", ".3f"),
    ("correct", "pass_rate", ".0%"),
    ("nonzero adv.", "nonzero_advantage", ".0%"),
    ("tokens", "response_tokens", ".1f"),
    ("truncated", "truncated", ".0%"),
    ("entropy", "entropy", ".2f"),
    ("kl", "kl", ".1e"),
    ("mismatch", "engine/logprob_diff", ".1e"),
    ("anchors", "contrast/anchors", ".4g"),
    ("auc", "contrast/auc_cross_domain", ".2f"),
)


class StepTable:
    """The layout of the lines of one run.

    A line has at most WIDTH characters: of more domains than fit, the strip shows the first ones and an ellipsis.
    """

    def __init__(self, domains: Sequence[str], total_steps: int, *, ascii_only: bool):
        """Set the widths of the columns. ascii_only: the strip shows tenths as digits instead of bars."""
        self._domains = domains
        self._total = total_steps
        self._levels = _DIGITS if ascii_only else _BARS
        self._more = "+" if ascii_only else "…"
        self._step_width = max(len("step"), 2 * len(str(total_steps)) + 1)
        others = [self._step_width, 6, *(width for _, width, _ in _COLUMNS), *(width for _, width in _WORK)]
        self._strip_width = min(max(len("domains"), len(domains)), WIDTH - sum(others) - 2 * len(others))

    def legend(self) -> list[str]:
        """Return which domain is which character of the strip: one line, or more where the names need them."""
        kind = "digit for a reward in tenths" if self._levels == _DIGITS else "bar for the reward, from 0 to 1"
        text = f"domains: one {kind}, from the left: {', '.join(self._domains)}"
        return textwrap.wrap(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False)

    def header(self) -> str:
        """Return the line of headings."""
        names = [name.rjust(width) for name, width, _ in _COLUMNS]
        work = [name.rjust(width) for name, width in _WORK]
        return "  ".join(["step".rjust(self._step_width), "reward", "domains".ljust(self._strip_width), *names, *work])

    def line(self, step: int, values: Mapping[str, float], eta: str) -> str:
        """Return the line of a step. Keys as in metrics.jsonl; a missing value is a dash."""
        seconds, tokens = values.get("time/step"), values.get("tokens/trained")
        rate = tokens / seconds if seconds and tokens is not None else None
        work = [number(rate, ".0f"), number(seconds, ".1f"), number(values.get("memory/peak_gib"), ".1f"), eta]
        return "  ".join(
            [
                f"{step}/{self._total}".rjust(self._step_width),
                short(values.get("reward/mean")).rjust(6),
                self.strip(values),
                *(short(values.get(key)).rjust(width) for _, width, key in _COLUMNS),
                *(cell.rjust(width) for cell, (_, width) in zip(work, _WORK, strict=True)),
            ]
        )

    def strip(self, values: Mapping[str, float]) -> str:
        """Return the domains' rewards from 0 to 1, one character each; "-" for a domain without rollouts."""
        marks = "".join(self._mark(values.get(f"reward/{name}")) for name in self._domains)
        if len(marks) > self._strip_width:
            marks = marks[: self._strip_width - 1] + self._more
        return marks.ljust(self._strip_width)

    def _mark(self, reward: float | None) -> str:
        if reward is None or not math.isfinite(reward):
            return "-"
        return self._levels[min(max(0, int(reward * len(self._levels))), len(self._levels) - 1)]

    def domains(self, values: Mapping[str, float]) -> list[str]:
        """Return a table with one line per domain; a column that no domain has is left out."""
        width = max(map(len, [*self._domains, "domain"]))
        columns = [["domain".ljust(width), *(name.ljust(width) for name in self._domains)]]
        for heading, key, form in _DOMAIN_COLUMNS:
            found = [values.get(f"{key}/{name}") for name in self._domains]
            if any(value is not None for value in found):
                cells = [heading, *(number(value, form) for value in found)]
                columns.append([cell.rjust(max(map(len, cells))) for cell in cells])
        return ["  " + "  ".join(row) for row in zip(*columns, strict=True)]


def step_warnings(step: int, domains: Sequence[str], values: Mapping[str, float]) -> list[str]:
    """Return one line for each thing that went wrong in a step: skipped updates, groups whose verifier failed."""
    warnings = []
    applied = values.get("update/applied", 1.0)
    if applied < 1.0:
        share = "the update was" if applied == 0.0 else f"{1 - applied:.0%} of the updates were"
        warnings.append(f"WARNING: step {step}: {share} skipped: the gradient was not finite")
    if errors := values.get("groups/errors", 0.0):
        by_domain = [f"{name} {count:g}" for name in domains if (count := values.get(f"errors/{name}", 0.0))]
        tail = f" ({', '.join(by_domain)})" if by_domain else ""
        warnings.append(f"WARNING: step {step}: the verifier failed in {errors:g} groups, which are skipped{tail}")
    return warnings
