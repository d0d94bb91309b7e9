"""Name the arms of the study: every method and setting that is compared, as the keys in which it differs from the base.

An arm of the group `main` is a method; the claims rest on its runs with the seeds below FIRST_TUNING_SEED. The groups
`tuning/KEY` change one open choice of MCPO at a time around CENTRE, `tuning_reward/KEY` around REWARD, and
`tuning_grpo/KEY` one setting of GRPO, on other seeds, so that no seed both chooses a setting and shows what it is
worth. Imports no torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_mcpo.config.config import Config, ConfigError, load

_FOLDER = Path(__file__).resolve().parent
BASES = {"a": _FOLDER / "base.toml", "b": _FOLDER / "level_b.toml"}
"""What all arms of a level share. Level a: a small model of our own; level b: a pretrained model on public tasks."""

MAIN, TUNING, TUNING_GRPO, TUNING_REWARD = "main", "tuning", "tuning_grpo", "tuning_reward"
FIRST_TUNING_SEED = 100
TUNING_SEEDS = (100, 101, 102)
_MAIN_SEEDS = {"a": tuple(range(10)), "b": tuple(range(5))}
"""By level, for the arms that the claims rest on."""
_FEW_SEEDS = (0, 1, 2)
"""For arms that no claim about a method rests on: controls, and the mechanism's figures without an effect."""

REFERENCES = {MAIN: "grpo", TUNING: "centre", TUNING_GRPO: "grpo_centre", TUNING_REWARD: "reward_centre"}
"""The arm that the other arms of a group are compared with."""

Value = str | int | float
Settings = dict[str, Value]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A method or a setting.

    group: "main", or "tuning/KEY", "tuning_grpo/KEY" and "tuning_reward/KEY" with what is varied; its first part
        decides on seeds and reference
    settings: value by dotted key, where it differs from the level's base
    domains: the domains that are trained on and evaluated; empty: all of the base
    seeds: those that it runs with where the command line names none
    """

    name: str
    meaning: str
    group: str = MAIN
    settings: Settings
    domains: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()

    @property
    def kind(self) -> str:
        """Return the first part of the group, a key of SEEDS and REFERENCES."""
        return self.group.partition("/")[0]

    def overrides(self) -> list[str]:
        """Return the settings as they are written on a command line: --section.key=value."""
        return [f"--{key}={value}" for key, value in self.settings.items()]

    def has_seed(self, seed: int) -> bool:
        """Return whether a run with this seed counts for this arm."""
        return (seed >= FIRST_TUNING_SEED) == (self.kind != MAIN)


CROSS, IN = "contrastive.cross_domain_weight", "contrastive.in_domain_weight"

_OFF: Settings = {CROSS: 0.0, IN: 0.0}

CENTRE: Settings = {
    CROSS: 0.01,
    IN: 0.01,
    "contrastive.mode": "loss",
    "contrastive.temperature": 0.5,
    "contrastive.transfer": "top_k",
    "contrastive.top_k": 4,
    "contrastive.negatives": "pool",
    "contrastive.in_domain_scope": "domain",
    "contrastive.in_domain_loss": "infonce",
    "contrastive.denominator": "negatives",
    "contrastive.head": "linear",
    "contrastive.pool": "mean",
    "contrastive.center": "off",
    "optimizer.head_lr": 1e-3,
}
"""Where the tuning starts. Every open choice is named, so that a later change of a default changes no arm."""

REWARD: Settings = CENTRE | {CROSS: 0.05, IN: 0.05, "contrastive.mode": "reward"}
"""A second start: the terms change the rewards, not the model's representations. The weights leave most penalties
below 0.5, where the trainer cuts them off: with about 90 rivals a term is 4.5 nats at chance."""

MCPO: Settings = CENTRE
"""The settings of MCPO and its halves in the group `main`: those that the tuning runs chose."""

MCPO_REWARD: Settings = REWARD
"""The same for MCPO by rewards."""

_STRONG = 0.3
"""A weight at which the terms are learned: in the runs on the first base the ranking rose from 0.45 to 0.62."""

MEASURED = "grpo_measured"
"""The arm that shows the mechanism's figures where the model learns nothing from it."""

