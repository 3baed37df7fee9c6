"""The part of a JSON Schema for which it is refused: errors name a keyword at most, not its place."""

import json
import re
from collections.abc import Callable, Collection, Iterator
from typing import Any

from server.messages.grammar_schema import DATA, NAMED, of_any

_LATE = ("$defs", "definitions")  # members that others refer to are looked into last
_OURS = re.compile(r"([A-Za-z]+): ")
_UNKNOWN = re.compile(r"Unimplemented keys: (\[[^\]]*\])")
_ABOUT = {  # how llguidance's errors about a keyword begin
    "oneOf constraints": ("oneOf",),
    "Unknown format": ("format",),
    "patternProperty regexes": ("patternProperties",),
    "min/maxProperties": ("minProperties", "maxProperties"),
}
Schema = dict[str, Any]


def keywords_of(error: str) -> Collection[str]:
    """The keywords for any of which an error refuses a schema; empty where it names none."""
    if (ours := _OURS.match(error)) is not None:
        return (ours[1],)
    if (unknown := _UNKNOWN.match(error)) is not None:
        return frozenset(json.loads(unknown[1]))
    return next((words for begin, words in _ABOUT.items() if error.startswith(begin)), ())


def culprit(schema: Any, is_refused: Callable[[Any], bool], keywords: Collection[str] = ()) -> list[str]:
    """The path to the first part for which a schema is refused: with it and what comes before it is, without not.

    Args:
        keywords: of which one is the part's last name, if they are known.
    """
    return _keyword(schema, is_refused, keywords) or _first(schema, is_refused)


# --- the place of a keyword -------------------------------------------------------------------------


def _keyword(schema: Any, is_refused: Callable[[Any], bool], keywords: Collection[str]) -> list[str]:
    """References stay whole, unlike where parts are left out; empty if the keywords are not what it is."""
    text = json.dumps(schema)
    places = list(_places(schema, keywords))

    def is_refused_with(count: int) -> bool:
        copy = json.loads(text)
        for _, part in list(_places(copy, keywords))[count:]:
            _without(part, keywords)
        return is_refused(copy)

    fewest, most = 0, len(places)  # leading places that it takes
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


def _places(schema: Any, keywords: Collection[str], path: tuple[str, ...] = ()) -> Iterator[tuple[list[str], Schema]]:
    """Schemas that have any of the keywords."""
    if isinstance(schema, list):
        for index, part in enumerate(schema):
            yield from _places(part, keywords, (*path, str(index)))
    elif isinstance(schema, dict):
        if not schema.keys().isdisjoint(keywords):
            yield list(path), schema
        for key, part in sorted(schema.items(), key=lambda item: item[0] in _LATE):
            if key in NAMED and isinstance(part, dict):
                for name, each in part.items():
                    yield from _places(each, keywords, (*path, key, name))
            elif key not in DATA:
                yield from _places(part, keywords, (*path, key))


def _without(schema: Schema, keywords: Collection[str]) -> None:
    """Allow all that it did allow, and more."""
    if "oneOf" in keywords and isinstance(schema.get("oneOf"), list):
        of_any(schema)  # or the branches around it might no longer be told apart
    for keyword in keywords:
        schema.pop(keyword, None)


# --- any part ---------------------------------------------------------------------------------------


def _first(schema: Any, is_refused: Callable[[Any], bool]) -> list[str]:
    path: list[str] = []
    part = schema
    while isinstance(part, dict | list) and part:
        members = _members(part)
        fewest, most = 0, len(members)  # leading members that it takes
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
    """Words and numbers first, for they say what the rest is."""
    if isinstance(part, list):
        return list(enumerate(part))
    return sorted(part.items(), key=lambda item: (item[0] in _LATE, isinstance(item[1], dict | list)))


def _keep(part: dict[str, Any] | list[Any], members: list[tuple[Any, Any]]) -> None:
    if isinstance(part, list):
        part[:] = [member for _, member in members]
    else:
        part.clear()
        part.update(members)
