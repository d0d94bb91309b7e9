"""The configuration's sections on data, rewards and evaluation: keys as in sections.py. Imports no torch."""

from typing import Annotated, Literal

from pydantic import Field, JsonValue

from megatron_mcpo.config.schema import (
    Fraction,
    Name,
    NonNegativeFloat,
    NonNegativeInt,
    PathText,
    PositiveFloat,
    PositiveInt,
    Section,
)

FunctionPath = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_.]*:[A-Za-z_][A-Za-z0-9_]*$")]
HttpUrl = Annotated[str, Field(pattern=r"^https?://[^\s]+$")]


GENERATED_ITEMS = 400
"""Training items that a generator makes where domain.items doesn't say."""


class DataConfig(Section):
    """How domains are mixed, and what is done about prompts that teach nothing."""

    mixing: Literal["weights", "temperature", "curriculum", "worst"] = Field(
        "weights",
        description="shares of the domains in a step: their weights; temperature: weight x (training items)^(1 / "
        "mixing_temperature); curriculum: weight x how near the domain's recent pass rate is to 0.2 .. 0.8; worst: "
        "weight x exp(-recent pass rate / worst_temperature), which favours the domains that do worst (MT-GRPO)",
    )
    mixing_temperature: PositiveFloat = Field(
        1.0, description="for mixing temperature: 1: shares follow the sizes of the domains; large: all the same"
    )
    worst_temperature: PositiveFloat = Field(0.2, description="for mixing worst: smaller: the worst domain alone")
    window: PositiveInt = Field(
        10, description="newest steps with rollouts of the domain that its recent pass rate is the mean of"
    )
    item_curriculum: bool = Field(
        False,
        description="within a source, items whose last pass rate was 0 or 1 are skipped in every other epoch",
    )
    resample: NonNegativeInt = Field(
        0,
        description="rounds in which groups without signal (all rewards equal) are replaced by new prompts of the same "
        "domain (DAPO's dynamic sampling); what is then left without signal is trained on as it is",
    )
    max_bad_rows: Fraction = Field(
        0.01, description="share of a source's rows that may be malformed, too long, without an answer or duplicates"
    )


VerifierKind = Literal[
    "reasoning_gym", "math", "choice", "exact", "text", "numeric", "code", "format", "length", "judge", "function"
]


class VerifierConfig(Section):
    """What scores a response; a domain's reward is the weighted mean of its verifiers' scores, less penalties."""

    kind: VerifierKind = Field(
        description="reasoning_gym: the generator's own scorer; math: equal to the answer as an expression "
        "(math-verify); choice: the letter of a multiple choice; exact: the answer, character for character; text: the "
        "same but for case, articles, punctuation and spaces; numeric: the last number, within `tolerance`; code: "
        "passes the item's unit tests in the sandbox; format: matches `pattern`; length: a penalty for responses near "
        "the limit (DAPO's soft overlong); judge: a reward model or judge behind an OpenAI-style endpoint; function: "
        "your own"
    )
    weight: PositiveFloat = Field(1.0, description="relative to the others; for length: of the penalty")
    tolerance: NonNegativeFloat = Field(1e-6, description="for numeric: largest |x - y| / max(1, |y|)")
    pattern: str | None = Field(None, description="for format: a regular expression that the whole response must match")
    buffer_tokens: PositiveInt | None = Field(
        None, description="for length: tokens before the response limit in which the penalty grows from 0 to 1"
    )
    function: FunctionPath | None = Field(
        None, description="for function: package.module:name, called as name(entry, response) for a score from 0 to 1"
    )
    url: HttpUrl | None = Field(
        None, description="for judge: base address of an OpenAI-style API, such as http://127.0.0.1:8000/v1"
    )
    model: str | None = Field(None, description="for judge: name of the model there")
    prompt: PathText | None = Field(
        None,
        description="for judge: file with the instruction, in which {question}, {answer} and {response} are replaced; "
        "the number behind 'score' in the reply, or its only one, from 0 to 1, is the score",
    )
    api_key_file: PathText | None = Field(None, description="for judge: file that holds the key, where one is needed")
    retries: NonNegativeInt = Field(2, description="for judge: further attempts after a reply that can't be used")


