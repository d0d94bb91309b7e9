"""The configuration: typed, frozen, from a TOML file and dotted overrides. Imports no torch, so that it fails fast.

`load` returns a Config or raises ConfigError with ALL problems: the key, the value, the rule and the fix.
Every key's meaning is its `description`; there is no other list of keys.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, TypeAdapter, ValidationError, field_validator

from megatron_mcpo.config_io import apply_overrides, explain, read_toml, to_toml
from megatron_mcpo.layout import Layout

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(gt=0, le=1)]
PathText = Annotated[str, Field(min_length=1)]
# Names become folders and keys of metrics: no slash, no leading dot.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$")]

# What other keys of metrics.jsonl, eval.jsonl and the folder of runs are called.
RESERVED_DOMAINS = ("mean", "worst", "step")
RESERVED_RUN = "latest"


class ConfigError(ValueError):
    """One or more problems of a configuration; `problems` holds a line each."""

    def __init__(self, problems: Sequence[str]):
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class RunConfig(_Section):
    """What is run, how long, and where its files go."""

    name: Name = Field("run", description="folder of the run under `dir`")
    dir: PathText = Field("runs", description="folder that holds all runs")
    seed: NonNegativeInt = Field(0, description="of everything random: sampling, order of the data, the new head")
    steps: PositiveInt = Field(description="rollout-and-update steps")
    checkpoint_every: PositiveInt = Field(5, description="steps between checkpoints; the last step always has one")
    resume: Literal["auto", "never"] = Field(
        "auto", description="auto: go on with an unfinished run of the same name and settings; never: a new folder"
    )
    trackers: list[Literal["wandb", "mlflow", "trackio"]] = Field(
        [], description="experiment trackers besides metrics.jsonl and TensorBoard, each an optional extra"
    )


class ModelSection(_Section):
    """The policy, and the reference that starts as its copy."""

    path: PathText = Field(description="Hugging Face folder with config.json, tokenizer and safetensors")
    dtype: Literal["bf16", "fp32"] = Field("bf16", description="of weights and activations, in trainer and engine")


class ParallelConfig(_Section):
    """How the model is divided over ranks."""

    tensor: PositiveInt = Field(1, description="ranks that share every weight matrix")
    pipeline: PositiveInt = Field(1, description="stages the layers are divided into")
    virtual_pipeline: PositiveInt = Field(1, description="chunks of layers a stage holds (interleaved schedule)")
    context: PositiveInt = Field(1, description="ranks that share every sequence")
    sequence: bool = Field(True, description="sequence parallelism, where tensor > 1")
    data: PositiveInt | None = Field(
        None, description="data-parallel replicas; left out, torchrun's world size gives them (1 without torchrun)"
    )


class BatchConfig(_Section):
    """What a step trains on. Everything else is derived and printed at the start."""

    prompts: PositiveInt = Field(description="prompts a step, over all ranks")
    samples: Annotated[int, Field(gt=1)] = Field(description="rollouts a prompt (the group of GRPO)")
    micro_batch_tokens: PositiveInt = Field(2048, description="most tokens in one packed micro-batch of one rank")
    minibatches: PositiveInt = Field(1, description="optimizer steps a rollout batch is divided into")


class RolloutConfig(_Section):
    """Sampling."""

    max_prompt_tokens: PositiveInt = Field(512, description="longer prompts are refused at the start")
    max_response_tokens: PositiveInt = Field(16, description="a longer response is cut (stop reason: length)")
    temperature: PositiveFloat = Field(1.0, description="of the training rollouts; held-out evaluation is greedy")


class EngineConfig(_Section):
    """The inference engine."""

    tensor_parallel: PositiveInt = Field(1, description="ranks an engine's weights are divided over")
    kv_cache_gib: PositiveFloat = Field(0.5, description="key-value cache on a CPU")
    gpu_memory_utilization: Share = Field(0.5, description="share of a GPU's memory that the engine may take")
    max_concurrent: PositiveInt = Field(64, description="sequences decoded together")
    canary_every: PositiveInt = Field(10, description="steps between checks that engine and trainer agree")


class AlgorithmConfig(_Section):
    """The policy term (objective: group-relative advantages, clipped ratio, KL to the reference)."""

    clip_low: Fraction = Field(0.2, description="the ratio is clipped below 1 - clip_low")
    clip_high: NonNegativeFloat = Field(0.2, description="the ratio is clipped above 1 + clip_high")
    kl_weight: NonNegativeFloat = Field(0.001, description="beta of the k3 KL term; 0: no reference model is built")
    importance_cap: PositiveFloat | None = Field(
        2.0, description="cap C of the truncated importance weight min(exp(old - engine), C); 'off' for none"
    )
    pass_threshold: Fraction = Field(1.0 - 1e-6, description="a rollout with at least this reward is correct")

    @field_validator("importance_cap", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        return None if value == "off" else value


class ContrastiveConfig(_Section):
    """The contrastive terms; both weights 0: no head exists and the method is plain mixed-domain GRPO."""

    share_weight: NonNegativeFloat = Field(0.1, description="lambda of cross-domain knowledge sharing")
    consolidate_weight: NonNegativeFloat = Field(0.1, description="lambda of in-domain consolidation")
    temperature: PositiveFloat = Field(0.1, description="tau")
    top_k: PositiveInt = Field(4, description="positives an anchor takes from EACH other domain, most similar first")
    dim: PositiveInt = Field(512, description="size of a representation, at most the hidden size")

    @property
    def enabled(self) -> bool:
        return self.share_weight > 0 or self.consolidate_weight > 0


class OptimizerConfig(_Section):
    """Adam with decoupled weight decay."""

    lr: PositiveFloat = Field(description="peak learning rate")
    min_lr: NonNegativeFloat = Field(0.0, description="learning rate that a decay reaches one update after the last")
    warmup_steps: NonNegativeInt = Field(0, description="optimizer steps of linear warm-up")
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="shape after the warm-up")
    beta1: Decay = Field(0.9, description="decay of the first moment")
    beta2: Decay = Field(0.95, description="decay of the second moment")
    eps: PositiveFloat = Field(1e-8, description="added to the root of the second moment")
    weight_decay: NonNegativeFloat = Field(0.0, description="decoupled; not applied to norms and biases")
    clip_grad: PositiveFloat = Field(1.0, description="global gradient norm is clipped to this")


class RewardsConfig(_Section):
    """Verifiers, in killable worker processes."""

    workers: PositiveInt = Field(1, description="worker processes an engine's first rank scores with")
    timeout: PositiveFloat = Field(10.0, description="seconds a verifier may take before its worker is killed")
    max_error_rate: Fraction = Field(0.05, description="share of groups a verifier may fail on before the run stops")


class EvaluationConfig(_Section):
    """Held-out accuracy, greedy, before the first step, every `every` steps and after the last."""

    every: PositiveInt = Field(10, description="steps between evaluations")
    items: PositiveInt = Field(32, description="held-out items a domain, never among the training items")


class SourceConfig(_Section):
    """One reasoning-gym generator."""

    generator: Name = Field(description="name of an allow-listed reasoning-gym dataset")
    options: dict[str, JsonValue] = Field({}, description="its options, as reasoning-gym names them")
    weight: PositiveFloat = Field(1.0, description="share of the domain's prompts, relative to its other sources")


class DomainConfig(_Section):
    """A domain: where its prompts come from and how often."""

    name: Name = Field(description="as in reward/<name>")
    weight: PositiveFloat = Field(1.0, description="share of a step's prompts, relative to the other domains")
    sources: Annotated[list[SourceConfig], Field(min_length=1)] = Field(description="[[domain.sources]] tables")
    items: PositiveInt = Field(400, description="training items generated a source")
    shots: NonNegativeInt = Field(2, description="worked examples in front of every question")
    instruction: str = Field("", description="appended to every question")


class Config(_Section):
    """Everything a run depends on."""

    run: RunConfig
    model: ModelSection
    parallel: ParallelConfig = ParallelConfig()
    batch: BatchConfig
    rollout: RolloutConfig = RolloutConfig()
    engine: EngineConfig = EngineConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    contrastive: ContrastiveConfig = ContrastiveConfig()
    optimizer: OptimizerConfig
    rewards: RewardsConfig = RewardsConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    domain: Annotated[list[DomainConfig], Field(min_length=1)]

    @property
    def domain_names(self) -> list[str]:
        return [d.name for d in self.domain]

    def layout(self, world_size: int | None) -> Layout:
        """The layout on `world_size` ranks, or, for None, on as many as the configuration asks for.

        Raises ConfigError when they don't divide.
        """
        p = self.parallel
        replica = p.tensor * p.pipeline * p.context
        layout = Layout(
            tensor=p.tensor,
            pipeline=p.pipeline,
            virtual_pipeline=p.virtual_pipeline,
            context=p.context,
            data=p.data or max(1, (world_size or replica) // replica),
            sequence=p.sequence and p.tensor > 1,
        )
        problems = []
        if world_size is not None and layout.world_size != world_size:
            wanted = f"{layout.world_size}" if p.data else f"a multiple of {replica}"
            problems.append(
                f"parallel: {layout} needs {wanted} ranks, torchrun started {world_size}; start that many or change "
                "the sizes under [parallel]"
            )
        if layout.world_size % self.engine.tensor_parallel:
            problems.append(
                f"engine.tensor_parallel = {self.engine.tensor_parallel}: must divide the number of ranks, "
                f"{layout.world_size} ({layout}); set it to one of its divisors"
            )
        if self.batch.prompts < layout.data:
            problems.append(
                f"batch.prompts = {self.batch.prompts}: at least one for each of {layout.data} data-parallel replicas; "
                "raise it or lower parallel.data"
            )
        align = layout.sequence_alignment
        longest = -(-(self.rollout.max_prompt_tokens + self.rollout.max_response_tokens) // align) * align
        if self.batch.micro_batch_tokens < longest:
            problems.append(
                f"batch.micro_batch_tokens = {self.batch.micro_batch_tokens}: must hold the longest rollout, which "
                f"{layout} pads to {longest} tokens; raise it"
            )
        if problems:
            raise ConfigError(problems)
        return layout


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file and apply overrides (`--section.key value` or `--section.key=value`).

    Raises ConfigError with every problem at once: syntax, unknown keys (with the nearest known one), types, ranges,
    and what can be said of the combination without opening the model.
    """
    values, unreadable = read_toml(path)
    problems = unreadable + apply_overrides(values, overrides, Config)
    if unreadable:
        raise ConfigError(problems)
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        problems += [explain(detail, Config) for detail in error.errors()]
        broken = {str(detail["loc"][0]) for detail in error.errors()}
        raise ConfigError(problems + _combination_problems(_valid_part(values, broken), broken)) from None
    problems += _combination_problems(config, set())
    if problems:
        raise ConfigError(problems)
    return config


