"""What a run prints: plain lines into a file, a bar on a (pseudo) terminal, the table at the end, with --verbose more.

Not covered: how the bar looks, and terminals other than xterm.
"""

import io
import json
import math
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mcpo.config.config import Config
from megatron_mcpo.reporting.console import Console, eta_seconds
from megatron_mcpo.reporting.numbers import duration, printable, short
from megatron_mcpo.reporting.step_table import WIDTH, StepTable, step_warnings
from megatron_mcpo.reporting.summary import last_lines, summary_rows
from megatron_mcpo.reporting.verbose_lines import step_line

CONFIG = {
    "run": {"steps": 12},
    "model": {"path": "model"},
    "batch": {"prompts": 4, "samples": 4},
    "optimizer": {"lr": 1e-5},
    "domain": [
        {"name": "arithmetic", "sources": [{"generator": "chain_sum"}]},
        {"name": "logic", "sources": [{"generator": "syllogism"}]},
    ],
}

VALUES = {
    "reward/mean": 0.4125,
    "nonzero_advantage/arithmetic": 0.5,
    "nonzero_advantage/logic": 0.75,
    "loss/policy": -0.0123,
    "loss/kl": 0.0001,
    "loss/cross_domain": 4.1,
    "loss/in_domain": math.nan,
    "contrast/gain_cross_domain": -0.1234,
    "contrast/gain_in_domain": math.nan,
    "contrast/auc_cross_domain": 0.5678,
    "contrast/anchors_cross_domain": 12.0,
    "contrast/positives_cross_domain": 4.5,
    "grad_norm": 1.25,
    "lr": 1e-5,
    "engine/logprob_diff_mean": 0.03,
    "engine/logprob_diff_max": 0.4,
    "tokens/trained": 14123,
    "time/rollout": 9.3,
    "time/score": 4.5,
    "time/update": 8.2,
    "sync/seconds": 0.4,
    "time/step": 22.9,
    "memory/peak_gib": 4.21,
    "groups/errors": 1,
    "reward/arithmetic": 0.25,
    "reward/logic": 0.575,
    "response_tokens/arithmetic": 3.25,
    "response_tokens/logic": 12.5,
    "contrast/anchors/arithmetic": 12,
    "contrast/positives/arithmetic": 4.5,
    "errors/arithmetic": 1,
    "errors/logic": 0,
}


@pytest.fixture
def config() -> Config:
    return Config.model_validate(CONFIG)


def test_the_verbose_line_has_every_metric() -> None:
    assert step_line(3, 12, VALUES) == (
        "step  3/12  reward 0.412  nonzero advantage 62%  "
        "loss policy -0.0123 kl 0.0001 cross_domain 4.1 (12 anchors, 4.5 positives each) in_domain nan  "
        "grad norm 1.25  lr 1e-05  mismatch 0.03 max 0.4  tokens 14,123  "
        "22.9 s (rollout 9.3 score 4.5 update 8.2 sync 0.4)  memory 4.21 GiB"
    )


def test_metrics_of_pairs_and_gradients_are_for_the_files_alone() -> None:
    pairs = {
        "contrast/negatives": 9.0,
        "contrast/alignment": 0.5,
        "contrast/similarity/arithmetic/logic": 0.25,
        "contrast/positives/arithmetic/logic": 4.0,
        "gradient/cos_cross_domain": -0.5,
    }
    assert step_line(3, 12, VALUES | pairs) == step_line(3, 12, VALUES)
    table = StepTable(["arithmetic", "logic"], 12, ascii_only=False)
    assert table.domains(VALUES | pairs) == table.domains(VALUES)


def test_the_nonzero_advantage_is_that_of_all_groups_where_it_is_known() -> None:
    assert "nonzero advantage 60%" in step_line(1, 1, VALUES | {"nonzero_advantage": 0.6})


