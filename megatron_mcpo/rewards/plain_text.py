r"""Compare answers that look like expressions but are not: names, sequences of letters, numbers of other bases.

math-verify reads ABCD as a product, which equals DCBA, and drops the base of 1001_2. Standard library only.
"""

import re

_NAME = re.compile(r"[A-Z]{2,200}|[A-Za-z]{4,200}")
_MARKUP = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)(?![A-Za-z])|[\s{}$]")
_BASED = re.compile(r"[0-9A-Z.,]{1,300}_\{?\(?(?P<base>[0-9]{1,3})\)?\}?")


def equal_as_text(correct: str, stated: str) -> bool | None:
    """Tell whether two answers are equal where they are to be compared as text; None where they are not.

    An item's answer that is nothing but two or more capital letters, or four or more letters, is compared as text with
    a response of nothing but letters, whatever their case. Two numbers with a base each, as in 1001_2, differ where
    their bases do. Of an equation the last side counts.
    """
    correct, stated = (_MARKUP.sub("", text.rpartition("=")[2]) for text in (correct, stated))
    if _NAME.fullmatch(correct) and stated.isalpha():
        return correct.casefold() == stated.casefold()
    bases = [match["base"] for text in (correct, stated) if (match := _BASED.fullmatch(text))]
    return False if len(set(bases)) == 2 else None
