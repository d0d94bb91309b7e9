"""The planner: parameters against transformers and against what was published, the form of its answers, its advice.

Memory: test_planner_memory.py; bytes on the wire: test_planner_wire.py; the example recipes: test_recipes.py. Not
covered: whether the seconds are those of a GPU; nothing here has run on one.
"""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_mcpo.cli import plan as program
from megatron_mcpo.config.config import Config, ConfigError
from megatron_mcpo.config.hf_config import from_folder
from megatron_mcpo.config.layout import Layout
from megatron_mcpo.config.model import ModelConfig, layout_problems
from megatron_mcpo.mcore.head import HeadSpec
from megatron_mcpo.planner import hardware, plan_text, planning, search
from megatron_mcpo.planner.ranks import built_size, rank_size
from megatron_mcpo.weights.mapping import total_params
from tests.support import tiny_models
from tests.support.paths import ROOT

MODELS = ROOT / "examples" / "models"

# As the model pages on Hugging Face state them (safetensors metadata).
PUBLISHED = {
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "qwen2.5-32b": 32_763_876_352,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
}


def model_of(name: str) -> ModelConfig:
    return from_folder(MODELS / name, with_weights=False)


def config_for(name: str, **sections: dict[str, Any]) -> Config:
    defaults: dict[str, dict[str, Any]] = {
        "model": {"dtype": "bf16"},
        "batch": {"prompts": 64, "samples": 32, "micro_batch_tokens": 4096},
        "rollout": {"max_prompt_tokens": 512, "max_response_tokens": 3584},
    }
    merged = {key: defaults.get(key, {}) | sections.get(key, {}) for key in defaults.keys() | sections.keys()}
    return tiny_models.config(MODELS / name, **merged)


def test_every_model_has_a_published_size() -> None:
    assert {path.name for path in MODELS.iterdir()} == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_of_hugging_face(name: str) -> None:
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(MODELS / name))
    assert total_params(model_of(name)) == theirs.num_parameters() == PUBLISHED[name]


LAYOUTS = [
    ("qwen3-0.6b", Layout()),
    ("qwen3-1.7b", Layout(tensor=2, pipeline=4, data=2, sequence=True)),
    ("qwen3-4b", Layout(tensor=8, pipeline=1, sequence=True)),
    ("qwen3-8b", Layout(tensor=2, context=2, data=2, sequence=True)),
    ("qwen3-14b", Layout(tensor=8, pipeline=2, virtual_pipeline=2, sequence=True)),
    ("qwen3-32b", Layout(tensor=4, pipeline=4, data=2, sequence=True)),
    ("qwen3-30b-a3b", Layout(tensor=2, pipeline=2, expert=8, data=8, sequence=True)),
    ("qwen3-235b-a22b", Layout(tensor=4, pipeline=2, expert=16, data=16, sequence=True)),
    (
        "qwen3-235b-a22b",
        Layout(tensor=4, pipeline=4, expert=8, data=4, sequence=True, layers_per_stage=(23, 24, 24, 23)),
    ),
    ("qwen3-4b", Layout(pipeline=2, virtual_pipeline=2, layers_per_stage=(8, 10, 10, 8))),
    ("qwen2.5-32b", Layout(tensor=8, pipeline=4, data=2, sequence=True)),
    ("llama3-70b", Layout(tensor=8, pipeline=8, data=1, sequence=True)),
]


