"""Makes the example data: requests in plain words, and the call of a function that each asks for.

    python docs/demo/calls/make.py      writes train.jsonl and held_out.jsonl beside this file

Every request is a different combination, so no held-out call stands in the training data. Synthetic; use it freely.
"""

import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CITIES = ["Oslo", "Paris", "Berlin", "Madrid", "Rome", "Vienna", "Dublin", "Lisbon", "Prague", "Athens"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
NAMES = ["Ana", "Ben", "Carla", "David", "Emma", "Felix", "Greta", "Hugo", "Ida", "Jonas"]
ROOMS = ["kitchen", "office", "bedroom", "garage", "hall", "cellar"]
TRAINING, HELD_OUT = 200, 50


def function(name: str, /, **arguments: str) -> dict[str, Any]:
    """A tool. The less is said of it, the shorter the prompts."""
    properties = {key: {"type": kind} for key, kind in arguments.items()}
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}


TOOLS = [
    function("get_weather", city="string", day="string"),
    function("call_person", name="string", hour="integer"),
    function("set_heating", room="string", degrees="integer"),
]
PHRASES = {
    "get_weather": [
        "How will the weather be in {city} on {day}?",
        "On {day} I fly to {city}. Will it rain?",
        "Do I need an umbrella in {city} this {day}?",
        "Tell me {day}'s forecast for {city}.",
    ],
    "call_person": [
        "Call {name} at {hour} o'clock.",
        "At {hour} I want to speak to {name} on the phone.",
        "Please ring {name} when it is {hour}.",
        "{name} expects my call at {hour}.",
    ],
    "set_heating": [
        "Set the {room} to {degrees} degrees.",
        "It is cold in the {room}, make it {degrees}.",
        "I would like {degrees} degrees in the {room}.",
        "Heat the {room} up to {degrees}, please.",
    ],
}


def requests() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every call that can be asked for."""
    for city, day in itertools.product(CITIES, DAYS):
        yield "get_weather", {"city": city, "day": day}
    for name, hour in itertools.product(NAMES, range(7, 22)):
        yield "call_person", {"name": name, "hour": hour}
    for room, degrees in itertools.product(ROOMS, range(12, 29)):
        yield "set_heating", {"room": room, "degrees": degrees}


def example(name: str, arguments: dict[str, Any], phrase: str) -> dict[str, Any]:
    """A conversation of one request and one call."""
    call = {"id": "call_1", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
    asked = {"role": "user", "content": phrase.format(**arguments)}
    return {"messages": [asked, {"role": "assistant", "content": None, "tool_calls": [call]}], "tools": TOOLS}


def make() -> dict[str, str]:
    """File name -> content."""
    generator = random.Random(3)
    asked = generator.sample(list(requests()), TRAINING + HELD_OUT)
    lines = [json.dumps(example(*each, generator.choice(PHRASES[each[0]]))) + "\n" for each in asked]
    return {"train.jsonl": "".join(lines[:TRAINING]), "held_out.jsonl": "".join(lines[TRAINING:])}


if __name__ == "__main__":
    for name, content in make().items():
        (Path(__file__).parent / name).write_text(content)
