"""README, docs/ and the files that contributors expect: short, generated where they can be, and true.

Links and anchors resolve; commands, options, keys, metrics and paths on a page exist; configurations load, rows parse,
the reward function runs. Not covered: whether sentences are true.
"""

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from markdown.extensions.toc import slugify

from benchmarks.gpu.run import ROWS
from docs.generator import __main__ as generator
from docs.generator.figures import RESULTS, byte_text, formatted, lookup, significant
from docs.generator.parts import DOCS, PAGES, filled, rendered
from docs.generator.picture import direct, floors
from megatron_mcpo import __version__
from megatron_mcpo.cli.main import COMMANDS, main
from megatron_mcpo.config.config import Config, load
from megatron_mcpo.config.domain_schema import DataConfig, VerifierKind
from megatron_mcpo.config.hf_fields import FAMILIES
from megatron_mcpo.config.reference import keys, tables
from megatron_mcpo.data.rows import parse_row
from megatron_mcpo.reporting.metric_table import EVALUATION, SECTIONS
from megatron_mcpo.rewards import allowlist, rules
from tests.support.paths import ROOT

README_WORDS, PAGE_WORDS = 1300, 1500
GENERATED = {ROOT / name for name in PAGES}
PAGES_OF_DOCS = sorted(DOCS.glob("*.md"))
READ_FIRST = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")]
ALL = [*READ_FIRST, *PAGES_OF_DOCS]
# The changelog has the old names too.
CURRENT = [path for path in ALL if path.name != "CHANGELOG.md"]
TABLES_OF_KEYS = {table.name for table in tables()}
DOTTED_KEYS = {f"{key.section}.{key.name}" if key.section else key.name for key in keys()}
METRICS = {key for section in (*SECTIONS, EVALUATION) for metric in section.metrics for key in metric.keys}

each_page = pytest.mark.parametrize("page", ALL, ids=lambda path: path.name)
each_current_page = pytest.mark.parametrize("page", CURRENT, ids=lambda path: path.name)


