"""The recipes for many GPUs under examples/: valid, they fit, and the layout holds every weight exactly once.

Not covered: that they train; no test has the GPUs.
"""

import json
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest

from megatron_mcpo.cli import data_prepare, plan, submit, train
from megatron_mcpo.config.config import load
from megatron_mcpo.config.hf_config import from_folder
from megatron_mcpo.config.layout import Layout
from megatron_mcpo.config.model import ModelConfig
from megatron_mcpo.distributed import parallel
from megatron_mcpo.distributed.device import only_shapes
from megatron_mcpo.mcore.head import HeadSpec
from megatron_mcpo.mcore.model import DTYPES, build_chunks
from megatron_mcpo.planner.planning import head_of
from megatron_mcpo.rewards import allowlist
from megatron_mcpo.weights.mapping import hf_shapes
from megatron_mcpo.weights.match_parameters import match_parameters
from megatron_mcpo.weights.shards import cut_dim, shard_slices
from tests.support.paths import ROOT
from tests.support.tiny_run import save_chat_tokenizer

RECIPES = sorted((ROOT / "examples").glob("*/h100_*.toml"))
GPUS_A_NODE = 8


def gpus_of(path: Path) -> int:
    return int(path.stem.split("_")[1])


def ranks_of(path: Path) -> int:
    """Return how many GPUs are left to the trainer."""
    return gpus_of(path) - load(path).server_gpus


