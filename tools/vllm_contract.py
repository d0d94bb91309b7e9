"""Write down what several versions of vLLM have of what this project uses, so that a test needs none of them.

`python -m tools.vllm_contract [VERSION ...] [--wheels FOLDER]`
Downloads the wheel of each version with pip (300 MB each), parses its Python files without importing them, and writes
tests/data/vllm_contract.json. tests/unit/test_vllm_contract.py compares the package with that file. Run this again for
a new version, or when the test says that something is not in the file.
"""

import argparse
import ast
import functools
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CONTRACT = ROOT / "tests" / "data" / "vllm_contract.json"
VERSIONS = ("0.26.0", "0.28.0", "0.30.0")
"""The oldest that works in the trainer's process (it needs torch 2.11), the oldest server, and the locked one."""

READS: dict[str, tuple[str, ...]] = {
    "config/vllm.py": ("model_config", "parallel_config"),
    "config/model.py": ("model", "dtype", "quantization", "max_model_len", "logprobs_mode"),
    "config/parallel.py": ("rank", "world_size", "world_size_across_dp", "tensor_parallel_size"),
    "v1/worker/gpu_worker.py": ("weight_transfer_engine", "init_weight_transfer_engine", "update_weights"),
    "v1/engine/llm_engine.py": ("step", "reset_prefix_cache"),
    "entrypoints/llm.py": ("llm_engine",),
    "outputs.py": ("outputs", "token_ids", "logprobs", "finish_reason"),
    "logprobs.py": ("logprob",),
    "version.py": ("__version_tuple__",),
    "entrypoints/openai/api_server.py": ("run_server",),
    "model_executor/layers/linear.py": (
        "LinearBase", "ColumnParallelLinear", "RowParallelLinear", "QKVParallelLinear", "UnquantizedLinearMethod",
        "tp_rank", "output_partition_sizes", "input_size_per_partition", "num_kv_head_replicas", "params_dtype",
    ),
    "model_executor/layers/vocab_parallel_embedding.py": (
        "UnquantizedEmbeddingMethod", "ParallelLMHead", "shard_indices", "org_vocab_start_index", "org_vocab_end_index",
        "embedding", "apply",
    ),
    "model_executor/layers/fused_moe/unquantized_fused_moe_method.py": (
        "UnquantizedFusedMoEMethod", "unquantized_backend",
    ),
    "model_executor/layers/fused_moe/oracle/unquantized.py": ("TRITON", "BATCHED_TRITON"),
    "model_executor/layers/quantization/fp8.py": ("fp8_backend", "orig_dtype", "weight_scale_inv"),
    "model_executor/models/qwen3_moe.py": ("packed_modules_mapping",),
}  # fmt: skip
"""Names that rollout/ reads from objects of vLLM, by the file of vLLM that defines or sets them."""

CLASSES = {
    "engine/arg_utils.py": ("EngineArgs",),
    "sampling_params.py": ("SamplingParams",),
    "entrypoints/scale_out/token_in_token_out/protocol.py": (
        "GenerateRequest",
        "GenerateResponse",
        "GenerateResponseChoice",
    ),
}
"""Classes whose fields are passed or read by name, by their file."""

METHODS = {
    "entrypoints/llm.py": "LLM",
    "distributed/weight_transfer/base.py": "WeightTransferEngine",
    "distributed/weight_transfer/factory.py": "WeightTransferEngineFactory",
}
"""Classes whose methods are called or implemented, by their file."""