@pytest.mark.parametrize(("name", "layout"), LAYOUTS, ids=lambda value: str(value))
def test_a_rank_holds_what_megatron_builds(name: str, layout: Layout) -> None:
    model, head = model_of(name), HeadSpec(dim=512)
    assert not layout_problems(model, layout, 1)
    for stage in {0, layout.pipeline // 2, layout.pipeline - 1}:
        size = rank_size(model, layout, head, stage)
        assert built_size(model, layout, head, size) == size.params


@pytest.mark.parametrize("kind", ["tied", "untied", "experts"])
def test_ranks_of_a_stage_hold_equally_much(tmp_path: Path, kind: tiny_models.Kind) -> None:
    """Check that one rank of a stage stands for all, as the planner assumes, also where the vocabulary is padded."""
    tiny_models.save_model(tmp_path, kind)
    model = from_folder(tmp_path)
    layout = Layout(tensor=2, pipeline=2, data=2, expert=2 if kind == "experts" else 1, sequence=True)
    head = HeadSpec(dim=16, kind="mlp")
    for stage in range(2):
        size = rank_size(model, layout, head, stage)
        ranks = range(size.rank, size.rank + layout.world_size // 2)
        assert {built_size(model, layout, head, replace(size, rank=rank)) for rank in ranks} == {size.params}


def test_no_parameter_is_counted_twice_or_forgotten() -> None:
    """Qwen3-32B: all ranks of a replica together hold the model, and each norm once for every tensor rank."""
    model, layout = model_of("qwen3-32b"), Layout(tensor=4, pipeline=4, data=2, sequence=True)
    held = sum(rank_size(model, layout, None, stage).params for stage in range(4)) * 4
    norms = model.num_layers * (2 * model.hidden_size + 2 * model.head_dim) + model.hidden_size
    assert held == PUBLISHED["qwen3-32b"] + 3 * norms


def run_program(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = program.main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def write(path: Path, name: str, **parallel: int) -> str:
    lines = [
        "[run]\nsteps = 1",
        f'[model]\npath = "{MODELS / name}"',
        "[parallel]\n" + "\n".join(f"{key} = {value}" for key, value in parallel.items()),
        "[batch]\nprompts = 64\nsamples = 32\nmicro_batch_tokens = 4096",
        "[rollout]\nmax_prompt_tokens = 512\nmax_response_tokens = 3584",
        "[optimizer]\nlr = 1e-6",
        '[[domain]]\nname = "red"\n[[domain.sources]]\ngenerator = "chain_sum"',
    ]
    path.write_text("\n".join(lines))
    return str(path)


def test_json_has_the_names_that_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "a.toml", "qwen3-32b", tensor=4, pipeline=4)
    code, out, _ = run_program(
        file, "--gpu", "h100", "--nodes", "4", "--json", "--engine.tensor_parallel", "4", capsys=capsys
    )
    values = json.loads(out)
    assert (code, values["fits"], values["params_total"]) == (0, True, PUBLISHED["qwen3-32b"])
    assert [rank["rank"] for rank in values["ranks"]] == [0, 8, 16, 24]
    for rank in values["ranks"]:
        assert rank["params"] > 0 and 0 < rank["peak_gib"] < 80
        assert {"weights", "gradients", "optimizer", "reference", "activations", "kv_cache"} < rank["bytes"].keys()
    assert {"tensor", "pipeline", "data", "context", "expert", "sync", "contrastive"} == values["wire_bytes"].keys()
    assert {"rollout", "score", "update", "sync", "step"} == values["step_seconds"].keys()
    assert values["tokens_per_second_per_gpu"] > 0


def test_what_does_not_fit_ends_with_1_and_advice_that_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "a.toml", "qwen3-32b", tensor=4, pipeline=1)
    code, out, _ = run_program(file, "--nodes", "4", "--engine.tensor_parallel", "4", capsys=capsys)
    assert code == 1
    assert "more than a GPU has" in out
    overrides = advice(out)
    code, text, _ = run_program(file, "--nodes", "4", "--engine.tensor_parallel", "4", "--json", capsys=capsys)
    values = json.loads(text)
    remedy, remedies = values["remedy"], values["remedies"]
    assert code == 1 and remedy["fits"]
    assert [f"--{key}" for key in remedy["change"]] == [each for each in overrides if "." in each]
    assert remedies[0] == remedy and len(remedies) == 3 and all(each["fits"] for each in remedies)
    assert len({tuple(each["change"]) for each in remedies}) == 3, "each changes other keys"
    costs = re.findall(r"^  --.+  \(([\d,]+) s, ([\d.]+) GPU-hours, ([\d.]+) of 79.1 GiB\)$", out, re.MULTILINE)
    assert [int(seconds) for seconds, _, _ in costs] == [round(each["step_seconds"]["step"]) for each in remedies]
    for (_, hours, peak), each in zip(costs, remedies, strict=True):
        assert float(hours) == pytest.approx(each["step_seconds"]["step"] * each["world_size"] / 3600, abs=0.01)
        assert float(peak) == pytest.approx(max(rank["peak_gib"] for rank in each["ranks"]), abs=0.06)
    nodes = [] if "--nodes" in overrides else ["--nodes", "4"]
    code, out, _ = run_program(file, *nodes, "--engine.tensor_parallel", "4", *overrides, capsys=capsys)
    assert code == 0, out


def advice(out: str) -> list[str]:
    lines = out.splitlines()
    (number,) = [number for number, line in enumerate(lines) if line.startswith("changes that make it fit")]
    return lines[number + 1].strip().partition("  (")[0].split()


def test_a_remedy_is_left_out_if_a_part_of_it_suffices() -> None:
    """Qwen3-32B in one stage: both kinds of offload are needed together, one stage more suffices alone."""
    config = config_for("qwen3-32b", parallel={"tensor": 4}, engine={"tensor_parallel": 4})
    found = [set(change) for change, _ in search.remedies(config, model_of("qwen3-32b"), hardware.H100, 4)]
    assert {"optimizer.offload", "model.offload_reference"} in found and {"parallel.pipeline"} in found
    assert not any(one < other for one in found for other in found)


@pytest.mark.parametrize("settings", [[], ["--parallel.data", "1"]], ids=["data left out", "data set"])
def test_more_nodes_are_tried_with_other_layouts(capsys: pytest.CaptureFixture[str], settings: list[str]) -> None:
    """Llama-3-70B in two stages fits on no number of nodes, in more stages it does."""
    file = str(ROOT / "examples" / "llama3_70b" / "h100_64.toml")
    fixed = ["--model.path", str(MODELS / "llama3-70b")]
    code, out, _ = run_program(file, "--nodes", "2", "--parallel.pipeline", "2", *settings, *fixed, capsys=capsys)
    change = advice(out)
    assert code == 1 and change[0] == "--nodes" and "--parallel.pipeline" in change
    assert ("--parallel.data" in change) is (settings != [] and int(change[1]) > 4)
    code, out, _ = run_program(file, *settings, *fixed, *change, capsys=capsys)
    assert code == 0, out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nodes", "1", "--parallel.tensor", "3"], "needs a multiple of 3 ranks"),
        (["--nodes", "1", "--parallel.pipeline", "8"], "must divide the 28 layers"),
        (["--nodes", "1", "--parallel.tensr", "4"], "tensr"),
        (["--nodes", "0"], "--nodes 0: must be at least 1"),
        (["--nodes", "1", "--gpus-per-node", "0"], "--gpus-per-node 0: must be at least 1"),
        (["--nodes", "3", "--gpus-per-node", "4", "--parallel.tensor", "8"], "there are 12"),
        (["--nodes", "1", "--gpu", "h900"], "--gpu h900: no such GPU and no such file; use one of h100"),
        (["--nodes", "1", "--model.path", "/nowhere"], "no such folder"),
        (["--nodes", "1", "--engine.tensor_parallel", "3"], "engine.tensor_parallel = 3"),
        (
            ["--nodes", "1", "--rollout.max_response_tokens", "90000", "--batch.micro_batch_tokens", "99999"],
            "must be at most the model's max_position_embeddings",
        ),
    ],
)
def test_bad_configurations_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    file = write(tmp_path / "a.toml", "qwen3-0.6b")
    code, out, err = run_program(file, *arguments, capsys=capsys)
    assert (code, out) == (2, "")
    assert message in err


