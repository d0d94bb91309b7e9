"""Conversion between Hugging Face folders and Megatron checkpoints: every family and layout, real files, real ranks.

Not covered here: models larger than memory (benchmarks/convert.py), checkpoints of Transformer Engine's modules,
GPUs.
"""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from megatron_mcpo.cli import convert_to_hf, convert_to_megatron
from megatron_mcpo.config.config import Config, ConfigError, dump
from megatron_mcpo.config.hf_config import from_folder
from megatron_mcpo.config.layout import Layout
from megatron_mcpo.config.model import layout_problems
from megatron_mcpo.convert import compare as comparing
from megatron_mcpo.convert import convert
from megatron_mcpo.convert.compare import compare
from megatron_mcpo.convert.compare_logits import TOLERANCE
from megatron_mcpo.convert.convert import hf_to_megatron, megatron_to_hf
from megatron_mcpo.data.batch import make_batch
from megatron_mcpo.distributed import parallel
from megatron_mcpo.mcore import checkpoint
from megatron_mcpo.mcore.head import HeadSpec
from megatron_mcpo.mcore.model import build_chunks, unwrap
from megatron_mcpo.mcore.policy import Policy
from megatron_mcpo.weights import safe_unpickler, torch_dist
from megatron_mcpo.weights.checkpoint_layout import MegatronFolder
from megatron_mcpo.weights.full_sync import export
from megatron_mcpo.weights.hf_io import HfFolder
from megatron_mcpo.weights.load import load_hf, load_source
from tests.support import tiny_models
from tests.support.conversion import FAMILIES, make_model, quiet, same, save_folder, sizes, tensors
from tests.support.paths import ROOT
from tests.support.ranks import run_ranks

EMBEDDED = ROOT / ".cache" / "models" / "smollm2-135m-instruct"
LAYOUTS = [
    {},
    {"tensor": 2},
    {"pipeline": 2},
    {"pipeline": 2, "virtual_pipeline": 2},
    {"pipeline": 3, "layers_per_stage": (1, 2, 1)},
    {"tensor": 4, "pipeline": 2},
    {"expert": 2},
    {"tensor": 2, "pipeline": 4, "expert": 4},
]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_every_bit_is_the_same(tmp_path: Path, family: str, dtype: str) -> None:
    source = make_model(tmp_path / "source", family, dtype)
    model, tried = from_folder(source), 0
    for number, changes in enumerate(LAYOUTS):
        layout = sizes(**changes)
        if layout_problems(model, layout, 1):
            continue
        megatron, back = tmp_path / f"megatron{number}", tmp_path / f"back{number}"
        hf_to_megatron(source, megatron, layout, verify_forward=False, say=quiet)
        megatron_to_hf(megatron, back, max_file_bytes=100_000, verify_forward=False, say=quiet)
        assert (back / "model.safetensors.index.json").is_file()
        assert same(tensors(source), tensors(back))
        for name in ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"):
            assert (source / name).read_bytes() == (back / name).read_bytes(), name
        tried += 1
    assert tried >= 4


def sharded(chunks: list[nn.Module]) -> dict[str, Any]:
    metadata = {"singleton_local_shards": False}
    return {f"model{n}": unwrap(chunk).sharded_state_dict(metadata=metadata) for n, chunk in enumerate(chunks)}


def load_with_megatron(source: Path, megatron: Path, layout: Layout) -> list[str]:
    """Names of exported tensors that are not those of `source`, after Megatron-Core itself loaded the folder."""
    groups = parallel.init(layout, seed=0, timeout_seconds=240)
    model = from_folder(source)
    chunks = build_chunks(model, groups, dtype=torch.bfloat16, head=None)
    for chunk in chunks:
        for parameter in chunk.parameters():
            nn.init.constant_(parameter, torch.nan)
    loaded = dist_checkpointing.load(sharded(chunks), str(megatron))
    for number, chunk in enumerate(chunks):
        unwrap(chunk).load_state_dict(loaded[f"model{number}"])
    expected = tensors(source)
    return [name for name, found in export(chunks, model, groups) if not torch.equal(found, expected[name])]


