"""Write the tables of measured figures from benchmarks/results/*.json. Each function takes that folder."""

import json
import re
import statistics
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from docs.generator.figures import byte_text, significant


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table with a line end behind its last row."""
    return "".join(f"| {' | '.join(map(_without_pipes, line))} |\n" for line in (header, ["---"] * len(header), *rows))


def _without_pipes(cell: str) -> str:
    """Return a cell in which no `|` ends the cell early; an entity is not read within backticks."""
    code = re.sub(r"`([^`]*[|][^`]*)`", lambda span: f"<code>{escape(span[1], quote=False)}</code>", cell)
    return code.replace("|", "&#124;")


def _read(results: Path, name: str) -> dict[str, Any]:
    return dict(json.loads((results / name).read_text(encoding="utf-8")))


def machine(content: dict[str, Any]) -> str:
    """Return what a result file says of the machine that it was measured on, as a sentence."""
    m = content["machine"]
    return f"Measured on {m['cores']} cores of an {m['cpu']}, {m['memory_gib']} GiB of memory, Python {m['python']}."


def _with_machine(content: dict[str, Any], text: str) -> str:
    return f"{machine(content)}\n\n{text}"


def _console_lines(results: Path) -> list[str]:
    """Return what a whole run of the quick start printed."""
    return (results / "quickstart_console.txt").read_text(encoding="utf-8").splitlines()


def console(results: Path) -> str:
    """Return eight lines that the quick start printed: the heading, its first and last three steps, the accuracy."""
    lines = _console_lines(results)
    steps = [line for line in lines if re.match(r" *\d+/\d+ ", line)]
    heading = lines[lines.index(steps[0]) - 1]
    accuracy = [line for line in lines if line.startswith("held-out accuracy")]
    return _fenced([heading, *steps[:3], *steps[-3:], accuracy[-1]])


def console_end(results: Path) -> str:
    """Return what the quick start printed last: the table of the run, and where to look."""
    lines = _console_lines(results)
    accuracy = [number for number, line in enumerate(lines) if line.startswith("held-out accuracy")]
    return _fenced(lines[accuracy[-1] + 1 :])


def _fenced(lines: Sequence[str]) -> str:
    return "\n".join(["```text", *(line.rstrip() for line in lines), "```\n"])


_LAYOUT_WORDS = {
    "dp": "data",
    "tp": "tensor",
    "pp": "pipeline",
    "vpp": "pipeline 2, virtual pipeline",
    "cp": "context",
    "ep": "experts over",
    "sp": "sequence parallel",
    "uneven": "stages of 1, 2 and 1 layers",
}


def gradients(results: Path) -> str:
    """Return the largest errors of a gradient and of an update in every parallel layout, two layouts in a row."""
    content = _read(results, "gradient_table.json")
    cells = [
        (_layout(name), *(f"{row[key]:.1e}" for key in ("max_rel_err", "max_rel_err_update")))
        for name, row in content["layouts"].items()
    ]
    cells += [("", "", "")] * (-len(cells) % 2)
    rows = [[text for cell in cells[start : start + 2] for text in cell] for start in range(0, len(cells), 2)]
    return _with_machine(content, table(("layout", "gradient", "update") * 2, rows))


def _layout(name: str) -> str:
    """Spell out a layout's short name: tp2_pp2 is tensor 2, pipeline 2."""
    parts = [(part.rstrip("0123456789"), part.lstrip("abcdefghijklmnopqrstuvwxyz")) for part in name.split("_")]
    return ", ".join(f"{_LAYOUT_WORDS[short]} {size}".rstrip() for short, size in parts)


def quickstart(results: Path) -> str:
    """Return the quick start's rewards, held-out accuracy and ranking by seed."""
    content = _read(results, "quickstart_cpu.json")
    rows = [
        [
            str(run["seed"]),
            f"{run['reward_first_5']:.3f}",
            f"{run['reward_last_5']:.3f}",
            f"{run['factor']:.2f}",
            f"{run['held_out'][0]['mean']:.3f}",
            f"{run['held_out'][-1]['mean']:.3f}",
            *(f"{statistics.fmean(part):.2f}" for part in _ends(run["contrast/auc_cross_domain"])),
            f"{run['seconds']:.0f} s",
            f"{run['peak_memory_gib']:.1f} GiB",
        ]
        for run in content["runs"]
    ]
    columns = ("seed", "reward, first 5 steps", "last 5 steps", "factor", "held-out accuracy before", "after")
    mechanism = ("ranking, first 5 steps", "last 5 steps")
    return _with_machine(content, table((*columns, *mechanism, "whole program", "peak memory"), rows))


