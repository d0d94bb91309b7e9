"""Options of vLLM that a configuration passes on: what is refused, and that it is checked against what is installed."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_mcpo.config.config import load
from megatron_mcpo.rollout.vllm_fields import NOT_ON_CPU, REFUSED, installed_fields, option_problems
from megatron_mcpo.rollout.vllm_options import as_flags
from tests.support.paths import ROOT
from tests.unit.test_vllm_contract import CONTRACT, VERSIONS, in_process

QUICKSTART = ROOT / "examples" / "quickstart" / "config.toml"


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"scheduling_policy": "priority", "enforce_eager": True, "max_num_batched_tokens": 64}, None),
        ({"cudagraph_capture_sizes": [1, 2], "speculative_config": {"method": "ngram"}, "watermark": 0.1}, None),
        ({"watermark": 0}, None),
        ({"dtype": "float16"}, "engine.options.dtype: must be left out (set model.dtype). Remove it."),
        ({"hf_overrides": {}}, "must be left out (the engine must sample from the trainer's model)"),
        ({"enforce_eagr": True}, "engine.options.enforce_eagr: must be a field of EngineArgs of vllm"),
        ({"enforce_eagr": True}, "Did you mean enforce_eager?"),
        ({"enforce_eager": 1}, "engine.options.enforce_eager = 1: must be bool (EngineArgs of vllm"),
        ({"max_num_batched_tokens": True}, "engine.options.max_num_batched_tokens = true: must be int | None"),
        ({"max_num_batched_tokens": 8.0}, "must be int | None"),
        ({"_api_process_count": 2}, "must be a field of"),
    ],
)
def test_options_are_checked_against_the_installed_vllm(options: dict[str, Any], problem: str | None) -> None:
    found = option_problems(options, on_cpu=False)
    assert len(found) == (problem is not None)
    assert problem is None or problem in found[0]


@pytest.mark.parametrize("name", NOT_ON_CPU)
def test_what_ends_an_engine_on_a_cpu_is_refused_there(name: str) -> None:
    options = {name: True if name.startswith("enable") else {}}
    [problem] = option_problems(options, on_cpu=True)
    assert problem.startswith(f"engine.options.{name}: must be left out on a CPU (vLLM 0.30's")
    assert option_problems(options, on_cpu=False) == []


def test_what_the_package_sets_is_refused_but_for_what_a_user_may_change() -> None:
    replaceable = {"enable_prefix_caching", "disable_log_stats", "use_tqdm_on_load"}
    assert in_process() - REFUSED.keys() == replaceable
    assert REFUSED.keys() <= installed_fields().keys()
    assert installed_fields().keys() >= in_process() | replaceable


def test_fields_are_those_that_the_contract_of_the_newest_version_has() -> None:
    assert set(installed_fields()) <= set(CONTRACT[VERSIONS[-1]]["fields"]["EngineArgs"])


def test_options_come_from_a_file_or_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(
        f'extends = "{QUICKSTART}"\n[engine.options]\nwatermark = 0.1\nspeculative_config = {{ method = "x" }}\n'
    )
    options = load(file).engine.options
    assert options == {"watermark": 0.1, "speculative_config": {"method": "x"}}
    assert as_flags(options) == ["--watermark", "0.1", "--speculative-config", json.dumps({"method": "x"})]
    assert load(file, ["--engine.options", "{ block_size = 32 }"]).engine.options == {"block_size": 32}
