"""The table of verifiers: for each kind what a worker calls, which keys it takes, and what it needs of an item.

To add a verifier: write its function, add a row to VERIFIERS, add its name and keys to `VerifierKind` and
`VerifierConfig` (config/domain_schema.py). Imports no torch, and of the verifiers only the standard library's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_mcpo.config.domain_schema import RewardsConfig, VerifierConfig
from megatron_mcpo.rewards import answers, voting
from megatron_mcpo.rewards.answers import Entry
from megatron_mcpo.rewards.sandbox.levels import available_level
from megatron_mcpo.rewards.thoughts import final_answer

FULL_MARKS = 0.99
"""reasoning-gym's scorers give 0.01 to 0.05 for nonsense, and a share of the marks for any long text that happens to
contain the answer. Either would teach rambling: less than this is 0, anything else 1."""

OWN_SHARE = 0.9
"""Share of rewards.timeout that a verifier which ends by itself may take, so that its worker need not be killed."""

_HERE = "megatron_mcpo.rewards"


def _accept(entry: Entry) -> None:
    """Accept every item."""


@dataclass(frozen=True, kw_only=True)
class Verifier:
    """What one `kind` of [[domain.verifiers]] means.

    function: "module:name" that a worker calls as name(entry, response, **options); None: the kind needs no worker
        (length), or the configuration names the function (function)
    keys: keys of VerifierConfig that belong to this kind alone; the `required` ones have no usable default
    judges: says whether the response is correct, not merely how it is written
    whole_response: gets thoughts and tags too; the other kinds get what thoughts.final_answer leaves
    of_rows: a row may name the kind, because it needs no key that a row does not have
    needs_answer: an item without an answer cannot be scored
    check_item: raises ValueError for an item that this kind cannot score, as far as that is cheap to know
    stated: returns the answer that a response states, for a majority vote; None: this kind extracts none
    ends_itself: takes the option `seconds` and raises TimeoutError when they are over
    full_marks: a score below FULL_MARKS counts as 0
    """

    function: str | None
    keys: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    judges: bool = True
    whole_response: bool = False
    of_rows: bool = False
    needs_answer: bool = False
    check_item: Callable[[Entry], object] = _accept
    stated: Callable[[str], str] | None = None
    ends_itself: bool = False
    full_marks: bool = False


VERIFIERS: dict[str, Verifier] = {
    "reasoning_gym": Verifier(
        function=f"{_HERE}.reasoning_gym:score", of_rows=True, needs_answer=True, full_marks=True
    ),
    "math": Verifier(
        function=f"{_HERE}.math_answer:score",
        of_rows=True,
        needs_answer=True,
        check_item=answers.check_expression,
        stated=voting.stated_expression,
    ),
    "choice": Verifier(
        function=f"{_HERE}.answers:choice",
        of_rows=True,
        needs_answer=True,
        check_item=answers.correct_letter,
        stated=voting.stated_choice,
    ),
    "exact": Verifier(
        function=f"{_HERE}.answers:exact", of_rows=True, needs_answer=True, stated=voting.stated_characters
    ),
    "text": Verifier(
        function=f"{_HERE}.answers:text",
        of_rows=True,
        needs_answer=True,
        check_item=answers.correct_words,
        stated=voting.stated_words,
    ),
    "numeric": Verifier(
        function=f"{_HERE}.answers:numeric",
        keys=("tolerance",),
        of_rows=True,
        needs_answer=True,
        check_item=answers.correct_number,
        stated=voting.stated_number,
    ),
    "code": Verifier(function=f"{_HERE}.code:score", keys=("compare",), of_rows=True, ends_itself=True),
    "format": Verifier(
        function=f"{_HERE}.answers:response_format",
        keys=("pattern",),
        required=("pattern",),
        judges=False,
        whole_response=True,
    ),
    "length": Verifier(function=None, keys=("buffer_tokens",), required=("buffer_tokens",), judges=False),
    "judge": Verifier(
        function=f"{_HERE}.judge:score",
        keys=("url", "model", "prompt", "api_key_file", "retries"),
        required=("url", "model", "prompt"),
        ends_itself=True,
    ),
    "function": Verifier(function=None, keys=("function",), required=("function",), whole_response=True),
}

ROW_VERIFIERS = tuple(name for name, verifier in VERIFIERS.items() if verifier.of_rows)
"""The kinds that a row may name."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One verifier as the workers run it: function(entry, response, **options)."""

    name: str
    function: str
    options: dict[str, Any]
    weight: float
    judges: bool
    full_marks: bool
    """Whether a score below FULL_MARKS counts as 0."""
    whole_response: bool

    def seen(self, response: str) -> str:
        """Return the part of a response that the verifier gets; where it is "" the score is 0, and nothing is run."""
        return response if self.whole_response else final_answer(response)

    def marks(self, score: float) -> float:
        """Return what a verifier's score counts."""
        return float(score >= FULL_MARKS) if self.full_marks else score


def check_of(settings: VerifierConfig, rewards: RewardsConfig) -> Check:
    """Return what a worker runs for a verifier; not for kind length, which needs no worker.

    Raises ValueError for code on a machine without the sandbox that rewards.sandbox asks for.
    """
    verifier = VERIFIERS[settings.kind]
    is_users_own = settings.kind == "function"
    function = settings.function if is_users_own else verifier.function
    assert function is not None, f"kind {settings.kind} has nothing to run"
    options = {} if is_users_own else {key: getattr(settings, key) for key in verifier.keys}
    if verifier.ends_itself:
        options["seconds"] = OWN_SHARE * rewards.timeout
    if settings.kind == "code":
        options["level"] = available_level(rewards.sandbox)
    return Check(
        name=settings.kind,
        function=function,
        options=options,
        weight=settings.weight,
        judges=verifier.judges,
        full_marks=verifier.full_marks,
        whole_response=verifier.whole_response,
    )


def stated_answer(kind: str, response: str) -> str:
    """Return the answer that a response states, as far as a kind of verifier looks: equal texts are one vote.

    "" where the response states none. For a kind that extracts no answer, all of the text without case and spacing.
    """
    verifier = VERIFIERS.get(kind)
    stated = verifier.stated if verifier else None
    said = final_answer(response)
    return stated(said) if stated else voting.folded(said)
