"""Run folders: names, reuse, the lock, what a resumed run keeps, and errors.

Not covered: file systems without symbolic links (a warning only), two hosts on one network file system, and whether a
resumed run has the same figures (that is the trainer's test).
"""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from megatron_mcpo.config.config import Config, ConfigError, load
from megatron_mcpo.storage import run_items
from megatron_mcpo.storage.files import read_jsonl, step_files, write_atomically
from megatron_mcpo.storage.run_folder import FOLDERS, RunFolder, forecast, resume_problems
from megatron_mcpo.storage.run_items import Split
from megatron_mcpo.storage.run_settings import differences

FILE = """
[run]
steps = 5
name = "first"
[model]
path = "model"
[batch]
prompts = 4
samples = 4
[optimizer]
lr = 1e-5
[[domain]]
name = "arithmetic"
[[domain.sources]]
generator = "chain_sum"
options = { min_terms = 2 }
[[domain]]
name = "logic"
[[domain.sources]]
generator = "syllogism"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(FILE)
    return path


def config_of(file: Path, *overrides: str) -> Config:
    return load(file, ["--run.dir", str(file.parent / "runs"), *overrides])


def test_a_new_folder_holds_the_config_and_the_places_for_everything(file: Path) -> None:
    config = config_of(file)
    folder = RunFolder.open(config)
    assert folder.path == Path(config.run.dir) / "first"
    assert not folder.resumed
    assert folder.notes == ()
    assert load(folder.path / "config.toml") == config
    assert {p.name for p in folder.path.iterdir()} == {*FOLDERS, "config.toml", ".lock"}
    assert "trackers" not in FOLDERS, "only with a tracker"
    assert os.readlink(folder.path.parent / "latest") == "first"
    assert sorted(p.name for p in folder.path.parent.iterdir()) == ["first", "latest"]
    folder.close()


def test_an_unfinished_run_with_equal_settings_is_resumed(file: Path) -> None:
    RunFolder.open(config_of(file)).close()
    again = RunFolder.open(config_of(file))
    assert again.resumed
    assert again.path.name == "first"
    again.close()


def test_the_layout_and_settings_that_do_not_change_the_result_may_differ(file: Path) -> None:
    RunFolder.open(config_of(file)).close()
    overrides = ["--run.checkpoint_every", "2", "--rewards.workers", "3", "--engine.engine_check_every", "1"]
    overrides += ["--run.keep_checkpoints", "1", "--run.keep_every", "4", "--parallel.tensor", "2"]
    overrides += ["--engine.servers", '["http://there:1"]']
    again = RunFolder.open(config_of(file, *overrides, "--run.trackers", '["trackio"]'))
    assert again.resumed
    again.close()


@pytest.mark.parametrize(
    "override",
    [["--optimizer.lr", "2e-5"], ["--run.steps", "6"], ["--run.seed", "1"], ["--contrastive.mode", "reward"]],
)
def test_other_settings_get_a_folder_of_their_own(file: Path, override: list[str]) -> None:
    RunFolder.open(config_of(file)).close()
    other = RunFolder.open(config_of(file, *override))
    assert other.path.name == "first-2"
    assert not other.resumed
    assert override[0][2:] in other.notes[0]
    assert os.readlink(other.path.parent / "latest") == "first-2"
    other.close()
    third = RunFolder.open(config_of(file, *override))
    assert (third.path.name, third.resumed) == ("first-2", True)
    third.close()


def test_another_domain_is_another_run(file: Path) -> None:
    RunFolder.open(config_of(file)).close()
    file.write_text(FILE.replace("min_terms = 2", "min_terms = 3"))
    other = RunFolder.open(config_of(file))
    assert other.path.name == "first-2"
    assert "domain" in other.notes[0]
    other.close()


def test_a_finished_run_is_never_touched_again(file: Path) -> None:
    first = RunFolder.open(config_of(file))
    first.finish()
    first.close()
    before = {p: p.stat().st_mtime_ns for p in first.path.rglob("*")}
    second = RunFolder.open(config_of(file))
    assert second.path.name == "first-2"
    assert not second.resumed
    assert "finished" in second.notes[0] and second.notes[-1] == f"a new run begins in {second.path}"
    assert {p: p.stat().st_mtime_ns for p in first.path.rglob("*")} == before
    second.close()


def test_resume_never_takes_a_new_folder_even_beside_a_running_run(file: Path) -> None:
    first = RunFolder.open(config_of(file))
    second = RunFolder.open(config_of(file, "--run.resume", "never"))
    assert second.path.name == "first-2"
    first.close()
    second.close()


def test_foreign_files_of_the_name_are_left_alone(file: Path) -> None:
    runs = file.parent / "runs"
    (runs / "first").mkdir(parents=True)
    (runs / "first" / "thesis.tex").write_text("years of work")
    (runs / "first-2").write_text("a file")
    folder = RunFolder.open(config_of(file))
    assert folder.path.name == "first-3"
    assert (runs / "first" / "thesis.tex").read_text() == "years of work"
    assert (runs / "first-2").read_text() == "a file"
    folder.close()


HOLDER = """
import os, sys, time
from pathlib import Path
from megatron_mcpo.config.config import load
from megatron_mcpo.storage.run_folder import RunFolder
file = Path(sys.argv[1])
folder = RunFolder.open(load(file, ["--run.dir", str(file.parent / "runs")]))
if sys.argv[2] == "alone" or os.fork() == 0:
    print(os.getpid(), flush=True)
