"""What report.html carries: the figures, maps, notes and rollouts of a run folder, bounded in size, unable to act.

Not covered here: what the page does in a browser (test_report_page.py).
"""

import json
import re
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_mcpo.algo.pairing import Pairing
from megatron_mcpo.reporting.html import html_report
from megatron_mcpo.reporting.html.html_report import collect, columns, embeddable, page, write_report
from megatron_mcpo.reporting.html.rollout_sample import coarse_to_fine, sample_rollouts, shortened
from megatron_mcpo.reporting.loggers import write_representations
from megatron_mcpo.reporting.plots import principal_plane
from megatron_mcpo.storage.files import read_jsonl, step_file
from tests.support.paths import ROOT
from tests.support.report_runs import NAMES, OFF, MadeRun, Scripts, config_of, data_of, made_run, partners

PAGE = ROOT / "megatron_mcpo" / "reporting" / "html" / "page"


def true_partners(run: MadeRun, step: int) -> list[tuple[list[int], list[int], list[int]]]:
    """The same by the objective's own masks; empty where the rollout is no anchor of the term."""
    found: list[tuple[list[int], list[int], list[int]]] = []
    for report in run.reports[step]:
        start, num = len(found), len(report.labels)
        assert report.z_MD is not None and report.contrast is not None
        rows = torch.arange(num)
        pairs = Pairing(report.labels, run.config.contrastive).find(report.z_MD @ report.z_MD.T, rows)
        share, together = report.contrast.valid_cross_domain_M, report.contrast.valid_in_domain_M
        valid = [share, together, share | together]
        masks = [pairs.cross_domain_AM, pairs.in_domain_AM, pairs.rivals_AM]
        for row in range(num):
            places = [
                (start + mask[row].nonzero()[:, 0]).tolist() if ok[row] else []
                for mask, ok in zip(masks, valid, strict=True)
            ]
            found.append((places[0], places[1], places[2]))
    return found


@pytest.mark.parametrize("negatives", ["pool", "domain", "prompt"])
@pytest.mark.parametrize("in_domain_scope", ["domain", "prompt"])
def test_partners_are_those_of_the_objective(tmp_path: Path, negatives: str, in_domain_scope: str) -> None:
    run = made_run(tmp_path, num_steps=3, negatives=negatives, in_domain_scope=in_domain_scope, top_k=2)
    data = data_of(run.finish())
    assert [entry["step"] for entry in data["rollouts"]["steps"]] == [1, 2, 3]
    kinds = Counter[int]()
    for entry in data["rollouts"]["steps"]:
        for rollout, expected in zip(entry["rollouts"], true_partners(run, entry["step"]), strict=True):
            assert partners(entry, rollout) == expected
            assert rollout["partners"] == [len(places) for places in expected]
            kinds.update(kind for kind, places in enumerate(expected) if places)
    assert set(kinds) == {0, 1, 2}, "the run has no pairs of some kind: the test says nothing of it"


def test_a_run_s_figures_notes_and_settings(tmp_path: Path) -> None:
    run = made_run(tmp_path, num_steps=4)
    run.run_logger.note("WARNING: <b>something</b>\nover two lines")
    data = data_of(run.finish())
    assert data["status"] == "finished" and data["domains"] == NAMES and data["planned"] == 4
    assert data["metrics"]["steps"] == [1, 2, 3, 4]
    rows = read_jsonl(run.path / "metrics.jsonl")
    for name in ("reward/mean", "reward/logic", "time/step", "contrast/negatives/logic/logic"):
        assert data["metrics"]["columns"][name] == pytest.approx([row.get(name) for row in rows], rel=1e-4), name
    assert data["evaluations"]["columns"]["logic"] == [0.2, 0.2] and data["evaluations"]["steps"] == [0, 4]
    assert data["notes"]["notes"] == [{"step": 4, "text": "WARNING: <b>something</b>\nover two lines"}]
    assert [section["name"] for section in data["settings"]][-3:] == [f"domain {name}" for name in NAMES]
    [batch] = [section for section in data["settings"] if section["name"] == "batch"]
    by_key = {key["key"]: (key["value"], key["default"]) for key in batch["keys"]}
    assert by_key["prompts"] == ("6", False) and by_key["minibatches"] == ("1", True)
    assert all(key["about"] for section in data["settings"] for key in section["keys"])


