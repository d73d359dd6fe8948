"""Damage to JSON: to a document as a whole, and to single values of it, as raw text that a JSON writer would refuse."""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

Place = tuple[str | int, ...]  # of a value: keys and indices from the top
Change = Callable[[bytes], bytes]

_MARK = "\N{SNOWMAN}"
DEEP = "[" * 100_000 + "]" * 100_000

VALUES = {
    "null": "null",
    "list": "[]",
    "dict": "{}",
    "string": '"x"',
    "numeral": '"16"',
    "fraction": "1.5",
    "true": "true",
    "zero": "0",
    "negative": "-1",
    "huge": "1" + "0" * 30,
    "2-to-63": str(2**63),
    "digits": "1" * 5000,
    "nan": "NaN",
    "infinity": "Infinity",
    "1e400": "1e400",
    "deep": DEEP,
    "surrogate": '"\\ud800"',
    "nul": '"a\\u0000b"',
    "long": '"' + "x" * 1_000_000 + '"',
}

WHOLE: dict[str, Change] = {
    "empty": lambda _: b"",
    "blank": lambda _: b" \n\t ",
    "half": lambda text: text[: len(text) // 2],
    "without-its-end": lambda text: text.rstrip()[:-1],
    "something-after-it": lambda text: text + b"}",
    "not-utf-8": lambda text: text.replace(b'"', b'"\xff\xfe', 1),
    "utf-16": lambda text: text.decode().encode("utf-16"),
    "bom": lambda text: b"\xef\xbb\xbf" + text,
    "nuls": lambda text: bytes(len(text)),
    "nul-after-it": lambda text: text + b"\0",
    "deep": lambda _: DEEP.encode(),
    "deep-and-open": lambda _: b'{"a":' * 100_000,
    "null": lambda _: b"null",
    "list": lambda _: b"[]",
    "dict": lambda _: b"{}",
    "string": lambda _: b'"x"',
    "number": lambda _: b"1" * 5000,
    "binary": lambda text: random.Random(len(text)).randbytes(1000),
}


def replace(file: Path, content: bytes) -> None:
    """Another file of that name, whatever is there."""
    file.unlink(missing_ok=True)
    file.write_bytes(content)


def with_value(text: bytes, place: Place, raw: str | None) -> bytes:
    """The document with the JSON text `raw` at a place; None: nothing there."""
    document: Any = deepcopy(json.loads(text))
    inner = document
    for key in place[:-1]:
        inner = inner[key]
    if raw is None:
        del inner[place[-1]]
        return json.dumps(document).encode()
    inner[place[-1]] = _MARK
    return json.dumps(document).replace(json.dumps(_MARK), raw).encode()


def twice(text: bytes, key: str, raw: str) -> bytes:
    """The document with a key of the top that comes a second time, with another value."""
    return text.rstrip()[:-1] + f', "{key}": {raw}}}'.encode()


def value_damages(places: Sequence[Place], count: int, seed: str) -> Iterator[tuple[str, Change]]:
    """`count` of all pairs of a place and a value, drawn evenly: every place as often as every other, nearly."""
    drawn = random.Random(seed)
    kinds: list[str | None] = [*VALUES, None]
    order = {place: drawn.sample(kinds + ["twice"] * (len(place) == 1), len(kinds)) for place in places}
    for number in range(count):
        place = places[number % len(places)]
        kind = order[place][number // len(places)]
        name = f"{'.'.join(map(str, place))}-{kind or 'dropped'}"
        yield name, _value_damage(place, kind)


def _value_damage(place: Place, kind: str | None) -> Change:
    def change(text: bytes) -> bytes:
        if kind == "twice":
            return twice(text, str(place[-1]), VALUES["string"])
        return with_value(text, place, None if kind is None else VALUES[kind])

    return change