def _ends(values: Sequence[float | None]) -> list[list[float]]:
    """Return the figures of the first and of the last five steps; None: a step without one."""
    return [[value for value in part if value is not None] for part in (values[:5], values[-5:])]


def contrastive(results: Path) -> str:
    """Return seconds and memory of the contrastive terms: the plain N x N form and ours."""
    content = _read(results, "contrastive_cpu.json")
    by_case = {(row["n"], row["transfer"], row["impl"]): row for row in content["contrastive"]}
    rows = []
    for n in sorted({case[0] for case in by_case}):
        plain, tiled, top_k = (
            by_case.get((n, *case)) for case in (("all", "naive"), ("all", "tiled"), ("top_k", "tiled"))
        )
        ours = tiled or top_k
        assert ours is not None
        rows.append(
            [
                f"{n:,}",
                *(f"{significant(row['seconds'])} s" if row else "not measured" for row in (plain, tiled, top_k)),
                *(byte_text(row["peak_extra_bytes"]) if row else "not measured" for row in (plain, ours)),
                significant(ours["ratio_to_floor"]),
            ]
        )
    columns = ("rollouts", "plain, all pairs", "tiled, all pairs", "tiled, top 4 per domain", "extra memory, plain")
    return _with_machine(content, table((*columns, "extra memory, tiled", "time over floor, tiled"), rows))


def convert(results: Path) -> str:
    """Return seconds and memory of conversions."""
    content = _read(results, "convert_cpu.json")
    rows = [
        [
            f"{row['case']} ({byte_text(row['bytes'])})",
            row["direction"],
            f"{significant(row['seconds'])} s",
            f"{significant(row['seconds_cp'])} s",
            f"{row['ratio_cp']:.1f}",
            byte_text(row["peak_rss_bytes"]),
            byte_text(row["largest_tensor_bytes"]),
        ]
        for row in content["convert"]
    ]
    columns = ("model", "direction", "seconds", "`cp` and fsync", "times `cp`", "highest memory", "largest tensor")
    return _with_machine(content, table(columns, rows))


def push(results: Path) -> str:
    """Return seconds, bytes and memory of weight syncs."""
    content = _read(results, "push_cpu.json")
    rows = [
        [
            row["case"],
            row["weight_sync"],
            f"{significant(row['seconds'])} s",
            significant(row["ratio_to_memcpy"]),
            significant(row["ratio_floor"]),
            byte_text(row["bytes_moved"]),
            f"{row['ratio_to_lower_bound']:.2f}" if row["ratio_to_lower_bound"] else "nothing has to move",
            byte_text(row["peak_extra_bytes"]),
        ]
        for row in content["push"]
    ]
    columns = ("model, trainer to engines", "how", "seconds", "times a copy in memory", "times the floor")
    of_bytes = ("bytes between ranks", "times the least possible", "extra memory")
    return _with_machine(content, table((*columns, *of_bytes), rows))


def training_pass(results: Path) -> str:
    """Return seconds of forward and backward beside transformers'."""
    content = _read(results, "training_pass_cpu.json")
    rows = [
        [
            row["case"],
            f"{row['tokens']:,}",
            f"{row['seconds_ours']:.1f} s",
            f"{row['seconds_transformers']:.1f} s",
            f"{row['ratio']:.2f}",
        ]
        for row in content["training_pass"]
    ]
    columns = ("sequences and their tokens", "tokens", "this trainer", "transformers", "times as fast")
    return _with_machine(content, table(columns, rows))


