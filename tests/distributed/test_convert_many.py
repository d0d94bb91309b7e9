"""Conversions by several processes, and such as were killed: real processes, with torchrun's environment.

Not covered here: several hosts.
"""

import contextlib
import errno
import fcntl
import functools
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_mcpo.cli import convert_to_megatron
from megatron_mcpo.config.config import ConfigError
from megatron_mcpo.config.hf_config import from_folder
from megatron_mcpo.convert import megatron_write
from megatron_mcpo.convert.compare import compare
from megatron_mcpo.convert.convert import hf_to_megatron, megatron_to_hf
from megatron_mcpo.convert.staging import StagingFolder
from megatron_mcpo.weights.checkpoint_layout import MegatronFolder
from megatron_mcpo.weights.hf_io import HfFolder
from tests.support.conversion import make_model, quiet, same, sizes, tensors
from tests.support.ranks import run_ranks


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "source", "qwen3", "bfloat16")


KILLED = """
import itertools, os, signal, sys, time
from pathlib import Path
from megatron_mcpo.convert import convert, megatron_write
from megatron_mcpo.convert.staging import StagingFolder
source, final, kind = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
megatron_write.PART_BYTES = 100_000
finish, calls, parts = StagingFolder.finish, itertools.count(), []
def finish_and_die(self, part, files, record):
    if next(calls) >= 2:  # two threads finish parts
        while len(parts) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    finish(self, part, files, record)
    parts.append(part)
StagingFolder.finish = finish_and_die
if kind == "megatron":
    layout = convert.layout_of(tensor=2, pipeline=2, virtual_pipeline=1, expert=1)
    convert.hf_to_megatron(source, final, layout, say=print)
else:
    convert.megatron_to_hf(source, final, max_file_bytes=100_000, say=print)
"""


@pytest.mark.parametrize("kind", ["megatron", "hf"])
def test_a_killed_conversion_continues_where_it_was_interrupted(
    source: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(megatron_write, "PART_BYTES", 100_000)
    given, final = source, tmp_path / "out"
    if kind == "hf":
        given = tmp_path / "given"
        hf_to_megatron(source, given, sizes(), verify_forward=False, say=quiet)
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(given), str(final), kind], capture_output=True, text=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not final.exists()
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / ".out.partial").iterdir()}
    num_done = len(list((tmp_path / ".out.partial" / "parts").glob("*.json")))
    assert num_done >= 2
    said: list[str] = []
    if kind == "megatron":
        hf_to_megatron(given, final, sizes(tensor=2, pipeline=2), verify_forward=False, say=said.append)
        model = from_folder(source)
        assert not compare(HfFolder(source, model), MegatronFolder.open(final, model)).differing
    else:
        megatron_to_hf(given, final, max_file_bytes=100_000, verify_forward=False, say=said.append)
        assert same(tensors(source), tensors(final))
    kept = [path.name for path in final.iterdir() if before.get(path.name) == path.stat().st_mtime_ns]
    assert len(kept) >= num_done
    progress = [line for line in said if line.endswith("parts written")]
    assert progress[0].startswith(f"{num_done + 1} of "), said
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


KILLED_AT = """
import resource, signal, sys
from pathlib import Path
import torch
from megatron_mcpo.convert import convert
source, final, kind, function, limit = Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:5], int(sys.argv[5])
wanted = getattr(convert, function)
def cut(*arguments):
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    wanted(*arguments)
setattr(convert, function, cut)
if kind == "megatron":
    layout = convert.layout_of(tensor=1, pipeline=1, virtual_pipeline=1, expert=1)
    convert.hf_to_megatron(source, final, layout, dtype=torch.float32, say=print)
else:
    convert.megatron_to_hf(source, final, dtype=torch.float32, say=print)
"""


@pytest.mark.parametrize(
    ("kind", "function", "limit", "dies_in"),
    [
        ("megatron", "copy_assets", 10_000, "tokenizer.json"),
        ("hf", "copy_assets", 10_000, "tokenizer.json"),
        ("megatron", "copy_assets", 100, "config.json"),
        ("hf", "_set_dtype", 100, "config.json"),
    ],
)
def test_configuration_and_tokenizer_are_whole_after_a_kill_in_the_middle_of_one(
    source: Path, tmp_path: Path, kind: str, function: str, limit: int, dies_in: str
) -> None:
    given, final = tmp_path / "given", tmp_path / "out"
    shutil.copytree(source, given)
    (given / "tokenizer.json").write_text(json.dumps(["word"] * 5000))
    if kind == "hf":
        assets, given = given, tmp_path / "megatron"
        hf_to_megatron(assets, given, sizes(), verify_forward=False, say=quiet)
    command = [sys.executable, "-c", KILLED_AT, str(given), str(final), kind, function, str(limit)]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=540)
    assert killed.returncode == -signal.SIGXFSZ, killed.stderr
    [cut] = [path.name for path in (tmp_path / ".out.partial").iterdir() if path.stat().st_size == limit]
    assert dies_in in cut
    if kind == "megatron":
        hf_to_megatron(given, final, sizes(), dtype=torch.float32, verify_forward=False, say=quiet)
    else:
        megatron_to_hf(given, final, dtype=torch.float32, verify_forward=False, say=quiet)
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (final / name).read_bytes() == (given / name).read_bytes(), name
    written, before = (json.loads((folder / "config.json").read_text()) for folder in (final, given))
    assert written == {**before, "dtype": "float32"}
    assert [path.name for path in final.iterdir() if path.name.endswith(".tmp")] == []