time.sleep(600)
os._exit(0)
"""


def start_holder(file: Path, mode: str) -> tuple[subprocess.Popen[str], int]:
    """The process, and the id that it says, or its fork as soon as that runs."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(file), mode], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, int(process.stdout.readline())


# Runs that are resumed by name, with other settings


def fresh(file: Path, *overrides: str, finished: bool = False) -> Path:
    folder = RunFolder.open(config_of(file, *overrides))
    if finished:
        folder.finish()
    folder.close()
    return folder.path


@pytest.mark.parametrize("how", ["name", "folder", "latest"])
def test_a_run_is_resumed_by_name_with_other_settings(file: Path, how: str) -> None:
    path = fresh(file)
    run = {"name": "first", "folder": str(path), "latest": "latest"}[how]
    config = config_of(file, "--resume", run, "--optimizer.lr", "2e-5", "--run.steps=9")
    assert resume_problems(config) == []
    folder = RunFolder.open(config)
    assert (folder.path, folder.resumed) == (path, True)
    assert folder.notes == ("run.steps: 5 before, 9 from here on", "optimizer.lr: 1e-05 before, 2e-05 from here on")
    assert load(path / "config.toml").optimizer.lr == 1e-5, "until its checkpoint was loaded"
    folder.adopt_settings()
    folder.close()
    assert os.readlink(path.parent / "latest") == "first"
    own = load(path / "config.toml")
    assert (own.optimizer.lr, own.run.steps, own.run.resume) == (2e-5, 9, "auto")
    again = RunFolder.open(config_of(file, "--optimizer.lr", "2e-5", "--run.steps=9"))
    assert (again.path, again.resumed, again.notes) == (path, True, ())
    again.close()


def test_a_finished_run_is_extended(file: Path) -> None:
    path = fresh(file, finished=True)
    (problem,) = resume_problems(config_of(file, "--resume", "latest"))
    assert problem.startswith("run.steps = 5: must be above 5 (")
    folder = RunFolder.open(config_of(file, "--resume", "latest", "--run.steps", "6"))
    assert folder.resumed and (path / "FINISHED").exists()
    folder.adopt_settings()
    assert not (path / "FINISHED").exists()
    folder.close()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("--run.seed=1", r"run.seed = 1: must stay 0"),
        ("--model.dtype=fp32", r"model.dtype = 'fp32': must stay 'bf16'"),
        ("--contrastive.dim=7", r"contrastive.dim = 7: must stay None \(the trained head"),
        ("--contrastive.head=mlp", r"contrastive.head = 'mlp': must stay 'linear'"),
    ],
)
def test_what_a_resumed_run_can_not_change_is_refused_by_name(file: Path, override: str, said: str) -> None:
    path = fresh(file)
    before = (path / "config.toml").read_bytes()
    with pytest.raises(ConfigError, match=said):
        RunFolder.open(config_of(file, "--resume", "first", override, "--optimizer.lr=1"))
    assert (path / "config.toml").read_bytes() == before


