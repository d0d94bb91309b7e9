"""The rules that keep the package small and layered, read from its source: imports, sizes, leftovers, tree.

Not covered: imports by a name computed at run time. Each rule is also tried on a source that breaks it.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PACKAGE = "megatron_mcpo"
TREE = "docs/development.md"
OUTSIDE = ("tools", "benchmarks", "docs", "examples")

# A folder is a layer: it imports from the layers below only, and modules of one folder without closing a circle.
LAYERS: dict[str, int] = {
    "config": 0,
    "types": 0,
    "progress": 0,
    "algo": 1,
    "distributed": 1,
    "storage": 1,
    "rewards": 1,
    "weights": 2,
    "reporting": 2,
    "data": 2,
    "mcore": 3,
    "rollout": 3,
    "trainer": 4,
    "planner": 4,
    "convert": 4,
    "cli": 5,
    "__main__": 6,
}
TOP_LEVEL = 7  # tools, benchmarks, docs and examples may import all of the package

# Pairs (importer, imported) that levels alone would allow. The loss is handed to mcore as a callable.
FORBIDDEN = [("mcore", "algo")]

# A library behind a fence, and the only modules that may import it.
FENCES = {
    "megatron": ("mcore", "distributed"),
    "vllm": ("rollout.vllm_engine", "rollout.vllm_transfer", "rollout.vllm_cpu_fixes"),
}

# What pure torch means for algo; the configuration is plain values.
ALGO_MAY_IMPORT = {"torch", "algo", "types", "config"}

# Importing these must not import torch, not even through others: bad configurations fail before anything slow.
WITHOUT_TORCH = (
    "config.config",
    "config.hf_config",
    "config.model",
    "config.reference",
    "config.summary",
    "storage.run_folder",
    "storage.checkpoint_files",
    "distributed.preemption",
    "distributed.liveness",
    "progress",
    "reporting.accuracy",
    "weights.reshard_plan",
    "rewards.allowlist",
    "rewards.rules",
    "rewards.voting",
    "rollout.vllm_fields",
    "rollout.vllm_options",
    "rollout.server_client",
    "cli.config_keys",
    "cli.doctor",
    "cli.preflight",
    "cli.train",
    "cli.evaluate",
    "cli.serve",
)

MAX_FILE_LINES = 400
MAX_TEST_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
MAX_NESTING = 3

NESTING = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.TryStar, ast.Match)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    """`weights.layout` for megatron_mcpo/weights/shards.py; a package's __init__ goes by the folder's name."""
    parts = list(path.relative_to(ROOT / PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in python_files(PACKAGE)}


def within(module: str, unit: str) -> bool:
    return module == unit or module.startswith(unit + ".")


def layer_of(module: str) -> int | None:
    """Return the layer of a module's folder; the package's own __init__ lies just above `config`, which it imports."""
    return LAYERS.get(module.partition(".")[0], 1 if not module else None)


def imported(source: str, package: str = "") -> Iterator[str]:
    """Dotted names that a source imports, anywhere in it, relative ones resolved against `package`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            outer = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*outer, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from (arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str))


def own_imports(path: Path) -> set[str]:
    """The package's modules that a file imports (`from megatron_mcpo.types import RolloutLabels` is `types`)."""
    package = ".".join(path.relative_to(ROOT).parts[:-1])
    found = set()
    for name in imported(path.read_text(encoding="utf-8"), package):
        if within(name, PACKAGE):
            inner = name.removeprefix(PACKAGE).removeprefix(".")
            found.add(inner if inner in MODULES else inner.rpartition(".")[0])
    return found - {""}


def foreign_imports(source: str) -> set[str]:
    return {name.partition(".")[0] for name in imported(source)} - {PACKAGE}


def test_every_folder_is_a_layer() -> None:
    assert {module.partition(".")[0] for module in MODULES} - {""} == set(LAYERS), "give a new folder a layer in LAYERS"


def test_imports_go_down() -> None:
    wrong = []
    for path in python_files(PACKAGE, *OUTSIDE):
        inside = path.is_relative_to(ROOT / PACKAGE)
        folder = module_name(path).partition(".")[0] if inside else ""
        layer = layer_of(folder) if inside else TOP_LEVEL
        for target in own_imports(path):
            if target.partition(".")[0] != folder and (layer_of(target) or 0) >= (layer or 0):
                wrong.append(f"{path.relative_to(ROOT)} imports {target}, which does not lie below it")
    assert wrong == []


def test_no_circles() -> None:
    graph = {module: own_imports(path) - {module} for module, path in MODULES.items() if path.name != "__init__.py"}
    assert list(TopologicalSorter(graph).static_order())  # CycleError names the circle


def test_forbidden_pairs() -> None:
    wrong = [
        f"{module} imports {target}"
        for module, path in MODULES.items()
        for target in own_imports(path)
        for importer, banned in FORBIDDEN
        if within(module, importer) and within(target, banned)
    ]
    assert wrong == []