@pytest.mark.parametrize(
    ("memory_gib", "fits"), [(79.1, True), (0.1, False)], ids=["on an h100", "on a GPU without memory"]
)
def test_a_search_does_not_need_nodes_for_the_layout_of_the_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], memory_gib: float, fits: bool
) -> None:
    """A replica of 16 ranks on 2 GPUs: what fits there is listed, and that nothing does is exit code 1."""
    gpu = tmp_path / "gpu.json"
    gpu.write_text(json.dumps({"base": "H100", "memory_gib": memory_gib, "sources": ["made up"]}))
    parallel = ["--parallel.tensor", "4", "--parallel.pipeline", "4"]
    where = ["--nodes", "1", "--gpus-per-node", "2", "--gpu", str(gpu)]
    arguments = [write(tmp_path / "a.toml", "qwen3-0.6b"), *parallel, *where]
    code, out, err = run_program(*arguments, capsys=capsys)
    assert (code, out) == (2, "") and "needs a multiple of 16 ranks, there are 2" in err
    code, out, err = run_program(*arguments, "--search", capsys=capsys)
    assert (code, err) == (0 if fits else 1, "")
    assert "needs a multiple of 16 ranks, there are 2" in out
    assert ("as overrides: --parallel.tensor" in out, "no layout fits on these nodes" in out) == (fits, not fits)
    code, out, _ = run_program(*arguments, "--search", "--json", capsys=capsys)
    values = json.loads(out)
    assert code == (0 if fits else 1) and values["fits"] is False
    assert "needs a multiple of 16 ranks" in values["impossible"][0] and values["world_size"] == 2
    assert bool(values["search"]) is fits
    assert all(found["fits"] and found["world_size"] == 2 for found in values["search"])


