"""Conversion of a request's own grammar to Lark.

llguidance converts llama.cpp's GBNF, but misreads some escapes; they are replaced first.
"""

import re

from llguidance.gbnf_to_lark import gbnf_to_lark

_LARK = re.compile(r"^\s*(%llguidance\b|[?!]*start\s*:)", re.MULTILINE)
_TERMINALS = re.compile(r'#[^\n]*|"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]', re.DOTALL)
_ESCAPES = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|.)", re.DOTALL)
_IN_TEXT = {'"': r"\"", "\\": r"\\", "\n": r"\n", "\r": r"\r", "\t": r"\t"}


def as_lark(text: str) -> str:
    """Return a grammar in Lark or GBNF as Lark. Raises ValueError."""
    if _LARK.search(text):
        return text
    try:
        return gbnf_to_lark(_TERMINALS.sub(_terminal, text))
    except RecursionError:
        raise ValueError("the grammar is nested too deep") from None
    except Exception as fault:  # llguidance raises plain Exception
        raise ValueError(f"{fault} (a grammar in Lark has a rule `start:`, one in GBNF `root ::=`)") from None


def _terminal(match: re.Match[str]) -> str:
    """Return a terminal with numeric escapes replaced by characters; the conversion would drop their leading zeros."""
    terminal = match[0]
    if terminal[0] == "#":
        return terminal
    in_class = terminal[0] == "["

    def character(escape: re.Match[str]) -> str:
        digits = escape[1] or escape[2] or escape[3]
        code = int(digits, 16) if digits else 0
        if not digits or code > 0x10FFFF or 0xD800 <= code < 0xE000:
            return escape[0]
        if in_class and code < 0x80:
            return f"\\x{code:02x}"
        return _IN_TEXT.get(chr(code), chr(code))

    return _ESCAPES.sub(character, terminal)