@pytest.mark.parametrize("library", FENCES)
def test_fenced_libraries_are_imported_behind_their_fence_only(library: str) -> None:
    wrong = []
    for path in python_files(PACKAGE, *OUTSIDE):
        inside = path.is_relative_to(ROOT / PACKAGE)
        allowed = inside and any(within(module_name(path), unit) for unit in FENCES[library])
        if library in foreign_imports(path.read_text(encoding="utf-8")) and not allowed:
            wrong.append(str(path.relative_to(ROOT)))
    assert wrong == []


def test_one_place_asks_whether_there_is_a_gpu() -> None:
    """Torch's answer alone is wrong where vLLM is the CPU build: `device.uses_gpu` is the answer for everybody."""
    asking = [
        str(path.relative_to(ROOT))
        for path in python_files(PACKAGE, *OUTSIDE, "tests/gpu")
        if "cuda.is_available" in path.read_text(encoding="utf-8")
    ]
    assert asking == [f"{PACKAGE}/distributed/device.py"]


def test_algo_is_pure_torch() -> None:
    for path in python_files(f"{PACKAGE}/algo"):
        source = path.read_text(encoding="utf-8")
        others = {name for name in foreign_imports(source) if name not in sys.stdlib_module_names}
        others |= {target.partition(".")[0] for target in own_imports(path)}
        assert others <= ALGO_MAY_IMPORT, path.name
        assert not any("distributed" in name for name in imported(source)), path.name


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_configuration_is_checked_without_torch(module: str) -> None:
    code = f"import sys, {PACKAGE}.{module}; print([m for m in ('torch', 'megatron', 'vllm') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert (result.returncode, result.stdout.strip()) == (0, "[]"), result.stderr


def test_imports_are_found_wherever_they_hide() -> None:
    source = (
        "import torch.nn as nn\nfrom megatron.core import optimizer\n"
        "def f():\n    if True:\n        from . import near\n        from ..types import RolloutLabels\n"
        "    importlib.import_module('vllm.config')\n"
    )
    assert set(imported(source, "a.b")) == {
        "torch.nn", "megatron.core.optimizer", "a.b.near", "a.types.RolloutLabels", "vllm.config",
    }  # fmt: skip
    assert foreign_imports("from megatron_mcpo import types\nimport megatron") == {"megatron"}


def file_problems(source: str, limit: int) -> list[str]:
    """A file of nothing but data may be as long as its table."""
    tree = ast.parse(source)
    has_code = any(isinstance(node, (*FUNCTIONS, ast.ClassDef)) for node in ast.walk(tree))
    lines = len(source.splitlines())
    return [f"{lines} lines, at most {limit}"] if has_code and lines > limit else []


def function_problems(source: str) -> list[str]:
    problems = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, FUNCTIONS):
            continue
        lines = (node.end_lineno or node.lineno) - node.lineno + 1
        if lines > MAX_FUNCTION_LINES:
            problems.append(f"{node.name}: {lines} lines, at most {MAX_FUNCTION_LINES}")
        depth = max(nesting(statement) for statement in node.body)
        if depth > MAX_NESTING:
            problems.append(f"{node.name}: nested {depth} deep, at most {MAX_NESTING}")
    return problems


def nesting(node: ast.AST) -> int:
    """How deep compound statements are nested; `elif` is no deeper than its `if`, an inner function counts anew."""
    if isinstance(node, (*FUNCTIONS, ast.Lambda)):
        return 0
    continues = isinstance(node, ast.If) and len(node.orelse) == 1 and isinstance(node.orelse[0], ast.If)
    branches = node.orelse if isinstance(node, ast.If) and continues else []
    inner = max((nesting(child) for child in ast.iter_child_nodes(node) if child not in branches), default=0)
    return max(inner + isinstance(node, NESTING), *(nesting(branch) for branch in branches), 0)


def test_sizes_of_files_and_functions() -> None:
    problems = []
    for path in python_files(PACKAGE, *OUTSIDE):
        source = path.read_text(encoding="utf-8")
        found = file_problems(source, MAX_FILE_LINES) + function_problems(source)
        problems += [f"{path.relative_to(ROOT)}: {problem}" for problem in found]
    for path in python_files("tests"):
        found = file_problems(path.read_text(encoding="utf-8"), MAX_TEST_FILE_LINES)
        problems += [f"{path.relative_to(ROOT)}: {problem}" for problem in found]
    assert problems == []


def test_size_rules_on_sources_that_break_them() -> None:
    long_function = "def f():\n" + "    x = 1\n" * 60
    assert function_problems(long_function) == ["f: 61 lines, at most 60"]
    assert function_problems("def f():\n" + "    x = 1\n" * 59) == []
    deep = "def f():\n for a in b:\n  if a:\n   with a:\n    while a:\n     pass\n"
    assert function_problems(deep) == ["f: nested 4 deep, at most 3"]
    chain = "def f():\n if a:\n  pass\n elif b:\n  pass\n elif c:\n  pass\n elif d:\n  for x in y:\n   pass\n"
    assert function_problems(chain) == []
    in_else = "def f():\n if a:\n  pass\n else:\n  try:\n   pass\n  except E:\n   for x in y:\n    if x:\n     pass\n"
    assert function_problems(in_else) == ["f: nested 4 deep, at most 3"]
    assert file_problems("x = 1\n" * 401, 400) == []
    assert file_problems("x = 1\n" * 400 + "def f(): pass\n", 400) == ["401 lines, at most 400"]


