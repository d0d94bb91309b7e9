r"""Find which option of a multiple choice a text states. Standard library only; no text takes more than linear time."""

import re

from megatron_mcpo.rewards.boxes import last_boxed

_SPACE_AND_WORD = (
    r"(?:\s++(?:think|believe|say|mean|claim|sure|clear|certain|true|case|that|the|correct|right|final|my))"
)
# A statement: "the answer is (B)", "Answer: B", "final **answer**: B". It does not count where it is denied or assumed:
# "I don't think that the answer is B", "if the answer is B", "a wrong answer is B".
_STATEMENT = re.compile(
    rf"(?P<denied>(?:n['’]t|\bnot|\bnever|\bdoubt|\bif|\bwhether){_SPACE_AND_WORD}{{0,5}}+\s++|\b(?:wrong|incorrect)\s++)?"
    r"\banswer\b\*{0,3}(?:\s+is\b(?:\s*:)?|\s*:)\s*",
    re.IGNORECASE,
)
_UNWRAP = r"\\(?:text|textbf|textit|textrm|mathrm|mathbf)\s*\{"
# Possessive: two in a row would try every way to share the text out.
_MARKUP = rf"(?:[\s*_$\"'`\[]|{_UNWRAP}|\\[(\[])*+"
# Words that follow an option, and never the article A or the pronoun I: "the answer is A because ..."
_CONTINUES = (
    r"(?:as|because|but|by|due|for|from|given|if|in|is|not|on|or|and|since|so|than|that|to|when|where|which|with|I)"
)
_A_WORD = re.compile(rf"[ \t]+(?!{_CONTINUES}(?![\w-]))\w")
_LABEL = re.compile(
    rf"{_MARKUP}(?:(?i:option|choice)\b{_MARKUP})?"
    rf"(?:\(\s*(?P<bracketed>[A-Za-z])\s*\)|(?P<bare>[A-Z])(?![\w'’])"
    rf"|(?P<small>[a-z])(?={_MARKUP}(?:[].):,;/&+}}]|\\[)\]]|(?:or|and)\b|$)))",
)
_ANOTHER = re.compile(
    rf"(?:[)}}\].:*$]*+{_MARKUP}\(?(?:,|/|&|\+|\bor\b|\band\b){_MARKUP}"
    rf"(?:(?:or|and|maybe|perhaps|possibly|also|even|either)\b{_MARKUP})*+"
    rf"\(?(?P<letter>[A-Za-z])(?![\w'’])|[ \t]+(?:\((?P<bracketed>[A-Za-z])\)|(?P<bare>[A-Z])(?![\w'’-])))"
)
_WRAPPED = re.compile(rf"\s*{_UNWRAP}([^{{}}]*)\}}\s*")
_OTHER_LABEL = re.compile(r"(?<![\w])\(?[A-Z][).:](?!\w)")


def stated_letter(text: str) -> str | None:
    r"""Return the letter, A to Z, that a text states; None where it states none or several.

    The letter is the last of: the last \boxed{...}, and what follows "answer is" or "answer:" wherever a letter does
    and the statement is not denied. Without any, the whole text must be a letter or an option.
    A bare A or I is a word of the language where it is followed, in its line, by another word, unless that word can
    only follow an option (because, since, is, ...): "A because" is option A, "A bank" is not. A small letter needs a
    bracket or a mark of punctuation. So the a of "B, a bank" is not a second option.
    """
    boxed = last_boxed(text)
    for statement in reversed(list(_STATEMENT.finditer(text))):
        if boxed is not None and boxed[0] >= statement.start():
            break
        letters = set() if statement["denied"] else _letters_at(text, statement.end())
        if letters:
            return letters.pop() if len(letters) == 1 else None
    return _letter_alone(text if boxed is None else boxed[1])


def _letter_alone(value: str) -> str | None:
    """Return the letter of a text that is one letter, or an option with its letter in front."""
    while wrapped := _WRAPPED.fullmatch(value):
        value = wrapped[1]
    label = _LABEL.match(value)
    if label is None:
        return None
    rest = value[label.end() :]
    if not rest.strip(" \t\n\r*_$\"'`.):]}\\"):
        return _letter(label)
    is_option = label["bracketed"] or rest[0] in ".):"
    letters = _letters_at(value, 0) if is_option and not _OTHER_LABEL.search(rest) else set()
    return letters.pop() if len(letters) == 1 else None


def _letters_at(value: str, start: int) -> set[str]:
    """Return the options that a text offers at `start`: none, one, or as in "B or C" several."""
    label = _LABEL.match(value, start)
    if label is None:
        return set()
    letters, end = {_letter(label)}, label.end()
    while another := _ANOTHER.match(value, end):
        letter, end = another["letter"] or another["bracketed"] or another["bare"], another.end()
        if not another["bracketed"] and letter in "aAiI" and _A_WORD.match(value, end):
            break
        letters.add(letter.upper())
    is_word = label["bare"] in ("A", "I") and len(letters) == 1 and _A_WORD.match(value, label.end())
    return set() if is_word else letters


def _letter(label: re.Match[str]) -> str:
    return (label["bracketed"] or label["bare"] or label["small"]).upper()
