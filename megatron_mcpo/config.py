"""The configuration: typed, frozen, from a TOML file and dotted overrides. Imports no torch, so that it fails fast.

`load` returns a Config or raises ConfigError with ALL problems: the key, the value, the rule and the fix.
Every key's meaning is its `description`; there is no other list of keys.
"""

import difflib
import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from megatron_mcpo.layout import Layout

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,80}$")]


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
    dir: str = Field("runs", description="folder that holds all runs")
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

    path: str = Field(description="Hugging Face folder with config.json, tokenizer and safetensors")
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
    gpu_memory_utilization: Fraction = Field(0.5, description="share of a GPU's memory that the engine may take")
    max_concurrent: PositiveInt = Field(64, description="sequences decoded together")
    canary_every: PositiveInt = Field(10, description="steps between checks that engine and trainer agree")


class AlgorithmConfig(_Section):
    """The policy term (objective: group-relative advantages, clipped ratio, KL to the reference)."""

    clip_low: Fraction = Field(0.2, description="the ratio is clipped below 1 - clip_low")
    clip_high: Fraction = Field(0.2, description="the ratio is clipped above 1 + clip_high")
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
    min_lr: NonNegativeFloat = Field(0.0, description="learning rate at the end of the schedule")
    warmup_steps: NonNegativeInt = Field(0, description="optimizer steps of linear warm-up")
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="shape after the warm-up")
    beta1: Fraction = Field(0.9, description="decay of the first moment")
    beta2: Fraction = Field(0.95, description="decay of the second moment")
    eps: PositiveFloat = Field(1e-8, description="added to the root of the second moment")
    weight_decay: NonNegativeFloat = Field(0.0, description="decoupled; not applied to norms and biases")
    clip_grad: PositiveFloat = Field(1.0, description="global gradient norm is clipped to this")


class RewardsConfig(_Section):
    """Verifiers, in killable worker processes."""

    workers: PositiveInt = Field(1, description="worker processes an engine's first rank scores with")
    timeout: PositiveFloat = Field(10.0, description="seconds a verifier may take before its worker is killed")
    max_error_rate: Fraction = Field(0.05, description="share of groups a failing verifier may cost before the run stops")


class EvaluationConfig(_Section):
    """Held-out accuracy, greedy, before the first step, every `every` steps and after the last."""

    every: PositiveInt = Field(10, description="steps between evaluations")
    items: PositiveInt = Field(32, description="held-out items a domain, never among the training items")


class SourceConfig(_Section):
    """One reasoning-gym generator."""

    generator: Name = Field(description="name of an allow-listed reasoning-gym dataset")
    options: dict[str, Any] = Field({}, description="its options, as reasoning-gym names them")
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
        model_parallel = p.tensor * p.pipeline * p.context
        data = p.data or (world_size or model_parallel) // model_parallel
        layout = Layout(
            tensor=p.tensor,
            pipeline=p.pipeline,
            virtual_pipeline=p.virtual_pipeline,
            context=p.context,
            data=data,
            sequence=p.sequence and p.tensor > 1,
        )
        if world_size is not None and layout.world_size != world_size:
            raise ConfigError(
                [
                    f"parallel: {layout} needs {layout.world_size} ranks, torchrun started {world_size}; "
                    f"start {layout.world_size} or change parallel.data"
                ]
            )
        return layout


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file and apply overrides (`--section.key value` or `--section.key=value`).

    Raises ConfigError with every problem at once: syntax, unknown keys (with the nearest known one), types, ranges,
    and what can be said of the combination without opening the model.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError([f"{path}: no such file; give the path of a TOML configuration"]) from None
    except IsADirectoryError:
        raise ConfigError([f"{path}: is a folder; give the path of a TOML configuration"]) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path}: not valid TOML: {error}"]) from None
    problems = _apply_overrides(values, overrides)
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(problems + [_explain(e) for e in error.errors()]) from None
    problems += _combination_problems(config)
    if problems:
        raise ConfigError(problems)
    return config


def dump(config: Config) -> str:
    """The resolved configuration as TOML, which `load` reads back to an equal Config."""
    lines: list[str] = []
    for section, value in config.model_dump().items():
        if section != "domain":
            lines += [f"[{section}]", *_toml_pairs(value), ""]
    for domain in config.domain:
        values = domain.model_dump()
        sources = values.pop("sources")
        lines += ["[[domain]]", *_toml_pairs(values), ""]
        for source in sources:
            lines += ["[[domain.sources]]", *_toml_pairs(source), ""]
    return "\n".join(lines)