def contract(vllm: Traversable) -> dict[str, Any]:
    """Return what a version has, from the folder `vllm` of an installed package or of a wheel."""
    flags_file = next(path for path in ("launchers", "openai") if _tree(vllm, f"entrypoints/{path}/cli_args.py"))
    frontend = _tree(vllm, f"entrypoints/{flags_file}/cli_args.py")
    assert frontend is not None
    of_frontend = [*_fields(frontend, "BaseFrontendArgs"), *_fields(frontend, "FrontendArgs")]
    engine_flags = [text for text in _strings(_require(vllm, "engine/arg_utils.py")) if text.startswith("--")]
    return {
        "fields": {
            name: sorted(_fields(_require(vllm, path), name)) for path, names in CLASSES.items() for name in names
        },
        "flags": sorted({*engine_flags, *(f"--{name.replace('_', '-')}" for name in of_frontend)}),
        "methods": {name: _methods(_require(vllm, path), name) for path, name in METHODS.items()},
        "abstract": _abstract(_require(vllm, "distributed/weight_transfer/base.py"), "WeightTransferEngine"),
        "routes": {name: keys for name, keys in sorted(_routes(vllm / "entrypoints")) if name.split()[1] in paths()},
        "values": {
            "logprobs_mode": _values(_require(vllm, "config/model.py"), "LogprobsMode"),
            "quantization": _values(
                _require(vllm, "model_executor/layers/quantization/__init__.py"), "QuantizationMethods"
            ),
        },
        "environment": sorted(variables() & set(_strings(_require(vllm, "envs.py")))),
        "imports": {
            module: sorted(names & _defined(_module(vllm, module))) for module, names in sorted(imports().items())
        },
        "reads": {
            path: sorted(set(names) & _defined(_tree(vllm, path)), key=names.index) for path, names in READS.items()
        },
    }


@functools.cache
def imports() -> dict[str, set[str]]:
    """Return the names that the package imports from modules of vLLM."""
    found: dict[str, set[str]] = {}
    for node in _own_nodes("rollout"):
        if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith("vllm."):
            found.setdefault(str(node.module), set()).update(alias.name for alias in node.names)
    return found


@functools.cache
def paths() -> set[str]:
    """Return the paths that the package asks servers for, without what follows a question mark."""
    said = {str(node.value) for node in _own_nodes("rollout") if isinstance(node, ast.Constant)}
    return {text.partition("?")[0] for text in said if re.fullmatch(r"/[a-z0-9_/]+(\?.*)?", text)} - {"/dev/shm"}


@functools.cache
def variables() -> set[str]:
    """Return the environment variables of vLLM that the package sets."""
    said = {
        str(node.value) for unit in ("rollout", "cli") for node in _own_nodes(unit) if isinstance(node, ast.Constant)
    }
    return {text for text in said if re.fullmatch(r"VLLM_[A-Z0-9_]+", text)}


def _own_nodes(unit: str) -> Iterator[ast.AST]:
    for path in sorted((ROOT / "megatron_mcpo" / unit).glob("*.py")):
        yield from ast.walk(ast.parse(path.read_text(encoding="utf-8")))


def _tree(folder: Traversable, path: str) -> ast.Module | None:
    file = folder.joinpath(*path.split("/"))
    return ast.parse(file.read_text(encoding="utf-8")) if file.is_file() else None


def _require(folder: Traversable, path: str) -> ast.Module:
    tree = _tree(folder, path)
    if tree is None:
        raise FileNotFoundError(f"vllm/{path}: this version has moved it; correct tools/vllm_contract.py")
    return tree


def _module(vllm: Traversable, module: str) -> ast.Module | None:
    path = "/".join(module.split(".")[1:])
    return _tree(vllm, f"{path}.py") or _tree(vllm, f"{path}/__init__.py".lstrip("/"))


def _class(tree: ast.Module, name: str) -> ast.ClassDef:
    return next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)


def _fields(tree: ast.Module, name: str) -> list[str]:
    body = _class(tree, name).body
    return [node.target.id for node in body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)]


def _functions(node: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    yield from (child for child in ast.walk(node) if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))


def _parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """Return the names of parameters, with their stars; without self."""
    given = function.args
    names = [each.arg for each in (*given.posonlyargs, *given.args)]
    names += [f"*{given.vararg.arg}"] if given.vararg else []
    names += [each.arg for each in given.kwonlyargs]
    names += [f"**{given.kwarg.arg}"] if given.kwarg else []
    return [name for name in names if name not in ("self", "cls")]