def test_a_search_refuses_what_no_layout_can_cure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    longer = ["--rollout.max_response_tokens", "90000", "--batch.micro_batch_tokens", "99999"]
    file = write(tmp_path / "a.toml", "qwen3-0.6b")
    code, out, err = run_program(file, "--nodes", "1", "--parallel.tensor", "3", *longer, "--search", capsys=capsys)
    assert (code, out) == (2, "")
    assert "must be at most the model's max_position_embeddings" in err


@pytest.mark.parametrize("name", hardware.GPUS)
def test_a_gpu_may_be_named_in_capitals(name: str) -> None:
    assert hardware.load(name.upper()) is hardware.load(name) is hardware.GPUS[name]


def test_measured_rates_replace_those_of_the_table(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"base": "h100", "gemm_tflops": 340, "sources": ["measured here"]}))
    measured = hardware.load(str(file))
    assert (measured.name, measured.gemm_tflops, measured.copy_tbs) == ("mine", 340, hardware.H100.copy_tbs)
    # The other numbers are still the table's, and so is what is said of them.
    assert measured.sources[0] == "measured here"
    assert all(any(said.endswith(of) for said in measured.sources[1:]) for of in hardware.H100.sources)
    config, model = config_for("qwen3-0.6b"), model_of("qwen3-0.6b")
    slow, fast = (planning.plan(config, model, gpu, 1).seconds for gpu in (measured, hardware.H100))
    assert slow["update"] > 1.2 * fast["update"] and slow["sync"] == fast["sync"]
    for text in (
        '{"base": "h100"}',
        "[]",
        '{"base": "x", "sources": []}',
        '{"base": "h100", "sources": "measured here"}',
    ):
        file.write_text(text)
        with pytest.raises(ConfigError):
            hardware.load(str(file))


