"""Load the tokenizer of a model's folder, and check that it and its chat template belong to the model.

Files of a tokenizer hold programs: a template may fail or loop, and a regular expression may take for ever.
"""

import inspect
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Timer
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError, TemplateSyntaxError

from megatron_mcpo.config.config import Config, ConfigError
from megatron_mcpo.config.model import ModelConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_QUESTION = "What is 2 + 3?"
_REFUSED = 2
"""The exit code of bad input, as in cli/options.py."""


def load_tokenizer(config: Config) -> "PreTrainedTokenizerBase":
    """Return the tokenizer of the model's folder.

    Raises ConfigError when it can't be read, when it has no chat template or several without a default, when the
    template fails for a plain question or leaves it out, and when it lacks a name of data.chat_template_kwargs.
    """
    from transformers import AutoTokenizer

    path = config.model.path
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # of any kind: files may hold anything, and libraries expect what they wrote
        raise ConfigError(
            [f"model.path = {path!r}: its tokenizer can't be read ({_reason(error)}); download it again"]
        ) from None
    if not tokenizer.chat_template:
        raise ConfigError([f"model.path = {path!r}: has no chat template; use an instruction-tuned model"])
    if problem := _template_problem(tokenizer):
        raise ConfigError([f"model.path = {path!r}: its chat template {problem}"])
    if problems := template_problems(tokenizer, config.data.chat_template_kwargs):
        raise ConfigError(problems)
    return tokenizer


def template_problems(tokenizer: "PreTrainedTokenizerBase", values: Mapping[str, Any]) -> list[str]:
    """Return a line for every name of data.chat_template_kwargs that the tokenizer's chat template does not take."""
    template = tokenizer.get_chat_template()
    reserved = {"messages", *inspect.signature(tokenizer.apply_chat_template).parameters}
    return [
        f"data.chat_template_kwargs.{name} = {values[name]!r}: must be a variable of the model's chat template "
        f"({'is set by the run' if name in reserved else 'it has no such name'}). Correct the name, or remove it"
        for name in values
        if name in reserved or not re.search(rf"\b{re.escape(name)}\b", template)
    ]


def check_config(folder: Path) -> None:
    """Check that transformers, which vLLM uses, can read config.json. Raises ConfigError if it can't."""
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # as above
        rule = f"transformers must be able to read config.json ({_reason(error)})"
        raise ConfigError([f"model.path = {str(folder)!r}: {rule}. Correct the field."]) from None


def stop_token_ids(model: ModelConfig, tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
    """Return the tokens that end a response: all that config.json, generation_config.json and the tokenizer name.

    Raises ConfigError where there is none, or where the tokenizer's is none of the model's.
    """
    own = tokenizer.eos_token_id
    if own is None and not model.eos_token_ids:
        rule = "eos_token_id must be in generation_config.json or config.json, or eos_token in tokenizer_config.json"
        raise ConfigError([f"{rule} (else no response would ever end). Set one of them."])
    if own is not None and own >= model.vocab_size:
        rule = f"must be below vocab_size = {model.vocab_size}, which the model's config.json states"
        fix = "Use the tokenizer that belongs to the model"
        raise ConfigError([f"the tokenizer's eos_token {tokenizer.eos_token!r}: its id {own} {rule}. {fix}."])
    return tuple(dict.fromkeys([*model.eos_token_ids, *([] if own is None else [own])]))


@contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """End the process with the exit code of bad input and a line on stderr if a block takes longer.

    Neither a template's loop nor a tokenizer's native code can be interrupted in another way. what: begins the line
    """

    def end() -> None:
        rule = f"must take less than {seconds:.0f} s (an endless loop, or an expression that backtracks)"
        print(f"{what}: {rule}. Use the tokenizer and chat template of another model.", file=sys.stderr, flush=True)
        os._exit(_REFUSED)

    timer = Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def is_failure(error: BaseException) -> bool:
    """Return whether an error comes from a tokenizer or template: any Exception, or a panic of a Rust library."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _template_problem(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """Return why no prompt can be made with a chat template; None where one can, or where rows have to tell."""
    try:
        with time_limit(60, "the chat template of the model"):
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": _QUESTION}], tokenize=False, add_generation_prompt=True
            )
    except TemplateSyntaxError as error:
        return f"can't be compiled ({_reason(error)}). Correct it, or download it again."
    except TemplateError:
        return None  # it may need a system message, which the rows have
    except Exception as error:  # whatever an expression in it does
        return f"fails for a plain question ({_reason(error)}). Correct it, or use another instruction-tuned model."
    if _QUESTION not in str(text):
        return f"leaves the question out (it gives {str(text)[:60]!r}). Correct it, or use another model."
    return None


def _reason(error: BaseException) -> str:
    """Return an error's type and text in one line, cut where it is long."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
