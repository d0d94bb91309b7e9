"""Read the tokenizer and all data of a configuration as a start does, without ranks or weights: what is wrong?"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from transformers import PreTrainedTokenizerBase

from megatron_mcpo.config.config import Config
from megatron_mcpo.config.model import ModelConfig
from megatron_mcpo.data.domains import Inspection, inspect_domains, token_problems
from megatron_mcpo.data.generators import CACHE
from megatron_mcpo.data.tokenizer import check_config, load_tokenizer, stop_token_ids
from megatron_mcpo.storage.run_items import Split


@dataclass(frozen=True, kw_only=True)
class ModelTokens:
    """The tokenizer of a model, and the tokens that end a response."""

    tokenizer: PreTrainedTokenizerBase
    stop_token_ids: tuple[int, ...]


def read_tokens(config: Config, model: ModelConfig) -> ModelTokens:
    """Return the tokens of the model. Raises ConfigError where its folder can't be used."""
    check_config(Path(config.model.path))
    tokenizer = load_tokenizer(config)
    return ModelTokens(tokenizer=tokenizer, stop_token_ids=stop_token_ids(model, tokenizer))


def inspect(
    config: Config, model: ModelConfig, *, splits: Mapping[str, Split] = MappingProxyType({})
) -> tuple[Inspection, list[str]]:
    """Return what was read, and all problems for which a run would be refused. splits: see `inspect_domains`

    Raises ConfigError where the model's folder can't be used or data can't be read at all.
    """
    tokenizer = read_tokens(config, model).tokenizer
    inspection = inspect_domains(config, tokenizer, cache_dir=CACHE, splits=splits)
    return inspection, inspection.problems + token_problems(inspection.domains, tokenizer, model.vocab_size)