@pytest.mark.parametrize(
    ("family", "written", "read"),
    [
        ("llama", {"tensor": 4, "pipeline": 2}, Layout()),
        ("qwen3", {"pipeline": 2, "virtual_pipeline": 2}, Layout(tensor=2, sequence=True)),
        ("qwen3_moe", {"tensor": 2, "expert": 2}, Layout(pipeline=2, data=2, expert=2)),
        ("mixtral", {}, Layout(tensor=2, expert=2, sequence=True)),
    ],
)
def test_megatron_loads_what_was_converted(tmp_path: Path, family: str, written: dict[str, int], read: Layout) -> None:
    source = make_model(tmp_path / "source", family, "bfloat16")
    hf_to_megatron(source, tmp_path / "megatron", sizes(**written), verify_forward=False, say=quiet)
    assert run_ranks(read.world_size, load_with_megatron, source, tmp_path / "megatron", read) == [[]] * read.world_size


def start_from(folder: Path, layout: Layout) -> dict[str, Tensor]:
    """Return what ranks hold that start from a folder."""
    groups = parallel.init(layout, seed=0, timeout_seconds=240)
    model = from_folder(folder)
    chunks = build_chunks(model, groups, dtype=torch.bfloat16, head=None)
    load_hf(chunks, model, folder, groups)
    return {name: tensor.clone() for name, tensor in export(chunks, model, groups)}


@pytest.mark.parametrize("layout", [Layout(), Layout(tensor=2, pipeline=2)], ids=str)
def test_a_run_can_start_from_a_converted_folder(source: Path, tmp_path: Path, layout: Layout) -> None:
    hf_to_megatron(source, tmp_path / "megatron", sizes(tensor=2), verify_forward=False, say=quiet)
    started = run_ranks(layout.world_size, start_from, tmp_path / "megatron", layout)
    assert all(same(found, tensors(source)) for found in started)


def save_with_megatron(source: Path, folder: Path, layout: Layout) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """All tensors and the head's (where this rank has one) of a model of other weights, saved by real ranks."""
    groups = parallel.init(layout, seed=0, timeout_seconds=240)
    model = from_folder(source)
    spec = HeadSpec(dim=16, kind="mlp")
    chunks = build_chunks(model, groups, dtype=torch.bfloat16, head=spec)
    load_source(chunks, model, HfFolder(source, model), groups)
    if groups.rank == 0:
        folder.mkdir()
    torch.distributed.barrier()
    dist_checkpointing.save(sharded(chunks), str(folder))
    head = getattr(unwrap(chunks[-1]), "contrastive_head", None)
    names = dict(export(chunks, model, groups))
    return names, {} if head is None else {n: p.detach().clone() for n, p in head.named_parameters()}


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("llama", Layout(tensor=4, sequence=True)),
        ("qwen2", Layout(pipeline=2, virtual_pipeline=2)),
        ("qwen3", Layout(tensor=2, pipeline=2)),
        ("qwen3_moe", Layout(data=2, expert=2)),
        ("mixtral", Layout(tensor=2, expert=4, data=2, sequence=True)),
    ],
    ids=str,
)
def test_what_ranks_have_saved_is_exported_with_its_head(tmp_path: Path, family: str, layout: Layout) -> None:
    source, saved = make_model(tmp_path / "source", family, "bfloat16"), tmp_path / "saved"
    results = run_ranks(layout.world_size, save_with_megatron, source, saved, layout)
    megatron_to_hf(saved, tmp_path / "out", assets=source, verify_forward=False, say=quiet)
    assert same(tensors(tmp_path / "out"), results[0][0])
    head = next(head for _, head in results if head)
    assert same(load_file(tmp_path / "out" / "contrastive_head.safetensors"), head)
    hf_to_megatron(tmp_path / "out", tmp_path / "again", sizes(), verify_forward=False, say=quiet)
    assert same(MegatronFolder.open(tmp_path / "again", from_folder(source)).head(), head)