def _toml_pairs(values: dict[str, Any]) -> list[str]:
    return [f"{key} = {_toml_value(value)}" for key, value in values.items() if not _is_unset(key, value)]


def _is_unset(key: str, value: Any) -> bool:
    return value is None and key != "importance_cap"


def _toml_value(value: Any) -> str:
    if value is None:
        return '"off"'
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(k)} = {_toml_value(v)}" for k, v in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(_toml_value(v) for v in value) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return json.dumps(value)


def _apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    problems = []
    rest = list(overrides)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--") or "." not in flag:
            problems.append(f"{flag}: overrides look like --section.key VALUE")
            continue
        key, equals, text = flag[2:].partition("=")
        if not equals:
            if not rest:
                problems.append(f"{flag}: has no value; write {flag} VALUE")
                continue
            text = rest.pop(0)
        section, _, name = key.partition(".")
        table = values.setdefault(section, {})
        if not isinstance(table, dict) or "." in name:
            problems.append(f"--{key}: overrides reach single keys of single tables; edit {section!r} in the file")
        else:
            table[name] = _parse_value(text)
    return problems


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _explain(error: Any) -> str:
    """One line for one pydantic error: key, value, rule, fix."""
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known = _known_keys(error["loc"][:-1])
        near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"{where}: unknown key; {hint}"
    if error["type"] == "missing":
        return f"{where}: missing; add it to the file ({_description(error['loc']) or 'a table of settings'})"
    meaning = _description(error["loc"])
    return f"{where} = {error['input']!r}: {error['msg']}" + (f" ({meaning})" if meaning else "")


def _section_at(loc: Sequence[Any]) -> type[BaseModel] | None:
    model: type[BaseModel] | None = Config
    for part in loc:
        if isinstance(part, int):
            continue
        info = model.model_fields.get(part) if model else None
        annotation: Any = info.annotation if info else None
        while annotation is not None and not isinstance(annotation, type):
            args = getattr(annotation, "__args__", ())
            annotation = args[0] if args else None
        if getattr(annotation, "__args__", None):
            annotation = annotation.__args__[0]
        model = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
    return model


def _known_keys(loc: Sequence[Any]) -> list[str]:
    section = _section_at(loc)
    return list(section.model_fields) if section else []


def _description(loc: Sequence[Any]) -> str:
    keys = [part for part in loc if isinstance(part, str)]
    for end in range(len(keys), 0, -1):
        section = _section_at(keys[: end - 1])
        if section and keys[end - 1] in section.model_fields:
            return section.model_fields[keys[end - 1]].description or ""
    return ""


def _combination_problems(config: Config) -> list[str]:
    """Rules that involve more than one key and need neither the model nor the world size."""
    problems = []
    names = config.domain_names
    for name in sorted({n for n in names if names.count(n) > 1}):
        problems.append(f"domain.name = {name!r}: used twice; names must differ")
    if "mean" in names:
        problems.append("domain.name = 'mean': reward/mean is the mean over domains; choose another name")
    p, batch = config.parallel, config.batch
    if p.virtual_pipeline > 1 and p.pipeline == 1:
        problems.append(
            f"parallel.virtual_pipeline = {p.virtual_pipeline}: needs parallel.pipeline >= 2; set one of them"
        )
    longest = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    if batch.micro_batch_tokens < longest:
        problems.append(
            f"batch.micro_batch_tokens = {batch.micro_batch_tokens}: must hold the longest rollout, "
            f"rollout.max_prompt_tokens + max_response_tokens = {longest}; raise it or lower those"
        )
    if batch.minibatches > batch.prompts:
        problems.append(
            f"batch.minibatches = {batch.minibatches}: at most batch.prompts = {batch.prompts}, a group is not divided"
        )
    if config.contrastive.share_weight > 0 and len(names) < 2:
        problems.append(
            "contrastive.share_weight > 0: knowledge sharing needs two domains; add a [[domain]] or set it to 0"
        )
    if config.optimizer.min_lr > config.optimizer.lr:
        problems.append(f"optimizer.min_lr = {config.optimizer.min_lr}: must not exceed lr = {config.optimizer.lr}")
    return problems