def trl_step(results: Path) -> str:
    """Return seconds and memory of a step of TRL and of this trainer."""
    content = _read(results, "trl_step_cpu.json")
    (row,) = content["trl_step"]
    names = {
        "trl": f"TRL {row['trl']}, GRPO",
        "ours_unshared": "this trainer, GRPO, prompts not shared",
        "ours": "this trainer, GRPO",
        "ours_mcpo": "this trainer, MCPO",
    }
    lines = [
        [
            meaning,
            f"{row[f'{name}_seconds']:.0f} s",
            f"{row['trl_seconds'] / row[f'{name}_seconds']:.1f}",
            byte_text(row[f"{name}_peak_bytes"]),
        ]
        for name, meaning in names.items()
    ]
    shape = f"{row['rollouts']} rollouts of {row['tokens']} tokens, {row['dtype']}"
    return _with_machine(content, table((shape, "a step", "times as fast as TRL", "highest memory"), lines))


def scaling(results: Path) -> str:
    """Return the bytes that one rank receives in a step as the number of replicas grows."""
    content = _read(results, "scaling.json")
    rows = [
        [
            str(row["replicas"]),
            *(byte_text(row["bytes"].get(kind, 0)) for kind in ("data", "contrastive", "rollouts")),
            str(sum(row["messages"].values())),
        ]
        for row in content["scaling"]
        if row["grows"] == "replicas"
    ]
    columns = ("replicas", "gradients and weights", "representations", "rollouts", "messages")
    return _with_machine(content, table(columns, rows))


def exchange(results: Path) -> str:
    """Return the bytes that a rank receives until it has the rollouts that it learns from."""
    content = _read(results, "exchange.json")
    rows = [
        [
            f"{row['rollouts']:,} of {row['tokens']:,} tokens",
            f"{row['ranks']}, {row['data']} replicas",
            byte_text(row["bytes_per_rank"]),
            byte_text(row["bytes_whole_groups"]) if "bytes_whole_groups" in row else "-",
        ]
        for row in content["exchange"]
    ]
    return _with_machine(content, table(("rollouts", "ranks", "received by a rank", "if sent whole"), rows))


def router_replay(results: Path) -> str:
    """Return how far engine and trainer are apart with and without routing replay."""
    content = _read(results, "router_replay_cpu.json")
    rows = [
        [
            row["model"],
            f"`{row['replay']}`",
            *(f"{row[key]:.1g}" for key in ("mismatch_mean", "mismatch_p999", "mismatch_kl", "ratio_p999")),
            f"{100 * row['choices_changed']:.0f} %",
            f"{100 * row['overhead']:+.0f} %" if row["replay"] != "off" else "",
            str(row["bytes_per_token"]),
        ]
        for row in content["router_replay"]
    ]
    header = ("model", "replay", "mean", "p99.9", "KL", "ratio p99.9", "other experts", "seconds", "bytes a token")
    return _with_machine(content, table(header, rows))


def tiers(results: Path) -> str:
    """Return what each tier of the tests costs, and its slowest files."""
    content = _read(results, "tiers.json")
    lines = []
    for tier in ("unit", "distributed", "system"):
        files = [row for row in content["tiers"] if row["tier"] == tier]
        slowest = ", ".join(f"`{row['file']}` {row['seconds']:.0f} s" for row in files[:4])
        tests, seconds = (sum(row[key] for row in files) for key in ("tests", "seconds"))
        lines.append([f"`tests/{tier}`", str(tests), f"{seconds:.0f} s", slowest])
    return _with_machine(content, table(["tier", "tests", "seconds of all tests", "slowest files"], lines))


def faults(results: Path) -> str:
    """Return what became of a run after each fault in each phase, and how often nothing was lost."""
    content = _read(results, "faults_cpu.json")
    rows = content["faults"]
    survived, same = (sum(bool(test(row)) for row in rows) for test in (_survived, lambda row: row["same"]))
    hung = sum(row["result"] == "hung" for row in rows)
    counts = (
        f"{len(rows)} runs: {survived} survived, {len(rows) - survived - hung} ended, {hung} hung. Those that ended "
        f"were started again. Then {same} had the metrics, evaluations and rollouts of a run without a fault, bit for "
        f"bit; {len(rows) - same} had left something out and said so.\n"
    )
    return _with_machine(content, _by_phase(rows) + "\n" + counts)


def server_faults(results: Path) -> str:
    """Return what became of an asynchronous run after each fault of a server or a rank, and of its prompts."""
    content = _read(results, "server_faults_cpu.json")
    rows = [row | {"same": not row["lost"] + row["twice"]} for row in content["server_faults"]]
    survived, finished = (sum(bool(test(row)) for row in rows) for test in (_survived, lambda row: row["finished"]))
    lost, twice = (sum(row[key] for row in rows) for key in ("lost", "twice"))
    counts = (
        f"{len(rows)} runs: {survived} survived, {len(rows) - survived} ended and were started again. {finished} "
        f"finished. Prompts that no step learned from: {lost}; that more than one step did: {twice}.\n"
    )
    return _with_machine(content, _by_phase(rows) + "\n" + counts)