@pytest.mark.parametrize(
    ("number", "rule"),
    [
        ('"gemm": 1', "must be one of"),
        ('"copy_tbs": 0', "must be a positive, finite number"),
        ('"copy_tbs": NaN', "must be a positive, finite number"),
        ('"copy_tbs": Infinity', "must be a positive, finite number"),
        ('"busy": 50', "must be at most 1"),
        ('"decode_share": 1.1', "must be at most 1"),
        ('"per_node": 2.5', "must be a whole number"),
    ],
)
def test_a_number_that_its_key_can_not_have_is_refused(tmp_path: Path, number: str, rule: str) -> None:
    file = tmp_path / "mine.json"
    file.write_text(f'{{"base": "h100", "sources": [], {number}}}')
    with pytest.raises(ConfigError, match=rule):
        hardware.load(str(file))


def test_the_whole_table_has_sources() -> None:
    for gpu in hardware.GPUS.values():
        assert gpu.sources and gpu.memory_gib > 70


def slower(plan: planning.MemoryPlan) -> float:
    """Return what a plan's seconds are multiplied by when plans are ordered: 1.03 if less than 5 % is free."""
    return 1.03 if max(rank.peak for rank in plan.ranks) > 0.95 * plan.gpu.memory_bytes else 1.0


def test_search_prefers_headroom_at_a_few_per_cent_of_time() -> None:
    config, model = config_for("qwen3-0.6b", engine={"max_concurrent": 256}), model_of("qwen3-0.6b")
    found = search.fastest(config, model, replace(hardware.H100, memory_gib=22, per_node=4), 1)
    seconds = [round(each.seconds["step"] * slower(each), 1) for _, each in found]
    assert seconds == sorted(seconds)
    roomy = [search.has_headroom(each) for _, each in found]
    assert roomy == [slower(each) == 1 for _, each in found]
    fastest = min((each for _, each in found), key=lambda each: each.seconds["step"])
    assert roomy[0] and not search.has_headroom(fastest), "the fastest fills the GPU, and comes later"
    assert True in roomy[roomy.index(False) :], "a layout that is much faster still comes before one with headroom"
    assert "one that leaves less than 5% of a GPU's" in "\n".join(plan_text.search_lines(found))


def test_search_ranks_what_fits() -> None:
    config, model = config_for("qwen3-0.6b", engine={"max_concurrent": 256}), model_of("qwen3-0.6b")
    found = search.fastest(config, model, hardware.H100, 1)
    seconds = [round(each.seconds["step"] * slower(each), 1) for _, each in found]
    assert found and seconds == sorted(seconds) and all(each.fits for _, each in found)
    assert seconds[0] <= round(planning.plan(config, model, hardware.H100, 1).seconds["step"], 1)
    change, best = found[0]
    assert planning.plan(search.changed(config, change), model, hardware.H100, 1).seconds == best.seconds


def test_servers_leave_the_trainer_s_gpus_to_the_trainer() -> None:
    urls = [f"http://127.0.0.1:{8000 + number}" for number in range(3)]
    model, shape = model_of("qwen3-0.6b"), {"tensor_parallel": 4}
    config = config_for("qwen3-0.6b", engine=shape, batch={"prompts": 66})
    served = config_for("qwen3-0.6b", engine=shape | {"servers": urls}, batch={"prompts": 66})
    gpu = replace(hardware.H100, per_node=6)
    with pytest.raises(ConfigError, match="must divide the number of ranks"):
        planning.plan(config, model, gpu, 1)
    with pytest.raises(ConfigError, match=r"3 servers of 4 GPU\(s\) must leave some of 2 node\(s\) of 6"):
        planning.plan(served, model, gpu, 2)
    found, inside = planning.plan(served, model, gpu, 3), planning.plan(config, model, gpu, 2)
    assert (found.layout.world_size, found.num_gpus) == (6, 18)
    assert found.tokens_per_second_per_gpu * 18 * found.seconds["step"] == pytest.approx(66 * 32 * found.shape.length)
    for rank, with_engine in zip(found.ranks, inside.ranks, strict=True):
        assert rank.parts["engine_weights"] == rank.parts["kv_cache"] == 0 < with_engine.parts["engine_weights"]
        assert rank.phases["rollout"] < with_engine.phases["rollout"] - inside.engine.budget
    assert (found.engine.engines, inside.engine.engines) == (3, 3)
    assert found.seconds["rollout"] == inside.seconds["rollout"], "as many engines of the same kind"
    assert found.seconds["sync"] > inside.seconds["sync"]

    (missing,) = found.not_modelled
    assert "servers' GPUs" in missing and inside.not_modelled == []
    assert f"not modelled: {missing}" in plan_text.plan_lines(found)