@cache
def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def fenced(text: str, language: str) -> list[str]:
    """Return the fenced blocks of a language; "" for those without one."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [block for name, block in blocks if name == language]


def prose_of(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def inline_code(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose_of(text))


# Length


def test_the_readme_is_read_in_five_minutes() -> None:
    assert len(text_of(ROOT / "README.md").split()) <= README_WORDS


def test_no_page_written_by_hand_is_long() -> None:
    lengths = {
        page.name: len(re.sub(r"<!-- table: .*?<!-- /table -->|<!--.*?-->", "", text_of(page), flags=re.DOTALL).split())
        for page in PAGES_OF_DOCS
        if page not in GENERATED
    }
    assert {name: words for name, words in lengths.items() if words > PAGE_WORDS} == {}


def test_the_readme_says_first_what_has_never_run() -> None:
    text = text_of(ROOT / "README.md")
    assert text.index("never run on a GPU") < text.index("![") < text.index("\n## ")
    assert text.count("![") == 1


# Generated parts


def test_committed_pages_are_what_the_generator_writes() -> None:
    stale = [str(path.relative_to(ROOT)) for path, text in rendered().items() if path.read_text("utf-8") != text]
    assert stale == [], "run `python -m docs.generator`"


def test_a_changed_page_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    page = tmp_path / "page.md"
    page.write_text("old")
    monkeypatch.setattr(generator, "ROOT", tmp_path)
    monkeypatch.setattr(generator, "rendered", lambda: {page: "new"})
    assert (generator.main(["--check"]), page.read_text()) == (1, "old")
    assert (generator.main([]), page.read_text()) == (0, "new")
    assert (generator.main(["--check"]), capsys.readouterr().out.count("page.md")) == (0, 2)


def numbers_in(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield where the numbers of a result lie, but for those of the machine."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(inner, (dict, list)):
            yield from numbers_in(inner, (*at, key))
        elif isinstance(inner, (int, float)) and not isinstance(inner, bool):
            yield (*at, key)


@pytest.mark.parametrize(
    "name", sorted({match[1] for page in ALL for match in re.finditer(r"figure: (\S+)", text_of(page))})
)
def test_a_changed_result_changes_a_page(name: str, tmp_path: Path) -> None:
    """Every result is doubled: no number that a page shows of this file may survive."""
    shutil.copytree(RESULTS, tmp_path, dirs_exist_ok=True)
    content = json.loads((RESULTS / name).read_text())
    for *outer, last in list(numbers_in(content)):
        place = content
        for key in outer:
            place = place[key]
        place[last] = 2 * place[last] + 1 if last != "seed" else place[last]
    (tmp_path / name).write_text(json.dumps(content))
    marked = [page for page in ALL if f"figure: {name}" in text_of(page)]
    for page in marked:
        before, after = (
            [m[1] for m in re.finditer(rf"figure: {name} .*?-->(.*?)<!--", text)]
            for text in (text_of(page), filled(text_of(page), tmp_path))
        )
        assert before and all(old != new for old, new in zip(before, after, strict=True)), page.name


def test_a_changed_result_changes_its_table(tmp_path: Path) -> None:
    shutil.copytree(RESULTS, tmp_path, dirs_exist_ok=True)
    content = json.loads((RESULTS / "convert_cpu.json").read_text())
    content["convert"][0]["seconds"] += 1
    (tmp_path / "convert_cpu.json").write_text(json.dumps(content))
    page = text_of(DOCS / "conversion.md")
    assert filled(page) == page != filled(page, tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<!-- table: nothing -->\n<!-- /table -->", "no such table: nothing"),
        ("<!-- figure: convert_cpu.json convert/0/seconds -->1<!-- /figure -->", "malformed"),
        ("<!-- table: convert -->\n", "has no end"),
        ("<!-- figure: convert_cpu.json convert/9/seconds .1f -->1<!-- /figure -->", "there is no '9'"),
        ("<!-- figure: convert_cpu.json convert/case=135M/seconds .1f -->1<!-- /figure -->", "2 elements meet"),
    ],
)
def test_a_marker_that_names_nothing_is_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        filled(text)


def test_figures_are_formatted() -> None:
    assert lookup("contrastive_cpu.json", "contrastive/n=512,transfer=all,impl=tiled/threads") == 2
    assert [formatted(7_012_455_895, form) for form in (".1fGB", ",d")] == ["7.0 GB", "7,012,455,895"]
    assert formatted(0.125, ".1f%") == "12.5%"
    assert [significant(x) for x in (0.00567, 0.84, 5.7, 23.12, 87.25, 0)] == ["0.0057", "0.84", "5.7", "23", "87", "0"]
    assert [byte_text(x) for x in (0, 65_408, 174_219_264, 2_156_716_032)] == ["0 bytes", "65 KB", "174 MB", "2.2 GB"]


def test_the_picture_leaves_out_what_other_arrows_imply() -> None:
    graph = {"a": {"b", "c"}, "b": {"c"}, "c": set()}
    assert direct(graph) == {"a": {"b"}, "b": {"c"}, "c": set()}
    assert floors(graph) == {"a": 2, "b": 1, "c": 0}


@pytest.mark.parametrize("path", sorted((DOCS / "assets").glob("*.svg")), ids=lambda path: path.name)
def test_pictures_are_readable_in_light_and_dark_and_load_nothing(path: Path) -> None:
    root = ElementTree.parse(path).getroot()
    assert root.find("{http://www.w3.org/2000/svg}title") is not None
    assert "prefers-color-scheme:dark" in text_of(path)
    assert re.findall(r"(?:href|src|url)=?[\"(](?!#)", text_of(path)) == []


# Links


def slugs(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", prose_of(text_of(page)), re.MULTILINE)
    return {slugify(title.replace("`", ""), "-") for title in titles}


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(text_of(page))):
        name, _, anchor = target.partition("#")
        if name.startswith("https://"):
            continue
        path = (page.parent / name).resolve() if name else page
        inside = page.parent != DOCS or path.is_relative_to(DOCS)  # the site has nothing but docs/
        if not path.is_file() or not inside or (anchor and anchor not in slugs(path)):
            wrong.append(target)
    assert wrong == []


def test_every_page_is_in_the_navigation_and_in_the_readme() -> None:
    settings = yaml.safe_load(text_of(ROOT / "mkdocs.yml"))
    listed = re.findall(r"\S+\.md", yaml.safe_dump(settings["nav"]))
    assert sorted(listed) == [page.name for page in PAGES_OF_DOCS]
    readme = text_of(ROOT / "README.md")
    assert [page.name for page in PAGES_OF_DOCS if f"(docs/{page.name})" not in readme] == []


def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    built = sorted(path.name for path in tmp_path.glob("*.html"))
    assert built == sorted(["404.html", *(page.with_suffix(".html").name for page in PAGES_OF_DOCS)])
    for page in tmp_path.glob("*.html"):
        loaded = re.findall(r"<(?:script|img|iframe|link)\b[^>]*?(?:src|href)=\"?(https?:[^\s\">]+)", text_of(page))
        assert loaded == [], page.name
    assert not list(tmp_path.rglob("*.py"))


# Commands


def commands_on(page: Path) -> list[list[str]]:
    """Return the arguments of every `mcpo ...` on a page."""
    lines = [line for block in fenced(text_of(page), "") for line in block.splitlines()] + inline_code(text_of(page))
    found = [re.search(r"(?:^|/)mcpo (.+)|-m megatron_mcpo (.+)", line.partition("  #")[0]) for line in lines]
    return [shlex.split(match[1] or match[2]) for match in found if match]


@cache
def help_of(command: str) -> str:
    """Return what `mcpo COMMAND --help` prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main([*command.split(), "--help"])
    return out.getvalue()