def test_the_map_is_one_projection_of_all_steps(tmp_path: Path) -> None:
    """Points keep their distances up to one scale, as far as the plane holds them."""
    run = made_run(tmp_path, num_steps=3)
    data = data_of(run.finish())["map"]
    z = np.concatenate([r.z_MD.double().numpy() for step in (1, 2, 3) for r in run.reports[step] if r.z_MD is not None])
    _, plane, share = principal_plane(z)
    points = np.array([entry["points"] for entry in data["steps"]]).reshape(-1, 4)
    xy = (z - z.mean(axis=0)) @ plane.T
    np.testing.assert_allclose(points[:, 1:3], xy * 1000 / np.abs(xy).max(), atol=0.51)
    assert data["shares"] == pytest.approx(share, rel=1e-4)
    right = torch.cat([r.labels.correct_M for step in (1, 2, 3) for r in run.reports[step]])
    domain = torch.cat([r.labels.domain_M for step in (1, 2, 3) for r in run.reports[step]])
    assert points[:, 3].tolist() == (2 * domain + right).tolist()
    assert points[:, 0].tolist() == [*range(24)] * 3


def test_points_that_are_not_finite_leave_the_others_their_places(tmp_path: Path) -> None:
    run = made_run(tmp_path, num_steps=1)
    z = np.random.default_rng(0).normal(size=(5, 4))
    z[2] = np.nan
    write_representations(run.path, 1, z=z, domain=np.zeros(5, int), prompt=np.zeros(5, int), correct=np.ones(5, bool))
    assert collect(run.path, run.config)["map"]["steps"][0]["points"][::4] == [0, 1, 3, 4]


ATTACK = "</script><script>alert(1)</script><!-- <img src=x onerror=alert(2)> \u2028 {{data}} {{script}} \ud800 é"


def test_nothing_that_a_model_wrote_becomes_markup(tmp_path: Path) -> None:
    run = made_run(tmp_path, num_steps=1, text=lambda domain, number: ATTACK)
    run.run_logger.note(ATTACK)
    path = run.finish()
    plain = made_run(tmp_path, name="plain", num_steps=1).finish()
    text = path.read_text(encoding="utf-8")
    assert Scripts(text).tags == Scripts(plain.read_text(encoding="utf-8")).tags
    assert "\u2028" not in text and "alert(1)</script>" not in text
    data = data_of(path)
    assert {rollout["text"] for rollout in data["rollouts"]["steps"][0]["rollouts"]} == {ATTACK}
    assert data["notes"]["notes"][0]["text"] == ATTACK


def test_the_page_may_run_its_own_script_and_fetch_nothing(tmp_path: Path) -> None:
    text = made_run(tmp_path, num_steps=1).finish().read_text(encoding="utf-8")
    [policy] = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "unsafe" not in policy
    assert not re.search(r"<[^>]*\b(src|href)=.?(https?:|//)", text)
    assert Scripts(text).tags["script"] == 2


def test_data_for_a_script_element_is_ascii_without_a_tag() -> None:
    made = embeddable({"text": ATTACK})
    assert made.isascii() and "<" not in made
    assert json.loads(made) == {"text": ATTACK}
    with pytest.raises(ValueError):
        embeddable([float("nan")])


