"""Files of figures, rollouts and representations, TensorBoard, and the refusal of trackers that are not installed.

Not covered: wandb, mlflow and trackio themselves (optional, not installed here; their adapters are a few calls each).
"""

import importlib.util
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_mcpo.config.config import Config, ConfigError
from megatron_mcpo.reporting.loggers import MetricsLog, check_trackers, write_representations, write_rollouts
from megatron_mcpo.storage.files import read_jsonl


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("tensorboard", "rollouts", "representations"):
        (tmp_path / name).mkdir()
    return tmp_path


def config_with(trackers: list[str]) -> Config:
    return Config.model_validate(
        {
            "run": {"steps": 1, "trackers": trackers},
            "model": {"path": "model"},
            "batch": {"prompts": 1, "samples": 2},
            "optimizer": {"lr": 1e-5},
            "domain": [{"name": "arithmetic", "sources": [{"generator": "chain_sum"}]}],
        }
    )


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_one_object_a_step_in_a_stable_order_at_once(folder: Path) -> None:
    log = MetricsLog(folder, [])
    log.log(1, {"reward/mean": 0.5, "lr": 1e-5, "tokens/trained": 1234, "contrast/anchors_cross_domain": 0.0})
    text = (
        '{"step": 1, "contrast/anchors_cross_domain": 0.0, "lr": 1e-05, "reward/mean": 0.5, "tokens/trained": 1234}\n'
    )
    assert (folder / "metrics.jsonl").read_text() == text
    log.log(2, {"reward/mean": 0.75})
    assert (folder / "metrics.jsonl").read_text() == text + '{"step": 2, "reward/mean": 0.75}\n'
    assert log.failures == 0
    log.close()
    assert not (folder / "trackers").exists(), "without a tracker there is nothing to put there"


