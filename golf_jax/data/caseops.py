"""CaseOps, the reversible text transform of PR 2135: capitals of ASCII words as operator characters before them.

docs/recipes/pr2135_model_training.md, section 2.1. `decode(encode(text)) == text` for every string; what no encoder wrote is refused.
"""

import re
from collections.abc import Iterable, Iterator

from golf_jax.config import GolfError

TITLE, ALLCAPS, CAPNEXT, ESC = OPERATORS = "\ue001\ue002\ue003\ue004"
_WORDS = re.compile(f"([A-Za-z]+)|([{OPERATORS}])")
_PARTS = re.compile(f"{ESC}.?|[{TITLE}{ALLCAPS}{CAPNEXT}]|[A-Za-z]+|[^{OPERATORS}A-Za-z]+", re.DOTALL)


def encode(text: str) -> str:
    """`text` in lower case as far as ASCII letters go, with the operators that `decode` needs."""
    return _WORDS.sub(lambda found: _word(found[1]) if found[1] else ESC + found[2], text)


def _word(word: str) -> str:
    lower = word.lower()
    if word == lower:
        return word
    if len(word) > 1 and word == word.upper():
        return ALLCAPS + lower
    first = TITLE + lower[0] if word[0] != lower[0] else lower[0]
    return first + "".join(small if big == small else CAPNEXT + small for big, small in zip(word[1:], lower[1:], strict=True))


def decode(text: str, strict: bool = True) -> str:
    """The text that `encode` made this of.

    GolfError names the character where an operator stands in a wrong place or has no ASCII letter behind it. strict=False leaves such
    operators out: a model may write anything.
    """
    out: list[str] = []
    mode = ""  # TITLE or ALLCAPS, until the word that it stands before begins
    capital = loud = inside = False  # the next letter is a capital; all letters of this word are; in a word

    def wrong(where: int, what: str) -> None:
        if strict:
            raise GolfError(f"caseops: {what} at character {where}: {text[max(where - 8, 0) : where + 8]!a}")

    for found in _PARTS.finditer(text):
        part, where = found[0], found.start()
        letter = part[-1].isascii() and part[-1].isalpha()
        if part[0] in (TITLE, ALLCAPS):
            if inside or mode or capital:
                wrong(where, "title or all-caps operator inside a word or behind another operator")
            mode = part
        elif part[0] == CAPNEXT:
            if capital:
                wrong(where, "two capital-next operators")
            capital = True
        elif part[0] == ESC or not letter:
            if part == ESC:
                wrong(where, "escape without a character")
            if (mode or capital) and not letter:
                wrong(where, "operator without an ASCII letter behind it")
            out.append(part.removeprefix(ESC) if len(part) > 1 and part[0] == ESC else part.strip(ESC))
            mode, capital, inside = "", False, letter
            loud = loud and letter
        else:
            rest = part
            if mode and not inside:
                out.append(part[0].upper())
                loud, rest = mode == ALLCAPS, part[1:]
            elif not inside:
                loud = False
            if capital and rest:
                out.append(rest[0].upper())
                capital, rest = False, rest[1:]
            out.append(rest.upper() if loud else rest)
            mode, inside = "", True
    if mode or capital:
        wrong(len(text), "operator without an ASCII letter behind it")
    return "".join(out)


def original_bytes(surfaces: Iterable[str]) -> Iterator[int]:
    """UTF-8 bytes of the original text in each surface (the slices of one transformed text, in order): operators count nothing, what is
    escaped counts whole, also where the escape ended the surface before (section 2.3)."""
    escaped = False
    for surface in surfaces:
        size = len(surface.encode())
        if escaped or any(operator in surface for operator in OPERATORS):
            for character in surface:
                operator = character in OPERATORS and not escaped
                size -= len(character.encode()) * operator
                escaped = operator and character == ESC
        yield size
