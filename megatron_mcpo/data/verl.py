"""Rewrite rows of verl in our schema (data/rows.py).

Columns of verl: data_source, prompt (chat messages), ability, reward_model.ground_truth, extra_info. `ability` is not
used: data sets of multiple choice call it "math" too.
"""

import json
from collections.abc import Collection, Mapping
from typing import Any

from megatron_mcpo.data.plain_json import parsed, plain_object
from megatron_mcpo.data.rows import RowError

COLUMNS = ("data_source", "prompt", "reward_model", "extra_info")

# By the last part of data_source, in small letters, with _ for -. The code sets' ground truth are unit tests.
_DATA_SETS: dict[str, tuple[str, ...]] = {
    "math": (
        "gsm8k", "math", "math_lighteval", "math_500", "math500", "math_dapo", "math_dapo_reasoning", "dapo_math_17k",
        "numina_aops_forum", "numina_synthetic_math", "numina_amc_aime", "numina_synthetic_amc", "numina_cn_k12",
        "numina_olympiads", "deepscaler", "svamp", "asdiv", "aime_2024", "aime_2025", "aime24", "aime25", "amc23",
        "minerva_math", "olympiadbench", "aime", "amc", "minerva", "olympiad_bench", "deepmath_103k",
        "deepscaler_preview_dataset", "openr1_math_220k", "numinamath_cot", "orz_math", "big_math",
    ),
    "choice": (
        "commonsense_qa", "commonsenseqa", "arc", "ai2_arc", "arc_easy", "arc_challenge", "openbookqa", "sciq", "mmlu",
        "mmlu_pro", "gpqa", "gpqa_diamond", "medqa", "medmcqa", "logiqa", "race", "hellaswag", "piqa", "winogrande",
    ),
    "code": ("codecontests", "apps", "codeforces", "taco", "mbpp", "humaneval", "livecodebench", "kodcode"),
}  # fmt: skip

_VERIFIER_OF = {name: verifier for verifier, names in _DATA_SETS.items() for name in names}


def is_verl(columns: Collection[str]) -> bool:
    """Tell whether a row with these columns is verl's."""
    return "reward_model" in columns


def from_verl(row: Mapping[str, Any], verifiers: Collection[str]) -> dict[str, Any]:
    """Return the row in our schema; its metadata is extra_info with data_source. Raises RowError.

    verifiers: the domain's.
    """
    model, data_source, extra = row.get("reward_model"), row.get("data_source"), row.get("extra_info")
    model = parsed(model) if isinstance(model, str) else model
    if not isinstance(model, Mapping):
        raise RowError("malformed", "reward_model must be an object with ground_truth")
    truth, verifier = model.get("ground_truth"), _verifier(data_source)
    ours: dict[str, Any] = {"prompt": row.get("prompt"), "verifier": verifier}
    ours["metadata"] = {**({} if extra is None else plain_object(extra, "extra_info")), "data_source": data_source}
    if verifier == "code" or "code" in verifiers:
        return ours | _unit_tests(truth)
    return ours | {"answer": truth[0] if isinstance(truth, list) and len(truth) == 1 else truth}


def _verifier(data_source: Any) -> str | None:
    if not isinstance(data_source, str):
        return None
    return _VERIFIER_OF.get(data_source.rpartition("/")[2].lower().replace("-", "_"))


def _unit_tests(truth: Any) -> dict[str, Any]:
    """Return the tests of verl's code sets: {"inputs": [...], "outputs": [...]}, with fn_name for a function."""
    try:
        cases = json.loads(truth) if isinstance(truth, str) else truth
    except (ValueError, RecursionError) as error:
        raise RowError("bad tests", f"its ground truth must be unit tests as JSON: {error}") from None
    inputs, outputs = (cases.get("inputs"), cases.get("outputs")) if isinstance(cases, Mapping) else (None, None)
    if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs) or not inputs:
        raise RowError("bad tests", "its ground truth must have inputs and outputs, as many of each")
    function = cases.get("fn_name")
    if function is None:
        pairs = zip(inputs, outputs, strict=True)
        return {"tests": [{"input": _lines(given), "output": _lines(wanted)} for given, wanted in pairs]}
    tests = [_call(function, *case) for case in zip(inputs, outputs, strict=True)]
    return {"tests": tests, "function": function}


def _lines(value: Any) -> Any:
    return "\n".join(map(str, value)) if isinstance(value, list) else value


def _call(function: str, arguments: Any, wanted: Any) -> dict[str, Any]:
    """Return the test of a call as APPS has it: a list of arguments, or one line of JSON each."""
    try:
        values = [json.loads(line) for line in arguments.splitlines()] if isinstance(arguments, str) else arguments
        result = json.loads(wanted) if isinstance(wanted, str) and isinstance(arguments, str) else wanted
    except (ValueError, RecursionError) as error:
        raise RowError("bad tests", f"the arguments of {function} must be JSON: {error}") from None
    if not isinstance(values, list):
        raise RowError("bad tests", f"the arguments of {function} must be a list")
    return {"arguments": values, "result": result}