def _methods(tree: ast.Module, name: str) -> dict[str, list[str]]:
    """Return the parameters of a class's own methods; of overloads the last, which is the real one."""
    own = [node for node in _class(tree, name).body if isinstance(node, ast.FunctionDef)]
    return {each.name: _parameters(each) for each in own if not each.name.startswith("_") or each.name == "__init__"}


def _abstract(tree: ast.Module, name: str) -> list[str]:
    own = [node for node in _class(tree, name).body if isinstance(node, ast.FunctionDef)]
    return sorted(each.name for each in own if "abstractmethod" in map(ast.unparse, each.decorator_list))


def _strings(node: ast.AST) -> Iterator[str]:
    yield from (
        child.value for child in ast.walk(node) if isinstance(child, ast.Constant) and isinstance(child.value, str)
    )


def _values(tree: ast.Module, name: str) -> list[str]:
    """Return the strings of `NAME = Literal[...]`."""
    (assigned,) = (node for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name)
    return sorted(_strings(assigned.value))


def _files(folder: Traversable) -> Iterator[Traversable]:
    for each in folder.iterdir():
        if each.is_dir():
            yield from _files(each)
        elif each.name.endswith(".py"):
            yield each


def _routes(folder: Traversable) -> Iterator[tuple[str, list[str]]]:
    """Yield `VERB /path` of every function that answers it, with the names that occur in it: parameters and keys."""
    for file in _files(folder):
        for function in _functions(ast.parse(file.read_text(encoding="utf-8"))):
            names = {*_parameters(function), *filter(str.isidentifier, _strings(function))}
            yield from ((route, sorted(names)) for route in map(_route, function.decorator_list) if route)


def _route(decorator: ast.expr) -> str | None:
    """Return what `@router.post("/path")` and its like say; None for another decorator."""
    match decorator:
        case ast.Call(func=ast.Attribute(attr="get" | "post" as verb), args=[ast.Constant(value=str(path)), *_]):
            return f"{verb.upper()} {path}"
    return None


def _defined(tree: ast.Module | None) -> set[str]:
    """Return every name that a file defines, imports, annotates or sets as an attribute; empty without a file."""
    found: set[str] = set()
    for node in ast.walk(tree) if tree is not None else ():
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            found |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign):
            found |= set(_targets(node.targets))
        elif isinstance(node, ast.AnnAssign):
            found |= set(_targets([node.target]))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("register_parameter"):
            found |= set(_strings(node))
    return found


def _targets(nodes: Iterable[ast.expr]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Tuple):
            yield from _targets(node.elts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="*", default=VERSIONS, metavar="VERSION")
    parser.add_argument("--wheels", type=Path, default=ROOT / ".cache" / "wheels", help="folder of the wheels")
    known = parser.parse_args()
    found = {}
    for version in known.versions:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        subprocess.run([*pip, "--dest", str(known.wheels), f"vllm=={version}"], check=True)
        (wheel,) = known.wheels.glob(f"vllm-{version}-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            found[version] = contract(zipfile.Path(archive, "vllm/"))
    # One list a line: a difference between versions is then a line of a diff.
    CONTRACT.write_text(_as_text(found), encoding="utf-8")
    print(f"wrote {CONTRACT.relative_to(ROOT)}: {', '.join(found)}")
    return 0


def _as_text(value: Any, indent: int = 0) -> str:
    """Return JSON in which objects are indented and a list is one line."""
    if not isinstance(value, dict):
        return json.dumps(value)
    inner = " " * (indent + 1)
    lines = [f"{inner}{json.dumps(key)}: {_as_text(each, indent + 1)}" for key, each in value.items()]
    return "{\n" + ",\n".join(lines) + "\n" + " " * indent + "}" + ("\n" if indent == 0 else "")


if __name__ == "__main__":
    sys.exit(main())
