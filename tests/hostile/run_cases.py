"""Damage to what runs leave and later ones read: the journal, the weights, the caches, plan.json."""

import json
import random
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

from cases import EITHER, SAME, SAME_OR_REFUSED, Case, Damage, evaluate, export
from config_cases import by
from documents import VALUES, WHOLE, Change, Place, replace, twice, value_damages, with_value
from scenes import RUNS
from tensor_cases import joined, split

from pyprune.checkpoint.journal import journal_line

JOURNAL = "out.partial/journal.jsonl"
ENTRY_PLACES: tuple[Place, ...] = (
    ("part",), ("checksums",), ("record",), ("tensor_bytes",), ("sources",)
)  # fmt: skip
IDENTITY_PLACES: tuple[Place, ...] = (("identity",), ("identity", "model"), ("identity", "batch"))
PLAN_PLACES: tuple[Place, ...] = (
    ("identity",), ("format",), ("layers",), ("layers", 0), ("parameters",), ("identity", "model"), ("method",)
)  # fmt: skip
Lines = list[bytes]


def resumed(scene: str) -> tuple[str, ...]:
    return (*RUNS[scene][0], "--resume")


def lines(change: Callable[[Lines], Lines]) -> Damage:
    """Of the journal: its head, then one a part."""

    def changed(text: bytes) -> bytes:
        return b"".join(line + b"\n" for line in change(text.splitlines()))

    return by(changed, JOURNAL)


def line(number: int, change: Change) -> Damage:
    return lines(lambda found: [change(own) if k == number else own for k, own in enumerate(found)])


def sealed(change: Change) -> Change:
    """With the digest that the changed line ought to have: as if a run had written it so."""

    def changed(text: bytes) -> bytes:
        damaged = change(text)
        try:
            document = json.loads(damaged)
            del document["digest"]
            return journal_line(document).rstrip("\n").encode()
        except (ValueError, KeyError, TypeError, RecursionError):  # a line that has no place for one
            return damaged

    return changed


def dropped(text: bytes, name: str) -> bytes:
    document = json.loads(text)
    del document[name]
    return json.dumps(document).encode()


def entry(number: int = 2, **values: Any) -> Damage:
    return line(number, sealed(lambda text: json.dumps(json.loads(text) | values).encode()))


def files(folder: Path) -> list[Path]:
    return sorted((folder / "out.partial").glob("model-*.safetensors"))


def rotted(file: Path) -> None:
    """Other bytes at its end, as many."""
    content = file.read_bytes()
    replace(file, content[:-256] + random.Random(0).randbytes(256))


def of_last(change: Callable[[Path], object]) -> Damage:
    def damage(folder: Path) -> None:
        change(files(folder)[-1])

    return damage


def added(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / "out.partial" / name).write_bytes(b"x" * 99)

    return damage


def exchanged(file: Path) -> None:
    """The last file is the first one."""
    replace(file, min(file.parent.glob("model-*.safetensors")).read_bytes())


def cut(file: Path) -> None:
    replace(file, file.read_bytes()[:-8])