def command_problems(arguments: list[str]) -> list[str]:
    """Return what of a command line does not exist."""
    names = [" ".join(arguments[:count]) for count in (2, 1) if " ".join(arguments[:count]) in COMMANDS]
    if not names:
        is_group = len(arguments) == 1 and any(name.startswith(f"{arguments[0]} ") for name in COMMANDS)
        is_known = is_group or arguments[0] in ("--help", "--version", "SUBCOMMAND", "...")
        return [] if is_known else [f"mcpo {' '.join(arguments[:2])}"]
    options = [word.partition("=")[0] for word in arguments if word.startswith("--") and word != "--"]
    return [
        option
        for option in options
        if (option.removeprefix("--") not in DOTTED_KEYS | {"section.key"})
        and not re.search(rf"{re.escape(option)}(?![\w-])", help_of(names[0]))
    ]


@pytest.fixture(autouse=True)
def keep_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put back what subcommands that compute on the CPU change."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES", ""))


@each_page
def test_commands_exist(page: Path) -> None:
    assert [problem for arguments in commands_on(page) for problem in command_problems(arguments)] == []


def test_commands_that_do_not_exist_are_found() -> None:
    assert command_problems(["fly", "CONFIG"]) == ["mcpo fly CONFIG"]
    assert command_problems(["plan", "CONFIG", "--gpus", "--model.pat", "x"]) == ["--gpus", "--model.pat"]
    assert command_problems(["convert", "to-hf", "SRC", "DST", "--hf", "DIR", "--tp", "2"]) == ["--tp"]


def test_every_subcommand_is_on_a_page() -> None:
    shown = " ".join(text_of(page) for page in [ROOT / "README.md", *PAGES_OF_DOCS])
    assert [name for name in COMMANDS if f"mcpo {name}" not in shown] == []


@each_page
def test_targets_of_make_and_programs_of_benchmarks_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", text_of(ROOT / "Makefile"), re.MULTILINE))
    shown = [line for block in fenced(text_of(page), "") for line in block.splitlines()] + inline_code(text_of(page))
    assert {match[1] for line in shown if (match := re.match(r"make ([a-z][a-z-]*)", line))} <= targets
    programs = {match[1] for line in shown if (match := re.search(r"-m (benchmarks\.[a-z_.]*[a-z_])", line))}
    assert [name for name in programs if not (ROOT / name.replace(".", "/")).with_suffix(".py").is_file()] == []


# Names of keys, metrics and files


@each_current_page
def test_keys_metrics_and_files_exist(page: Path) -> None:
    names = "|".join(sorted({name.partition(".")[0] for name in TABLES_OF_KEYS}))
    families = "|".join(sorted({key.partition("/")[0] for key in METRICS if "/" in key} - {"items"}))
    wrong = []
    for code in inline_code(text_of(page)):
        if match := re.fullmatch(rf"((?:{names})\.[a-z_0-9.]+)(?: = .*)?", code):
            wrong += [code] if match[1] not in DOTTED_KEYS | TABLES_OF_KEYS else []
        elif re.fullmatch(rf"(?:{families})/[a-z_<>/]+", code):
            wrong += [code] if code not in METRICS else []
        elif re.fullmatch(r"(?:megatron_mcpo|benchmarks|docs|examples|requirements|tests|tools)/[a-z0-9_./-]+", code):
            wrong += [code] if not (ROOT / code).exists() else []
    assert wrong == []


def test_the_changelog_names_what_was_renamed() -> None:
    text = text_of(ROOT / "CHANGELOG.md")
    assert f"## [{__version__}]" in text
    rows = re.findall(r"^\| (key|metric) \| (.+) \| (.+) \|$", text, re.MULTILINE)
    assert len(rows) >= 9
    for kind, old, new in rows:
        known = DOTTED_KEYS if kind == "key" else METRICS
        assert set(re.findall(r"`([^`]+)`", new)) <= known, new
        assert not set(re.findall(r"`([^`]+)`", old)) & known, old