_GRADIENTS: Settings = {"contrastive.diagnose_every": 10, "algorithm.diagnose_every": 10}
"""Also measure the cosines of the gradients of terms and domains. Changes nothing that is learned."""

_TO_MEASURE: Settings = {CROSS: 2e-10, IN: 2e-10, "contrastive.mode": "reward", "optimizer.eps": 1e-16}
"""Train the head and leave the model's weights to GRPO.

With mode = reward no gradient of the head reaches the model. The rewards stay what they are: half of the distance of
1.0 to the next smaller number in fp32 is 3e-8, and the two terms together are below 100. Adam divides a gradient by its
own size, so the head learns at its rate as if the weights were large, if eps is far below its gradients (about 1e-13).
"""

_METHODS = (
    Arm(name="grpo", meaning="GRPO on all domains together, without contrastive terms.", settings=_OFF | _GRADIENTS),
    Arm(
        name=MEASURED,
        meaning="GRPO with a head that learns the terms of MCPO, of which nothing reaches the model or the rewards.",
        settings=MCPO | _TO_MEASURE,
        seeds=_FEW_SEEDS,
    ),
    Arm(name="mcpo", meaning="MCPO: GRPO and both contrastive terms.", settings=MCPO | _GRADIENTS),
    Arm(
        name="cross_only",
        meaning="MCPO without its in-domain term.",
        settings=MCPO | _GRADIENTS | {IN: 0.0},
    ),
    Arm(name="in_only", meaning="MCPO without its cross-domain term.", settings=MCPO | _GRADIENTS | {CROSS: 0.0}),
    Arm(
        name="mcpo_strong",
        meaning=f"MCPO with weights of {_STRONG}, at which the terms are learned.",
        settings=MCPO | _GRADIENTS | {CROSS: _STRONG, IN: _STRONG},
        seeds=_FEW_SEEDS,
    ),
    Arm(
        name="mcpo_reward",
        meaning="MCPO by rewards: correct rollouts that are unlike other correct ones lose reward; only the head "
        "learns from the terms.",
        settings=MCPO_REWARD,
    ),
    Arm(
        name="clipo",
        meaning="CLIPO: correct rollouts that are unlike other correct ones of their prompt lose reward "
        "(examples/methods/clipo.toml).",
        settings={
            CROSS: 0.0,
            IN: 0.2,
            "contrastive.mode": "reward",
            "contrastive.temperature": 0.05,
            "contrastive.in_domain_scope": "prompt",
            "contrastive.negatives": "prompt",
            "contrastive.denominator": "all",
        },
    ),
    Arm(
        name="per_domain",
        meaning="GRPO whose advantages are divided by the standard deviation of their domain, not of their prompt.",
        settings=_OFF | {"algorithm.advantage": "per_domain"},
    ),
    Arm(
        name="worst",
        meaning="GRPO that gives most prompts to the domains with the lowest pass rates (as MT-GRPO).",
        settings=_OFF | {"data.mixing": "worst"},
    ),
)

_TUNED: tuple[tuple[str, Sequence[Value]], ...] = (
    ("contrastive.temperature", (0.1, 1.0)),
    ("contrastive.top_k", (1,)),
    ("contrastive.transfer", ("threshold", "all")),
    ("contrastive.negatives", ("domain", "prompt")),
    ("contrastive.in_domain_loss", ("align",)),
    ("contrastive.in_domain_scope", ("prompt",)),
    ("contrastive.pool", ("last",)),
    ("contrastive.head", ("mlp",)),
    ("contrastive.center", ("prompt",)),
    ("optimizer.head_lr", (1e-4, 1e-2)),
)
"""Values of one key at a time; the value of CENTRE is the arm `centre`."""

_TUNED_REWARD: tuple[tuple[str, Sequence[Value]], ...] = (
    ("contrastive.temperature", (0.1,)),
    ("contrastive.center", ("prompt",)),
)
"""The same around REWARD."""

_WEIGHTS = {TUNING: (0.001, 0.03, 0.1), TUNING_REWARD: (0.02, 0.1)}
"""Of both terms together."""