def test_terms_and_domains_can_not_come_or_go(file: Path) -> None:
    fresh(file)
    off = ("--contrastive.cross_domain_weight=0", "--contrastive.in_domain_weight=0")
    (problem,) = resume_problems(config_of(file, "--resume=first", *off))
    assert "must stay 'above 0'" in problem
    assert resume_problems(config_of(file, "--resume=first", off[0])) == []
    file.write_text(FILE.replace('name = "logic"', 'name = "others"'))
    (problem,) = resume_problems(config_of(file, "--resume=first"))
    assert "domain = 'arithmetic, others': must stay 'arithmetic, logic'" in problem


def test_a_name_that_is_no_run_is_refused(file: Path) -> None:
    fresh(file)
    (problem,) = resume_problems(config_of(file, "--resume", "frist"))
    assert "run.resume = 'frist': must be auto, never, latest, or a run's name or folder" in problem
    with pytest.raises(ConfigError, match="in use by another process"):
        held = RunFolder.open(config_of(file, "--resume", "first"))
        RunFolder.open(config_of(file, "--resume", "first"))
    held.close()


def test_limits_never_make_a_new_run(file: Path) -> None:
    path = fresh(file)
    overrides = ["--rewards.timeout=99", "--rewards.memory_gib=1", "--evaluation.every=3", "--evaluation.samples=2"]
    folder = RunFolder.open(config_of(file, *overrides, "--evaluation.temperature=1"))
    assert folder.path == path and len(folder.notes) == 5
    assert "rewards.timeout: 10.0 before, 99.0 from here on" in folder.notes
    folder.close()


def test_weights_of_another_run_are_for_a_beginning(file: Path) -> None:
    fresh(file)
    (problem,) = resume_problems(config_of(file, "--resume", "first", "--init-from", "elsewhere"))
    assert problem.startswith("model.init_from = 'elsewhere': must not be set for a run that goes on")
    fresh(file, "--init-from", "elsewhere", "--run.name", "begun")
    assert resume_problems(config_of(file, "--resume", "begun")) == []
    assert resume_problems(config_of(file, "--resume", "begun", "--init-from", "elsewhere")) == []


def test_changes_of_a_domain_are_said_key_by_key(file: Path) -> None:
    fresh(file)
    file.write_text(FILE.replace('name = "logic"', 'name = "logic"\nweight = 2.5'))
    assert forecast(config_of(file, "--resume", "first"))[1:] == ["domain logic: weight: 1.0 before, 2.5 from here on"]


def test_what_a_start_would_do_is_said_before(file: Path) -> None:
    assert forecast(config_of(file)) == [f"would begin {file.parent / 'runs' / 'first'}"]
    path = fresh(file)
    assert forecast(config_of(file)) == [f"would resume {path} from its start: it has no checkpoint yet"]
    (path / "checkpoints" / "step_000004").mkdir()
    assert forecast(config_of(file)) == [f"would resume {path} after step 4"]
    other = config_of(file, "--optimizer.lr=2e-5")
    assert forecast(other) == [
        f"{path} has other settings (optimizer.lr 1e-05 there, 2e-05 here)", f"would begin {path}-2",
    ]  # fmt: skip
    named = config_of(file, "--optimizer.lr=2e-5", "--resume=latest")
    assert forecast(named) == [f"would resume {path} after step 4", "optimizer.lr: 1e-05 before, 2e-05 from here on"]
    assert not Path(f"{path}-2").exists()


# The items of a run


