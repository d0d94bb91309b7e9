r"""Find which option of a multiple choice a text states. Standard library only; no text takes more than linear time."""

import re
import unicodedata

from megatron_mcpo.rewards.boxes import last_boxed

_OPTION = r"(?:correct|right|best|final|selected|chosen|my)\s+(?:option|choice)\b"
_SPACE_AND_WORD = (
    rf"(?:\s++(?!{_OPTION})"
    r"(?:think|believe|say|mean|claim|sure|clear|certain|true|case|that|the|correct|right|final|my))"
)
# Statements that do not count: "I don't think that the answer is B", "if the answer is B", "a wrong answer is B".
_DENIED = rf"(?:n['’]t|\bnot|\bnever|\bdoubt|\bif|\bwhether){_SPACE_AND_WORD}{{0,5}}+\s++|\b(?:wrong|incorrect)\s++"
# The names of an answer that must be linked to it: "the answer is (B)", "Answer: B", "final **answer**: B",
# {"answer": "B"}.
_NOUN = (
    r"(?:\b(?:answer(?:\s+(?:choice|option))?|Antwort|Lösung|réponse|reponse|respuesta|resposta|risposta|ответ|odpowiedź|antwoord)\b"
    rf"|\b{_OPTION}|\b(?:option|choice)(?=[\"']?\s*:)"
    r"|答案|答え|正解|解答|정답)"
)
_VERB = (
    r"(?:is|was|would\s+be|should\s+be|must\s+be|ist|est|es|é|è|это)(?!\w)"
    r"(?:\s+(?:clearly|definitely|therefore|thus|indeed|probably|actually)\b)?(?:\s*:)?"
)
_ALONE = r"[*_$(]{0,4}(?-i:[A-Z])[*_$).!]{0,4}[ \t]*$"
_LINK = (
    rf"(?:\*{{0,3}}|[\"'])(?:\s+{_VERB}|\s*[:=]|\s+[-–—]\s|[ \t]*\n|\s+(?={_ALONE})"
    r"|(?:应该是|應該是|是|为|為|应为|應為|选|選|は|은)\s*:?)\s*"
)
_STATEMENT = re.compile(
    rf"(?P<denied>{_DENIED})?(?:{_NOUN}{_LINK}|\bI(?:['’]ll|\s+will|\s+would)?\s+(?:choose|pick|select|go\s+with)\s+"
    r"|(?<![不未勿])(?:故|应|應|因此)?[选選](?![项項择擇])\s*:?\s*)",
    re.IGNORECASE | re.MULTILINE,
)
# "Option B is correct", "therefore, B is the right answer".
_NAMED = re.compile(
    rf"(?P<denied>{_DENIED}|\b(?:or|nor|and)\s++)?(?<![\w'’])(?:(?:option|choice|answer)\s+)?[*_$\"`]{{0,3}}"
    r"(?:\((?P<bracketed>[A-Za-z])\)|(?P<bare>(?-i:[A-Z])))[*_$\"`.)]{0,4}"
    r"\s+is\s+(?:(?:the|clearly|indeed|therefore|thus)\s+){0,2}(?:(?:correct|right|best)\s+)?"
    r"(?:answer|option|choice|correct|right)\b(?!\s+(?:only|if|or|that)\b)",
    re.IGNORECASE,
)
_FULL_WIDTH = re.compile("[！-～]")
_UNWRAP = r"\\(?:text|textbf|textit|textrm|mathrm|mathbf)\s*\{"
# Possessive: two in a row would try every way to share the text out.
_MARKUP = rf"(?:[\s*_$\"'‘`\[{{]|{_UNWRAP}|\\[(\[])*+"
# Words that follow an option, and never the article A or the pronoun I: "the answer is A because ..."
_CONTINUES = (
    r"(?:as|because|but|by|due|for|from|given|if|in|is|not|on|or|and|since|so|than|that|to|when|where|which|with|I)"
)
_A_WORD = re.compile(rf"[ \t]+(?!{_CONTINUES}(?![\w-]))\w")
_LETTER = r"[^\W\u3040-\u9fff\uac00-\ud7af]"  # of a word that goes on; Chinese and Japanese write without blanks
_LABEL = re.compile(
    rf"{_MARKUP}(?:(?i:option|choice)\b{_MARKUP})?"
    rf"(?:\(\s*(?P<bracketed>[A-Za-z])\s*\)|(?<=['‘])(?P<quoted>[A-Z])(?=['’])|(?P<bare>[A-Z])(?!{_LETTER}|['’])"
    rf"|(?P<small>[a-z])(?={_MARKUP}(?:[].):,;/&+}}]|\\[)\]]|(?:or|and)\b|$)))",
)
_ANOTHER = re.compile(
    rf"(?:[)}}\].:*$]*+{_MARKUP}\(?(?:,|/|&|\+|\bor\b|\band\b){_MARKUP}"
    rf"(?:(?:or|and|maybe|perhaps|possibly|also|even|either)\b{_MARKUP})*+"
    rf"\(?(?P<letter>[A-Za-z])(?![\w'’])|[ \t]+(?:\((?P<bracketed>[A-Za-z])\)|(?P<bare>[A-Z])(?![\w'’-])))"
)
_WRAPPED = re.compile(rf"\s*{_UNWRAP}([^{{}}]*)\}}\s*")
_OTHER_LABEL = re.compile(r"(?<![\w])\(?[A-Z][).:](?!\w)|^[^\w\n]{0,8}[A-Z][^\w\n]{0,8}$", re.MULTILINE)
_IT_IS = re.compile(r"\W*(?:it['’]s|it is|so|thus|therefore),?\s+", re.IGNORECASE)


