"""A small real model that chats, for tests of the whole program."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}<eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SPECIALS = ["<pad>", "<eos>", "<system>", "<user>", "<assistant>"]


def save_chat_model(folder: Path, *, experts: bool = False, warm_steps: int = 120, spread: float = 0.0) -> None:
    """A model of 100 thousand parameters that reads characters and answers any question with one random digit.

    experts: a Qwen3-MoE model; else a Llama model with tied embeddings
    warm_steps: of training; a trained model is another one on every kind of processor, an untrained one is not
    spread: of random numbers that are added to all weights, so that an untrained model's logits are apart
    """
    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    vocab = {token: number for number, token in enumerate(SPECIALS + characters)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(SPECIALS)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)

    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(
        vocab_size=len(vocab),
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
        mixture: dict[str, Any] = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64)
        model: PreTrainedModel = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **mixture, head_dim=32))
    else:
        model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(warm_steps):
        question = torch.randint(5, len(vocab), (32, 24))
        digit = torch.randint(vocab["0"], vocab["9"] + 1, (32, 1))
        ids = torch.cat([question, torch.full((32, 1), vocab["<assistant>"]), digit, torch.full((32, 1), 1)], 1)
        labels = ids.clone()
        labels[:, :25] = -100
        loss = model(ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(spread * torch.randn_like(parameter))
    model.save_pretrained(folder)