def test_changes_of_items_are_counted(tmp_path: Path) -> None:
    big = 2**64 - 1
    splits = {"math/a.jsonl": Split(shots=(9, big), held_out=frozenset((7, big))), "code/b": Split()}
    run_items.write(tmp_path, {"math/a.jsonl": [1, 2, big], "code/b": [4]}, splits)
    assert run_items.read_splits(tmp_path) == splits

    def notes(now: list[int], *, allowed: bool = False) -> list[str]:
        return run_items.notes_of_changes(
            tmp_path, {"math/a.jsonl": now, "code/b": [4]}, ["math/a.jsonl"], allowed=allowed
        )

    assert notes([1, 2, big]) == [
        "math/a.jsonl: the items have changed since the checkpoint; the source begins its next epoch"
    ]

    counts = "math/a.jsonl: {} of 3 items were removed or changed, {} were added; the source begins its next epoch"
    assert notes([big, 2, 1, 7, 8]) == [counts.format(0, 2)]
    with pytest.raises(ConfigError, match=r"2 of 3 items were removed or changed, 1 were added.*--data.allow_changed"):
        notes([1, 9])
    assert notes([1, 9], allowed=True) == [counts.format(2, 1)]
    assert run_items.notes_of_changes(tmp_path / "none", {"code/b": [4]}, [], allowed=False) == []
    assert run_items.read_splits(tmp_path / "none") == run_items.read_splits(None) == {}
    (tmp_path / "items.npz").write_bytes(b"PK")
    with pytest.raises(ConfigError, match=r"items.npz: can't be read"):
        notes([1])


def test_a_second_process_is_refused_and_a_killed_one_lets_go(file: Path) -> None:
    process, _ = start_holder(file, "alone")
    try:
        with pytest.raises(ConfigError, match="in use by another process") as refused:
            RunFolder.open(config_of(file))
        assert f"process {process.pid} on " in str(refused.value)
        assert "--run.name" in str(refused.value)
    finally:
        process.kill()
        process.wait()
    folder = RunFolder.open(config_of(file))
    assert folder.resumed
    folder.close()


def test_a_forked_worker_that_outlives_a_killed_run_does_not_hold_its_folder(file: Path) -> None:
    process, child = start_holder(file, "fork")
    try:
        process.kill()
        process.wait()
        os.kill(child, 0)
        RunFolder.open(config_of(file)).close()
    finally:
        os.kill(child, signal.SIGKILL)


def test_launches_at_the_same_moment_end_in_one_owner(file: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(file), "alone"]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    try:
        deadline = time.monotonic() + 240
        while sum(process.poll() is None for process in processes) > 1:
            assert time.monotonic() < deadline, "two owners"
            time.sleep(0.02)
        (owner,) = [process for process in processes if process.poll() is None]
        assert owner.stdout is not None and owner.stdout.readline() == f"{owner.pid}\n"
    finally:
        for process in processes:
            process.kill()
    errors = [process.communicate()[1] for process in processes]
    assert sum("in use by another process" in error for error in errors) == 2, errors
    assert sorted(p.name for p in (file.parent / "runs").iterdir()) == ["first", "latest"]


def test_a_missing_parent_is_a_clear_error_and_quick(file: Path) -> None:
    begin = time.monotonic()
    with pytest.raises(ConfigError, match=r"run\.dir = .*No such file.*--run\.dir"):
        RunFolder.open(config_of(file, "--run.dir", str(file.parent / "typo" / "runs")))
    assert time.monotonic() - begin < 10, "no search for another name, and no waiting, can help"