class SourceConfig(Section):
    """Where a domain's items come from: exactly one of `generator`, `file` and `dataset`."""

    generator: Name | None = Field(None, description="name of an allow-listed reasoning-gym dataset")
    options: dict[str, JsonValue] = Field({}, description="the generator's options, as reasoning-gym names them")
    file: PathText | None = Field(
        None, description=".jsonl or .parquet, rows in the schema of this project or of verl (see data/rows.py)"
    )
    dataset: PathText | None = Field(
        None, description="name or folder of a Hugging Face dataset (extra `datasets`), rows as in `file`"
    )
    subset: Name | None = Field(None, description="configuration of the dataset, where it has several")
    split: Name = Field("train", description="split of the dataset that is trained on")
    held_out_file: PathText | None = Field(
        None, description="file with the held-out items; left out, they are taken from the source itself"
    )
    held_out_split: Name | None = Field(None, description="split of the dataset with the held-out items")
    weight: PositiveFloat = Field(1.0, description="share of the domain's prompts, relative to its other sources")


class DomainConfig(Section):
    """A domain: where its prompts come from, how often, and what scores the responses."""

    name: Name = Field(description="as in reward/<name>")
    weight: PositiveFloat = Field(1.0, description="share of a step's prompts, relative to the other domains")
    sources: Annotated[list[SourceConfig], Field(min_length=1)] = Field(description="[[domain.sources]] tables")
    verifiers: list[VerifierConfig] = Field(
        [],
        description="[[domain.verifiers]] tables; none, or length alone: what the rows name, or for generators their "
        "own scorer",
    )
    items: PositiveInt | None = Field(
        None, description="most training items of a source; left out: 400 of a generator, all that a file has"
    )
    shots: NonNegativeInt = Field(2, description="worked examples in front of every question")
    system: str = Field("", description="system message in front of every conversation")
    instruction: str = Field("", description="appended to every question")
    samples: Annotated[int, Field(gt=1)] | None = Field(
        None, description="rollouts a prompt of this domain; left out: batch.samples"
    )
    max_response_tokens: PositiveInt | None = Field(
        None, description="response limit of this domain, at most rollout.max_response_tokens, which it is if left out"
    )

    @property
    def scoring(self) -> list[VerifierConfig]:
        """Its verifiers that give a score; without one, what its rows and generators name does. length only takes."""
        return [verifier for verifier in self.verifiers if verifier.kind != "length"]


class RewardsConfig(Section):
    """Verifiers, in killable worker processes."""

    workers: PositiveInt = Field(1, description="worker processes an engine's first rank scores with")
    timeout: PositiveFloat = Field(10.0, description="seconds a verifier may take before its worker is killed")
    memory_gib: PositiveFloat = Field(4.0, description="address space of a worker")
    max_error_rate: Fraction = Field(
        0.05,
        description="share of a step's groups a verifier may fail on before the run stops; above 0, one of several may",
    )
    sandbox: Literal["auto", "bubblewrap", "interpreter", "insecure"] = Field(
        "auto",
        description="where the model's code runs, for verifier code; bubblewrap: CPython in a namespace of its own; "
        "interpreter: a restricted Python in a worker; auto: the first of these that this machine allows; insecure: "
        "CPython with resource limits alone, which a program can leave",
    )


class EvaluationConfig(Section):
    """Held-out accuracy, before the first step, every `every` steps and after the last."""

    every: PositiveInt = Field(10, description="steps between evaluations")
    items: PositiveInt = Field(32, description="held-out items a domain, never among the training items")
    samples: PositiveInt = Field(1, description="responses an item: avg@k, pass@k and maj@k are of k = this")
    temperature: NonNegativeFloat = Field(0.0, description="of these responses; 0: greedy, for one sample alone")
