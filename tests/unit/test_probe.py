"""The probe of correctness on a domain it never saw: what it finds, what it must not find, and what it leaves out."""

from pathlib import Path

import numpy as np
import pytest

from megatron_mcpo.reporting.loggers import write_representations
from megatron_mcpo.reporting.metric_table import EVALUATION
from megatron_mcpo.reporting.probe import load, probe_transfer

NAMES = ("red", "green", "blue")
DIM = 6


def write_step(folder: Path, step: int, *, shared: float, own: float = 0.0, question: float = 0.0) -> None:
    """Write 3 x 8 prompts of 6 rollouts; correctness moves them along a common axis, and along one of their domain.

    question: how far apart prompts are
    """
    random = np.random.default_rng(step)
    (folder / "representations").mkdir(exist_ok=True)
    domain, prompt = np.repeat(np.arange(3), 48), np.repeat(np.arange(24), 6)
    correct = np.tile([True, False, True, False, False, True], 24)
    z = 0.1 * random.normal(size=(144, DIM)) + question * random.normal(size=(24, DIM))[prompt]
    sign = np.where(correct, 1.0, -1.0)
    z[:, 0] += shared * sign
    z[np.arange(144), 1 + domain] += own * sign
    write_representations(folder, step, z=z.astype(np.float32), domain=domain, prompt=prompt, correct=correct)


def test_it_finds_a_direction_that_domains_share(tmp_path: Path) -> None:
    write_step(tmp_path, 1, shared=0.3)
    found = probe_transfer(tmp_path, after=0, domain_names=NAMES)
    assert found["contrast/probe_transfer"] > 0.99
    assert found["contrast/probe_transfer_low"] <= found["contrast/probe_transfer"]
    described = {key.replace("<domain>", name) for row in EVALUATION.metrics for key in row.keys for name in NAMES}
    assert set(found) == {key for key in described if key.startswith("contrast/probe_")}
    by_domain = [found[f"contrast/probe_transfer/{name}"] for name in NAMES]
    assert sum(by_domain) / 3 == pytest.approx(found["contrast/probe_transfer"])


def test_directions_of_single_domains_are_no_transfer(tmp_path: Path) -> None:
    for step in range(1, 6):
        write_step(tmp_path, step, shared=0.0, own=1.0)
    found = probe_transfer(tmp_path, after=0, domain_names=NAMES)
    assert found["contrast/probe_transfer"] == pytest.approx(0.5, abs=0.1)
    assert found["contrast/probe_transfer_low"] < 0.53


def test_centring_removes_what_questions_differ_in(tmp_path: Path) -> None:
    write_step(tmp_path, 1, shared=0.3, question=3.0)
    found = probe_transfer(tmp_path, after=0, domain_names=NAMES)
    assert found["contrast/probe_transfer"] < 0.9 < found["contrast/probe_centered"]
    assert found["contrast/probe_centered"] > 0.99


def test_only_steps_since_the_last_evaluation_and_prompts_with_both_outcomes_count(tmp_path: Path) -> None:
    write_step(tmp_path, 1, shared=0.3)
    write_step(tmp_path, 2, shared=0.3)
    assert probe_transfer(tmp_path, after=2, domain_names=NAMES) == {}
    both, last = load(tmp_path / "representations", after=0), load(tmp_path / "representations", after=1)
    assert both is not None and last is not None
    assert (len(both.z_XD), len(last.z_XD)) == (288, 144)
    assert len(np.unique(both.prompt_X)) == 48, "prompts of two steps are two prompts"
    z = np.ones((4, DIM), np.float32)
    one_outcome = np.array([True, True, True, False])
    prompts = np.array([0, 0, 1, 1])
    write_representations(tmp_path, 3, z=z, domain=np.zeros(4, int), prompt=prompts, correct=one_outcome)
    kept = load(tmp_path / "representations", after=2)
    assert kept is not None and kept.prompt_X.tolist() == [(3 << 32) + 1] * 2
    assert probe_transfer(tmp_path, after=2, domain_names=NAMES) == {}, "one domain can't be left out"


def test_a_damaged_file_is_left_out(tmp_path: Path) -> None:
    write_step(tmp_path, 1, shared=0.3)
    (tmp_path / "representations" / "step_000002.npz").write_bytes(b"PK half a file")
    assert probe_transfer(tmp_path, after=0, domain_names=NAMES)["contrast/probe_transfer"] > 0.99
