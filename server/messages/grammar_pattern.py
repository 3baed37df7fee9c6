"""Regular expressions with the meaning that ECMAScript and Python share, in Rust's syntax, as llguidance requires."""

import re

# Characters of a class in all regex engines, and in any of them: engines take classes as ASCII or as Unicode.
_CLASSES = {
    "s": (r" \t\n\r\f\v", r"\s\x1c-\x1f\x{feff}"),
    "d": (r"0-9", r"0-9\p{N}"),
    "w": (r"0-9A-Za-z_", r"0-9A-Za-z_\p{L}\p{M}\p{N}\p{Pc}\p{Alphabetic}\x{200c}\x{200d}"),
}
_DOTS = r"[^\n\r\x{2028}\x{2029}]", r"[^\n]"
_ESCAPE = r"\\(?:[pPuxb]\{[^}]*\}|x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|.)"
_PART = re.compile(rf"{_ESCAPE}|\[\^?\]|\[\^?(?:{_ESCAPE}|[^\\\]])+\]|\.|[*+?}}]\+", re.DOTALL)
_ATOM = re.compile(rf"{_ESCAPE}|.", re.DOTALL)
_ESCAPES = re.compile(
    r"\\(?:[^A-Za-z0-9<>]|[bBfnrtv]|x[0-9A-Fa-f]*|u[0-9A-Fa-f]*(\{[^}]*\})?|[pP]\{[^}]*\}|c|k|[0-9])", re.DOTALL
)
_MARKS = "[]&~-^"  # special in Rust's classes, some only when doubled
# llguidance treats a set with all control characters as if it contained the quote and the backslash, too. Most control
# characters cannot occur in JSON, so one is left out of every set.
_WRITABLE = r"[[^\x01]&&{}]"


def portable(pattern: str, *, quoted: bool = False, wide: bool = False) -> str:
    """Return a pattern in Rust's syntax for texts that match in all engines. Raises ValueError for ambiguous syntax.

    Args:
        quoted: for the content of JSON strings.
        wide: for texts that match in any engine.
    """
    written = _WRITABLE.format if quoted else str

    def rewritten(match: re.Match[str]) -> str:
        part = match[0]
        if part in ("[]", "[^]"):
            raise ValueError(f"pattern: {part} is read in several ways; write [^\\s\\S], [\\s\\S] or [\\]...]")
        if part[0] == "[":
            return written(_set(part, wide))
        if part[0] == "\\":
            return written(_escape(part, wide)) if part[1] == "P" else _escape(part, wide)
        if part == ".":
            return _DOTS[wide]
        raise ValueError(f"pattern: {part} is read in several ways")

    return _PART.sub(rewritten, pattern)


def _set(part: str, wide: bool) -> str:
    """Rewrite a class in brackets, with ECMAScript's ranges."""
    negated = part[1] == "^"
    atoms: list[str] = _ATOM.findall(part[2 if negated else 1 : -1])
    written = []
    while atoms:
        is_range = atoms[1:2] == ["-"] and len(atoms) > 2
        written.append(
            "-".join(_atom(atom, wide is not negated) for atom in (atoms[0::2][:2] if is_range else atoms[:1]))
        )
        del atoms[: 3 if is_range else 1]
    return f"[{'^' * negated}{''.join(written)}]"


def _atom(atom: str, wide: bool) -> str:
    return _escape(atom, wide) if len(atom) > 1 else "\\" * (atom in _MARKS) + atom


def _escape(part: str, wide: bool) -> str:
    if part[1] in "sSdDwW":
        return _class(part[1], wide)
    if not _ESCAPES.fullmatch(part):
        raise ValueError(f"pattern: {part} is no escape in ECMAScript")
    return part


def _class(name: str, wide: bool) -> str:
    r"""Return the characters of `\d` and its like, in any engine or in all engines."""
    is_positive = name.islower()
    return f"[{'' if is_positive else '^'}{_CLASSES[name.lower()][wide is is_positive]}]"
