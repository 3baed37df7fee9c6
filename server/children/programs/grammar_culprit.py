"""Search for the refused part of a JSON Schema, since llguidance's errors name a keyword at most, not its place."""

import json
import re
from collections.abc import Callable, Collection, Iterator
from typing import Any

from server.messages.grammar_schema import DEFINITIONS, of_any, subschemas

_OURS = re.compile(r"([A-Za-z]+): ")
_UNKNOWN = re.compile(r"Unimplemented keys: (\[[^\]]*\])")
_ABOUT = {  # beginning of an llguidance error -> the keywords it is about
    "oneOf constraints": ("oneOf",),
    "Unknown format": ("format",),
    "patternProperty regexes": ("patternProperties",),
    "min/maxProperties": ("minProperties", "maxProperties"),
}
Schema = dict[str, Any]


def keywords_of(error: str) -> Collection[str]:
    """Return the keywords named by an error; empty if it names none."""
    if (ours := _OURS.match(error)) is not None:
        return (ours[1],)
    if (unknown := _UNKNOWN.match(error)) is not None:
        return frozenset(json.loads(unknown[1]))
    return next((words for begin, words in _ABOUT.items() if error.startswith(begin)), ())


def culprit(schema: Any, is_refused: Callable[[Any], bool], keywords: Collection[str] = ()) -> list[str]:
    """Return the path to the first part that makes a schema refused: refused with it and the parts before it, accepted
    without it.

    Args:
        keywords: possible last names of the path, if known.
    """
    return _keyword(schema, is_refused, keywords) or _first(schema, is_refused)


# --- the place of a keyword -------------------------------------------------------------------------


def _keyword(schema: Any, is_refused: Callable[[Any], bool], keywords: Collection[str]) -> list[str]:
    """Return the path to the refused keyword, empty if it is none of these. Other parts stay, so references hold."""
    text = json.dumps(schema)
    places = list(_places(schema, keywords))

    def is_refused_with(count: int) -> bool:
        copy = json.loads(text)
        for _, part in list(_places(copy, keywords))[count:]:
            _without(part, keywords)
        return is_refused(copy)

    fewest, most = 0, len(places)  # bounds of the number of leading places that are refused
    while fewest < most:
        count = (fewest + most) // 2
        if is_refused_with(count):
            most = count
        else:
            fewest = count + 1
    if not fewest or not is_refused_with(fewest):
        return []
    path, part = places[fewest - 1]
    return [*path, next(key for key in part if key in keywords)]


def _places(schema: Any, keywords: Collection[str]) -> Iterator[tuple[tuple[str, ...], Schema]]:
    """Yield the subschemas with any of the keywords, and their paths."""
    return ((path, part) for path, part in subschemas(schema) if not part.keys().isdisjoint(keywords))


def _without(schema: Schema, keywords: Collection[str]) -> None:
    """Remove the keywords, so that the schema allows more."""
    if "oneOf" in keywords and isinstance(schema.get("oneOf"), list):
        of_any(schema)  # otherwise enclosing branches might overlap
    for keyword in keywords:
        schema.pop(keyword, None)


# --- any part ---------------------------------------------------------------------------------------


def _first(schema: Any, is_refused: Callable[[Any], bool]) -> list[str]:
    path: list[str] = []
    part = schema
    while isinstance(part, dict | list) and part:
        members = _members(part)
        fewest, most = 0, len(members)  # bounds of the number of leading members that are refused
        while fewest < most:
            count = (fewest + most) // 2
            _keep(part, members[:count])
            if is_refused(schema):
                most = count
            else:
                fewest = count + 1
        _keep(part, members[:fewest])
        if not fewest:
            break
        key, part = members[fewest - 1]
        path.append(str(key))
    return path


def _members(part: dict[str, Any] | list[Any]) -> list[tuple[Any, Any]]:
    """Return the part's members with their keys, scalars first, since these determine the meaning of the others."""
    if isinstance(part, list):
        return list(enumerate(part))
    return sorted(part.items(), key=lambda item: (item[0] in DEFINITIONS, isinstance(item[1], dict | list)))


def _keep(part: dict[str, Any] | list[Any], members: list[tuple[Any, Any]]) -> None:
    if isinstance(part, list):
        part[:] = [member for _, member in members]
    else:
        part.clear()
        part.update(members)