def dump(config: Config) -> str:
    """The resolved configuration as TOML, which `load` reads back to an equal Config."""
    values = config.model_dump()
    if config.algorithm.importance_cap is None:
        values["algorithm"]["importance_cap"] = "off"
    return to_toml(values)


def _valid_part(values: dict[str, Any], broken: set[str]) -> Config:
    """A Config that lacks the broken sections, for rules that don't ask for them."""
    sections = {}
    for name, field in Config.model_fields.items():
        if name not in broken:
            annotation: Any = field.annotation
            sections[name] = TypeAdapter(annotation).validate_python(values[name]) if name in values else field.default
    return Config.model_construct(**sections)


def _combination_problems(config: Config, broken: set[str]) -> list[str]:
    """Rules that involve more than one key and need neither the model nor the world size."""
    return [problem for sections, rule in _RULES if not broken.intersection(sections) for problem in rule(config)]


def _names(config: Config) -> list[str]:
    names = config.domain_names
    twice = sorted({name for name in names if names.count(name) > 1})
    problems = [f"domain.name = {name!r}: used twice; names must differ, rename one" for name in twice]
    for name in sorted(set(names).intersection(RESERVED_DOMAINS)):
        problems.append(f"domain.name = {name!r}: the metrics use this name for something else; choose another")
    return problems