def fragments(source: str) -> list[str]:
    """Docstrings of properties that are not sentences: ruff's D401 does not look at these."""
    return [
        f"{node.name}: {text}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, FUNCTIONS) and {"property", "cached_property"} & set(map(ast.unparse, node.decorator_list))
        if (text := ast.get_docstring(node)) and not text.startswith("Return ")
    ]


def test_docstrings_of_properties_begin_with_return() -> None:
    found = {str(path.relative_to(ROOT)): fragments(path.read_text(encoding="utf-8")) for path in MODULES.values()}
    assert {path: texts for path, texts in found.items() if texts} == {}


def test_a_fragment_is_recognised() -> None:
    source = "class A:\n @property\n def b(self):\n  '''{}'''\n def c(self):\n  '''Whether.'''\n"
    assert fragments(source.format("Whether it is.")) == ["b: Whether it is."]
    assert fragments(source.format("Return whether it is.")) == []


LEFTOVERS = re.compile(r"\b(TODO|FIXME|NotImplementedError)\b|# type: ignore(?!\[)")


def test_no_leftovers() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in python_files(PACKAGE, *OUTSIDE, "tests")
        if path != Path(__file__)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if LEFTOVERS.search(line)
    ]
    assert found == []


def test_leftovers_are_recognised() -> None:
    assert LEFTOVERS.search("x = 1  # TODO later")
    assert LEFTOVERS.search("x = 1  # type: ignore")
    assert not LEFTOVERS.search("x = 1  # type: ignore[assignment]")


def tree_entries(page: str) -> dict[str, str]:
    """Path and purpose of every line of the first fenced block under "## The tree".

    A line is a name, two or more spaces, a purpose; deeper indentation puts it into the folder above (`name/`).
    Raises ValueError where the heading or block is missing, or a line has no purpose or a path comes twice.
    """
    match = re.search(r"^## The tree\n(?:(?!^## ).*\n)*?```.*\n((?:(?!```).*\n)*)```", page, re.MULTILINE)
    if match is None:
        raise ValueError('docs/development.md: no fenced block under the heading "## The tree"')
    entries: dict[str, str] = {}
    folders: list[tuple[int, str]] = []
    for line in filter(str.strip, match[1].splitlines()):
        indent = len(line) - len(line.lstrip())
        name, *purpose = re.split(r"\s{2,}", line.strip(), maxsplit=1)
        while folders and folders[-1][0] >= indent:
            folders.pop()
        path = (folders[-1][1] if folders else "") + name
        if not purpose or path in entries:
            raise ValueError(f"docs/development.md: {path!r} has no purpose or comes twice: {line!r}")
        entries[path] = purpose[0]
        if name.endswith("/"):
            folders.append((indent, path))
    return entries


def tree_on_disk() -> set[str]:
    """What the tree must list: the top level, folders two levels deep, programs in tools/, folders of the package."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    found = set()
    for path in map(Path, listed.stdout.splitlines()):
        if path.parts[0].startswith(".") or not (ROOT / path).exists():
            continue
        deep = 9 if path.parts[0] == PACKAGE else 1 if path.parts[0] == "examples" and path.parts[1] == "models" else 2
        found |= {f"{folder}/" for folder in path.parents if 0 < len(folder.parts) <= deep}
        is_listed = len(path.parts) == 1 or path.parts[0] == "tools" or path.parent == Path(PACKAGE)
        if is_listed and path.name != "__init__.py":
            found.add(str(path))
    return found


def test_the_tree_is_the_tree() -> None:
    entries = tree_entries((ROOT / TREE).read_text(encoding="utf-8"))
    assert sorted(tree_on_disk() - entries.keys()) == [], f"not in {TREE}"
    assert sorted(path for path in entries if not (ROOT / path).exists()) == [], f"in {TREE} only"


def test_the_tree_is_read_as_indented() -> None:
    tree = "a/  one\n  b/    two\n    c.py  three\n  d.py  four\ne  five\n"
    text = f"# T\n```\nno\n```\n## The tree\nWords.\n\n```text\n{tree}```\n"
    expected = {"a/": "one", "a/b/": "two", "a/b/c.py": "three", "a/d.py": "four", "e": "five"}
    assert tree_entries(text) == expected


@pytest.mark.parametrize("text", ["# T\n", "## The tree\n## Next\n```\na  one\n```\n", "## The tree\n```\na\n```\n"])
def test_a_page_without_a_proper_tree_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"development"):
        tree_entries(text)
