"""Turn items into prompts: system message, few-shot examples and instruction around a question, as token ids."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from megatron_mcpo.config.domain_schema import DomainConfig
from megatron_mcpo.data.item_pools import Pool
from megatron_mcpo.data.rows import Item, Message, RowError
from megatron_mcpo.data.tokenizer import is_failure, time_limit
from megatron_mcpo.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH = 1024
_RENDER_SECONDS = 120.0
_ENCODE_SECONDS = 120.0
_ENCODE_CHARACTERS_PER_SECOND = 10_000.0
"""How long a batch of prompts may take, at rates that are a hundredth of the usual ones or less."""


class PromptMaker:
    """The maker of one domain's prompts."""

    def __init__(
        self,
        domain: DomainConfig,
        index: int,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        max_tokens: int,
        template_values: Mapping[str, Any],
    ):
        """Keep the parts.

        index: position of the domain in the configuration
        max_tokens: rollout.max_prompt_tokens
        template_values: data.chat_template_kwargs
        """
        self._domain = domain
        self._index = index
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._template_values = template_values
        # One object a token id, whatever the number of prompts: eight bytes a token instead of forty.
        self._ids: dict[int, int] = {}

    def prompts(self, pool: Pool, items: Sequence[Item], shots: Sequence[Item]) -> Iterator[Prompt]:
        """Yield the prompt of every item that is short enough, in order; count the others in the pool's statistics."""
        for start in range(0, len(items), _BATCH):
            batch = items[start : start + _BATCH]
            with time_limit(_RENDER_SECONDS, f"{pool.row_statistics.where}: the chat template"):
                texts = [self._text(pool, item, shots) for item in batch]
            written = [(item, text) for item, text in zip(batch, texts, strict=True) if text is not None]
            for item, ids in self._encode(pool, written):
                if len(ids) <= self._max_tokens:
                    yield self._prompt(pool, item, ids)
                    continue
                text = f"has {len(ids)} tokens as a prompt, rollout.max_prompt_tokens allows {self._max_tokens}"
                pool.row_statistics.leave_out(item.position, RowError("too long", text))

    def _prompt(self, pool: Pool, item: Item, ids: Sequence[int]) -> Prompt:
        return Prompt(
            domain=self._index,
            source=pool.name,
            index=item.position,
            token_ids=tuple(map(self._ids.setdefault, ids, ids)),
            entry=item.entry,
        )

    def _encode(self, pool: Pool, written: Sequence[tuple[Item, str]]) -> list[tuple[Item, Sequence[int]]]:
        """Return the token ids of every prompt, in order; count those for which the tokenizer fails as bad rows."""
        items, texts = [item for item, _ in written], [text for _, text in written]
        seconds = _ENCODE_SECONDS + sum(map(len, texts)) / _ENCODE_CHARACTERS_PER_SECOND
        with time_limit(seconds, f"{pool.row_statistics.where}: the tokenizer"):
            together = self._token_ids(texts)
            if not isinstance(together, BaseException):
                return list(zip(items, together, strict=True))
            alone = [(item, self._token_ids([text])) for item, text in written]  # to find the rows
        encoded = []
        for item, ids in alone:
            if isinstance(ids, BaseException):
                error = RowError("malformed", f"makes the tokenizer fail: {ids}")
                pool.row_statistics.leave_out(item.position, error)
            else:
                encoded.append((item, ids[0]))
        return encoded

    def _token_ids(self, texts: list[str]) -> list[Sequence[int]] | BaseException:
        """Return the token ids of texts, or why the tokenizer fails for one of them."""
        if not texts:
            return []
        try:
            encoded = self._tokenizer(texts, add_special_tokens=False, return_attention_mask=False)
        except BaseException as error:
            if is_failure(error):
                return error
            raise
        return list(encoded["input_ids"])

    def _text(self, pool: Pool, item: Item, shots: Sequence[Item]) -> str | None:
        """Return the prompt as text; None where the model's chat template refuses such a conversation."""
        messages = self._messages(item, shots)
        try:
            text = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **self._template_values
            )
            return str(text)
        except TemplateError as error:
            pool.row_statistics.leave_out(
                item.position, RowError("malformed", f"is refused by the chat template: {error}")
            )
            return None
        except Exception as error:  # whatever an expression in the template does
            text = f"makes the chat template fail: {type(error).__name__}: {error}"
            pool.row_statistics.leave_out(item.position, RowError("malformed", text))
            return None

    def _messages(self, item: Item, shots: Sequence[Item]) -> list[Message]:
        """Return the conversation with few-shot examples; an item's own system message replaces the domain's."""
        system, turns = _parted(item)
        if not system and self._domain.system:
            system = [{"role": "system", "content": self._domain.system}]
        messages = list(system)
        for shot in shots:
            assert shot.answer is not None
            messages += self._instructed(_parted(shot)[1])
            messages.append({"role": "assistant", "content": shot.answer.strip()})
        return messages + self._instructed(turns)

    def _instructed(self, turns: Sequence[Message]) -> list[Message]:
        if not self._domain.instruction:
            return list(turns)
        question = f"{turns[-1]['content']}\n{self._domain.instruction}"
        return [*turns[:-1], {"role": "user", "content": question.strip()}]


def choose_shots(items: Sequence[Item], num: int) -> list[Item]:
    """Return the first `num` items with an answer, different answers where possible; fewer where too few have one.

    Two examples that are answered "Yes" would teach to say "Yes".
    """
    answers: set[str] = set()
    novel: list[Item] = []
    repeated: list[Item] = []
    for item in items:
        if len(novel) >= num:
            break
        if item.answer is not None:
            (repeated if item.answer in answers else novel).append(item)
            answers.add(item.answer)
    return (novel + repeated)[:num]


def _parted(item: Item) -> tuple[list[Message], list[Message]]:
    """Return the item's own system message, if any, and its turns."""
    first = item.messages[0]["role"] == "system"
    return list(item.messages[:first]), list(item.messages[first:])