def train_and_save(config: Config, layout: Layout, folder: Path) -> dict[str, Tensor]:
    """Return the weights after an update, and save them with optimizer and schedule."""
    groups = parallel.init(layout, seed=0, timeout_seconds=240)
    policy = Policy(config, from_folder(Path(config.model.path)), groups)
    batch = make_batch(
        tiny_models.rollout_groups(num_prompts=4, num_samples=3, seed=0),
        num_data_ranks=layout.data,
        data_rank=groups.data_rank,
        share_prompts=policy.shares_prompts,
    )
    policy.update(batch, lambda x: (-x.logp_r.sum() / 100, {}))
    if groups.rank == 0:
        folder.mkdir(parents=True)
    torch.distributed.barrier()
    dist_checkpointing.save(checkpoint._sharded_state(policy, is_loading=False), str(folder))
    return {name: tensor.clone() for name, tensor in policy.weights()}


@pytest.mark.parametrize(
    ("kind", "layout"),
    [("tied", Layout(pipeline=2, data=2)), ("experts", Layout(tensor=2, expert=2, sequence=True))],
    ids=str,
)
def test_a_runs_checkpoint_is_exported_by_itself(tmp_path: Path, kind: Any, layout: Layout) -> None:
    """The run's config.toml leads to the model's configuration."""
    tiny_models.save_model(tmp_path / "model", kind)
    config = tiny_models.config(tmp_path / "model", run={"steps": 3}, model={"dtype": "bf16"})
    saved = tmp_path / "run" / "checkpoints" / "step_000001"
    results = run_ranks(layout.world_size, train_and_save, config, layout, saved)
    (tmp_path / "run" / "config.toml").write_text(dump(config))
    megatron_to_hf(saved, tmp_path / "out", verify_forward=False, say=quiet)
    assert same(tensors(tmp_path / "out"), results[0])
    said: list[str] = []
    megatron_to_hf(saved, tmp_path / "fp32", dtype=torch.float32, verify_forward=False, say=said.append)
    masters = tensors(tmp_path / "fp32")
    assert said[0] == "weights: those that the optimizer keeps in fp32"
    assert same({name: values.bfloat16() for name, values in masters.items()}, results[0])
    assert not same({name: values.float() for name, values in results[0].items()}, masters)
    assert load_file(tmp_path / "fp32" / "contrastive_head.safetensors")["weight"].dtype is torch.float32
    before = {name: values.bfloat16() for name, values in tensors(tmp_path / "model").items()}
    assert not same(tensors(tmp_path / "out"), before), "an update that changes nothing shows nothing"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "source", "qwen3", "bfloat16")


LOGITS = """
import sys
from pathlib import Path
import torch
from megatron_mcpo.config.hf_config import from_folder
from megatron_mcpo.convert.compare_logits import logits_error
from megatron_mcpo.weights.checkpoint_layout import MegatronFolder
megatron, source, folder = map(Path, sys.argv[1:])
model = from_folder(source)
print(logits_error(MegatronFolder.open(megatron, model), model, folder, torch.float32))
"""


