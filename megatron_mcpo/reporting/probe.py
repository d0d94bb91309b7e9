"""Measure whether correctness lies in a direction that domains share: a linear probe, tried on a domain it never saw.

Shapes: X: rollouts, D: dimensions of a representation.
"""

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_mcpo.reporting.accuracy import interval, mean
from megatron_mcpo.storage.files import step_files

MOST_ROLLOUTS = 4096
"""The newest rollouts that a probe is fitted on, so that it takes seconds."""

_NUM_RESAMPLES = 200
_FEWEST_PROMPTS = 4


@dataclass(frozen=True, kw_only=True)
class Rollouts:
    """Representations of rollouts whose prompts have both outcomes.

    z_XD: float64; domain_X, prompt_X: int; correct_X: bool
    """

    z_XD: np.ndarray
    domain_X: np.ndarray
    prompt_X: np.ndarray
    correct_X: np.ndarray

    def centered(self) -> np.ndarray:
        """Return the representations less the mean of their prompt's: [X, D]."""
        _, number_X = np.unique(self.prompt_X, return_inverse=True)
        sums = np.zeros((number_X.max() + 1, self.z_XD.shape[1]))
        np.add.at(sums, number_X, self.z_XD)
        centered_XD: np.ndarray = self.z_XD - (sums / np.bincount(number_X)[:, None])[number_X]
        return centered_XD


def probe_transfer(folder: Path, *, after: int, domain_names: Sequence[str]) -> dict[str, float]:
    """Return the probe's metrics (metric_table.EVALUATION) from the representations of the steps after `after`.

    A logistic regression of correctness on the rollouts of all domains but one ranks those of that one. Prompts with
    one outcome are left out. Empty without two domains that have at least four prompts with both outcomes.
    """
    rollouts = load(folder / "representations", after=after)
    if rollouts is None:
        return {}
    found: dict[str, float] = {}
    for key, x_XD in (("contrast/probe_transfer", rollouts.z_XD), ("contrast/probe_centered", rollouts.centered())):
        scores = {domain: score_X for domain in _domains(rollouts) if (score_X := _scores(x_XD, rollouts, domain)).size}
        if not scores:
            return {}
        resamples = [_resampled(score_X, rollouts, domain) for domain, score_X in scores.items()]
        low, high = interval(np.mean(resamples, axis=0))
        by_domain = {domain_names[domain]: _auc(score_X, rollouts, domain) for domain, score_X in scores.items()}
        found |= {key: mean(list(by_domain.values())), f"{key}_low": low, f"{key}_high": high}
        found |= {f"{key}/{name}": value for name, value in by_domain.items()}
    return found


def load(folder: Path, *, after: int) -> Rollouts | None:
    """Load the newest rollouts of these steps whose prompts have both outcomes; None without any."""
    parts: list[tuple[np.ndarray, ...]] = []
    for step, path in reversed([file for file in step_files(folder) if file[0] > after]):
        if sum(len(part[0]) for part in parts) >= MOST_ROLLOUTS:
            break
        try:
            with np.load(path, allow_pickle=False) as data:
                z, domain, correct = data["z"].astype(np.float64), data["domain"], data["correct"].astype(bool)
                prompt = data["prompt"].astype(np.int64) + (step << 32)
        except (OSError, KeyError, ValueError, zipfile.BadZipFile):
            continue
        usable = np.isfinite(z).all(axis=1) & _has_both_outcomes(prompt, correct)
        parts.append((z[usable], domain[usable], prompt[usable], correct[usable]))
    if not sum(len(part[0]) for part in parts):
        return None
    z, domain, prompt, correct = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    return Rollouts(z_XD=z, domain_X=domain, prompt_X=prompt, correct_X=correct)


def _has_both_outcomes(prompt_X: np.ndarray, correct_X: np.ndarray) -> np.ndarray:
    """Return which rollouts belong to a prompt with correct and incorrect rollouts: bool [X]."""
    _, number_X = np.unique(prompt_X, return_inverse=True)
    share = np.bincount(number_X, weights=correct_X) / np.bincount(number_X) if len(number_X) else np.zeros(0)
    mixed: np.ndarray = ((share > 0) & (share < 1))[number_X]
    return mixed


def _domains(rollouts: Rollouts) -> list[int]:
    """Return the domains with enough prompts to rank; none if there is only one."""
    prompts = {
        int(domain): len(np.unique(rollouts.prompt_X[rollouts.domain_X == domain]))
        for domain in np.unique(rollouts.domain_X)
    }
    found = [domain for domain, count in prompts.items() if count >= _FEWEST_PROMPTS]
    return found if len(found) > 1 else []


def _scores(x_XD: np.ndarray, rollouts: Rollouts, domain: int) -> np.ndarray:
    """Return how correct the probe of all other domains takes each rollout of `domain` to be."""
    from sklearn.linear_model import LogisticRegression  # takes a second to import, and most runs' ranks never need it

    inside_X = rollouts.domain_X == domain
    probe = LogisticRegression(class_weight="balanced", max_iter=500)
    scores: np.ndarray = probe.fit(x_XD[~inside_X], rollouts.correct_X[~inside_X]).decision_function(x_XD[inside_X])
    return scores


def _auc(score_X: np.ndarray, rollouts: Rollouts, domain: int, weight_X: np.ndarray | None = None) -> float:
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(rollouts.correct_X[rollouts.domain_X == domain], score_X, sample_weight=weight_X))


def _resampled(score_X: np.ndarray, rollouts: Rollouts, domain: int) -> np.ndarray:
    """Return the AUC of resamples of the domain's prompts, each with all its rollouts."""
    _, number_X = np.unique(rollouts.prompt_X[rollouts.domain_X == domain], return_inverse=True)
    num_prompts = int(number_X.max()) + 1
    generator = np.random.default_rng([0, domain])
    drawn = generator.multinomial(num_prompts, np.full(num_prompts, 1 / num_prompts), size=_NUM_RESAMPLES)
    return np.array([_auc(score_X, rollouts, domain, weights[number_X].astype(float)) for weights in drawn])
