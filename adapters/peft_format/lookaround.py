r"""Regular expressions with look-around, which trainers write and RE2 lacks: `^(?!.*visual).*(?:q_proj|v_proj).*`.

Python's own parser reads them. They are run on sets of positions: each part of a pattern maps the positions where it
may begin to those where it may end. So nothing is tried twice, and the work for one text is bounded.
"""

import re
import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any, Final

MAX_STEPS = 20_000  # of one text; trainers' usual patterns take hundreds for a module's name
_PART_SIZE = 64  # of a part, in RE2's program size; large because this is slower

_Positions = int  # bit i: the position before character i
_Part = Callable[["_Text", _Positions], _Positions]


def parsed(pattern: str, refusal: Callable[[str], Exception]) -> Any:
    """The parse tree of Python's `re`. Raises `refusal(reason)` for an invalid pattern."""
    parser = import_module("re._parser")  # nothing else reads the syntax as `re` does, to the last detail
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about syntax with a possible future meaning
            return parser.parse(pattern)
    except (re.error, ValueError, RecursionError, OverflowError) as fault:
        raise refusal(str(fault)) from None


class LookaroundRegex:
    """A pattern of Python's `re` without back-references, flags, atomic groups and possessive repetition.

    Args:
        refusal: makes an exception from a reason: the pattern is invalid or has one of these, or, in a match, a text
            takes more than `MAX_STEPS`.
    """

    def __init__(self, pattern: str, refusal: Callable[[str], Exception]) -> None:
        self._refusal = refusal
        tree = parsed(pattern, refusal)
        if tree.state.flags & ~re.UNICODE:
            raise refusal("flags are not supported")
        self.programsize = 0
        try:
            self._run = self._sequence(tree)
        except RecursionError:
            raise refusal("it is nested too deeply") from None

    def match(self, text: str) -> bool:
        """Whether the pattern matches a prefix of the text."""
        return self._ends(text) != 0

    def fullmatch(self, text: str) -> bool:
        """Whether the pattern matches the whole text."""
        return bool(self._ends(text) >> len(text))

    def _ends(self, text: str) -> _Positions:
        try:
            return self._run(_Text(text), 1)
        except _TooManySteps:
            raise self._refusal(f"it takes more than {MAX_STEPS} steps on one name") from None

    # --- compilation of the parse tree ----------------------------------------------------------------

    def _sequence(self, tree: Any) -> _Part:
        return _sequence([self._part(kind, argument) for kind, argument in tree])

    def _part(self, kind: Any, argument: Any) -> _Part:
        self.programsize += _PART_SIZE
        match str(kind):
            case "LITERAL" | "NOT_LITERAL" | "IN" | "ANY":
                return _character(_predicate(str(kind), argument))
            case "BRANCH":
                return _branch([self._sequence(branch) for branch in argument[1]])
            case "SUBPATTERN" if not argument[1] | argument[2]:
                return self._sequence(argument[3])
            case "MAX_REPEAT" | "MIN_REPEAT":
                return _repeat(self._sequence(argument[2]), argument[0], argument[1])
            case "AT" if str(argument) in _ANCHORS:
                return _filter(_ANCHORS[str(argument)])
            case "ASSERT" | "ASSERT_NOT":
                direction, tree = argument
                least, most = tree.getwidth()
                if direction < 0 and least != most:
                    raise self._refusal("look-behind requires fixed-width pattern")
                width = least if direction < 0 else None
                return _assertion(self._sequence(tree), width, wanted=str(kind) == "ASSERT")
        raise self._refusal(f"{str(kind).lower().replace('_', ' ')} is not supported")


class _TooManySteps(Exception):
    """The steps of a text are used up."""


class _Text:
    """A text, and the steps left for it."""

    def __init__(self, text: str) -> None:
        self.text: Final = text
        self._steps_left = MAX_STEPS
        self._positions: dict[Callable[[str], bool], _Positions] = {}

    def step(self) -> None:
        self._steps_left -= 1
        if self._steps_left < 0:
            raise _TooManySteps

    def positions_where(self, holds: Callable[[str], bool]) -> _Positions:
        """The positions before characters for which `holds` is true."""
        if holds not in self._positions:
            self._positions[holds] = sum(1 << i for i, character in enumerate(self.text) if holds(character))
        return self._positions[holds]


