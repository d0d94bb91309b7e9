"""The configuration: typed, frozen, from a TOML file and dotted overrides. Imports no torch, so that it fails fast.

`load` returns a Config or raises ConfigError with ALL problems: the key, the value, the rule and the fix.
What each key means: sections.py, which is the only list of keys.
"""

from collections.abc import Callable, Sequence
from math import lcm
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from megatron_mcpo.config import domain_rules
from megatron_mcpo.config.domain_schema import DataConfig, DomainConfig, EvaluationConfig, RewardsConfig
from megatron_mcpo.config.layout import Layout
from megatron_mcpo.config.schema import (
    AlgorithmConfig,
    BatchConfig,
    ContrastiveConfig,
    EngineConfig,
    ModelSection,
    OptimizerConfig,
    ParallelConfig,
    RolloutConfig,
    RunConfig,
    Section,
)
from megatron_mcpo.config.toml_io import apply_overrides, explain, read_toml, to_toml

# What other keys of metrics.jsonl, eval.jsonl and the folder of runs are called.
RESERVED_DOMAINS = ("mean", "worst", "step")
RESERVED_RUN = "latest"
_LAST_PORT = 65535


class ConfigError(ValueError):
    """One or more problems of a configuration; `problems` holds a line each."""

    def __init__(self, problems: Sequence[str]):
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


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
        return [d.name for d in self.domain]

    @property
    def group_sizes(self) -> list[int]:
        """Rollouts a prompt, of each domain."""
        return [d.samples or self.batch.samples for d in self.domain]

    @property
    def response_limits(self) -> list[int]:
        """Most response tokens, of each domain."""
        return [d.max_response_tokens or self.rollout.max_response_tokens for d in self.domain]

    def layout(self, world_size: int | None) -> Layout:
        """The layout on `world_size` ranks, or, for None, on the fewest that the sizes of the configuration divide.

        Raises ConfigError when they don't divide.
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
        )
        problems = []
        if world_size is not None and layout.world_size != world_size:
            wanted = f"{layout.world_size}" if p.data else f"a multiple of {replica}"
            problems.append(
                f"parallel: {layout} needs {wanted} ranks, there are {world_size}; start that many or change "
                "the sizes under [parallel]"
            )
        if not self.engine.servers and layout.world_size % self.engine.tensor_parallel:
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
    return to_toml(config.model_dump())


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


def _kept_checkpoints(config: Config) -> list[str]:
    r = config.run
    if r.keep_every % r.checkpoint_every == 0:
        return []
    return [
        f"run.keep_every = {r.keep_every}: must be a multiple of run.checkpoint_every = {r.checkpoint_every}, other "
        "steps have no checkpoint to keep; change one of them"
    ]


def _fp8(config: Config) -> list[str]:
    if config.model.fp8 == "off" or config.model.dtype == "bf16":
        return []
    return [
        f"model.fp8 = {config.model.fp8!r}: is a way to compute in bf16; set model.dtype to 'bf16', or this to 'off'"
    ]


def _servers(config: Config) -> list[str]:
    servers = config.engine.servers
    twice = sorted({url for url in servers if servers.count(url) > 1})
    problems = [f"engine.servers: {url} is there twice; leave one of them out" for url in twice]
    return problems + [
        f"engine.servers: {url} has a port above {_LAST_PORT}; correct it"
        for url in servers
        if int(url.rpartition(":")[2]) > _LAST_PORT
    ]


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
    batch = config.batch
    if batch.minibatches > batch.prompts:
        return [
            f"batch.minibatches = {batch.minibatches}: at most batch.prompts = {batch.prompts}, because a group is not "
            "divided; lower it"
        ]
    shares = config.contrastive.cross_domain_weight > 0 and len(config.domain) > 1
    if shares and batch.prompts < 2 * batch.minibatches:
        return [
            f"batch.minibatches = {batch.minibatches}: at most half of batch.prompts = {batch.prompts}, because "
            "each optimizer step needs at least 2 prompts for the cross-domain loss; lower it, or set "
            "contrastive.cross_domain_weight to 0"
        ]
    return []


def _rewarding(config: Config) -> list[str]:
    if config.contrastive.mode == "loss" or config.contrastive.enabled:
        return []
    return ["contrastive.mode = 'reward': both weights are 0, so there is no term to reward; raise one of them"]


def _diagnosis(config: Config) -> list[str]:
    c = config.contrastive
    if c.diagnose_every == 0 or (c.enabled and c.mode == "loss"):
        return []
    return [
        f"contrastive.diagnose_every = {c.diagnose_every}: no contrastive term reaches the model's weights (mode "
        f"{c.mode!r}, weights {c.cross_domain_weight} and {c.in_domain_weight}), so there is nothing to compare; "
        "set it to 0"
    ]


def _importance(config: Config) -> list[str]:
    a = config.algorithm
    if a.importance != "mask" or a.importance_floor < a.importance_cap:
        return []
    return [
        f"algorithm.importance_floor = {a.importance_floor}: must be below importance_cap = {a.importance_cap}, or "
        "every token is masked; lower it"
    ]


def _quantized_dtype(config: Config) -> list[str]:
    if config.engine.quantization == "none" or config.model.dtype == "bf16":
        return []
    return [
        f"model.dtype = {config.model.dtype!r}: vLLM computes in bf16 with engine.quantization = "
        f"{config.engine.quantization!r}; set it to 'bf16', or the quantization to 'none'"
    ]


def _quantized_importance(config: Config) -> list[str]:
    if config.engine.quantization == "none" or config.algorithm.importance != "off":
        return []
    return [
        "algorithm.importance = 'off': a quantized engine samples from another distribution than the one that is "
        "trained, which the importance weight makes up for; set it to 'truncate' or 'mask', or engine.quantization "
        "to 'none'"
    ]


def _sequence_ratio(config: Config) -> list[str]:
    if config.algorithm.clip != "gspo" or config.parallel.context == 1:
        return []
    return [
        f"algorithm.clip = 'gspo': needs a rollout's tokens on one rank, parallel.context = {config.parallel.context} "
        "divides them; set it to 1 or use another clip"
    ]


def _learning_rates(config: Config) -> list[str]:
    rates = config.optimizer
    if rates.min_lr <= rates.lr:
        return []
    return [f"optimizer.min_lr = {rates.min_lr}: must not exceed optimizer.lr = {rates.lr}; lower it"]


def _greedy_samples(config: Config) -> list[str]:
    e = config.evaluation
    if e.temperature > 0 or e.samples == 1:
        return []
    return [
        f"evaluation.samples = {e.samples}: greedy responses (evaluation.temperature = 0) are all the same; set "
        "samples to 1, or the temperature to that of the rollouts"
    ]


# Each with the sections it reads: where one of them is broken already, the rule would judge a value nobody wrote.
_RULES: list[tuple[tuple[str, ...], Callable[[Config], list[str]]]] = [
    (("run",), _run_name),
    (("run",), _kept_checkpoints),
    (("domain",), _names),
    (("domain",), domain_rules.sources),
    (("domain", "rollout"), domain_rules.limits),
    (("data", "domain"), domain_rules.mixing),
    (("model",), _fp8),
    (("engine",), _servers),
    (("parallel",), _virtual_pipeline),
    (("batch", "rollout"), _longest_rollout),
    (("batch", "contrastive", "domain"), _minibatches),
    (("contrastive",), _rewarding),
    (("contrastive",), _diagnosis),
    (("algorithm",), _importance),
    (("engine", "model"), _quantized_dtype),
    (("engine", "algorithm"), _quantized_importance),
    (("algorithm", "parallel"), _sequence_ratio),
    (("optimizer",), _learning_rates),
    (("evaluation",), _greedy_samples),
]