def test_tables_on_pages_are_complete() -> None:
    def missing(page: str, names: Any) -> list[str]:
        return [name for name in names if f"`{name}`" not in text_of(DOCS / page)]

    assert missing("rewards.md", get_args(VerifierKind)) == []
    assert missing("data.md", get_args(DataConfig.model_fields["mixing"].annotation)) == []
    assert missing("gpu-validation.md", ROWS) == missing("gpu-claims.md", ROWS) == []
    claims = [line.split("|")[1:-1] for line in text_of(DOCS / "gpu-claims.md").splitlines() if line.startswith("|")]
    assert len(claims) > 20 and all(cell.strip() for row in claims for cell in row)
    families = {name.removesuffix("ForCausalLM").replace("Moe", "-MoE") for name in FAMILIES}
    for page in (ROOT / "README.md", DOCS / "conversion.md", DOCS / "limitations.md", DOCS / "quickstart.md"):
        assert {name for name in families if name not in text_of(page)} == set(), page.name


# Examples


def test_the_complete_configurations_load(tmp_path: Path) -> None:
    """At most 25 and 15 lines; with generators that are allowed and verifiers that exist."""
    for page, most_lines in ((ROOT / "README.md", 25), (DOCS / "quickstart.md", 15)):
        block = fenced(text_of(page), "toml")[0]
        assert len(block.splitlines()) <= most_lines
        (tmp_path / "small.toml").write_text(block)
        config = load(tmp_path / "small.toml")
        assert allowlist.problems(config) + rules.problems(config) == []
        assert len(config.domain) == 2 and config.contrastive.enabled
        assert config.layout(None).world_size == 1


@pytest.mark.parametrize("page", [page for page in CURRENT if "```toml" in text_of(page)], ids=lambda path: path.name)
def test_parts_of_configurations_are_valid(page: Path) -> None:
    base = tomllib.loads(fenced(text_of(DOCS / "quickstart.md"), "toml")[0])
    for block in fenced(text_of(page), "toml"):
        part = {key: value for key, value in tomllib.loads(block).items() if key != "extends"}
        tables = {
            key: {**base.get(key, {}), **value} if isinstance(value, dict) else value for key, value in part.items()
        }
        Config.model_validate({**base, **tables})


def test_a_configuration_that_extends_another_is_shown_as_it_works(tmp_path: Path) -> None:
    base, extending = fenced(text_of(DOCS / "quickstart.md"), "toml")
    (tmp_path / "small.toml").write_text(base)
    (tmp_path / "grpo.toml").write_text(extending)
    assert load(tmp_path / "small.toml").contrastive.enabled
    assert not load(tmp_path / "grpo.toml").contrastive.enabled


def test_rows_are_read() -> None:
    lines = [line for block in fenced(text_of(DOCS / "data.md"), "json") for line in block.splitlines()]
    assert len(lines) >= 4
    for position, line in enumerate(lines):
        assert parse_row(json.loads(line), position, ()).entry["question"]


def test_the_reward_function_runs() -> None:
    (block,) = fenced(text_of(DOCS / "rewards.md"), "python")
    assert len(block.splitlines()) <= 8
    names: dict[str, Any] = {}
    exec(block, names)
    entry = {"question": "Which?", "answer": "blue red", "metadata": {}}
    assert [names["score"](entry, response) for response in ("Blue red", "a blue one", "")] == [1.0, 0.5, 0.0]


# What contributors expect


def test_files_for_contributors_are_well_formed() -> None:
    citation = yaml.safe_load(text_of(ROOT / "CITATION.cff"))
    assert {"cff-version", "message", "title", "authors", "license"} <= citation.keys()
    assert citation["references"][0]["identifiers"][0]["value"] == "arXiv:2605.25443"
    for path in (ROOT / ".github").rglob("*.yml"):
        assert yaml.safe_load(text_of(path)), path.name
    hooks = yaml.safe_load(text_of(ROOT / ".pre-commit-config.yaml"))["repos"][0]["hooks"]
    assert [hook["language"] for hook in hooks] == ["system", "system"]
    (job,) = yaml.safe_load(text_of(ROOT / ".github" / "workflows" / "test.yml"))["jobs"].values()
    steps = [step.get("run") for step in job["steps"]]
    assert {"make test", "make docs"} <= set(steps)
    for form in ("bug", "feature"):
        content = yaml.safe_load(text_of(ROOT / ".github" / "ISSUE_TEMPLATE" / f"{form}.yml"))
        assert {"name", "description", "body"} <= content.keys()
