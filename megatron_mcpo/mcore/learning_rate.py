"""Set the learning rates of the model and of the head, and their schedule, also of a run that is resumed."""

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import ParamGroupOverride, ParamKey
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_mcpo.config.schema import OptimizerConfig

_RATES = ("max_lr", "min_lr", "betas", "eps", "weight_decay")
"""Keys of Megatron's parameter groups that come from the configuration."""

_IDENTIFYING = ("max_lr", "min_lr")
"""Those of them by which Megatron tells the groups of a saved state apart."""


def megatron_config(optimizer: OptimizerConfig, *, dtype: torch.dtype) -> MegatronOptimizerConfig:
    """Return the settings of Adam in the form that Megatron-Core takes."""
    return MegatronOptimizerConfig(
        optimizer="adam",
        lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.beta1,
        adam_beta2=optimizer.beta2,
        adam_eps=optimizer.eps,
        clip_grad=optimizer.clip_grad,
        bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=True,
    )


def head_rate(optimizer: OptimizerConfig) -> dict[ParamKey, ParamGroupOverride]:
    """Return the head's own peak and final rate, in the form that Megatron-Core takes.

    Adam moves every weight by about its rate: at the rate of a trained model a head that begins random stays random.
    """
    final = optimizer.head_lr * optimizer.min_lr / optimizer.lr
    return {ParamKey(name="*contrastive_head*"): ParamGroupOverride(max_lr=optimizer.head_lr, min_lr=final)}


def make_schedule(optimizer: Any, config: OptimizerConfig, *, num_updates: int) -> OptimizerParamScheduler:
    """Return the learning rate's schedule. A decay reaches min_lr one update after the last, which would be wasted."""
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=min(config.warmup_steps, num_updates),
        lr_decay_steps=num_updates + 1,
        lr_decay_style=config.schedule,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )


def load_state(optimizer: Any, schedule: OptimizerParamScheduler, state: Any, *, num_updates: int) -> None:
    """Load the optimizer's saved state, and put the configuration's schedule where it is after so many updates.

    Rates, decay and betas stay those of the configuration, so that a run can be resumed with others and with another
    number of steps. With equal ones nothing differs from the run that was saved.
    """
    own = [{key: group[key] for key in _RATES if key in group} for group in optimizer.param_groups]
    # Megatron finds a saved group, that of the head or one of the model, by its saved rates.
    saved = {group["default_config"]: group for group in _parameter_groups(state)}
    for group in optimizer.param_groups:
        theirs = saved.get(group["default_config"], {})
        group.update({key: theirs[key] for key in _IDENTIFYING if key in theirs})
    optimizer.load_state_dict(state)
    for group, rates in zip(optimizer.param_groups, own, strict=True):
        group.update(rates)
    schedule.num_steps = num_updates
    schedule.step(increment=0)


def _parameter_groups(state: Any) -> Iterator[dict[str, Any]]:
    """Yield the parameter groups in a saved state of Megatron's optimizer, which may be a chain of optimizers."""
    if isinstance(state, dict) and "default_config" in state:
        yield state
    elif isinstance(state, dict | list):
        for part in state.values() if isinstance(state, dict) else state:
            yield from _parameter_groups(part)
