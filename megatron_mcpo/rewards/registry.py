"""The table of verifiers: what a worker calls for each kind, with which options. Imports no torch and no verifier."""

from dataclasses import dataclass
from typing import Any

from megatron_mcpo.config.domain_schema import RewardsConfig, VerifierConfig
from megatron_mcpo.rewards.sandbox.levels import available_level

FULL_MARKS = 0.99
"""reasoning-gym's scorers give 0.01 to 0.05 for nonsense, and a share of the marks for any long text that happens to
contain the answer. Either would teach rambling: less than this is 0, anything else 1."""

OWN_SHARE = 0.9
"""Of rewards.timeout: what a verifier may take that ends in time by itself, so that its worker need not be killed."""

_HERE = "megatron_mcpo.rewards"


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What a kind of VerifierConfig means.

    function: "module:name" that a worker calls as name(entry, answer, **options); None: needs no worker (length), or
        the configuration names it (function)
    keys: of VerifierConfig that belong to this kind alone; `required` ones have no default that could be meant
    judges: says whether the answer is right, not merely how it is written
    of_rows: a row may name it, because it needs no key that a row does not have
    """

    function: str | None
    keys: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    judges: bool = True
    of_rows: bool = False


KINDS: dict[str, Kind] = {
    "reasoning_gym": Kind(function=f"{_HERE}.reasoning_gym:score", of_rows=True),
    "math": Kind(function=f"{_HERE}.math_answer:score", of_rows=True),
    "choice": Kind(function=f"{_HERE}.answers:choice", of_rows=True),
    "exact": Kind(function=f"{_HERE}.answers:exact", of_rows=True),
    "text": Kind(function=f"{_HERE}.answers:text", of_rows=True),
    "numeric": Kind(function=f"{_HERE}.answers:numeric", keys=("tolerance",), of_rows=True),
    "code": Kind(function=f"{_HERE}.code:score", of_rows=True),
    "format": Kind(function=f"{_HERE}.answers:response_format", keys=("pattern",), required=("pattern",), judges=False),
    "length": Kind(function=None, keys=("buffer_tokens",), required=("buffer_tokens",), judges=False),
    "judge": Kind(
        function=f"{_HERE}.judge:score",
        keys=("url", "model", "prompt", "api_key_file", "retries"),
        required=("url", "model", "prompt"),
    ),
    "function": Kind(function=None, keys=("function",), required=("function",)),
}


@dataclass(frozen=True, kw_only=True)
class Check:
    """One verifier as the workers run it: function(entry, answer, **options)."""

    name: str
    function: str
    options: dict[str, Any]
    weight: float
    judges: bool
    full_marks: bool
    """Whether less than FULL_MARKS is 0."""


def check_of(verifier: VerifierConfig, rewards: RewardsConfig) -> Check:
    """What a worker is told of a verifier; not for kind length, which needs no worker.

    Raises ValueError for code on a machine without the sandbox that rewards.sandbox asks for.
    """
    kind = KINDS[verifier.kind]
    function = verifier.function if verifier.kind == "function" else kind.function
    assert function is not None, f"kind {verifier.kind} has nothing to run"
    options = {} if verifier.kind == "function" else {key: getattr(verifier, key) for key in kind.keys}
    if verifier.kind in ("judge", "code"):
        options["seconds"] = OWN_SHARE * rewards.timeout
    if verifier.kind == "code":
        options["level"] = available_level(rewards.sandbox)
    return Check(
        name=verifier.kind,
        function=function,
        options=options,
        weight=verifier.weight,
        judges=kind.judges,
        full_marks=verifier.kind == "reasoning_gym",
    )