def test_a_file_in_place_of_the_dir_is_a_clear_error(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.dir"):
        RunFolder.open(config_of(file, "--run.dir", str(file)))


def test_a_read_only_dir_is_a_clear_error(file: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        runs = Path(name)
        runs.chmod(0o555)
        config = config_of(file, "--run.dir", str(runs))
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        try:
            with pytest.raises(ConfigError, match=r"Permission denied.*--run\.dir"):
                RunFolder.open(config)
        finally:
            os.seteuid(user)
            runs.chmod(0o755)


@pytest.mark.parametrize("name", ["latest", ".", "..", ".hidden"])
def test_names_that_are_taken_are_refused(file: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"run\.name"):
        RunFolder.open(config_of(file, "--run.name", name))


def fill(folder: RunFolder, steps: range) -> None:
    lines = [json.dumps({"step": step, "reward/mean": step / 10}) + "\n" for step in steps]
    (folder.path / "metrics.jsonl").write_text("".join(lines))
    (folder.path / "eval.jsonl").write_text('{"step": 0, "mean": 0.1}\n{"step": 4, "mean": 0.2}\n')
    (folder.path / "notes.jsonl").write_text('{"step": 3, "text": "a"}\n{"step": 4, "text": "b"}\n')
    for step in steps:
        (folder.path / "rollouts" / f"step_{step:06d}.jsonl").touch()
        (folder.path / "representations" / f"step_{step:06d}.npz").touch()


def test_truncate_drops_what_came_after_the_checkpoint(file: Path) -> None:
    folder = RunFolder.open(config_of(file))
    fill(folder, range(1, 6))
    with (folder.path / "metrics.jsonl").open("a") as log:
        log.write('{"step": 6, "rewa')
    (folder.path / "rollouts" / ".step_000006.jsonl.tmp").touch()
    (folder.path / "rollouts" / "notes.txt").touch()
    assert folder.truncate_after(3) == 2, "the sixth step was not logged as a whole"
    assert (folder.path / "metrics.jsonl").read_text().splitlines() == [
        '{"step": 1, "reward/mean": 0.1}',
        '{"step": 2, "reward/mean": 0.2}',
        '{"step": 3, "reward/mean": 0.3}',
    ]
    assert (folder.path / "metrics.jsonl").read_text().endswith("}\n")
    assert [row["step"] for row in read_jsonl(folder.path / "eval.jsonl")] == [0]
    assert [row["text"] for row in read_jsonl(folder.path / "notes.jsonl")] == ["a"]
    assert [step for step, _ in step_files(folder.path / "rollouts")] == [1, 2, 3]
    assert [step for step, _ in step_files(folder.path / "representations")] == [1, 2, 3]
    assert sorted(p.name for p in (folder.path / "rollouts").iterdir())[0] == "notes.txt"
    assert folder.evaluated(0)
    assert not folder.evaluated(4)
    folder.close()


@pytest.mark.parametrize("half", ['{"step": 3, "reward', '{"step": 3}', "\x00\x00\x00", "3"])
def test_truncate_repairs_a_half_written_last_line(file: Path, half: str) -> None:
    folder = RunFolder.open(config_of(file))
    (folder.path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n' + half)
    folder.truncate_after(2)
    assert (folder.path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'
    folder.close()


def test_truncate_with_minus_one_starts_over(file: Path) -> None:
    folder = RunFolder.open(config_of(file))
    fill(folder, range(1, 3))
    assert folder.truncate_after(-1) == 2
    assert (folder.path / "metrics.jsonl").read_text() == ""
    assert (folder.path / "eval.jsonl").read_text() == (folder.path / "notes.jsonl").read_text() == ""
    assert step_files(folder.path / "rollouts") == []
    folder.close()


def test_a_file_system_without_locks_is_a_warning(
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(_file: int, _kind: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    folder = RunFolder.open(config_of(file))
    folder.close()
    [said] = caplog.messages
    assert "this file system has no locks (No locks available); don't start a run twice" in said


def test_truncate_of_an_empty_run_does_nothing(file: Path) -> None:
    folder = RunFolder.open(config_of(file))
    assert folder.truncate_after(0) == 0
    assert not (folder.path / "metrics.jsonl").exists()
    folder.close()


def test_an_atomic_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")
    code = (
        "import resource, signal, sys; from pathlib import Path;"
        "from megatron_mcpo.storage.files import write_atomically;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10));"
        "write_atomically(Path(sys.argv[1]), b'new' * 100)"
    )
    failed = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=180)
    assert "File too large" in failed.stderr
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_the_module_imports_no_torch() -> None:
    code = "import sys, megatron_mcpo.storage.run_folder; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=180).returncode == 0


def test_of_the_settings_that_differ_those_of_the_method_come_first() -> None:
    theirs = {"batch.prompts": 1, "batch.samples": 1, "optimizer.lr": 0.1, "contrastive.cross_domain_weight": 0.1}
    found = differences(theirs, {key: 0 for key in theirs})
    assert found[0] == "contrastive.cross_domain_weight 0.1 there, 0 here" and found[3] == "and 1 more"