def stated_letter(text: str) -> str | None:
    r"""Return the letter, A to Z, that a text states; None where it states none or several.

    The letter is the last of: the last \boxed{...}; what follows "answer is" or "answer:", or the like in some other
    languages, wherever a letter does; and the B of "B is correct". What is denied does not count. Without any, the
    whole text, or its first line, must be a letter or an option.
    A bare A or I is a word of the language where it is followed, in its line, by another word, unless that word can
    only follow an option (because, since, is, ...): "A because" is option A, "A bank" is not. A small letter needs a
    bracket or a mark of punctuation. So the a of "B, a bank" is not a second option.
    """
    text = _FULL_WIDTH.sub(lambda match: unicodedata.normalize("NFKC", match[0]), text)
    boxed = last_boxed(text)
    stated = [*_STATEMENT.finditer(text), *_NAMED.finditer(text)]
    for statement in sorted(stated, key=re.Match.start, reverse=True):
        if boxed is not None and boxed[0] >= statement.start():
            break
        letters = _letters_of(text, statement)
        if letters:
            return letters.pop() if len(letters) == 1 else None
    return _letter_alone(text if boxed is None else boxed[1])


def _letters_of(text: str, statement: re.Match[str]) -> set[str]:
    """Return the options that a match of _STATEMENT or _NAMED states."""
    if statement["denied"]:
        return set()
    if statement.re is _NAMED:
        return {(statement["bracketed"] or statement["bare"]).upper()}
    return _letters_at(text, statement.end())


def _letter_alone(value: str) -> str | None:
    """Return the letter of a text that is one letter, perhaps explained below it, or an option with its letter."""
    while wrapped := _WRAPPED.fullmatch(value):
        value = wrapped[1]
    label = _LABEL.match(value, opening.end() if (opening := _IT_IS.match(value)) else 0)
    if label is None:
        return None
    rest = value[label.end() :]
    first, _, below = rest.partition("\n")
    if not first.strip(" \t\r*_$\"'’`.):]}\\") and not _OTHER_LABEL.search(below):
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
    return (label["bracketed"] or label["quoted"] or label["bare"] or label["small"]).upper()