def test_engines_ahead_of_the_trainer_hide_the_shorter_half_of_a_step() -> None:
    urls = [f"http://127.0.0.1:{8000 + number}" for number in range(2)]
    model, shape = model_of("qwen3-0.6b"), {"tensor_parallel": 4, "servers": urls}
    sync = planning.plan(config_for("qwen3-0.6b", engine=shape), model, hardware.H100, 2)
    wait = planning.plan(
        config_for("qwen3-0.6b", engine=shape | {"staleness": 1, "in_flight": "wait"}), model, hardware.H100, 2
    )
    keep = planning.plan(config_for("qwen3-0.6b", engine=shape | {"staleness": 1}), model, hardware.H100, 2)
    for found in (wait, keep):
        seconds = found.seconds
        learning = seconds["score"] + seconds["update"]
        assert seconds["step"] == max(seconds["rollout"], learning) + seconds["sync"] < sync.seconds["step"]
        assert learning == sync.seconds["score"] + sync.seconds["update"]
        assert max(found.busy.values()) == pytest.approx(1.0) and 0 < min(found.busy.values()) < 1
        assert "busy     trainer" in "\n".join(plan_text.plan_lines(found))
    assert keep.seconds["rollout"] > wait.seconds["rollout"], "interrupted responses are read again"
    assert sum(sync.busy.values()) == pytest.approx(1 + sync.seconds["sync"] / sync.seconds["step"])


def test_a_search_divides_the_gpus_between_servers_and_trainer() -> None:
    shape = {"tensor_parallel": 1, "servers": ["http://mine:1"], "staleness": 1}
    config, model = config_for("qwen3-0.6b", engine=shape), model_of("qwen3-0.6b")
    found = search.fastest(config, model, replace(hardware.H100, per_node=4), 1)
    assert {each.config.server_gpus for _, each in found} == {1, 2, 3}
    assert all(each.num_gpus == 4 for _, each in found)
    change, best = found[0]
    assert change["engine.servers"][0] == "http://mine:1" and best.seconds["step"] == min(
        each.seconds["step"] for _, each in found
    )
    assert f"servers {len(change['engine.servers'])}" in "\n".join(plan_text.search_lines(found))
    assert plan_text.describe(change).endswith(f"and {len(change['engine.servers'])} engine.servers")


def test_a_sync_pays_for_every_tensor_that_the_engine_loads() -> None:
    model = model_of("qwen3-30b-a3b")
    config = config_for("qwen3-30b-a3b", parallel={"expert": 8})
    tensors = 48 * (128 * 3 + 9) + 3  # experts; attention, its norms, the router and two norms; the ends
    slow = replace(hardware.H100, tensor_us=hardware.H100.tensor_us + 1000)
    usual, slower_load = (planning.plan(config, model, gpu, 1).seconds for gpu in (hardware.H100, slow))
    assert slower_load["sync"] - usual["sync"] == pytest.approx(tensors * 1e-3)


def test_gradients_are_reduced_behind_a_backward_pass_as_far_as_it_lasts() -> None:
    config, model = config_for("qwen3-0.6b"), model_of("qwen3-0.6b")
    rates = (400.0, 200.0, 1.0)  # GB/s; at the last one the reduction takes longer than a backward pass
    gpus = [replace(hardware.H100, per_node=2, nvlink_gbs=rate) for rate in rates]
    fast, slower, slowest = (planning.plan(config, model, gpu, 1).seconds["update"] for gpu in gpus)
    weights = total_params(model)  # in bytes: each rank gets half of them from the other, in bf16
    assert slower - fast == pytest.approx(weights * (1 / 200 - 1 / 400) / 1e9, rel=0.05)
    assert slowest - fast > 1.5 * weights * (1 / 1 - 1 / 400) / 1e9