def test_a_step_without_metrics_is_still_a_line() -> None:
    assert step_line(1, 1, {}) == "step 1/1"
    table = StepTable(["arithmetic", "logic"], 1, ascii_only=False)
    assert table.line(1, {}, "0:00").split() == [*("1/1", "-", "--"), *["-"] * 9, "0:00"]


def test_domains_are_columns_without_those_that_nobody_has() -> None:
    assert StepTable(["arithmetic", "logic"], 12, ascii_only=False).domains(VALUES) == [
        "  domain      reward  nonzero adv.  tokens  anchors",
        "  arithmetic   0.250           50%     3.2       12",
        "  logic        0.575           75%    12.5        -",
    ]


def test_a_step_is_one_line_below_its_headings() -> None:
    table = StepTable(["arithmetic", "logic"], 12, ascii_only=False)
    assert table.header() == (
        " step  reward  domains  policy      kl    gain     auc    grad  mismatch    tok/s     sec     GiB       ETA"
    )
    assert table.line(3, VALUES, "3:12") == (
        " 3/12   0.412  ▃▅       -0.012   1e-04  -0.123   0.568    1.25     0.030      617    22.9     4.2      3:12"
    )


def test_the_legend_says_which_character_is_which_domain() -> None:
    assert StepTable(["b", "a-1"], 12, ascii_only=False).legend() == [
        "domains: one bar for the reward, from 0 to 1, from the left: b, a-1"
    ]
    assert StepTable(["b"], 12, ascii_only=True).legend() == [
        "domains: one digit for a reward in tenths, from the left: b"
    ]
    names = [f"domain-{number}" for number in range(40)]
    lines = StepTable(names, 12, ascii_only=False).legend()
    assert len(lines) > 1 and max(map(len, lines)) <= WIDTH
    assert re.findall(r"domain-[0-9]+", "".join(lines)) == names


@pytest.mark.parametrize(("num_domains", "num_steps"), [(1, 1), (5, 24), (12, 1000), (12, 100_000), (60, 100_000)])
def test_no_line_of_a_step_is_longer_than_120_characters(num_domains: int, num_steps: int) -> None:
    names = [f"domain{number}" for number in range(num_domains)]
    large = {key: -1.234e-5 for key in VALUES} | {f"reward/{name}": 0.5 for name in names}
    large |= {"tokens/trained": 1e9, "time/step": 9999.9, "memory/peak_gib": 9999.9, "grad_norm": math.inf}
    table = StepTable(names, num_steps, ascii_only=False)
    line = table.line(num_steps, large, "99:59:59")
    assert len(line) <= WIDTH and len(line) == len(table.header())
    shown = line.split()[2]
    assert shown == "▅" * num_domains or (shown.endswith("…") and num_steps == 100_000)


def test_the_strip_shows_rewards_from_0_to_1() -> None:
    names = ["a", "b", "c", "d", "e", "f"]
    rewards = {"a": -0.5, "b": 0.0, "c": 0.124, "d": 0.5, "e": 1.5}
    values = {f"reward/{name}": reward for name, reward in rewards.items()}
    assert StepTable(names, 9, ascii_only=False).strip(values).split() == ["▁▁▁▅█-"]
    assert StepTable(names, 9, ascii_only=True).strip(values | {"reward/f": math.nan}).split() == ["00159-"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *[(0.0, "0"), (-1e-5, "-1e-05"), (0.00099, "0.001"), (-0.0475, "-0.048"), (0.9996, "1.00"), (9.996, "10.0")],
        *[(99.96, "100"), (999.7, "1e+03"), (-123456.0, "-1e+05"), (math.nan, "nan"), (None, "-")],
    ],
)
def test_short_numbers(value: float | None, text: str) -> None:
    assert short(value) == text
    assert len(text) <= 6