def _bits(positions: _Positions) -> list[int]:
    return [i for i in range(positions.bit_length()) if positions >> i & 1]


def _character(holds: Callable[[str], bool]) -> _Part:
    def run(text: _Text, begins: _Positions) -> _Positions:
        text.step()
        return (begins & text.positions_where(holds)) << 1

    return run


def _sequence(parts: list[_Part]) -> _Part:
    def run(text: _Text, begins: _Positions) -> _Positions:
        for part in parts:
            if not begins:
                break
            begins = part(text, begins)
        return begins

    return run


def _branch(branches: list[_Part]) -> _Part:
    def run(text: _Text, begins: _Positions) -> _Positions:
        ends = 0
        for branch in branches:
            ends |= branch(text, begins)
        return ends

    return run


def _repeat(part: _Part, least: int, most: int) -> _Part:
    def run(text: _Text, begins: _Positions) -> _Positions:
        for _ in range(least):
            text.step()
            before, begins = begins, part(text, begins)
            if begins in (before, 0):  # a fixed point: more repetitions change nothing
                break
        reached = new = begins
        for _ in range(min(most - least, len(text.text))):  # each repetition adds a character, or nothing new
            text.step()
            new = part(text, new) & ~reached
            if not new:
                break
            reached |= new
        return reached

    return run


def _filter(holds: Callable[[str, int], bool]) -> _Part:
    def run(text: _Text, begins: _Positions) -> _Positions:
        text.step()
        return sum(1 << i for i in _bits(begins) if holds(text.text, i))

    return run


def _assertion(part: _Part, width: int | None, *, wanted: bool) -> _Part:
    """A look-ahead, or with `width` a look-behind of so many characters."""

    def holds(text: _Text, i: int) -> bool:
        if width is None:
            return part(text, 1 << i) != 0
        return i >= width and bool(part(text, 1 << i - width) >> i & 1)

    def run(text: _Text, begins: _Positions) -> _Positions:
        text.step()
        return sum(1 << i for i in _bits(begins) if holds(text, i) is wanted)

    return run


# --- characters and places ---------------------------------------------------------------------------


def _word(character: str) -> bool:
    return character.isalnum() or character == "_"


def _boundary(text: str, i: int) -> bool:
    return (i > 0 and _word(text[i - 1])) is not (i < len(text) and _word(text[i]))


_CATEGORIES: dict[str, Callable[[str], bool]] = {
    "CATEGORY_DIGIT": str.isdecimal,
    "CATEGORY_SPACE": str.isspace,
    "CATEGORY_WORD": _word,
}
_ANCHORS: dict[str, Callable[[str, int], bool]] = {
    "AT_BEGINNING": lambda text, i: i == 0,
    "AT_BEGINNING_STRING": lambda text, i: i == 0,
    "AT_END": lambda text, i: i == len(text) or (i == len(text) - 1 and text[i] == "\n"),
    "AT_END_STRING": lambda text, i: i == len(text),
    "AT_BOUNDARY": _boundary,
    "AT_NON_BOUNDARY": lambda text, i: bool(text) and not _boundary(text, i),
}


def _predicate(kind: str, argument: Any) -> Callable[[str], bool]:
    """A test for the characters of a literal, a class or the dot."""
    match kind:
        case "LITERAL":
            return lambda character: ord(character) == argument
        case "NOT_LITERAL":
            return lambda character: ord(character) != argument
        case "ANY":
            return lambda character: character != "\n"
        case "RANGE":
            return lambda character: argument[0] <= ord(character) <= argument[1]
        case "CATEGORY":
            name = str(argument)
            holds = _CATEGORIES[name.replace("_NOT_", "_")]
            return (lambda character: not holds(character)) if "_NOT_" in name else holds
    negated = str(argument[0][0]) == "NEGATE"
    items = [_predicate(str(name), value) for name, value in argument[negated:]]
    return lambda character: any(item(character) for item in items) is not negated