def _run_name(config: Config) -> list[str]:
    if config.run.name != RESERVED_RUN:
        return []
    return [f"run.name = {RESERVED_RUN!r}: is the link to the newest run; choose another name"]


def _virtual_pipeline(config: Config) -> list[str]:
    p = config.parallel
    if p.virtual_pipeline == 1 or p.pipeline > 1:
        return []
    return [
        f"parallel.virtual_pipeline = {p.virtual_pipeline}: needs at least 2 pipeline stages; set parallel.pipeline, "
        "or this to 1"
    ]


def _longest_rollout(config: Config) -> list[str]:
    longest = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    if config.batch.micro_batch_tokens >= longest:
        return []
    return [
        f"batch.micro_batch_tokens = {config.batch.micro_batch_tokens}: must hold the longest rollout, "
        f"rollout.max_prompt_tokens + rollout.max_response_tokens = {longest}; raise it or lower those"
    ]


def _minibatches(config: Config) -> list[str]:
    if config.batch.minibatches <= config.batch.prompts:
        return []
    return [
        f"batch.minibatches = {config.batch.minibatches}: at most batch.prompts = {config.batch.prompts}, because a "
        "group is not divided; lower it"
    ]


def _sharing(config: Config) -> list[str]:
    weight = config.contrastive.share_weight
    if weight == 0 or len(config.domain) > 1:
        return []
    return [
        f"contrastive.share_weight = {weight}: knowledge sharing needs two domains; add a [[domain]] or set it to 0"
    ]


def _learning_rates(config: Config) -> list[str]:
    rates = config.optimizer
    if rates.min_lr <= rates.lr:
        return []
    return [f"optimizer.min_lr = {rates.min_lr}: must not exceed optimizer.lr = {rates.lr}; lower it"]


# Each with the sections it reads: where one of them is broken already, the rule would judge a value nobody wrote.
_RULES: list[tuple[tuple[str, ...], Callable[[Config], list[str]]]] = [
    (("run",), _run_name),
    (("domain",), _names),
    (("parallel",), _virtual_pipeline),
    (("batch", "rollout"), _longest_rollout),
    (("batch",), _minibatches),
    (("contrastive", "domain"), _sharing),
    (("optimizer",), _learning_rates),
]