def test_figures_that_are_not_finite_become_null(folder: Path) -> None:
    log = MetricsLog(folder, [])
    log.log(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": np.float32(0.5)})
    log.close()
    assert json.loads((folder / "metrics.jsonl").read_text()) == {"step": 1, "a": None, "b": None, "c": None, "d": 0.5}
    assert scalars(folder) == {"d": [(1, 0.5)]}


def test_an_evaluation_has_accuracies_mean_and_worst(folder: Path) -> None:
    log = MetricsLog(folder, [])
    log.log_eval(0, {"logic": 0.5, "arithmetic": 0.25, "mean": 0.375, "worst": 0.25, "accuracy_low/logic": math.nan})
    log.close()
    assert (folder / "eval.jsonl").read_text() == (
        '{"step": 0, "logic": 0.5, "arithmetic": 0.25, "mean": 0.375, "worst": 0.25, "accuracy_low/logic": null}\n'
    )
    assert scalars(folder)["eval/worst"] == [(0, 0.25)]


def test_tensorboard_of_a_resumed_run_has_each_step_once(folder: Path) -> None:
    first = MetricsLog(folder, [])
    for step in (1, 2, 3):
        first.log(step, {"reward/mean": step / 10})
    first.close()
    (folder / "metrics.jsonl").write_text('{"step": 1, "reward/mean": 0.1}\n')
    time.sleep(1.1)  # event files are read in the order of the second they were begun in, as a run's starts differ
    resumed = MetricsLog(folder, [])
    for step in (2, 3):
        resumed.log(step, {"reward/mean": step / 100})
    resumed.close()
    values = scalars(folder)["reward/mean"]
    assert [step for step, _ in values] == [1, 2, 3]
    assert [value for _, value in values] == pytest.approx([0.1, 0.02, 0.03])
    assert [row["step"] for row in read_jsonl(folder / "metrics.jsonl")] == [1, 2, 3]


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from megatron_mcpo.reporting.loggers import MetricsLog, write_rollouts
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder = Path(sys.argv[1])
log = MetricsLog(folder, [])
log.log(1, {"a": 0.5})
size = (folder / "metrics.jsonl").stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 5, resource.RLIM_INFINITY))
log.log(2, {"a": 0.25})
log.log(3, {"a": 0.125})
assert (folder / "metrics.jsonl").stat().st_size == size, "half a line was left"
assert not write_rollouts(folder, 3, [{"text": "x" * 1000}])
assert list((folder / "rollouts").iterdir()) == []
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
log.log(4, {"a": 0.0625})
log.close()
print(log.failures)
"""


def test_a_full_disk_is_told_once_and_costs_no_line(folder: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(folder)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [row["a"] for row in read_jsonl(folder / "metrics.jsonl")] == [0.5, 0.25, 0.125, 0.0625]
    assert [row["step"] for row in read_jsonl(folder / "metrics.jsonl")] == [1, 2, 3, 4]
    assert done.stderr.count("metrics.jsonl: could not be written") == 1
    assert done.stderr.count("step_000003.jsonl: could not be written") == 1
    assert int(done.stdout) >= 2
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_a_tracker_that_is_not_installed_is_refused_with_the_command(folder: Path, name: str) -> None:
    if importlib.util.find_spec(name) is not None:
        pytest.skip(f"{name} is installed")
    (problem,) = check_trackers(config_with([name]))
    assert problem.startswith(f"run.trackers: {name} must be installed")
    assert f"pip install {name}" in problem
    with pytest.raises(ConfigError, match=f"pip install {name}"):
        MetricsLog(folder, [name])


def test_a_folder_with_the_name_of_a_tracker_is_not_its_package(tmp_path: Path) -> None:
    if importlib.util.find_spec("trackio") is not None:
        pytest.skip("trackio is installed")
    (tmp_path / "trackio").mkdir()
    sys.path.insert(0, str(tmp_path))
    try:
        assert len(check_trackers(config_with(["trackio"]))) == 1
    finally:
        sys.path.remove(str(tmp_path))


def test_no_tracker_is_no_problem_and_checking_imports_no_torch() -> None:
    assert check_trackers(config_with([])) == []
    code = (
        "import sys, megatron_mcpo.reporting.loggers; sys.exit('torch' in sys.modules or 'tensorboard' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=180).returncode == 0


def test_rollouts_survive_whatever_the_model_wrote(folder: Path) -> None:
    rows = [
        {"completion": "\x1b[2J\x00\r\n\u2028é\ud800", "reward": 1.0, "advantage": math.nan, "positives": (3, 5)},
        {"completion": "", "reward": np.float32(0.0), "advantage": -0.5, "positives": []},
    ]
    assert write_rollouts(folder, 12, rows)
    raw = (folder / "rollouts" / "step_000012.jsonl").read_bytes()
    assert all(byte == 0x0A or 0x20 <= byte < 0x7F for byte in raw)
    first, second = (json.loads(line) for line in raw.split(b"\n")[:-1])
    assert first == {"step": 12, **rows[0], "advantage": None, "positives": [3, 5]}
    assert second["reward"] == 0.0


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_representations_come_back_as_they_were(folder: Path, dtype: type) -> None:
    z = np.random.default_rng(0).normal(size=(6, 4)).astype(dtype)
    domain, correct = np.array([0, 0, 1, 1, 2, 2]), np.array([1, 0, 1, 0, 1, 0], dtype=bool)
    prompt = np.array([0, 0, 1, 1, 2, 2])
    assert write_representations(folder, 3, z=z, domain=domain, prompt=prompt, correct=correct)
    with np.load(folder / "representations" / "step_000003.npz", allow_pickle=False) as data:
        assert data["z"].dtype == dtype
        np.testing.assert_array_equal(data["z"], z)
        np.testing.assert_array_equal(data["domain"], domain)
        np.testing.assert_array_equal(data["prompt"], prompt)
        np.testing.assert_array_equal(data["correct"], correct)


def test_representations_of_different_lengths_are_refused(folder: Path) -> None:
    two, three = np.zeros(2, int), np.zeros(3, int)
    with pytest.raises(AssertionError):
        write_representations(folder, 1, z=np.zeros((3, 2)), domain=two, prompt=three, correct=three.astype(bool))
