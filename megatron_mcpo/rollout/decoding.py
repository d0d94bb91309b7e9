"""Turn the tokens of completions into the texts that verifiers get."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_mcpo.rewards.thoughts import is_tag, opened_thoughts
from megatron_mcpo.types import Completion, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LONGEST_TAG = 32
"""Tokens at the end of a prompt in which a tag is looked for; one with a token per character takes fewer."""


class ResponseDecoder:
    """The decoder of one model's responses, which keeps the tags of thoughts and answers."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        self._tokenizer = tokenizer
        special = {n: str(token) for n, token in tokenizer.added_tokens_decoder.items() if token.special}
        special |= dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
        # Some vocabularies have <think> as a special token, which decoding would drop.
        self._dropped = {n for n, token in special.items() if not is_tag(token)}

    def texts(self, prompt: Prompt, completions: Sequence[Completion]) -> list[str]:
        """Return the text of every completion, without special tokens other than the tags.

        Where the chat template has opened the thoughts in the prompt, the texts begin with that tag: a response that
        is <think>...</think> for one model is for the other too.
        """
        [end, *texts] = self._decode([prompt.token_ids[-_LONGEST_TAG:], *(c.token_ids for c in completions)])
        opened = opened_thoughts(end)
        return [opened + text for text in texts]

    def _decode(self, sequences: Sequence[Sequence[int]]) -> list[str]:
        kept = [[n for n in sequence if n not in self._dropped] for sequence in sequences]
        return [str(text) for text in self._tokenizer.batch_decode(kept, skip_special_tokens=False)]
