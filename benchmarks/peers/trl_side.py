"""Take GRPO steps with TRL on given prompts; print seconds and peak memory as JSON. Run by trl_step.py, in TRL's
environment, with a JSON object as its only argument: model, dtype, prompts, samples, response_tokens, learning_rate,
kl_weight, threads. Imports nothing of this project.
"""

import json
import random
import resource
import sys
import time
from itertools import pairwise
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

ROLLOUTS_AT_ONCE = 8
"""Sequences in a forward and backward pass; gradients are accumulated over the passes of a step."""


class Seconds(TrainerCallback):
    """Notes when each optimizer step ends."""

    def __init__(self) -> None:
        self.ends = [time.perf_counter()]

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())


def main(task: dict[str, Any]) -> None:
    torch.set_num_threads(task["threads"])
    tokenizer = AutoTokenizer.from_pretrained(task["model"])
    rollouts = len(task["prompts"][0]) * task["samples"]
    seconds = Seconds()
    length = task["response_tokens"]
    settings = GRPOConfig(
        output_dir="unused",
        use_cpu=True,
        bf16=task["dtype"] == "bf16",
        max_steps=len(task["prompts"]),
        per_device_train_batch_size=ROLLOUTS_AT_ONCE,
        gradient_accumulation_steps=rollouts // ROLLOUTS_AT_ONCE,
        num_generations=task["samples"],
        max_completion_length=length,
        generation_kwargs={"min_new_tokens": length},
        beta=task["kl_weight"],
        learning_rate=task["learning_rate"],
        gradient_checkpointing=False,
        shuffle_dataset=False,
        model_init_kwargs={"dtype": "bfloat16" if task["dtype"] == "bf16" else "float32"},
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    draw = random.Random(0)

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(draw.random() < 0.5) for _ in completions]

    trainer = GRPOTrainer(
        model=task["model"],
        reward_funcs=reward,
        args=settings,
        train_dataset=Dataset.from_dict({"prompt": [text for step in task["prompts"] for text in step]}),
        processing_class=tokenizer,
        callbacks=[seconds],
    )
    seconds.ends = [time.perf_counter()]
    trainer.train()
    steps = [end - start for start, end in pairwise(seconds.ends)]
    print(
        json.dumps(
            {
                "seconds": steps,
                "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
                "prompt_tokens": [[len(tokenizer(text).input_ids) for text in step] for step in task["prompts"]],
            }
        )
    )


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