def test_no_part_of_the_page_parses_markup_or_calls_out() -> None:
    names = {path.name for path in PAGE.iterdir()}
    assert names == {"page.html", "style.css", *html_report.SCRIPTS}
    for name in names:
        source = (PAGE / name).read_text(encoding="utf-8")
        assert len(source.splitlines()) <= 400, name
        banned = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|Function\(|fetch\(|XMLHttp|import\("
        assert not re.search(banned, source), name


def test_an_empty_run_and_one_without_contrast(tmp_path: Path) -> None:
    empty = MadeRun(config_of(tmp_path, name="empty"))
    data = data_of(write_report(empty.path, empty.config))
    assert data["status"] == "not finished"
    assert data["metrics"] == {"total": 0, "steps": [], "columns": {}}
    assert data["rollouts"] == {"steps": [], "num_steps": 0, "unreadable": []}
    assert data["map"]["steps"] == [] and data["notes"]["total"] == 0
    off = data_of(made_run(tmp_path, name="off", num_steps=2, **OFF).finish())
    assert not off["contrastive"] and off["map"]["steps"] == []
    rollouts = [rollout for entry in off["rollouts"]["steps"] for rollout in entry["rollouts"]]
    assert len(rollouts) == 48 and all(r["partners"] == [0, 0, 0] and not r["positives"] for r in rollouts)


def test_damaged_files_are_left_out_and_said(tmp_path: Path) -> None:
    run = made_run(tmp_path, num_steps=4)
    step_file(run.path, "rollouts", 2, ".jsonl").write_text('{"step": 2, "row": 0}\n')
    step_file(run.path, "representations", 3, ".npz").write_bytes(b"PK half a file")
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "rew')
    data = data_of(run.finish())
    assert [entry["step"] for entry in data["rollouts"]["steps"]] == [1, 3, 4]
    assert data["rollouts"]["unreadable"] == [2]
    assert [entry["step"] for entry in data["map"]["steps"]] == [1, 2, 4]
    assert data["metrics"]["steps"] == [1, 2, 3, 4]


def test_a_page_that_can_t_be_written_does_not_fail_a_finished_run(tmp_path: Path, capsys: Any) -> None:
    run = made_run(tmp_path, num_steps=1)
    (run.path / "report.html").mkdir()
    run.finish()
    assert (run.path / "FINISHED").exists()
    assert "WARNING: no report.html (" in read_jsonl(run.path / "notes.jsonl")[-1]["text"]
    assert "WARNING: no report.html" in capsys.readouterr().out


def test_the_tool_makes_the_page_anew_and_refuses_what_is_no_run(tmp_path: Path) -> None:
    run = made_run(tmp_path, num_steps=2)  # not finished
    command = [sys.executable, "-m", "megatron_mcpo", "report"]
    options: dict[str, Any] = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 100}
    made = subprocess.run([*command, tmp_path / "latest"], **options)
    assert (made.returncode, made.stdout.strip()) == (0, str(run.path / "report.html")), made.stderr
    assert data_of(run.path / "report.html")["status"] == "not finished"
    refused = subprocess.run([*command, tmp_path / "nothing"], **options)
    assert (
        refused.returncode == 2
        and "must be the folder of a run" in refused.stderr
        and "Traceback" not in refused.stderr
    )


# Sampling.


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 24, 1000])
def test_every_beginning_of_the_order_is_spread(count: int) -> None:
    order = coarse_to_fine(count)
    assert sorted(order) == list(range(count))
    for taken in (8, 24, 100):
        places = sorted(order[:taken])
        gaps = [after - before for before, after in pairwise(places)]
        assert max(gaps, default=0) <= 4 * max(1, count / taken), (count, taken)
        assert not places or (places[0], places[-1]) == (0, count - 1)


def test_a_long_text_keeps_its_beginning_and_its_end() -> None:
    assert shortened("x" * 100, 100) == ("x" * 100, 0)
    text, left_out = shortened("a" * 90 + "b" * 10, 40)
    assert text.startswith("a" * 30 + "\n[...") and text.endswith("b" * 10) and left_out == 60


def sampled(run: MadeRun, most_bytes: int) -> list[dict[str, Any]]:
    sample = sample_rollouts(run.path, run.config, most_bytes=most_bytes)
    assert len(json.dumps(sample.steps)) <= 1.01 * most_bytes
    return sample.steps