def _by_phase(rows: Sequence[dict[str, Any]]) -> str:
    """Return a table of outcomes: a line per fault, a column per phase of the first fault, which is tried in all."""
    cells = {(row["fault"], row["phase"]): row for row in rows}
    phases = [row["phase"] for row in rows if row["fault"] == rows[0]["fault"]]
    lines = [
        [kind, *(_outcome(cells.get((kind, phase))) for phase in phases)]
        for kind in dict.fromkeys(row["fault"] for row in rows)
    ]
    return table(["fault", *phases], lines)


def _survived(row: dict[str, Any]) -> bool:
    return bool(row["result"] == "survived")


def _outcome(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    if _survived(row):
        return "survives" if row["same"] else "survives, says what it left out"
    if row["result"] == "hung":
        return "hangs"
    code = max((code for code in row["codes"] if code is not None), default=1)
    return f"ends, exit code {code}" if code else "saves, exit code 0"


def asynchronous(results: Path) -> str:
    """Return what rollouts ahead of the trainer gain, and what is learned from them."""
    content = _read(results, "asynchronous_cpu.json")
    rows = {row["case"]: row for row in content["asynchronous"]}
    even, tail = rows["balanced"], rows["tail"]
    what = {
        "balanced": "rollout and learning take nearly equally long",
        "tail": "one prompt in 32 has responses 20 times longer; staleness up to 24",
    }
    more = {
        "balanced": f"{even['ratio_possible']:.2f} is possible",
        "tail": f"{tail['over_equal_async']:.2f} times a step with as many tokens in equal responses; synchronous "
        f"{tail['over_equal_sync']:.2f} times",
    }
    lines = [
        [
            what[name],
            f"{row['seconds_sync']:.1f} s",
            f"{row['seconds_async']:.1f} s",
            f"{row['ratio']:.2f}",
            f"{row['trainer_wait_share']:.0%}" if "trainer_wait_share" in row else "not measured",
            more[name],
        ]
        for name, row in (("balanced", even), ("tail", tail))
    ]
    quality = [
        [row["kind"], ", ".join(f"{reward:.3f}" for reward in row["rewards"]), f"{row['mean']:.3f}"]
        for row in content["asynchronous"]
        if row["case"] == "quality"
    ]
    speed = table(["seconds of a step", "synchronous", "ahead", "times faster", "the trainer waits", ""], lines)
    learned = table(["a tiny model", "reward of the last third of the steps, by seed", "mean"], quality)
    return _with_machine(content, f"{speed}\n{learned}" if quality else speed)


def planned_staleness(results: Path) -> str:
    """Return what the planner expects of rollouts ahead of the trainer, the best layouts against each other."""
    rows = _read(results, "planned_staleness.json")["planned_staleness"]
    lines = [
        [
            f"{row['limit']:,}",
            f"{row['mean']:,}" if row["mean"] != row["limit"] else "all as long",
            row["kind"],
            str(row["server_gpus"] or "-"),
            ", ".join(f"{who} {share:.0%}" for who, share in row["busy"].items()),
            f"{row['tokens_per_second_per_gpu']:.0f}",
            f"{row['ratio']:.2f}",
        ]
        for row in rows
    ]
    head = ["longest response", "mean", "kind", "GPUs of servers", "busy", "tokens/s per GPU", "over synchronous"]
    return table(head, lines)


def cost(results: Path) -> str:
    """Return what the methods cost on GPUs by the planner's prediction, each against GRPO without a KL term."""
    rows = _read(results, "cost.json")["cost"]
    cheapest = min(row["step"] for row in rows)
    lines = []
    for row in rows:
        seconds = [f"{row[phase]:g}" for phase in ("rollout", "score", "update", "step")]
        lines.append([row["method"], *seconds, f"{row['step'] / cheapest - 1:+.0%}"])
    return table(["method", "rollout, s", "score, s", "update, s", "step, s", "more than the cheapest"], lines)
