"""Load the configuration, typed and frozen, from TOML files and overrides. Imports no torch, so that it fails fast.

`load` returns a Config or raises ConfigError with ALL problems: the key, the value, the rule and the fix.
The keys and their meanings are in schema.py, engine_schema.py and domain_schema.py.
"""

import re
from collections.abc import Callable, Sequence
from math import lcm
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from megatron_mcpo.config import domain_rules, engine_rules
from megatron_mcpo.config.domain_schema import DataConfig, DomainConfig, EvaluationConfig, RewardsConfig
from megatron_mcpo.config.engine_schema import EngineConfig
from megatron_mcpo.config.explain import explain
from megatron_mcpo.config.layout import Layout
from megatron_mcpo.config.overrides import apply_overrides
from megatron_mcpo.config.schema import (
    LOWEST_TEMPERATURE,
    AlgorithmConfig,
    BatchConfig,
    ContrastiveConfig,
    ModelSection,
    OptimizerConfig,
    ParallelConfig,
    RolloutConfig,
    RunConfig,
    Section,
)
from megatron_mcpo.config.toml_io import Layers, read_layers, to_toml

# Names that have another meaning in metrics.jsonl, in eval.jsonl and in the folder of the runs.
RESERVED_DOMAINS = ("mean", "worst", "step")
RESERVED_RUN = "latest"


class ConfigError(ValueError):
    """One or more problems of a configuration; `problems` has one line per problem."""

    def __init__(self, problems: Sequence[str]):
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


class RunError(RuntimeError):
    """The error of a run that had to end, which its user can do something about; the same on every rank."""