JOURNALS: dict[str, Damage] = {
    "half-line-at-the-end": by(lambda text: text + b'{"part": 2, "checksu', JOURNAL),
    "half-line-within": line(1, lambda text: text[: len(text) // 2]),
    "blank-line": lines(lambda found: [found[0], b"", *found[1:]]),
    "nuls-within": line(2, lambda text: bytes(len(text))),
    "no-head": lines(lambda found: found[1:]),
    "head-alone": lines(lambda found: found[:1]),
    "turned": lines(lambda found: [found[0], *found[:0:-1]]),
    "each-twice": lines(lambda found: [found[0], *found[1:], *found[1:]]),
    "crlf": by(lambda text: text.replace(b"\n", b"\r\n"), JOURNAL),
    "part-of-text": entry(part="1"),
    "part-beyond": entry(part=10**9),
    "part-negative": entry(part=-1),
    "part-of-another": entry(part=3),
    "head-of-the-first-format": line(0, sealed(lambda text: dropped(text, "format"))),
    "checksums-wrong": entry(checksums={"lm_head.weight": "0" * 32}),
    "checksums-empty": entry(checksums={}),
    "checksums-of-nothing": entry(checksums={"a\0b": "0" * 32, "\ud800": 1}),
    "tensor-bytes-wrong": entry(tensor_bytes=7),
    "record-other": entry(record={"kept": [[0], [1, 2, 3]]}),
    "record-list": entry(record=[1]),
    "record-dropped": line(2, sealed(lambda text: dropped(text, "record"))),
}
PARTIALS: dict[str, Damage] = {
    "weights-rotted": of_last(rotted),
    "weights-cut": of_last(cut),
    "weights-empty": of_last(lambda file: replace(file, b"")),
    "weights-gone": of_last(Path.unlink),
    "weights-of-nuls": of_last(lambda file: replace(file, bytes(file.stat().st_size))),
    "weights-exchanged": of_last(exchanged),
    "file-of-another": added("notes.txt"),
    "temporary": added("journal.tmp"),
    "weights-of-another": added("model.safetensors"),
    "journal-gone": lambda folder: (folder / JOURNAL).unlink(),
}


def journals() -> Iterator[Case]:
    command, scenes = resumed("killed"), cycle(("killed", "killed-obs"))
    for name, damage in (JOURNALS | PARTIALS).items():
        expected = SAME if name in ("half-line-at-the-end", "weights-gone", "temporary") else SAME_OR_REFUSED
        scene = next(scenes)
        yield Case(f"journal-{name}", damage, resumed(scene), scene=scene, expected=expected)
    for name, change in WHOLE.items():
        yield Case(
            f"journal-head-{name}", line(0, change), command, scene="killed", expected=SAME_OR_REFUSED, generated=True
        )
        yield Case(
            f"journal-{name}", by(change, JOURNAL), command, scene="killed", expected=SAME_OR_REFUSED, generated=True
        )
    for name, change in value_damages(ENTRY_PLACES, 30, "journal"):
        yield Case(
            f"journal-entry-{name}",
            line(2, sealed(change)),
            command,
            scene="killed",
            expected=SAME_OR_REFUSED,
            generated=True,
        )
    for name, change in value_damages(IDENTITY_PLACES, 12, "identity"):
        yield Case(
            f"journal-{name}",
            line(0, sealed(change)),
            command,
            scene="killed",
            expected=SAME_OR_REFUSED,
            generated=True,
        )


# Of a file of tensors that a run keeps for the next: its bytes as a whole, its header, what its header says.
KEPT: dict[str, Change] = {
    "empty": lambda _: b"",
    "cut": lambda text: text[:-8],
    "cut-in-header": lambda text: text[:40],
    "longer": lambda text: text + bytes(8),
    "length-2-to-63": lambda text: joined(*split(text), 2**63),
    "pickle": lambda _: b"PK\x03\x04" + bytes(500),
    "no-tensors": lambda _: joined(b"{}", b""),
    "deep": lambda text: joined(WHOLE["deep"](b""), split(text)[1]),
    "tensors-renamed": lambda text: text.replace(b"0.", b"7."),
    "other-names": lambda text: joined(split(text)[0].replace(b'":{"d', b'x":{"d'), split(text)[1]),
    "other-types": lambda text: text.replace(b'"F32"', b'"I32"').replace(b'"F64"', b'"I64"'),
    "flat": lambda text: joined(*flattened(*split(text))),
    "nan": lambda text: joined(split(text)[0], b"\xff" * len(split(text)[1])),
    "metadata-wrong": lambda text: joined(*with_metadata(*split(text))),
}  # fmt: skip
# Whole files with other numbers: nothing tells them from right ones, unless something does.
PLAUSIBLE = ("other-types",)


def flattened(header: bytes, data: bytes) -> tuple[bytes, bytes]:
    """The tensors as one of bytes."""
    end = len(data)
    return json.dumps({"x": {"dtype": "U8", "shape": [end], "data_offsets": [0, end]}}).encode(), data


def with_metadata(header: bytes, data: bytes) -> tuple[bytes, bytes]:
    document = json.loads(header)
    document["__metadata__"] = dict.fromkeys(document.get("__metadata__", {"counts": ""}), "[[")
    return json.dumps(document).encode(), data


def kept_file(pattern: str, change: Change) -> Damage:
    def damage(folder: Path) -> None:
        file = min(folder.glob(pattern))
        replace(file, change(file.read_bytes()))

    return damage


# Where each scene keeps the tensors that the next run reads.
FILES = {
    "cached": ".pyprune-cache/calibration-*.safetensors",
    "cached-obs": ".pyprune-cache/curves-*.safetensors",
    "cached-text": ".pyprune-cache/text-*.safetensors",
    "surveyed": ".pyprune-cache/calibration-*.layers/layer-00000.safetensors",
    "curved": ".pyprune-cache/curves-*.layers/layer-00000.safetensors",
    "trained": "out.partial/training.safetensors",
}
_OPEN = ("surveyed", "curved", "trained")  # of a run that was killed


def caches() -> Iterator[Case]:
    for scene, pattern in FILES.items():
        command = (*RUNS[scene][0], "--resume") if scene in _OPEN else RUNS[scene][0]
        for name, change in KEPT.items():
            expected = EITHER if name in PLAUSIBLE else SAME_OR_REFUSED
            yield Case(
                f"{scene}-{name}", kept_file(pattern, change), command, scene=scene, expected=expected, generated=True
            )


def plans() -> Iterator[Case]:
    plan = "out/plan.json"
    commands = cycle((resumed("finished"), evaluate("out"), export_of_out()))
    whole = {name: by(change, plan) for name, change in WHOLE.items()}
    values = {name: by(change, plan) for name, change in value_damages(PLAN_PLACES, 28, "plan")}
    twice_identity = by(lambda text: twice(text, "identity", "{}"), plan)
    huge = by(lambda text: with_value(text, ("seconds",), VALUES["digits"]), plan)
    for name, damage in (whole | values | {"identity-again": twice_identity, "seconds-digits": huge}).items():
        yield Case(f"plan-{name}", damage, next(commands), scene="finished", generated=True)
    ends: dict[str, Callable[[Path], None]] = {"rotted": rotted, "cut": cut, "gone": Path.unlink}
    for name, act in ends.items():
        damage = of_last_in_output(act)
        yield Case(f"output-{name}", damage, resumed("finished"), scene="finished", expected=SAME_OR_REFUSED)


def of_last_in_output(change: Callable[[Path], object]) -> Damage:
    def damage(folder: Path) -> None:
        change(folder / "out" / "model.safetensors")

    return damage


def export_of_out() -> tuple[str, ...]:
    return ("export", "out", "exported", *export("padded")[3:])


def cases() -> Iterator[Case]:
    yield from journals()
    yield from caches()
    yield from plans()
