"""Make the data and the small model of the study's level A, which half knows its domains.

`.venv/bin/python -m benchmarks.study.pretrain` writes .cache/study/data/DOMAIN.jsonl and DOMAIN_held_out.jsonl, and the
Hugging Face folder benchmarks/study/model where it is not there. The folder is part of the repository, since another
kind of processor would make another model; --again makes a new one in a quarter of an hour on one core. The model is
trained on the responses of the half-knowing writer (knowledge.py). So it is this writer that determines how often the
model is right when it is sampled, and not the moment at which training ends.
"""

import argparse
import json
import random
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from transformers.utils import logging

from benchmarks.measure import ROOT
from benchmarks.study.domains import DOMAINS, Example, StudyDomain
from benchmarks.study.tokens import EOS, RESPOND, make_tokenizer
from megatron_mcpo.rewards.answers import exact

DATA = ROOT / ".cache" / "study" / "data"
MODEL = Path(__file__).resolve().parent / "model"
TRAIN_ITEMS, HELD_OUT_ITEMS = 2000, 100
ACCURACY = (0.2, 0.5)
"""What the sampled accuracy of every domain must lie in after pretraining: groups of 8 samples are then mixed."""
_SEED = 16
_STEPS, _BATCH, _LR, _WARMUP = 900, 48, 1e-3, 50
_LONGEST = 48


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study.pretrain",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--again", action="store_true", help="make the model again, from the same seed")
    again = parser.parse_args(arguments).again
    items = {domain.name: items_of(domain) for domain in DOMAINS}
    held_out = {name: examples[:HELD_OUT_ITEMS] for name, examples in items.items()}
    for name, examples in items.items():
        write_rows(DATA / f"{name}.jsonl", examples[HELD_OUT_ITEMS:])
        write_rows(DATA / f"{name}_held_out.jsonl", held_out[name])
    if MODEL.is_dir() and not again:
        print(f"{MODEL} is there; the data is written to {DATA}")
        return 0
    torch.manual_seed(_SEED)
    logging.disable_progress_bar()
    texts = [text for examples in items.values() for e in examples for text in (e.question, e.response)]
    tokenizer = make_tokenizer(texts)
    model = make_model(tokenizer)
    train(model, tokenizer, writings({e.question for examples in held_out.values() for e in examples}))
    reached = {name: accuracy(model, tokenizer, examples) for name, examples in held_out.items()}
    print("held-out accuracy, sampled at temperature 1: " + ", ".join(f"{n} {a:.2f}" for n, a in reached.items()))
    if not all(ACCURACY[0] <= value <= ACCURACY[1] for value in reached.values()):
        print(f"accuracy: must lie in {ACCURACY} in every domain (else groups are seldom mixed). Nothing was saved.")
        return 1
    save(model, tokenizer, MODEL)
    return 0


def items_of(domain: StudyDomain) -> list[Example]:
    """Return the held-out items of a domain and then its training items, all with different questions."""
    return list(islice(domain.distinct(random.Random(f"{_SEED}/{domain.name}")), HELD_OUT_ITEMS + TRAIN_ITEMS))


def write_rows(path: Path, examples: list[Example]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.dumps({"question": example.question, "answer": example.answer}) for example in examples]
    path.write_text("\n".join(rows) + "\n")


def writings(left_out: set[str]) -> Iterator[Example]:
    """Yield what the half-knowing writer writes, one domain after the other, without the questions in `left_out`."""
    rng = random.Random(_SEED)
    while True:
        examples = [domain.example(rng, half_known=True) for domain in DOMAINS]
        yield from (example for example in examples if example.question not in left_out)


def make_model(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """Return a random Llama model of 3 million parameters."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, examples: Iterator[Example]) -> None:
    """Train with Adam on the tokens of the responses, in fp32, which every CPU multiplies at full speed.

    The rate rises linearly for _WARMUP steps, and falls linearly to 0 in the second half.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LR, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / _WARMUP, 1.0, 2 * (_STEPS - step) / _STEPS)
    )
    start = time.monotonic()
    losses = []
    for step in range(1, _STEPS + 1):
        batch = encode(tokenizer, list(islice(examples, _BATCH)))
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 50 == 0:
            mean = statistics.fmean(losses[-50:])
            print(f"pretraining step {step}: loss {mean:.3f}, {time.monotonic() - start:.0f} s", flush=True)


def encode(tokenizer: PreTrainedTokenizerBase, examples: list[Example]) -> Mapping[str, Tensor]:
    """Return input_ids, attention_mask and labels [examples, longest]; questions and padding have the label -100."""
    texts = [f"{example.question}{RESPOND}{example.response}{EOS}" for example in examples]
    batch = tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
    ids = batch["input_ids"]
    is_response = (ids == tokenizer.convert_tokens_to_ids(RESPOND)).cumsum(1) - (
        ids == tokenizer.convert_tokens_to_ids(RESPOND)
    ).long()
    return {**batch, "labels": ids.masked_fill(~(is_response.bool() & batch["attention_mask"].bool()), -100)}


def accuracy(model: Any, tokenizer: PreTrainedTokenizerBase, examples: list[Example], *, samples: int = 4) -> float:
    """Return the mean score of responses that are sampled at temperature 1; the questions are equally long."""
    prompts = [f"{example.question}{RESPOND}" for example in examples for _ in range(samples)]
    ids = tokenizer(prompts, return_tensors="pt")["input_ids"]
    done = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, max_length=_LONGEST
    )
    texts = tokenizer.batch_decode(done[:, ids.shape[1] :], skip_special_tokens=True)
    answers = [example.answer for example in examples for _ in range(samples)]
    return statistics.fmean(exact({"answer": a}, text) for a, text in zip(answers, texts, strict=True))


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the folder as a whole, in bf16, in which it is trained further; an interruption leaves no half of it."""
    draft = folder.with_name(f"{folder.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    tokenizer.save_pretrained(draft)
    model.bfloat16().save_pretrained(draft)
    shutil.rmtree(folder, ignore_errors=True)
    draft.rename(folder)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