def test_a_step_warns_of_skipped_updates_and_failed_verifiers() -> None:
    names = ["arithmetic", "logic"]
    assert step_warnings(3, names, {"update/applied": 1.0, "groups/errors": 0.0}) == []
    assert step_warnings(3, names, VALUES | {"update/applied": 0.75}) == [
        "WARNING: step 3: 25% of the updates were skipped: the gradient was not finite",
        "WARNING: step 3: the verifier failed in 1 groups, which are skipped (arithmetic 1)",
    ]
    assert "the update was skipped" in step_warnings(3, names, {"update/applied": 0.0})[0]


def test_a_log_file_gets_plain_lines_with_the_eta(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """And every five steps the domains, whose table is followed by the headings."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    stream = io.StringIO()
    with Console(config, 12, 1, stream=stream) as console:
        console.note("weights pushed\n\x1b[31mred\x1b[0m")
        console.evaluation(0, {"arithmetic": 0.125, "logic": 0.5})
        for step in range(1, 7):
            console.step(step, VALUES)
    text = stream.getvalue()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text)
    lines = text.splitlines()
    assert lines[0] == "weights pushed"
    assert lines[1] == r"\x1b[31mred\x1b[0m"
    assert lines[2] == "held-out accuracy before step 1: mean 0.312  arithmetic 0.125  logic 0.500"
    kinds = [
        "domains:",
        "step",
        *["1/12", "WARNING:", "2/12", "WARNING:", "3/12", "WARNING:", "4/12", "WARNING:", "5/12"],
    ]
    kinds += ["WARNING:", "domain", "arithmetic", "logic", "step", "6/12", "WARNING:"]
    assert [line.split()[0] for line in lines[3:]] == kinds
    assert re.search(r" \d+:\d\d$", lines[5])
    assert lines[15].split()[:5] == ["domain", "reward", "nonzero", "adv.", "tokens"]
    assert lines[16].split() == ["arithmetic", "0.250", "50%", "3.2", "12"]
    assert lines[17].split() == ["logic", "0.575", "75%", "12.5", "-"]


def test_a_verbose_log_has_the_domains_of_every_step(config: Config) -> None:
    stream = io.StringIO()
    with Console(config, 12, 1, verbose=True, stream=stream) as console:
        console.step(1, VALUES)
        console.step(2, VALUES)
    lines = stream.getvalue().splitlines()
    assert re.search(r"^step  1/12 .* ETA \d+:\d\d$", lines[0])
    table = StepTable(["arithmetic", "logic"], 12, ascii_only=False)
    assert lines[1:5] == [*step_warnings(1, ["arithmetic", "logic"], VALUES), *table.domains(VALUES)]
    assert lines[5].startswith("step  2/12") and len(lines) == 2 * 5


def test_the_eta_is_steps_to_go_at_the_pace_of_the_last_ones() -> None:
    assert eta_seconds(3, [400.0]) == 1200.0
    assert eta_seconds(3, [400.0, 10.0, 11.0, 12.0, 13.0, 14.0]) == 36.0
    assert eta_seconds(0, [400.0]) == 0.0


TERMINAL = """
import json, sys
from pathlib import Path
from megatron_mcpo.config.config import Config
from megatron_mcpo.reporting.console import Console
config, values, folder = Config.model_validate(json.loads(sys.argv[1])), json.loads(sys.argv[2]), Path(sys.argv[3])
with Console(config, 2, 1) as console:
    console.step(1, values)
    console.step(2, values)
    console.summary(folder)
    if sys.argv[4] == "fail":
        raise KeyboardInterrupt
"""


def run_on_terminal(folder: Path, mode: str) -> str:
    parent, child = pty.openpty()
    arguments = [json.dumps(CONFIG), json.dumps(VALUES), str(folder), mode]
    process = subprocess.Popen(
        [sys.executable, "-c", TERMINAL, *arguments],
        stdout=child,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "100"},
    )
    os.close(child)
    content = b""
    while True:
        try:
            part = os.read(parent, 65536)
        except OSError:  # what Linux says when the other end is closed
            break
        if not part:
            break
        content += part
    process.wait(timeout=400)
    os.close(parent)
    return content.decode()


@pytest.mark.parametrize("mode", ["end", "fail"])
def test_a_terminal_gets_a_bar_with_eta_and_its_cursor_back(tmp_path: Path, mode: str) -> None:
    text = run_on_terminal(tmp_path, mode)
    assert "\x1b[" in text
    assert "━" in text
    assert "0:00" in next(line for line in text.splitlines() if "2/2" in line and "0.412" in line)
    assert re.search(r"━.* 2/2", text), "the bar"
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l") >= 0, "the cursor stays hidden"
    assert "ETA" in next(line for line in text.splitlines() if "gain" in line)


def write_run(folder: Path, num_steps: int) -> None:
    rows = [
        {"step": s, "reward/mean": s / 100, "reward/arithmetic": s / 50, "reward/logic": None if s == 1 else 0.5}
        for s in range(1, num_steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "eval.jsonl").write_text(
        '{"step": 0, "arithmetic": 0.1, "logic": 0.3, "mean": 0.2, "worst": 0.1}\n'
        '{"step": 9, "arithmetic": 0.4, "logic": null, "mean": null, "worst": null}\n'
    )


@pytest.mark.parametrize(("num_steps", "window"), [(1, 1), (2, 1), (5, 1), (6, 2), (14, 4), (15, 5), (100, 5)])
def test_a_short_run_compares_its_first_and_last_third(num_steps: int, window: int) -> None:
    steps = [{"step": s, "reward/mean": float(s)} for s in range(1, num_steps + 1)]
    found, rows = summary_rows(steps, [], ["logic"])
    first, last = (window + 1) / 2, num_steps - (window - 1) / 2
    assert found == window
    assert rows[0] == ["logic", "-", "-", "-", "-"]
    assert rows[1] == ["mean", f"{first:.3f}", f"{last:.3f}", f"{last - first:+.3f}", f"{last / first:.2f}"]


def test_the_summary_is_a_table_and_three_lines(tmp_path: Path, config: Config) -> None:
    folder = tmp_path / "my run"
    folder.mkdir()
    write_run(folder, 15)
    (folder / "report.html").touch()
    for step in (8, 12):
        (folder / "checkpoints" / f"step_{step:06d}").mkdir(parents=True)
    stream = io.StringIO()
    Console(config, 15, 1, stream=stream).summary(folder)
    text = stream.getvalue()
    cells = [re.split(r"\s*[│|]\s*", line.strip(" │|")) for line in text.splitlines() if "│" in line or "|" in line]
    assert ["arithmetic", "0.060", "0.260", "+0.200", "4.33", "0.100", "0.400", "+0.300"] in cells
    assert ["logic", "0.500", "0.500", "+0.000", "1.00", "0.300", "-", "-"] in cells
    assert ["mean", "0.030", "0.130", "+0.100", "4.33", "0.200", "-", "-"] in cells
    assert "first 5 steps" in text
    assert "\x1b" not in text
    checkpoint = folder / "checkpoints" / "step_000012"
    assert text.splitlines()[-3:] == [
        f"report      {folder / 'report.html'}",
        f"checkpoint  {checkpoint}",
        f"next        mcpo evaluate '{folder / 'config.toml'}' --checkpoint '{checkpoint}'",
    ]


def test_the_summary_names_what_is_there(tmp_path: Path) -> None:
    assert last_lines(tmp_path) == []


def test_the_summary_of_a_run_without_steps(tmp_path: Path, config: Config) -> None:
    stream = io.StringIO()
    Console(config, 15, 1, stream=stream).summary(tmp_path)
    assert "no training step was logged" in stream.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3723, "1:02:03"), (math.nan, "unknown")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_control_characters_are_shown() -> None:
    assert printable("a\x1b[2J\rb\x9b\u202eé") == r"a\x1b[2J\rb\x9b\u202eé"
