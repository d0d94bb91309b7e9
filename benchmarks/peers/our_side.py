"""Take steps of this trainer with responses of a fixed length; print seconds, peak memory and prompts as JSON. Run by
trl_step.py with a JSON object as its only argument: overrides, steps, share_prompts.
"""

import json
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.measure import ROOT
from megatron_mcpo.config.config import Config, load
from megatron_mcpo.config.hf_config import from_folder
from megatron_mcpo.config.layout import Layout
from megatron_mcpo.data.stream import PromptStream
from megatron_mcpo.distributed import parallel
from megatron_mcpo.mcore.checkpoint import Checkpoints
from megatron_mcpo.mcore.policy import Policy, Reference
from megatron_mcpo.reporting.run_logger import RunLogger
from megatron_mcpo.trainer.parts import Inputs, Parts, build_parts, load_inputs
from megatron_mcpo.trainer.rollout_stream import RolloutStream
from megatron_mcpo.trainer.trainer import Trainer
from megatron_mcpo.types import RolloutGroup


def main(task: dict[str, Any]) -> None:
    config = load(ROOT / "examples" / "quickstart" / "config.toml", task["overrides"])
    model, layout = from_folder(Path(config.model.path)), Layout()
    # Without a token that ends a response, every response has the most tokens that it may have.
    inputs = replace(load_inputs(config, layout, model, run=None), stop_token_ids=())
    policy = Policy(config, model, inputs.groups)
    reference = Reference(config, model, inputs.groups) if config.algorithm.kl_weight > 0 else None
    logger = RunLogger(config, None, inputs.tokenizer, stop_token_ids=(), first_step=0, evaluated=False, verbose=False)
    with build_parts(config, model, inputs, policy, lambda _: None) as parts:
        trainer = _trainer(config, inputs, policy, reference, parts, logger)
        trainer.sync_weights(verify=False)
        steps = []
        with patch.object(Policy, "shares_prompts", task["share_prompts"]):
            for trainer.step in range(1, task["steps"] + 1):
                steps.append(_step(trainer, inputs))
    print(
        json.dumps(
            {
                "seconds": [step["seconds"] for step in steps],
                "phases": steps[-1]["phases"],
                "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
                "prompts": [step["prompts"] for step in steps],
                "prompt_tokens": [step["prompt_tokens"] for step in steps],
            }
        )
    )
    parallel.destroy()


def _trainer(
    config: Config, inputs: Inputs, policy: Policy, reference: Reference | None, parts: Parts, logger: RunLogger
) -> Trainer:
    """Put a trainer together that neither logs nor saves."""
    stream = PromptStream(inputs.domains, weights=[1.0] * len(inputs.domains), seed=0, data=config.data)
    checkpoints = Checkpoints(
        policy=policy,
        folder=Path("unused"),
        vocabulary="",
        assets={},
        keep=1,
        keep_every=0,
        in_background=False,
        say=lambda _: None,
    )
    return Trainer(
        config,
        groups=inputs.groups,
        policy=policy,
        reference=reference,
        engine=parts.engine,
        weight_sync=parts.weight_sync,
        collector=parts.collector,
        engine_check=parts.engine_check,
        rollouts=RolloutStream(config, parts.collector, stream, first_step=0),
        domains=inputs.domains,
        run_logger=logger,
        checkpoints=checkpoints,
        first_step=0,
    )


def _step(trainer: Trainer, inputs: Inputs) -> dict[str, Any]:
    """Take a step as Trainer.run does. Half of the rollouts count as correct, since no random response is."""
    trainer.seconds = {}
    start = time.perf_counter()
    groups = _rewarded(trainer.collect().groups)
    trainer.learn(trainer.score(groups))
    trainer.sync_weights(verify=False)
    return {
        "seconds": time.perf_counter() - start,
        "phases": {phase: round(seconds, 2) for phase, seconds in trainer.seconds.items()},
        "prompts": [inputs.tokenizer.decode(list(group.prompt.token_ids)) for group in groups],
        "prompt_tokens": [len(group.prompt.token_ids) for group in groups],
    }


def _rewarded(groups: Sequence[RolloutGroup]) -> list[RolloutGroup]:
    found = []
    for group in groups:
        correct = tuple(sample % 2 == 0 for sample in range(len(group.outlines)))
        found.append(replace(group, correct=correct, rewards=tuple(map(float, correct)), error=None))
    return found


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
