"""A small real model that chats, for tests of the whole program. `python tests/tiny.py` trains it again.

Training it where it is needed would make it another model on every kind of processor, and with it all that a test
samples from it.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tests.support.paths import DATA

CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}<eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SPECIALS = ["<pad>", "<eos>", "<system>", "<user>", "<assistant>"]
CHARACTERS = [chr(code) for code in range(32, 127)] + ["\n"]
VOCAB = {token: number for number, token in enumerate(SPECIALS + CHARACTERS)}


def save_chat_model(folder: Path, *, experts: bool = False, trained: bool = True, spread: float = 0.0) -> None:
    """Write a model of 100 thousand parameters that reads characters and answers any question with one random digit.

    experts: a Qwen3-MoE model; else a Llama model with tied embeddings
    trained: False for a random model, which answers with any characters
    spread: of random numbers that are added to all weights, so that a random model's logits are apart
    """
    save_chat_tokenizer(folder)
    model = _random_model(experts=experts)
    if trained:
        model.load_state_dict({name: tensor.float() for name, tensor in load_file(_trained(experts)).items()})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(spread * torch.randn_like(parameter))
    model.save_pretrained(folder)


def save_chat_tokenizer(folder: Path) -> None:
    """Write a tokenizer that has a token per character, with a chat template."""
    tokenizer = Tokenizer(models.WordLevel(VOCAB, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(SPECIALS)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)


def _trained(experts: bool) -> Path:
    return DATA / f"chat_{'experts' if experts else 'dense'}.safetensors"


def _random_model(*, experts: bool) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(
        vocab_size=len(VOCAB),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=1,
    )
    if experts:
        mixture: dict[str, Any] = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, head_dim=32)
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **mixture))
    return LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True))


def train(*, experts: bool, steps: int) -> None:
    """Train a model to answer with any one digit, and keep its weights in bf16 beside the tests."""
    model = _random_model(experts=experts)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        question = torch.randint(5, len(VOCAB), (32, 24))
        digit = torch.randint(VOCAB["0"], VOCAB["9"] + 1, (32, 1))
        ids = torch.cat([question, torch.full((32, 1), VOCAB["<assistant>"]), digit, torch.full((32, 1), 1)], 1)
        labels = ids.clone()
        labels[:, :25] = -100
        loss = model(ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save_file({name: tensor.bfloat16().clone() for name, tensor in model.state_dict().items()}, _trained(experts))


if __name__ == "__main__":
    train(experts=False, steps=120)
    train(experts=True, steps=40)
