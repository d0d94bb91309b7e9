"""Define the sections on data, rewards and evaluation, as schema.py does the others. Imports no torch."""

from typing import Annotated, Literal

from pydantic import Field, JsonValue

from megatron_mcpo.config.schema import (
    HIGHEST_TEMPERATURE,
    Fraction,
    Name,
    NonNegativeFloat,
    NonNegativeInt,
    PathText,
    PositiveFloat,
    PositiveInt,
    Section,
)

FunctionPath = Annotated[
    str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_.]*:[A-Za-z_][A-Za-z0-9_]*$", examples=["my_rewards:score"])
]
HttpUrl = Annotated[str, Field(pattern=r"^https?://[^\s]+$", examples=["http://127.0.0.1:8000/v1"])]


GENERATED_ITEMS = 400
"""Number of training items that a generator makes where `domain.items` is unset."""


class DataConfig(Section):
    """The mixture of the domains, and the handling of prompts that give no training signal."""

    mixing: Literal["weights", "temperature", "curriculum", "worst"] = Field(
        "weights",
        description="how a domain's share of a step's prompts is computed; weights: from its weight; temperature: "
        "weight x (training items)^(1 / mixing_temperature); curriculum: weight x closeness of the domain's recent "
        "pass rate to the range 0.2 .. 0.8; worst: weight x exp(-recent pass rate / worst_temperature), which favours "
        "the domains with the lowest pass rates (MT-GRPO)",
    )
    mixing_temperature: PositiveFloat = Field(
        1.0,
        description="temperature of mixing = temperature; 1: shares are proportional to the sizes of the domains; a "
        "large value: shares are equal",
    )
    worst_temperature: PositiveFloat = Field(
        0.2, description="temperature of mixing = worst; the smaller, the more of the step the worst domain gets"
    )
    window: PositiveInt = Field(
        10,
        description="number of the newest steps with rollouts of a domain over which its recent pass rate is averaged, "
        "used by mixing = curriculum and worst",
    )
    item_curriculum: bool = Field(
        False,
        description="whether items whose last pass rate was 0 or 1 are skipped in every other epoch of their source",
    )
    resample: NonNegativeInt = Field(
        0,
        description="number of rounds in which groups with equal rewards, whose advantages are all 0, are replaced by "
        "new prompts of the same domain (DAPO's dynamic sampling); groups that are left after that are trained on as "
        "they are",
    )
    max_bad_rows: Fraction = Field(
        0.01,
        description="fraction of a source's rows that may be malformed, too long or without an answer before the "
        "run is refused; rows that repeat a question are left out and do not count",
    )
    allow_changed: bool = Field(
        False,
        description="whether a run may be resumed although items that it had were removed or changed; items that were "
        "added are always allowed",
    )
    chat_template_kwargs: dict[str, JsonValue] = Field(
        {},
        description="values for variables of the model's chat template, such as { enable_thinking = false } for Qwen3; "
        "a name that the template does not have is refused",
    )


VerifierKind = Literal[
    "reasoning_gym", "math", "choice", "exact", "text", "numeric", "code", "format", "length", "judge", "function"
]


class VerifierConfig(Section):
    """One verifier of a domain; the reward is the weighted mean of the verifiers' scores, minus the penalties."""

    kind: VerifierKind = Field(
        description="what is verified; reasoning_gym: the generator's own scorer; math: the response equals the answer "
        "as an expression (math-verify); choice: the letter of a multiple choice; exact: the response equals the "
        "answer, character by character; text: as exact, but case, articles, punctuation and spaces are ignored; "
        "numeric: the last number of the response, within `tolerance`; code: the response passes the item's unit tests "
        "in the sandbox; format: the response matches `pattern`; length: a penalty for responses close to the limit "
        "(DAPO's soft overlong punishment); judge: a reward model or judge behind an OpenAI-style API; function: a "
        "function of your own"
    )
    weight: PositiveFloat = Field(
        1.0, description="weight of the score relative to those of the other verifiers; of length: largest penalty"
    )
    tolerance: NonNegativeFloat | None = Field(
        None,
        description="of numeric: largest |x - y| / max(1, |y|) between response x and answer y; unset: whole numbers "
        "must be equal, others within 1e-6",
    )
    compare: Literal["lines", "tokens"] = Field(
        "lines",
        description="of code: how printed output is compared; lines: line by line, without blanks around them; tokens: "
        "word by word, however they are spaced, where numbers with a fraction agree within 1e-6",
    )
    pattern: str | None = Field(None, description="of format: regular expression that the whole response has to match")
    buffer_tokens: PositiveInt | None = Field(
        None,
        description="of length: number of tokens before the response limit over which the penalty grows from 0 to its "
        "weight",
    )
    function: FunctionPath | None = Field(
        None,
        description="of function: `package.module:name`, called as name(entry, response), which returns a score from "
        "0 to 1",
    )
    url: HttpUrl | None = Field(
        None, description="of judge: base address of an OpenAI-style API, such as http://127.0.0.1:8000/v1"
    )
    model: str | None = Field(None, description="of judge: name of the model at that address")
    prompt: PathText | None = Field(
        None,
        description="of judge: file with the instruction, in which {question}, {answer} and {response} are replaced; "
        "the score is the number after 'score' in the reply, or the only number in it, from 0 to 1",
    )
    api_key_file: PathText | None = Field(
        None, description="of judge: file that contains the API key, if the address needs one"
    )
    retries: NonNegativeInt = Field(
        2, description="of judge: number of further attempts after a reply without a usable score"
    )