def test_of_a_run_too_large_whole_steps_are_kept_spread_over_it(tmp_path: Path) -> None:
    run = made_run(tmp_path, num_steps=60)
    whole = sampled(run, 10**9)
    assert len(whole) == 60
    part = sampled(run, len(json.dumps(whole)) // 2)
    steps = [entry["step"] for entry in part]
    assert 25 <= len(steps) <= 30 and (steps[0], steps[-1]) == (1, 60)
    assert max(b - a for a, b in pairwise(steps)) <= 4
    assert part == [entry for entry in whole if entry["step"] in steps], "a step that is kept is kept as it is"
    assert sampled(run, len(json.dumps(whole)) // 2) == part


def test_of_a_step_too_large_anchors_are_kept_with_partners(tmp_path: Path) -> None:
    run = MadeRun(config_of(tmp_path, num_steps=1), prompts=60, samples=8, num_minibatches=2)
    run.step(1)
    [whole] = sampled(run, 10**9)
    [part] = sampled(run, len(json.dumps(whole)) // 4)
    kept = {rollout["place"]: rollout for rollout in part["rollouts"]}
    assert part["total"] == 480 and 60 <= len(kept) <= 160
    assert {(part["groups"][r["group"]]["domain"], r["right"]) for r in kept.values()} == {
        (domain, right) for domain in range(3) for right in (False, True)
    }
    complete = [
        rollout
        for rollout in kept.values()
        if rollout["right"] and all(len(found) >= 4 for found in partners_here(part, kept, rollout))
    ]
    assert len(complete) >= 3, "anchors with partners of every kind"
    texts = {rollout["place"]: rollout["text"] for rollout in whole["rollouts"]}
    assert all(texts[place] == rollout["text"] for place, rollout in kept.items())


def partners_here(entry: dict[str, Any], kept: dict[int, Any], rollout: dict[str, Any]) -> list[list[int]]:
    return [[place for place in places if place in kept] for places in partners(entry, rollout)]


def test_a_thousand_steps_of_512_rollouts_fit_twenty_megabytes(tmp_path: Path) -> None:
    """600 MB of rollouts, of which six steps are really written; the others share their files."""
    run = MadeRun(config_of(tmp_path, num_steps=1000), prompts=64, samples=8)
    for step in range(1, 7):
        run.step(step, text=lambda domain, number: f"{domain} é {number} " + "so it goes on, " * 40)
    run.repeat(range(7, 1001), like=6)
    rollouts = sum(path.stat().st_size for path in (run.path / "rollouts").iterdir())
    code = (
        "import re, sys; from megatron_mcpo.cli.report import main; code = main(sys.argv[1:]);"
        r"print(re.search(r'VmHWM:\s*(\d+) kB', open('/proc/self/status').read())[1]); sys.exit(code)"
    )
    made = subprocess.run([sys.executable, "-c", code, run.path], cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert made.returncode == 0, made.stderr
    path, kibibytes = made.stdout.split()
    size = Path(path).stat().st_size
    assert size <= 20e6, f"{size / 1e6:.1f} MB"
    assert rollouts > 500e6 and int(kibibytes) * 1024 <= rollouts / 2, f"{kibibytes} KiB for {rollouts / 1e6:.0f} MB"
    data = data_of(Path(path))
    assert len(data["rollouts"]["steps"]) >= 24 and data["rollouts"]["num_steps"] == 1000
    assert data["metrics"]["total"] == 1000 and len(data["map"]["steps"]) >= 100
    sizes = {name: len(json.dumps(part)) for name, part in data.items()}
    assert sum(sizes.values()) > 0.8 * size
    run.finish()


@pytest.mark.parametrize(("lines", "names", "most"), [(100, 3, 60), (9, 2, 6), (2000, 100, 10_000)])
def test_of_many_figures_the_ends_and_some_between_are_kept(tmp_path: Path, lines: int, names: int, most: int) -> None:
    path = tmp_path / "metrics.jsonl"
    row = {f"f{number}": 1 / 3 for number in range(names)}
    path.write_text("".join(json.dumps({"step": step, **row}) + "\n" for step in range(1, lines + 1)))
    found = columns(path, most_numbers=most)
    steps = found["steps"]
    assert found["total"] == lines and len(found["columns"]) == names
    assert found["columns"]["f0"] == [0.33333] * len(steps)
    assert steps[:5] == [1, 2, 3, 4, 5] and steps[-5:] == list(range(lines - 4, lines + 1))
    assert len(steps) * names <= max(most, 12 * names)
    assert max(b - a for a, b in pairwise(steps)) <= 3 * max(1, lines / (most / names))


def test_of_many_notes_the_first_and_the_last_are_kept(tmp_path: Path) -> None:
    run = MadeRun(config_of(tmp_path))
    for number in range(1100):
        run.run_logger.note(f"{number} " + "x" * 2000)
    notes = data_of(write_report(run.path, run.config))["notes"]
    numbers = [int(note["text"].split()[0]) for note in notes["notes"]]
    assert numbers == [*range(200), *range(300, 1100)]
    assert notes["total"] == 1100 and notes["first"] == 200
    assert all(len(note["text"]) < 1100 for note in notes["notes"])


def test_a_title_is_text(tmp_path: Path) -> None:
    assert b"<title>&lt;b&gt; - megatron_mcpo</title>" in page("<b>", {})
