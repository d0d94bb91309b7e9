"""Make the tokenizer of the study's small model: a token is a word, a digit, a letter or a sign, with its blank."""

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, EOS, RESPOND = "<pad>", "<eos>", "<respond>"
SPECIALS = (PAD, EOS, RESPOND)
_TOKEN = r" ?\\boxed\{| ?[a-z]+| ?\S"
_CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}<eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<respond>{% endif %}"
)


def make_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose vocabulary is the tokens of `texts`, sorted, behind the special ones."""
    split = pre_tokenizers.Split(Regex(_TOKEN), "isolated")
    found = {token for text in texts for token, _ in split.pre_tokenize_str(text)}
    vocabulary = {token: number for number, token in enumerate([*SPECIALS, *sorted(found)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(list(SPECIALS))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD)
    fast.chat_template = _CHAT_TEMPLATE
    return fast
