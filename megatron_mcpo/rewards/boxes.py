r"""Find where a response states its answer: its last complete \boxed{...}, or what follows its last ####."""

import re

_BRACES = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)

_WRAPPED = re.compile(r"\\text\{([^{}]*)\}|\*\*([^*]+)\*\*|\$([^$]+)\$|`([^`]+)`")


def last_boxed(text: str) -> tuple[int, str] | None:
    r"""Return position and content of the last \boxed{...} whose braces close; escaped braces don't count."""
    opened: list[tuple[int, int]] = []
    last: tuple[int, int, int] | None = None
    for match in _BRACES.finditer(text):
        token = match[0]
        if token == "{" or token.startswith("\\boxed"):
            opened.append((match.start(), match.end() if token != "{" else -1))
        elif token == "}" and opened:
            start, content = opened.pop()
            if content >= 0 and (last is None or start > last[0]):
                last = (start, content, match.start())
    return (last[0], text[last[1] : last[2]]) if last else None


def after_hashes(text: str) -> str:
    """Return what follows the last ####, as in GSM8K's answers; the whole text where there is none."""
    return text.rpartition("####")[2].strip()


def where_stated(text: str) -> str:
    """Return the content of the last box, else what follows the last ####, else the whole text."""
    boxed = last_boxed(text)
    return boxed[1] if boxed else after_hashes(text)


def bare_forms(text: str) -> list[str]:
    """Return the last box, else the whole text, then the same without markup around it and without a full stop."""
    boxed = last_boxed(text)
    forms = [boxed[1].strip() if boxed else text]
    while wrapped := _WRAPPED.fullmatch(forms[-1].removesuffix(".")):
        forms.append(wrapped[wrapped.lastindex or 0].strip())
    return [*forms, forms[-1].removesuffix(".")]


def braces_close(text: str) -> bool:
    """Tell whether braces are balanced; escaped ones don't count."""
    depth = 0
    for match in _BRACES.finditer(text):
        depth += match[0].endswith("{") and match[0] != "\\{"
        depth -= match[0] == "}"
        if depth < 0:
            return False
    return depth == 0
