"""Makes the example data: orders in plain words, and the one line that a warehouse wants to read.

    python docs/demo/orders/make.py      writes train.jsonl and held_out.jsonl beside this file

Every order is a different combination, so no held-out answer stands in the training data. Synthetic; use it freely.
"""

import itertools
import json
import random
from pathlib import Path

SYSTEM = "Write the order as one line."
COUNTS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
COLOURS = ["red", "blue", "green", "black", "white", "yellow", "grey", "brown"]
ITEMS = ["lamp", "chair", "table", "desk", "shelf", "stool", "bench", "mirror", "carpet", "cushion", "clock", "vase"]
CITIES = ["Oslo", "Paris", "Berlin", "Madrid", "Rome", "Vienna", "Dublin", "Lisbon", "Prague", "Athens"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
PHRASES = [
    "Please send {count} {colour} {items} to {city} by {day}.",
    "We need {count} {items} in {colour}, delivered to {city} on {day}.",
    "Could {city} have {count} {colour} {items} before {day}?",
    "On {day} our shop in {city} expects {count} {colour} {items}.",
    "{city} is out of {items}: ship {count} {colour} ones for {day}.",
    "For {day}, {count} {items} ({colour}) to {city}, thank you.",
]
TRAINING, HELD_OUT = 240, 60


def plural(item: str, count: str) -> str:
    """One lamp, two lamps, two shelves, two benches."""
    if count == "one":
        return item
    return {"shelf": "shelves", "bench": "benches"}.get(item, item + "s")


def example(count: str, colour: str, item: str, city: str, day: str, phrase: str) -> dict[str, object]:
    """A conversation of one question and one answer."""
    order = phrase.format(count=count, colour=colour, items=plural(item, count), city=city, day=day)
    line = f"{COUNTS.index(count) + 1} x {item} / {colour} / {city.upper()} / {day[:3]}"
    return {
        "messages": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": order[0].upper() + order[1:]},
            {"role": "assistant", "content": line},
        ]
    }


def make() -> dict[str, str]:
    """File name -> content."""
    generator = random.Random(2)
    orders = generator.sample(list(itertools.product(COUNTS, COLOURS, ITEMS, CITIES, DAYS)), TRAINING + HELD_OUT)
    lines = [json.dumps(example(*order, generator.choice(PHRASES))) + "\n" for order in orders]
    return {"train.jsonl": "".join(lines[:TRAINING]), "held_out.jsonl": "".join(lines[TRAINING:])}


if __name__ == "__main__":
    for name, content in make().items():
        (Path(__file__).parent / name).write_text(content)