_TUNED_GRPO: tuple[tuple[str, Sequence[Value]], ...] = (
    ("optimizer.lr", (2e-4,)),
    ("algorithm.advantage", ("dr_grpo",)),
    ("algorithm.aggregation", ("seq_mean_token_mean",)),
    ("algorithm.clip", ("gspo",)),
    ("batch.minibatches", (2,)),
    ("data.resample", (1,)),
)
"""What GRPO may choose, too; the base's value is the arm `grpo_centre`."""


def arms(level: str) -> dict[str, Arm]:
    """Return all arms of a level by name, the methods first. Raises ConfigError where its base cannot be used."""
    singles = [_single(name) for name in load(_base(level)).domain_names]
    methods = [replace(arm, seeds=arm.seeds or _MAIN_SEEDS[level]) for arm in (*_METHODS, *singles)]
    tuning = [replace(arm, seeds=TUNING_SEEDS) for arm in (*_tuning(), *_tuning_reward(), *_tuning_grpo())]
    return {arm.name: arm for arm in (*methods, *tuning)}


def configuration(level: str, arm: Arm, overrides: Sequence[str] = ()) -> Config:
    """Return the resolved configuration of an arm with further overrides. Raises ConfigError with all problems."""
    config = load(_base(level), [*arm.overrides(), *overrides])
    chosen = [domain for domain in config.domain if not arm.domains or domain.name in arm.domains]
    return config.model_copy(update={"domain": chosen})


def _base(level: str) -> Path:
    path = BASES[level]
    if not path.is_file():
        raise ConfigError([f"--level = {level!r}: must have a base file ({path} is not there). Use another level."])
    return path


def _single(domain: str) -> Arm:
    """Return GRPO on one domain, with as many rollouts in total as a run on all domains takes of all of them."""
    return Arm(
        name=f"single_{domain}",
        meaning=f"GRPO on {domain} alone, with as many rollouts as the runs on all domains take of all domains.",
        settings=_OFF,
        domains=(domain,),
        seeds=_FEW_SEEDS,
    )


def _tuning() -> list[Arm]:
    found = [Arm(name="centre", meaning="MCPO with the settings that the others vary.", group=TUNING, settings=CENTRE)]
    found += [_varied("weight", weight, CENTRE | {CROSS: weight, IN: weight}) for weight in _WEIGHTS[TUNING]]
    for key, values in _TUNED:
        found += [_varied(key.partition(".")[2], value, CENTRE | {key: value}) for value in values]
    return found


def _tuning_reward() -> list[Arm]:
    meaning = "MCPO by rewards with the settings that the others of its group vary."
    found = [Arm(name=REFERENCES[TUNING_REWARD], meaning=meaning, group=TUNING_REWARD, settings=REWARD)]
    varied: list[tuple[str, Value, Settings]]
    varied = [("weight", weight, {CROSS: weight, IN: weight}) for weight in _WEIGHTS[TUNING_REWARD]]
    varied += [(key.partition(".")[2], value, {key: value}) for key, values in _TUNED_REWARD for value in values]
    found += [
        Arm(
            name=f"reward_{choice}_{value}",
            meaning=f"MCPO by rewards with {choice} = {value}.",
            group=f"{TUNING_REWARD}/{choice}",
            settings=REWARD | changed,
        )
        for choice, value, changed in varied
    ]
    return found


def _varied(choice: str, value: Value, settings: Settings) -> Arm:
    return Arm(
        name=f"{choice}_{value}",
        meaning=f"MCPO with {choice} = {value}.",
        group=f"{TUNING}/{choice}",
        settings=settings,
    )


def _tuning_grpo() -> list[Arm]:
    found = [Arm(name="grpo_centre", meaning="GRPO as the base has it.", group=TUNING_GRPO, settings=_OFF)]
    for key, values in _TUNED_GRPO:
        choice = key.partition(".")[2]
        found += [
            Arm(
                name=f"grpo_{choice}_{value}",
                meaning=f"GRPO with {choice} = {value}.",
                group=f"{TUNING_GRPO}/{choice}",
                settings=_OFF | {key: value},
            )
            for value in values
        ]
    return found