def test_the_table_of_contents_is_gone_through_once(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not once for every chunk: a large model of experts has tens of thousands."""
    hf_to_megatron(source, tmp_path / "megatron", sizes(), verify_forward=False, say=quiet)
    turns: list[int] = []

    class Counted(list[Any]):
        def __iter__(self) -> Any:
            turns.append(len(self))
            return super().__iter__()

    def read(folder: Path) -> Any:
        metadata = safe_unpickler.read_metadata(folder)
        for described in metadata.state_dict_metadata.values():
            if hasattr(described, "chunks"):
                described.chunks = Counted(described.chunks)
        return metadata

    monkeypatch.setattr(torch_dist, "read_metadata", read)
    opened = torch_dist.ShardedFolder(tmp_path / "megatron")
    assert len(turns) == len(opened.shapes()) and max(turns) > 1


def test_wrong_logits_are_found(source: Path, tmp_path: Path) -> None:
    """Weights that are read under other settings than those they were made for."""
    megatron = tmp_path / "megatron"
    hf_to_megatron(source, megatron, sizes(), verify_forward=False, say=quiet)
    other = save_folder(source, tmp_path / "other", tensors(source))
    settings = json.loads((other / "config.json").read_text())
    settings["rope_parameters"]["rope_theta"] = 20000.0
    (other / "config.json").write_text(json.dumps(settings))

    def error(folder: Path) -> float:
        command = [sys.executable, "-c", LOGITS, megatron, source, folder]
        found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=540)
        return float(found.stdout)

    assert error(source) <= TOLERANCE
    assert error(other) > 100 * TOLERANCE


def test_a_wrong_bit_is_found_and_nothing_is_left(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bit that changes after it was written: the last of the biggest file."""
    published = convert.compare

    def damage_first(*args: Any, **options: Any) -> Any:
        file = max((tmp_path / ".out.partial").glob("__*.distcp"), key=lambda path: path.stat().st_size)
        data = bytearray(file.read_bytes())
        where = data.find(b"PK\x01\x02") // 2
        data[where] ^= 1
        file.write_bytes(data)
        return published(*args, **options)

    monkeypatch.setattr(convert, "compare", damage_first)
    monkeypatch.setattr(comparing, "SMALL_BYTES", 0)
    assert convert_to_megatron.main([str(source), str(tmp_path / "out")]) == 1
    assert "1 bits differ" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_two_exchanged_tensors_are_found_and_named(source: Path, tmp_path: Path) -> None:
    model, found = from_folder(source), tensors(source)
    a, b = (f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1))
    save_folder(source, tmp_path / "other", {**found, a: found[b], b: found[a]})
    compared = compare(HfFolder(source, model), HfFolder(tmp_path / "other", model))
    assert [line.split(":")[0] for line in compared.differing] == [a, b]
    assert compared.num_bits_different > 1000


def test_tensors_of_several_files_are_read_each_from_its_own(source: Path, tmp_path: Path) -> None:
    """Whole and in part, along both dimensions."""
    found = tensors(source)
    others = {name: values for name, values in found.items() if "layers.1" in name}
    folder = save_folder(source, tmp_path / "other", {})
    (folder / "model.safetensors").unlink()
    held = {"1.safetensors": {n: v for n, v in found.items() if n not in others}, "2.safetensors": others}
    for file, each in held.items():
        save_file(each, folder / file)
    weight_map = {name: file for file, each in held.items() for name in each}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    opened = HfFolder(folder, from_folder(folder))
    assert others and set(opened.names) <= set(found)
    for name in opened.names:
        assert torch.equal(opened.read(name), found[name]), name
        for dim in range(found[name].dim()):
            assert torch.equal(opened.read(name, 3, 11, dim=dim), found[name].narrow(dim, 3, 8)), name


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


