"""Write the reference pages: every configuration key, every metric, every module."""

import ast
from pathlib import Path

from docs.generator.benchmarks import table
from docs.generator.picture import PACKAGE, floors, folder_imports
from megatron_mcpo.config.reference import REQUIRED, UNSET, Key, keys, tables
from megatron_mcpo.reporting.metric import Metric, Section
from megatron_mcpo.reporting.metric_table import EVALUATION, SECTIONS

_HEAD = "<!-- Written by `python -m docs.generator`; changes here are overwritten. -->\n\n"

_CONFIGURATION = """# Configuration

A run is described by one TOML file. `mcpo train CONFIG --section.key VALUE` overrides single keys; a value is TOML, so
a list is written `'["wandb"]'`. Unknown keys and bad values are refused before torch is imported, all of them at once,
with the key, the value, the rule and the fix (exit code 2). `mcpo config keys` prints the tables below, and
`mcpo config keys contrastive` one of them. The run folder holds the resolved configuration with every key.

Keys without a default are *required*; *unset* means that the meaning says what happens without a value. No default has
been tuned by measurement, and no option is claimed to be better than another.
"""

_COLUMNS = ("key", "type", "default", "allowed", "meaning")

_METRICS = """# Metrics

A run writes one JSON object per step to `metrics.jsonl` and one per evaluation to `eval.jsonl`; TensorBoard and the
trackers get the same keys. `<domain>` stands for the name of a domain, `<a>/<b>` for two of them.

## Five figures to watch

| figure | chance level or healthy value | what a bad value means |
| --- | --- | --- |
| `reward/<domain>` | starts near the chance level of the domain (0.5 for a Yes-or-No question, 0.25 for four choices, \
0 for free answers) and rises | flat in every domain: look at `nonzero_advantage` first |
| `nonzero_advantage` | well above 0; at 0 every group has equal rewards | the policy term learns nothing: the domain \
is too easy or too hard for the model, or the verifier rejects everything |
| `contrast/auc_cross_domain`, `contrast/gain_cross_domain` | above the chance levels 0.5 and 0 after some steps | \
the cross-domain term does not act: the run warns after step 10 and says what to change; see \
`contrast/anchors_cross_domain` for whether there are pairs at all |
| `engine/logprob_diff_mean` | what rounding gives (bf16: 0.02 to 0.06 in the quick start); the engine check compares \
all weights above its tolerance and stops the run above four times that | trainer and engine \
do not compute the same policy |
| held-out accuracy (`eval.jsonl`) | rises with the reward; its interval says what the number of items can show | \
reward rises and accuracy does not: the model learns the verifier or the training items |
"""

_MODULES = """# Modules

Every module of the package with the first line of its docstring, folder by folder, from the top layer to the bottom
one. [Development](development.md) shows how the folders depend on each other.
"""


def configuration() -> str:
    """Return the page of all configuration keys."""
    by_section: dict[str, list[Key]] = {}
    for key in keys():
        by_section.setdefault(key.section, []).append(key)
    headings = {"": ("Top of the file", "Keys at the top of the file, in front of the first table.")}
    headings |= {found.name: (f"`{found.heading}`", found.meaning) for found in tables()}
    parts = [_HEAD + _CONFIGURATION]
    for name, listed in by_section.items():
        title, meaning = headings[name]
        rows = [[f"`{key.name}`", key.type, _default(key), _allowed(key), _cell(key.meaning)] for key in listed]
        parts.append(f"## {title}\n\n{_cell(meaning)}\n\n{table(_COLUMNS, rows)}")
    return "\n".join(parts)


def metrics() -> str:
    """Return the page of all metrics."""
    parts = [_HEAD + _METRICS, "## Every key of metrics.jsonl\n"]
    parts += [_metric_section(section, level="###") for section in SECTIONS]
    return "\n".join([*parts, _metric_section(EVALUATION, level="##")])


def modules() -> str:
    """Return the page of all modules, folder by folder, from the top layer down."""
    floor_of = floors(folder_imports())
    parts = [_HEAD + _MODULES]
    for folder in sorted(floor_of, key=lambda name: (-floor_of[name], name)):
        path = PACKAGE / folder
        files = sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
        rows = [[f"`{_shown(file)}`", _cell(_first_line(file))] for file in files if _first_line(file)]
        parts.append(f"## {folder}\n\n" + table(("module", "what it does"), rows))
    return "\n".join(parts)


def _metric_section(section: Section, level: str) -> str:
    rows = [[_metric_keys(metric), _cell(metric.meaning), _cell(metric.target)] for metric in section.metrics]
    header = ("key", "meaning", "chance level or target")
    return f"{level} {section.title}\n\n{_cell(section.about)}\n\n" + table(header, rows)


def _metric_keys(metric: Metric) -> str:
    return ", ".join(f"`{key}`" for key in metric.keys)


def _default(key: Key) -> str:
    return f"*{key.default}*" if key.default in (REQUIRED, UNSET) else f"`{key.default}`"


def _allowed(key: Key) -> str:
    """Return the range with its values as code."""
    for words in ("each one of ", "one of "):
        if key.range.startswith(words):
            return words + ", ".join(f"`{value}`" for value in key.range.removeprefix(words).split(", "))
    for words in ("each matches ", "matches ", "each "):
        if key.range.startswith(words):
            return f"{words}`{key.range.removeprefix(words)}`"
    return f"`{key.range}`" if key.range and key.range != "not empty" else key.range


def _cell(text: str) -> str:
    """Return prose that Markdown cannot take for a tag."""
    return " ".join(text.split()).replace("<", "&lt;")


def _shown(file: Path) -> str:
    path = file.relative_to(PACKAGE)
    return f"{path.parent}/" if path.name == "__init__.py" else str(path)


def _first_line(file: Path) -> str:
    """Return the first paragraph of a module's docstring; the first line, where it is a sentence."""
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return " ".join(text.partition("\n\n")[0].split()) if text else ""
