"""Separate what a response states from how it came to it. Standard library only; linear time.

The scorer (scorer.py) and the majority vote (registry.py) cut a response here, before a verifier gets it; so no
verifier knows about tags. Kinds with `whole_response` get the response uncut.
"""

import re

_OPENS = r"<(?:think|thinking|thought|reasoning)>|\[THINK\]"
_CLOSES = r"</(?:think|thinking|thought|reasoning)>|\[/THINK\]"
_ANSWER = re.compile(r"<(?P<closes>/?)answer>", re.IGNORECASE)
_TAG = re.compile(rf"(?:{_OPENS}|{_CLOSES}|</?answer>)", re.IGNORECASE)
_OPENED = re.compile(rf"(?:{_OPENS})\s*\Z")


def final_answer(response: str) -> str:
    """Return the part of a response that is judged, without the blanks around it.

    That is what follows its last </think>, without further thoughts that did not end; and of that the inside of the
    last <answer>. So a response that consists of thoughts, or whose thoughts never ended, states nothing: "".
    """
    *_, said = re.split(_CLOSES, response)
    said = re.split(_OPENS, said, maxsplit=1)[0]
    tags = list(_ANSWER.finditer(said))
    last = max((n for n, tag in enumerate(tags) if tag["closes"]), default=len(tags))
    opened = [tag.end() for tag in tags[:last] if not tag["closes"]]
    ends = tags[last].start() if last < len(tags) else len(said)
    return said[opened[-1] if opened else 0 : ends].strip()


def is_tag(token: str) -> bool:
    """Tell whether a token of a vocabulary is a tag that `final_answer` looks for."""
    return _TAG.fullmatch(token) is not None


def opened_thoughts(prompt_end: str) -> str:
    """Return the tag with which a prompt ends, and the blanks behind it; "" where it ends in none.

    Some chat templates open the thoughts themselves, so that the response begins inside of them.
    """
    opened = _OPENED.search(prompt_end)
    return opened[0] if opened else ""