class Config(Section):
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
    data: DataConfig = DataConfig()
    rewards: RewardsConfig = RewardsConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    domain: Annotated[list[DomainConfig], Field(min_length=1)]

    @property
    def domain_names(self) -> list[str]:
        """Return the names of the domains, in the order of the file."""
        return [d.name for d in self.domain]

    @property
    def group_sizes(self) -> list[int]:
        """Return the number of rollouts per prompt, for each domain."""
        return [d.samples or self.batch.samples for d in self.domain]

    @property
    def response_limits(self) -> list[int]:
        """Return the maximum number of response tokens, for each domain."""
        return [d.max_response_tokens or self.rollout.max_response_tokens for d in self.domain]

    @property
    def scores_policy(self) -> bool:
        """Return whether the policy scores a batch in a pass of its own, before the update.

        Contrastive terms need all representations before the first backward pass; with several optimizer steps per
        batch, the old log-probs of the later ones are those before the first.
        """
        return self.contrastive.enabled or self.batch.minibatches > 1

    @property
    def server_gpus(self) -> int:
        """Return the number of GPUs of all engine servers; 0 where the engines are in the trainer's ranks."""
        return len(self.engine.servers) * self.engine.tensor_parallel

    def layout(self, world_size: int | None) -> Layout:
        """Return the layout on `world_size` ranks, or, for None, on the fewest ranks that all sizes divide.

        Raises ConfigError if they do not divide.
        """
        p = self.parallel
        replica = p.tensor * p.pipeline * p.context
        # Engines divide the ranks of the run, experts those of a stage.
        engine = 1 if self.engine.servers else self.engine.tensor_parallel
        fewest = lcm(replica, p.pipeline * p.expert, engine)
        layout = Layout(
            tensor=p.tensor,
            pipeline=p.pipeline,
            virtual_pipeline=p.virtual_pipeline,
            context=p.context,
            expert=p.expert,
            data=p.data or max(1, (fewest if world_size is None else world_size) // replica),
            sequence=p.sequence and p.tensor > 1,
            layers_per_stage=tuple(p.layers_per_stage),
        )
        problems = []
        if world_size is not None and layout.world_size != world_size:
            wanted = f"{layout.world_size}" if p.data else f"a multiple of {replica}"
            problems.append(
                f"parallel: {layout} needs {wanted} ranks, there are {world_size}. Start that many, or change the "
                "sizes in [parallel]."
            )
        if not self.engine.servers and layout.world_size % self.engine.tensor_parallel:
            problems.append(
                f"engine.tensor_parallel = {self.engine.tensor_parallel}: must divide the number of ranks, "
                f"{layout.world_size} ({layout}). Set it to one of its divisors."
            )
        if self.batch.prompts < layout.data:
            problems.append(
                f"batch.prompts = {self.batch.prompts}: must be at least {layout.data} (one for each of {layout.data} "
                "data-parallel replicas). Raise it or lower parallel.data."
            )
        align = layout.sequence_alignment
        longest = -(-(self.rollout.max_prompt_tokens + self.rollout.max_response_tokens) // align) * align
        if self.batch.micro_batch_tokens < longest:
            problems.append(
                f"batch.micro_batch_tokens = {self.batch.micro_batch_tokens}: must be at least {longest} (the longest "
                f"rollout must fit; {layout} pads it to that). Raise it."
            )
        if problems:
            raise ConfigError(problems)
        return layout


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file with its bases (`extends`) and apply overrides (`--section.key value` or `--section.key=value`).

    Raises ConfigError with every problem at once: syntax, unknown keys (with the nearest known one), types, ranges,
    and what can be said of the combination without opening the model. With bases, each says which file is meant.
    """
    layers, unreadable = read_layers(path)
    problems = apply_overrides(layers, overrides, Config)
    if unreadable:
        raise ConfigError(unreadable + problems)
    wrong: list[str] = []
    try:
        config = Config.model_validate(layers.values)
    except ValidationError as error:
        wrong = [explain(detail, Config) for detail in error.errors()]
        broken = {str(detail["loc"][0]) for detail in error.errors()}
        wrong += _combination_problems(_valid_part(layers.values, broken), broken)
    else:
        wrong = _combination_problems(config, set())
    problems += [_with_origin(problem, layers) for problem in wrong]
    if problems:
        raise ConfigError(problems)
    return config


def dump(config: Config) -> str:
    """Return the resolved configuration as TOML, which `load` reads back to an equal Config."""
    return to_toml(config.model_dump())


def _with_origin(problem: str, layers: Layers) -> str:
    """Return a problem with the file that the value comes from, where there are several; it begins with its key."""
    key = re.match(r"([^\W\d]\w*)(?:\.(\w+))?", problem)
    if key is None or len(layers.files) < 2:
        return problem
    origin = layers.origin(key[1], key[2] or "")
    return f"{problem} [{origin}]" if origin else problem


def _valid_part(values: dict[str, Any], broken: set[str]) -> Config:
    """Return a Config without the broken sections, for the rules that do not read them."""
    sections = {}
    for name, field in Config.model_fields.items():
        if name not in broken:
            annotation: Any = field.annotation
            sections[name] = TypeAdapter(annotation).validate_python(values[name]) if name in values else field.default
    return Config.model_construct(**sections)


def _combination_problems(config: Config, broken: set[str]) -> list[str]:
    """Return what breaks the rules between keys, of those that need neither the model nor the world size."""
    return [problem for sections, rule in _RULES if not broken.intersection(sections) for problem in rule(config)]


def _names(config: Config) -> list[str]:
    names = config.domain_names
    twice = sorted({name for name in names if names.count(name) > 1})
    problems = [f"domain.name = {name!r}: must be unique (two domains have it). Rename one." for name in twice]
    for name in sorted(set(names).intersection(RESERVED_DOMAINS)):
        problems.append(f"domain.name = {name!r}: must be another name (the metrics use this one). Rename it.")
    return problems


def _run_name(config: Config) -> list[str]:
    if config.run.name != RESERVED_RUN:
        return []
    return [f"run.name = {RESERVED_RUN!r}: must be another name (this is the link to the newest run). Rename it."]


def _kept_checkpoints(config: Config) -> list[str]:
    r = config.run
    if r.keep_every % r.checkpoint_every == 0:
        return []
    return [
        f"run.keep_every = {r.keep_every}: must be a multiple of run.checkpoint_every = {r.checkpoint_every} "
        "(other steps have no checkpoint). Change one of them."
    ]


def _fp8(config: Config) -> list[str]:
    if config.model.fp8 == "off" or config.model.dtype == "bf16":
        return []
    return [
        f"model.fp8 = {config.model.fp8!r}: requires model.dtype = 'bf16' (it is {config.model.dtype!r}). Set that, or "
        "fp8 to 'off'."
    ]


def _virtual_pipeline(config: Config) -> list[str]:
    p = config.parallel
    if p.virtual_pipeline == 1 or p.pipeline > 1:
        return []
    return [
        f"parallel.virtual_pipeline = {p.virtual_pipeline}: requires parallel.pipeline >= 2 (the schedule interleaves "
        "stages). Raise that, or set this to 1."
    ]


def _longest_rollout(config: Config) -> list[str]:
    longest = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    if config.batch.micro_batch_tokens >= longest:
        return []
    return [
        f"batch.micro_batch_tokens = {config.batch.micro_batch_tokens}: must be at least {longest} (the longest "
        "rollout must fit: rollout.max_prompt_tokens + rollout.max_response_tokens). Raise it or lower those."
    ]


def _minibatches(config: Config) -> list[str]:
    batch = config.batch
    if batch.minibatches > batch.prompts:
        return [
            f"batch.minibatches = {batch.minibatches}: must be at most batch.prompts = {batch.prompts} (the rollouts "
            "of a prompt are not divided). Lower it."
        ]
    shares = config.contrastive.cross_domain_weight > 0 and len(config.domain) > 1
    if shares and batch.prompts < 2 * batch.minibatches:
        return [
            f"batch.minibatches = {batch.minibatches}: must be at most half of batch.prompts = {batch.prompts} (each "
            "optimizer step needs at least 2 prompts for the cross-domain loss). Lower it, or set "
            "contrastive.cross_domain_weight to 0."
        ]
    return []


def _rewarding(config: Config) -> list[str]:
    if config.contrastive.mode == "loss" or config.contrastive.enabled:
        return []
    return [
        "contrastive.mode = 'reward': requires a contrastive term (cross_domain_weight and in_domain_weight are 0). "
        "Raise one of them."
    ]


def _importance(config: Config) -> list[str]:
    a = config.algorithm
    if a.importance != "mask" or a.importance_floor < a.importance_cap:
        return []
    return [
        f"algorithm.importance_floor = {a.importance_floor}: must be below algorithm.importance_cap = "
        f"{a.importance_cap} (else every token is masked). Lower it."
    ]


def _sequence_ratio(config: Config) -> list[str]:
    a = config.algorithm
    whole = [key for key, needs in (("clip", a.clip == "gspo"), ("importance", a.importance == "reject")) if needs]
    if config.parallel.context == 1:
        return []
    return [
        f"algorithm.{key} = {getattr(a, key)!r}: requires parallel.context = 1 (its ratio needs all tokens of a "
        f"rollout on one rank; context is {config.parallel.context}). Set that, or use another {key}."
        for key in whole
    ]


def _learning_rates(config: Config) -> list[str]:
    rates = config.optimizer
    if rates.min_lr <= rates.lr:
        return []
    return [f"optimizer.min_lr = {rates.min_lr}: must be at most optimizer.lr = {rates.lr}. Lower it."]


def _evaluation_sampling(config: Config) -> list[str]:
    e = config.evaluation
    if 0 < e.temperature < LOWEST_TEMPERATURE:
        return [
            f"evaluation.temperature = {e.temperature}: must be 0 or at least {LOWEST_TEMPERATURE} (vLLM samples at "
            f"{LOWEST_TEMPERATURE} instead). Set it to 0."
        ]
    if e.temperature > 0 or e.samples == 1:
        return []
    return [
        f"evaluation.samples = {e.samples}: must be 1 with evaluation.temperature = 0 (greedy responses are all the "
        "same). Set it to 1, or raise the temperature to that of the rollouts."
    ]


# Each rule with the sections that it reads: if one of them is broken, the rule would judge a value that nobody wrote.
_RULES: list[tuple[tuple[str, ...], Callable[[Config], list[str]]]] = [
    (("run",), _run_name),
    (("run",), _kept_checkpoints),
    (("domain",), _names),
    (("domain",), domain_rules.sources),
    (("domain", "rollout"), domain_rules.limits),
    (("data", "domain"), domain_rules.mixing),
    (("model",), _fp8),
    (("engine",), engine_rules.servers),
    (("engine",), engine_rules.staleness),
    (("parallel",), _virtual_pipeline),
    (("batch", "rollout"), _longest_rollout),
    (("batch", "contrastive", "domain"), _minibatches),
    (("contrastive",), _rewarding),
    (("algorithm",), _importance),
    (("engine", "model"), engine_rules.quantized_dtype),
    (("engine", "algorithm"), engine_rules.quantized_importance),
    (("algorithm", "parallel"), _sequence_ratio),
    (("optimizer",), _learning_rates),
    (("evaluation",), _evaluation_sampling),
]