def test_nothing_in_a_foreign_folder_is_run(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    megatron = tmp_path / "megatron"
    hf_to_megatron(source, megatron, sizes(), verify_forward=False, say=quiet)
    (megatron / "conversion.json").unlink()
    (megatron / "manifest.json").unlink()  # who can write a checkpoint can write one that fits
    contents, shard = (megatron / ".metadata").read_bytes(), megatron / "__0_0.distcp"
    monkeypatch.chdir(tmp_path)
    (megatron / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ConfigError, match="may run code"):
        megatron_to_hf(megatron, tmp_path / "out", say=quiet)
    (megatron / ".metadata").write_bytes(contents)
    size = shard.stat().st_size
    with shard.open("wb") as file:
        torch.save(Evil(), file)
        file.write(b"\0" * (size - file.tell()))
    with pytest.raises(ConfigError, match="can't be read"):
        megatron_to_hf(megatron, tmp_path / "out", say=quiet)
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("exists", "must not exist; give another folder, or delete it"),
        ("itself", "must lie outside of the source; give another folder"),
        ("inside", "must lie outside of the source; give another folder"),
        ("layout", "must divide the 2 key-value heads"),
        ("mixed", "must all be bfloat16 or all float32"),
        ("NaN", "model.safetensors: model.norm.weight: must be finite (it holds NaN)"),
        ("megatron", "it is a Megatron checkpoint, which `mcpo convert to-hf` converts"),
        ("full", "the disk has 1,000 free"),
        ("empty", "must hold a model: config.json, a tokenizer and safetensors (it holds nothing)"),
    ],
)
def test_what_cannot_be_converted_is_refused(
    source: Path, tmp_path: Path, case: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    given, final, more = source, tmp_path / "out", []
    if case == "exists":
        final.mkdir()
    elif case == "itself":
        final = source
    elif case == "inside":
        final = source / "out"
    elif case == "layout":
        more = ["--tp", "3"]
    elif case in ("mixed", "NaN"):
        found, norm = tensors(source), "model.norm.weight"
        found[norm] = found[norm].float() if case == "mixed" else found[norm] * torch.nan
        given = save_folder(source, tmp_path / "changed", found)
    elif case == "megatron":
        given = tmp_path / "megatron"
        hf_to_megatron(source, given, sizes(), verify_forward=False, say=quiet)
    elif case == "full":
        monkeypatch.setattr(shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    else:
        given = tmp_path / "empty"
        given.mkdir()
    before = sorted(tmp_path.iterdir())
    assert convert_to_megatron.main([str(given), str(final), *more]) == 2
    assert message in capsys.readouterr().err
    assert [path for path in sorted(tmp_path.iterdir()) if not path.name.startswith(".")] == before


def test_damaged_and_foreign_checkpoints_are_refused(source: Path, tmp_path: Path, capsys: Any) -> None:
    megatron = tmp_path / "megatron"
    hf_to_megatron(source, megatron, sizes(), verify_forward=False, say=quiet)
    other = make_model(tmp_path / "other", "llama", "bfloat16")
    assert convert_to_hf.main([str(megatron), str(tmp_path / "out"), "--hf", str(other)]) == 2
    assert "q_layernorm.weight: unknown, the llama model has no such tensor" in capsys.readouterr().err
    assert convert_to_hf.main([str(source), str(tmp_path / "out")]) == 2
    assert "must be a Megatron checkpoint (it has no .metadata)" in capsys.readouterr().err
    manifest, record = ((megatron / name).read_bytes() for name in ("manifest.json", "conversion.json"))
    (megatron / "manifest.json").unlink()
    assert convert_to_hf.main([str(megatron), str(tmp_path / "out")]) == 2
    assert "manifest.json is missing" in capsys.readouterr().err
    (megatron / "conversion.json").rename(megatron / "state.json")  # as in a run's checkpoint
    assert convert_to_hf.main([str(megatron), str(tmp_path / "out")]) == 2
    assert "manifest.json is missing" in capsys.readouterr().err
    (megatron / "state.json").unlink()  # now it is as one of unknown origin
    (megatron / "config.json").unlink()
    assert convert_to_hf.main([str(megatron), str(tmp_path / "out")]) == 2
    assert "give --hf FOLDER" in capsys.readouterr().err
    (megatron / "manifest.json").write_bytes(manifest)
    (megatron / "conversion.json").write_bytes(record)
    assert convert_to_hf.main([str(megatron), str(tmp_path / "out"), "--hf", str(source)]) == 2
    assert "config.json is missing" in capsys.readouterr().err
    (megatron / "conversion.json").unlink()
    (megatron / "manifest.json").unlink()
    os.truncate(megatron / "__0_0.distcp", 1000)
    assert convert_to_hf.main([str(megatron), str(tmp_path / "out"), "--hf", str(source)]) == 2
    assert "__0_0.distcp: has 1000 bytes, must have" in capsys.readouterr().err
    (megatron / "__0_0.distcp").unlink()
    assert convert_to_hf.main([str(megatron), str(tmp_path / "out"), "--hf", str(source)]) == 2
    assert "__0_0.distcp: missing" in capsys.readouterr().err
