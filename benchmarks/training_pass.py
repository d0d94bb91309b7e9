"""Time forward and backward of this trainer beside transformers' (sdpa attention), on the same tokens in one run.

`.venv/bin/python -m benchmarks.training_pass [--json] [--out benchmarks/results/NAME.json]`
The quick start's model in the dtype that this CPU multiplies fastest. Both compute the gradient of the mean log-prob of
the responses with respect to all weights; ours packs the sequences, transformers pads them to the longest. Without a
head, an optimizer or shared prompts. The two take turns, and the least time of each counts.
"""

import random
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.measure import ROOT, options, timed, write_rows
from megatron_mcpo.config.config import Config, load
from megatron_mcpo.config.hf_config import from_folder
from megatron_mcpo.config.layout import Layout
from megatron_mcpo.data.batch import make_batch
from megatron_mcpo.distributed import cpu_bf16, parallel
from megatron_mcpo.mcore.policy import LossInput, Policy
from megatron_mcpo.types import Completion, Prompt, RolloutGroup, StopReason, TrainBatch

PROMPT = 16
REPEATS = 2
CASES: dict[str, tuple[int, ...]] = {
    "1 x 256": (256,),
    "4 x 256": (256,) * 4,
    "1 x 1,024": (1024,),
    "4 x 64 to 448": (64, 192, 320, 448),
}
"""Sequences and their tokens, of which all but PROMPT are the response."""
_SETTINGS = (
    *("--contrastive.cross_domain_weight=0", "--contrastive.in_domain_weight=0"),
    *(f"--batch.micro_batch_tokens={max(map(sum, CASES.values()))}", "--rollout.temperature=1"),
)


def main(arguments: Sequence[str]) -> int:
    return write_rows("training_pass", rows(), options(__doc__).parse_args(arguments))


def rows() -> Iterator[dict[str, Any]]:
    """Yield a row per case. gradients: of the embedding, their largest difference relative to the largest entry"""
    config = load(ROOT / "examples" / "quickstart" / "config.toml", _SETTINGS)
    cpu_bf16.apply()
    groups = parallel.init(Layout(), seed=0, timeout_seconds=600)
    ours, theirs = _Ours(config, groups), _Theirs(config)
    for name, lengths in CASES.items():
        sequences = _sequences(lengths)
        ours.prepare(sequences)
        theirs.prepare(sequences)
        seconds = [(timed(ours.step), timed(theirs.step)) for _ in range(1 + REPEATS)][1:]
        mine, other = (min(each) for each in zip(*seconds, strict=True))
        expected = theirs.gradient()
        yield {
            "case": name,
            "dtype": config.model.dtype,
            "tokens": sum(lengths),
            "seconds_ours": round(mine, 3),
            "seconds_transformers": round(other, 3),
            "ratio": round(other / mine, 2),
            "gradients": float((ours.gradient() - expected).abs().max() / expected.abs().max()),
            "threads": torch.get_num_threads(),
        }
    parallel.destroy()


def _sequences(lengths: Sequence[int]) -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(100, 40_000) for _ in range(length)] for length in lengths]


class _Ours:
    """The policy of a run without contrastive terms, packed as in a step."""

    def __init__(self, config: Config, groups: parallel.Groups):
        self._policy = Policy(config, from_folder(ROOT / config.model.path), groups)
        self._batch: TrainBatch | None = None

    def prepare(self, sequences: Sequence[Sequence[int]]) -> None:
        rollouts = [
            RolloutGroup(
                prompt=Prompt(domain=0, source="made up", index=number, token_ids=tuple(tokens[:PROMPT]), entry={}),
                completions=(_completion(tokens[PROMPT:]),),
                rewards=(0.0,),
                correct=(False,),
            )
            for number, tokens in enumerate(sequences)
        ]
        self._batch = make_batch(rollouts, num_data_ranks=1, data_rank=0, share_prompts=False)
        self._num_tokens = sum(len(tokens) - PROMPT for tokens in sequences)

    def step(self) -> None:
        assert self._batch is not None
        self._policy.backward(self._batch, self._loss)

    def gradient(self) -> Tensor:
        parameters = dict(self._policy.chunks[0].named_parameters())
        found = next(each for name, each in parameters.items() if name.endswith("word_embeddings.weight"))
        gradient: Tensor = found.main_grad
        return gradient

    def _loss(self, given: LossInput) -> tuple[Tensor, dict[str, Tensor]]:
        return -given.logp_r.sum() / self._num_tokens, {}


class _Theirs:
    """The model of transformers in training mode, with padded sequences."""

    def __init__(self, config: Config):
        dtype = torch.bfloat16 if config.model.dtype == "bf16" else torch.float32
        self._model = AutoModelForCausalLM.from_pretrained(
            ROOT / config.model.path, dtype=dtype, attn_implementation="sdpa"
        ).train()

    def prepare(self, sequences: Sequence[Sequence[int]]) -> None:
        longest = max(map(len, sequences))
        self._ids = torch.tensor([[*tokens, *[0] * (longest - len(tokens))] for tokens in sequences])
        self._mask = torch.tensor([[1] * len(tokens) + [0] * (longest - len(tokens)) for tokens in sequences])

    def step(self) -> None:
        self._model.zero_grad(set_to_none=False)
        logits = self._model(input_ids=self._ids, attention_mask=self._mask, use_cache=False).logits
        logp = logits[:, PROMPT - 1 : -1].float().log_softmax(-1)
        logp = logp.gather(-1, self._ids[:, PROMPT:, None])[..., 0]
        counted = self._mask[:, PROMPT:]
        (-(logp * counted).sum() / counted.sum()).backward()

    def gradient(self) -> Tensor:
        gradient: Tensor = self._model.get_input_embeddings().weight.grad
        return gradient


def _completion(tokens: Sequence[int]) -> Completion:
    return Completion(
        token_ids=tuple(tokens),
        logprobs=(-10.0,) * len(tokens),
        stop_reason=StopReason.LENGTH,
        versions=(0,) * len(tokens),
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
