"""Small real things that several tests share: Hugging Face folders of random models, configurations, rollouts."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from megatron_mcpo.config import Config
from megatron_mcpo.types import Completion, Prompt, RolloutGroup, StopReason

VOCAB = 97  # divides over no number of ranks: the padding must not take part
HIDDEN = 72  # divides over 4 heads and over 9


def save_model(
    folder: Path, *, tied: bool, num_layers: int = 4, num_heads: int = 4, num_kv_heads: int = 2, seed: int = 0
) -> PreTrainedModel:
    """A random model in fp32: Llama with tied embeddings, Qwen3 with untied ones."""
    shape: dict[str, Any] = dict(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=0,
    )
    torch.manual_seed(seed)
    config: PretrainedConfig = LlamaConfig(**shape) if tied else Qwen3Config(head_dim=16, **shape)
    model: PreTrainedModel = LlamaForCausalLM(config) if tied else Qwen3ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter)) if parameter.dim() == 1 else parameter.mul_(3.0)
    model.save_pretrained(folder)
    return model


def config(folder: Path, **sections: dict[str, Any]) -> Config:
    """A configuration around a model folder; keyword arguments replace keys of whole sections."""
    values: dict[str, Any] = {
        "run": {"steps": 4},
        "model": {"path": str(folder), "dtype": "fp32"},
        "batch": {"prompts": 6, "samples": 3},
        "optimizer": {"lr": 1e-3},
        "contrastive": {"dim": 16},
        "domain": [{"name": name, "sources": [{"generator": "chain_sum"}]} for name in ("red", "green", "blue")],
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return Config.model_validate(values)


def rollout_groups(*, num_prompts: int, num_samples: int, seed: int = 0) -> list[RolloutGroup]:
    """Groups of random tokens of uneven lengths over three domains, with mixed outcomes."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(low: int, high: int) -> tuple[int, ...]:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return tuple(torch.randint(0, VOCAB, (length,), generator=generator).tolist())

    groups = []
    for number in range(num_prompts):
        completions = []
        for _ in range(num_samples):
            ids = tokens(1, 9)
            logprobs = (-3 - 2 * torch.rand(len(ids), generator=generator)).tolist()
            completions.append(
                Completion(token_ids=ids, logprobs=tuple(logprobs), stop_reason=StopReason.STOP, version=0)
            )
        rewards = torch.randint(0, 2, (num_samples,), generator=generator).tolist()
        prompt = Prompt(domain=number % 3, source="random", index=number, token_ids=tokens(3, 20), entry={})
        groups.append(
            RolloutGroup(prompt=prompt, completions=tuple(completions), rewards=tuple(float(r) for r in rewards))
        )
    return groups


CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}<eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SPECIALS = ["<pad>", "<eos>", "<system>", "<user>", "<assistant>"]


def save_chat_model(folder: Path, *, warm_steps: int = 120) -> None:
    """A model of 100 thousand parameters that reads characters and answers any question with one random digit."""
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
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocab),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=1,
        )
    )
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
    model.save_pretrained(folder)