def test_there_is_a_recipe_for_each_model() -> None:
    found = {(path.parent.name, path.stem) for path in RECIPES}
    assert found == {
        ("qwen3_32b", "h100_32"),
        ("qwen3_32b", "h100_64"),
        ("qwen3_32b", "h100_64_async"),
        ("qwen2_5_32b", "h100_32"),
        ("llama3_70b", "h100_64"),
        ("qwen3_30b_a3b", "h100_32"),
        ("qwen3_235b_a22b", "h100_128"),
    }


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_recipe_fits_as_its_plan_says(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A plan that has changed: `mcpo plan RECIPE --nodes N > plan_GPUS.txt`."""
    monkeypatch.chdir(ROOT)
    config = load(path)
    assert allowlist.problems(config) == [] and len(config.domain) == 5
    code = plan.main([str(path.relative_to(ROOT)), "--gpu", "h100", "--nodes", str(gpus_of(path) // GPUS_A_NODE)])
    printed = capsys.readouterr().out
    assert code == 0, printed
    assert printed == (path.parent / f"plan_{path.stem.removeprefix('h100_')}.txt").read_text(encoding="utf-8")
    assert re.search(r"^fits +yes$", printed, re.MULTILINE)


def test_the_documentation_has_a_command_for_every_data_file_of_the_recipes() -> None:
    """The command parses, takes a set that exists, and writes this file."""
    needed = {
        file
        for path in RECIPES
        for domain in load(path).domain
        for source in domain.sources
        for file in (source.file, source.held_out_file)
        if file is not None
    }
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(.+?)` \| `mcpo data prepare (.+?)` \|$", page, re.MULTILINE)
    assert [file for file, _ in rows] == [str(data_prepare.parse(command.split()).out) for _, command in rows]
    assert Counter(file for file, _ in rows) == Counter(needed)
    fetched = re.findall(r"[\w-]+/[\w-]+", page.partition("for set in")[2].partition("; do")[0])
    for _, command in rows:
        name, source, *_ = command.split()
        hub = "/".join(source.split("/")[1:3])
        assert hub in fetched and hub in data_prepare.SETS[name].hub, command


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_recipe_says_where_its_data_comes_from(path: Path) -> None:
    assert 'docs/data.md, "The recipes\' data"' in path.read_text(encoding="utf-8")
    assert "\n### The recipes' data\n" in (ROOT / "docs" / "data.md").read_text(encoding="utf-8")


def save_empty_weights(folder: Path, model: ModelConfig) -> None:
    """Write a sparse file with every tensor of the model: a header, and a hole for the values."""
    header, size = {}, 0
    for name, shape in hf_shapes(model).items():
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [size, size + 2 * prod(shape)]}
        size += 2 * prod(shape)
    encoded = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + size)


def write_rows(path: Path) -> None:
    """Write rows of the kind that the file's name promises."""
    kind: dict[str, object] = {"answer": "4"}
    if "mbpp" in path.name:
        kind = {"verifier": "code", "function": "f", "tests": [{"assert": "assert f(1) == 2"}]}
    elif "gsm8k" not in path.name and "math" not in path.name:
        kind = {"verifier": "choice", "choices": ["red", "green"], "answer": "B"}
    rows = [{"question": f"Question {number} of {path.stem}?", **kind} for number in range(8)]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


@pytest.mark.parametrize("ranks", [True, False], ids=["of the job", "the fewest"])
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_recipe_passes_the_dry_run(
    path: Path, ranks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where its data and its model are, also as `mcpo submit` does. Its servers, if it has any, are not there."""
    config, folder = load(path), tmp_path / "model"
    original = ROOT / config.model.path
    shutil.copytree(original, folder)
    save_empty_weights(folder, from_folder(original, with_weights=False))
    save_chat_tokenizer(folder)
    monkeypatch.chdir(tmp_path)
    Path("datasets").mkdir()
    for source in (source for domain in config.domain for source in domain.sources):
        for name in (source.file, source.held_out_file):
            if name:
                write_rows(Path(name))
    run = [str(path), "--model.path", str(folder)]
    nodes = ranks_of(path) // GPUS_A_NODE
    if ranks:
        code = submit.check(submit.parse([f"-N{nodes}", f"--gpus-per-node={GPUS_A_NODE}", "--", *run], script=""))
    else:
        code = train.main([*run, "--dry-run"])
    (folder / "model.safetensors").unlink()
    printed = capsys.readouterr()
    if config.engine.servers:
        assert code == 2 and printed.err.count("no answer to GET /health") == len(config.engine.servers)
        assert len(printed.err.strip().splitlines()) == len(config.engine.servers), printed.err
        return
    assert code == 0, printed.err
    assert not ranks or f"layout   {gpus_of(path)} rank(s)" in printed.err


def test_ranks_are_told_to_a_dry_run_only(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        train.main([str(RECIPES[0]), "--ranks", "32"])
    assert "--ranks: needs --dry-run" in capsys.readouterr().err


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_replica_holds_every_weight_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of all ranks of a replica, built without memory: their shards tile each Hugging Face tensor, no gap.

    With one layer of each chunk, and one more where the recipe has one more.
    """
    monkeypatch.chdir(ROOT)
    config = load(path)
    whole, recipe = from_folder(Path(config.model.path), with_weights=False), config.layout(ranks_of(path))
    layers = recipe.chunk_layers(whole.num_layers)
    few = tuple(1 + number - min(layers) for number in layers)
    model, layout = replace(whole, num_layers=sum(few)), replace(recipe, layers_per_stage=few)
    covered: dict[str, Counter[Piece]] = defaultdict(Counter)
    num_ranks, stage_ranks = max(layout.tensor, layout.expert), layout.world_size // layout.pipeline
    for stage in range(layout.pipeline):
        for rank in range(num_ranks):
            for name, piece in held(model, layout, head_of(config, model), stage * stage_ranks + rank):
                covered[name][piece] += 1
    shapes = hf_shapes(model)
    assert covered.keys() == shapes.keys()
    for name, pieces in covered.items():
        dims = {dim for dim, _, _ in pieces}
        ends = [0, *(stop for _, _, stop in sorted(pieces))]
        assert ends[:-1] == [start for _, start, _ in sorted(pieces)], f"{name}: a gap or an overlap"
        assert [ends[-1]] == [shapes[name][dim] for dim in dims], f"{name}: ends too early"
        # A rank in num_ranks has a piece of a divided tensor, all of them have all of a replicated one.
        (copies,) = set(pieces.values())
        divided = layout.expert if ".experts." in name else layout.tensor
        assert copies == num_ranks // (divided if ".experts." in name or len(pieces) > 1 else 1), name


Piece = tuple[int, int, int]
"""The dimension that is cut, and the range along it."""


def held(model: ModelConfig, layout: Layout, head: HeadSpec | None, rank: int) -> Iterator[tuple[str, Piece]]:
    """Yield what a rank has of each Hugging Face tensor, read from the model that Megatron-Core builds for it."""
    with parallel.pretend(layout, rank=rank) as groups, only_shapes():
        chunks = build_chunks(model, groups, dtype=DTYPES["bf16"], head=head)
        for parameter, mine in match_parameters(chunks, model, groups):
            if mine is None or parameter.mapping.tied:
                continue
            row, ranks = parameter.mapping, parameter.mapping.num_shards(layout)
            number = 0 if ranks == 1 else groups.tensor_rank
            for piece in shard_slices(row, rank=number, num_ranks=ranks):
                yield parameter.hugging_face[piece.tensor], (cut_dim(row), piece.start, piece.stop)