def convert(kind: str, given: Path, final: Path, *, dies_at: int | None = None) -> list[str]:
    """Return the parts that this process has written; rank 1 kills itself at the end of one of them."""
    finish, made = StagingFolder.finish, []

    def count(self: StagingFolder, part: str, files: Sequence[str], record: Any) -> None:
        if len(made) == dies_at and os.environ.get("RANK") == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        finish(self, part, files, record)
        made.append(part)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StagingFolder, "finish", count)
        patch.setattr(megatron_write, "PART_BYTES", 30_000)
        if kind == "megatron":
            hf_to_megatron(given, final, sizes(tensor=2, pipeline=2), verify_forward=False, say=quiet)
        else:
            megatron_to_hf(given, final, max_file_bytes=30_000, verify_forward=False, say=quiet)
    return made


@pytest.fixture(scope="module")
def megatron(source: Path) -> Path:
    made = source.parent / "megatron"
    hf_to_megatron(source, made, sizes(tensor=2), verify_forward=False, say=quiet)
    return made


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("kind", ["megatron", "hf"])
def test_several_processes_make_what_one_makes(source: Path, megatron: Path, tmp_path: Path, kind: str) -> None:
    """Also after one of them was killed, and going on with another number of them."""
    given = source if kind == "megatron" else megatron
    parts = convert(kind, given, tmp_path / "one")
    assert len(parts) > 6
    first, second = run_ranks(2, convert, kind, given, tmp_path / "two")
    assert abs(len(first) - len(second)) <= 1 and sorted(first + second) == sorted(parts)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")

    with pytest.raises(RuntimeError, match="died without a traceback"):
        run_ranks(2, functools.partial(convert, dies_at=1), kind, given, tmp_path / "three")
    assert not (tmp_path / "three").exists()
    kept = {path.name for path in (tmp_path / ".three.partial" / "parts").iterdir()}
    again = [part for made in run_ranks(3, convert, kind, given, tmp_path / "three") for part in made]
    assert len(kept) >= 2 and sorted(again) == sorted(part for part in parts if f"{part}.json" not in kept)
    assert contents(tmp_path / "three") == contents(tmp_path / "one")


def run_tool(given: Path, final: Path) -> tuple[int, str]:
    """Return exit code and output, with a rank 1 that can't write files of more than 10,000 bytes."""
    megatron_write.PART_BYTES = 30_000
    if os.environ["RANK"] == "1":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    with contextlib.redirect_stderr(io.StringIO()) as errors, contextlib.redirect_stdout(io.StringIO()) as said:
        code = convert_to_megatron.main([str(given), str(final), "--no-verify-forward"])
    return code, said.getvalue() + errors.getvalue()


def test_what_one_process_cannot_write_ends_all_and_is_said_once(source: Path, tmp_path: Path) -> None:
    first, second = run_ranks(2, run_tool, source, tmp_path / "out")
    assert first[0] == second[0] == 2
    assert "File too large; what was written so far is kept" in first[1]
    assert second[1] == ""
    assert not (tmp_path / "out").exists()


def test_a_staging_folder_of_another_job_is_emptied(tmp_path: Path) -> None:
    staging = StagingFolder.begin(tmp_path / "out", {"from": 1})
    (staging.path / "a").write_text("x")
    staging.finish("0", ["a"], None)
    other = StagingFolder.join(tmp_path / "out")
    staging.close()
    with pytest.raises(ConfigError, match="another process"):
        StagingFolder.begin(tmp_path / "out", {"from": 1})
    other.close()
    again = StagingFolder.begin(tmp_path / "out", {"from": 1})
    assert again.done() == {"0": None}
    again.close()
    assert StagingFolder.begin(tmp_path / "out", {"from": 2}).done() == {}
    assert not (staging.path / "a").exists()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP], ids=errno.errorcode.get)
def test_a_staging_folder_is_made_where_the_file_system_has_no_locks(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With one warning, however many processes make it."""
    monkeypatch.setattr(fcntl, "flock", refuses(number))
    staging = StagingFolder.begin(tmp_path / "out", {"from": 1})
    other = StagingFolder.join(tmp_path / "out")
    (other.path / "a").write_text("x")
    other.finish("0", ["a"], None)
    other.close()
    assert staging.done() == {"0": None}
    staging.publish()
    assert contents(tmp_path / "out") == {"a": b"x"}
    [said] = caplog.messages
    assert said.startswith(f"{tmp_path / 'out'}: this file system has no locks ({os.strerror(number)}); ")


@pytest.mark.parametrize("number", [errno.EWOULDBLOCK, errno.EACCES], ids=errno.errorcode.get)
def test_a_staging_folder_that_another_host_holds_is_refused(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever way a network file system says that the lock is taken."""
    monkeypatch.setattr(fcntl, "flock", refuses(number))
    with pytest.raises(ConfigError, match="another process"):
        StagingFolder.begin(tmp_path / "out", {"from": 1})


def refuses(number: int) -> Callable[[object, int], None]:
    def flock(_file: object, _kind: int) -> None:
        raise OSError(number, os.strerror(number))

    return flock