class SourceConfig(Section):
    """One source of a domain's items; it needs exactly one of `generator`, `file` and `dataset`."""

    generator: Name | None = Field(None, description="name of a reasoning-gym generator that is on the allow-list")
    options: dict[str, JsonValue] = Field({}, description="options of the generator, with the names of reasoning-gym")
    file: PathText | None = Field(
        None,
        description=".jsonl or .parquet file with rows in the schema of this project or of verl (see data/rows.py)",
    )
    dataset: PathText | None = Field(
        None,
        description="name or folder of a Hugging Face dataset with rows as in `file`; it needs the extra `datasets`",
    )
    subset: Name | None = Field(None, description="configuration of the dataset, if it has several")
    split: Name = Field("train", description="split of the dataset that is used for training")
    held_out_file: PathText | None = Field(
        None, description="file with the held-out items; unset: they are taken from the source itself"
    )
    held_out_split: Name | None = Field(
        None,
        description="split of the dataset with the held-out items; unset: they are from `held_out_file` or `split`",
    )
    weight: PositiveFloat = Field(
        1.0, description="share of the domain's prompts, relative to the weights of its other sources"
    )


class DomainConfig(Section):
    """One domain: the sources of its prompts, its share of them, and the verifiers of its responses."""

    name: Name = Field(description="name of the domain, as it appears in metrics such as reward/<name>")
    weight: PositiveFloat = Field(
        1.0, description="share of a step's prompts, relative to the weights of the other domains"
    )
    sources: Annotated[list[SourceConfig], Field(min_length=1)] = Field(
        description="where the prompts come from, as [[domain.sources]] tables"
    )
    verifiers: list[VerifierConfig] = Field(
        [],
        description="what scores the responses, as [[domain.verifiers]] tables; with none, or only length, the "
        "verifiers are those that the rows name or, for generators, their own scorers",
    )
    items: PositiveInt | None = Field(
        None,
        description=f"maximum number of training items per source; unset: {GENERATED_ITEMS} for a generator, all rows "
        "of a file or dataset",
    )
    shots: NonNegativeInt = Field(2, description="number of worked examples (few-shot) before every question")
    system: str = Field("", description="system message at the start of every conversation; empty: none")
    instruction: str = Field("", description="text that is appended to every question")
    samples: Annotated[int, Field(gt=1)] | None = Field(
        None, description="number of rollouts per prompt of this domain; unset: batch.samples"
    )
    max_response_tokens: PositiveInt | None = Field(
        None,
        description="maximum length of a response in this domain, at most rollout.max_response_tokens, which is also "
        "its value if unset",
    )

    @property
    def scoring(self) -> list[VerifierConfig]:
        """Return the verifiers that give a score, all but `length`; if empty, rows and generators name theirs."""
        return [verifier for verifier in self.verifiers if verifier.kind != "length"]


class RewardsConfig(Section):
    """The processes in which verifiers run, and what happens when verifiers fail."""

    workers: PositiveInt = Field(1, description="number of worker processes that score the rollouts of one engine")
    timeout: PositiveFloat = Field(10.0, description="seconds that a verifier may take before its worker is killed")
    memory_gib: PositiveFloat = Field(4.0, description="limit of a worker's address space, in GiB")
    max_error_rate: Fraction = Field(
        0.05,
        description="fraction of a step's groups on which verifiers may fail before the run stops; if it is above 0, "
        "one group of several may always fail",
    )
    sandbox: Literal["auto", "bubblewrap", "interpreter", "insecure"] = Field(
        "auto",
        description="where the verifier `code` runs the model's programs; bubblewrap: CPython in its own namespaces; "
        "interpreter: a restricted Python interpreter in a worker; auto: bubblewrap if the machine allows it, else "
        "interpreter; insecure: CPython with resource limits only, which a program can escape from",
    )


class EvaluationConfig(Section):
    """The measurement of held-out accuracy: before the first step, every `every` steps, and after the last step."""

    every: PositiveInt = Field(10, description="steps between two evaluations")
    items: PositiveInt = Field(32, description="number of held-out items per domain, which are never trained on")
    samples: PositiveInt = Field(1, description="number of responses per item, the k of avg@k, pass@k and maj@k")
    temperature: Annotated[float, Field(ge=0, le=HIGHEST_TEMPERATURE)] = Field(
        0.0,
        description="sampling temperature of these responses, at least 0.01; 0: greedy decoding, which needs samples = "
        "1",
    )