@pytest.mark.parametrize(("name", "least", "most"), [("qwen3-32b", 0.5, 0.56), ("qwen3-30b-a3b", 0.5, 0.53)])
def test_a_quantised_engine_holds_a_byte_an_element_of_its_layers(name: str, least: float, most: float) -> None:
    ranks = 4
    sections: dict[str, dict[str, Any]] = {
        "engine": {"tensor_parallel": ranks},
        "algorithm": {"importance": "truncate"},
        "parallel": {"tensor": 4, "pipeline": 4},
    }
    plain = planning.plan(config_for(name, **sections), model_of(name), hardware.H100, 4)
    sections["engine"]["quantization"] = "fp8_per_block"
    found = planning.plan(config_for(name, **sections), model_of(name), hardware.H100, 4)
    assert least < found.engine.weights / plain.engine.weights < most
    model = model_of(name)
    kept = 2 * 2 * model.hidden_size * (-(-model.vocab_size // 64) * 64) / ranks
    matrices = plain.engine.weights - kept
    assert found.engine.weights == pytest.approx(kept + matrices / 2 * (1 + 4 / 128**2), rel=2e-3)
    assert found.engine.cache_tokens > plain.engine.cache_tokens
    assert found.seconds["rollout"] < plain.seconds["rollout"]
    assert any("engine.quantization" in text for text in found.not_modelled)


def test_what_is_not_modelled_is_said() -> None:
    config, model = config_for("qwen3-0.6b", model={"dtype": "bf16", "fp8": "blockwise"}), model_of("qwen3-0.6b")
    found = planning.plan(config, model, hardware.H100, 1)
    assert found.as_json()["not_modelled"] == ["model.fp8 = 'blockwise' (planned as bf16)"]
    assert "not modelled: model.fp8 = 'blockwise' (planned as bf16)" in plan_text.plan_lines(found)


def test_nothing_fits_a_model_that_is_too_large() -> None:
    config, model = config_for("qwen3-235b-a22b"), model_of("qwen3-235b-a22b")
    whole = planning.plan(config, model, hardware.H100, 1)
    assert not whole.fits and whole.as_json()["step_seconds"]["rollout"] is None
    assert whole.tokens_per_second_per_gpu == 0


# NeMo-RL's performance pages (v0.5, v0.6) of GRPO on 32 H100, 4,096 tokens at most, 64 x 32 rollouts a step: seconds a
# step and tokens/s/GPU. Their product is the number of tokens, so the mean length of a rollout.
PUBLIC_STEPS: list[tuple[str, dict[str, int], int, int, int, int]] = [
    ("qwen3-32b", {"tensor": 4, "pipeline": 4}, 4, 3354, 376, 571),
    ("qwen3-30b-a3b", {"expert": 8}, 2, 3306, 192, 1102),
]


@pytest.mark.parametrize(("name", "sizes", "engine", "length", "seconds", "tokens"), PUBLIC_STEPS)
def test_seconds_of_a_step_are_near_public_figures(
    name: str, sizes: dict[str, int], engine: int, length: int, seconds: int, tokens: int
) -> None:
    config = config_for(
        name,
        parallel=sizes,
        engine={"tensor_parallel": engine, "max_concurrent": 256},
        rollout={"max_prompt_tokens": 256, "max_response_tokens": length - 256},
    )
    found = planning.plan(config, model_of(name), hardware.H100, 4)
    assert 0.7 < found.seconds["step"] / seconds < 1.3, found.seconds
    assert 0.7 < found.tokens_per_second_per_gpu / tokens < 1.4
