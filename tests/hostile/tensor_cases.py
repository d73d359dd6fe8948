"""Damage to the weights: the safetensors header, its sizes and offsets, the index, values that are not finite."""

import json
import struct
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

from cases import (
    EITHER,
    REFUSED,
    SAME,
    SAME_OR_REFUSED,
    Case,
    Damage,
    called,
    evaluate,
    every_command,
    export,
    plan,
    prune,
)
from config_cases import by
from documents import DEEP, WHOLE, Place, replace, value_damages
from safetensors.torch import load_file, save_file

FILE, INDEX = "model/model.safetensors", "model/model.safetensors.index.json"
DOWN = "model.layers.1.mlp.down_proj.weight"
EMBEDDINGS = "model.embed_tokens.weight"
Entries = dict[str, Any]


def split(content: bytes) -> tuple[bytes, bytes]:
    """Header and data."""
    (length,) = struct.unpack("<Q", content[:8])
    return content[8 : 8 + length], content[8 + length :]


def joined(header: bytes, data: bytes, length: int | None = None) -> bytes:
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def header_text(change: Callable[[bytes], bytes]) -> Damage:
    def damage(folder: Path) -> None:
        header, data = split((folder / FILE).read_bytes())
        replace(folder / FILE, joined(change(header), data))

    return damage


def entries(change: Callable[[Entries], object]) -> Damage:
    def edited(header: bytes) -> bytes:
        document = json.loads(header)
        change(document)
        return json.dumps(document).encode()

    return header_text(edited)


def entry(**values: Any) -> Damage:
    return entries(lambda document: document[DOWN].update(values))


def length(value: int) -> Damage:
    def damage(folder: Path) -> None:
        replace(folder / FILE, joined(*split((folder / FILE).read_bytes()), value))

    return damage


def content(change: Callable[[bytes], bytes]) -> Damage:
    return by(change, FILE)


def tensors(change: Callable[[Entries], object]) -> Damage:
    def damage(folder: Path) -> None:
        found = load_file(folder / FILE)
        change(found)
        (folder / FILE).unlink()
        save_file(found, folder / FILE, metadata={"format": "pt"})

    return damage


def poisoned(name: str, value: float) -> Damage:
    return tensors(lambda found: found[name].view(-1)[5:6].fill_(value))


def overlap(document: Entries) -> None:
    """Two tensors of one size are the same bytes; others are nobody's."""
    gate, up = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up"))
    document[up]["data_offsets"] = document[gate]["data_offsets"]


def renamed(document: Entries) -> None:
    document["../../" + DOWN] = document.pop(DOWN)


HEADERS: dict[str, Damage] = {
    "length-0": length(0),
    "length-1": length(1),
    "length-2-to-63": length(2**63),
    "length-2-to-64-less-1": length(2**64 - 1),
    "length-1e12": length(10**12),
    "length-beyond-the-file": content(lambda text: struct.pack("<Q", len(text)) + text[8:]),
    "length-100e6": length(100_000_001),
    "dtype-unknown": entry(dtype="F12"),
    "dtype-integer": entry(dtype="I16"),
    "dtype-boolean": entry(dtype="BOOL"),
    "dtype-wider": entry(dtype="F64"),
    "dtype-null": entry(dtype=None),
    "shape-negative": entry(shape=[-32, -64]),
    "shape-huge": entry(shape=[2**40, 2**40]),
    "shape-wrap-around": entry(shape=[2**33, 2**31]),
    "shape-0": entry(shape=[0, 64]),
    "shape-flat": entry(shape=[32 * 64]),
    "shape-turned": entry(shape=[64, 32]),
    "shape-fraction": entry(shape=[32.5, 64]),
    "shape-string": entry(shape="32x64"),
    "shape-deep": entry(shape=[[32, 64]]),
    "shape-of-1e5-ones": entry(shape=[1] * 100_000 + [32, 64]),
    "offsets-negative": entry(data_offsets=[-8, 4088]),
    "offsets-turned": entry(data_offsets=[4096, 0]),
    "offsets-beyond": entry(data_offsets=[0, 2**62]),
    "offsets-2-to-64": entry(data_offsets=[2**64 - 1, 2**64 + 4095]),
    "offsets-three": entry(data_offsets=[0, 8, 16]),
    "offsets-none": entry(data_offsets=[]),
    "offsets-strings": entry(data_offsets=["0", "4096"]),
    "offsets-of-another": entries(overlap),
    "entry-null": entries(lambda document: document.update({DOWN: None})),
    "entry-missing": entries(lambda document: document.pop(DOWN)),
    "entry-extra": entries(lambda document: document.update({"x": {"dtype": "F32", "shape": [0],
                                                                   "data_offsets": [0, 0]}})),
    "name-upwards": entries(renamed),
    "metadata-list": entries(lambda document: document.update(__metadata__=[])),
    "metadata-numbers": entries(lambda document: document.update(__metadata__={"format": 1})),
    "metadata-large": entries(lambda document: document.update(__metadata__={"format": "x" * 3_000_000})),
    "twice": header_text(lambda text: text.rstrip()[:-1] + b"," + text.strip()[1:]),
    "1e5-tensors": entries(lambda document: document.update(
        {f"t{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(100_000)})),
    "file-empty": content(lambda _: b""),
    "file-of-7-bytes": content(lambda text: text[:7]),
    "file-of-8-bytes": content(lambda text: text[:8]),
    "file-cut-in-header": content(lambda text: text[:200]),
    "file-cut-by-a-byte": content(lambda text: text[:-1]),
    "file-longer": content(lambda text: text + bytes(64)),
    "file-pickle": content(lambda _: b"PK\x03\x04" + bytes(5000)),
    "file-of-text": content(lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n"),
}  # fmt: skip
VALUES: dict[str, tuple[str, float]] = {
    "nan-down": (DOWN, float("nan")),
    "infinite-down": (DOWN, float("inf")),
    "nan-gate": ("model.layers.0.mlp.gate_proj.weight", float("nan")),
    "nan-query": ("model.layers.0.self_attn.q_proj.weight", float("nan")),
    "infinite-output": ("model.layers.1.self_attn.o_proj.weight", float("-inf")),
    "nan-norm": ("model.layers.1.input_layernorm.weight", float("nan")),
    "nan-last-norm": ("model.norm.weight", float("nan")),
    "nan-embedding": (EMBEDDINGS, float("nan")),
    "overflowing": ("model.layers.0.mlp.up_proj.weight", 3e38),
}


def index(change: Callable[[Entries], object]) -> Damage:
    def edited(text: bytes) -> bytes:
        document = json.loads(text)
        change(document)
        return json.dumps(document).encode()

    return by(edited, INDEX)


def pointing(target: str) -> Damage:
    return index(lambda document: document["weight_map"].update({DOWN: target}))


def moved_out(prefix: str) -> Damage:
    """The shards are where the index says, outside the folder."""

    def damage(folder: Path) -> None:
        for file in (folder / "model").glob("*.safetensors"):
            file.rename(folder / file.name)
        where = prefix or f"{folder}/"
        index(lambda document: document.update(weight_map={k: where + v for k, v in document["weight_map"].items()}))(
            folder
        )

    return damage


INDICES: dict[str, Damage] = {
    "upwards": moved_out("../"),
    "absolute": moved_out(""),
    "to-itself": pointing("model.safetensors.index.json"),
    "to-the-configuration": pointing("config.json"),
    "to-nothing": pointing("model-00009-of-00009.safetensors"),
    "to-the-folder": pointing("."),
    "to-an-empty-name": pointing(""),
    "to-a-device": pointing("/dev/zero"),
    "to-a-long-name": pointing("x" * 5000),
    "to-a-nul": pointing("model\0.safetensors"),
    "to-a-surrogate": pointing("\ud800.safetensors"),
    "map-empty": index(lambda document: document.update(weight_map={})),
    "map-list": index(lambda document: document.update(weight_map=[DOWN])),
    "map-numbers": index(lambda document: document.update(weight_map=dict.fromkeys(document["weight_map"], 7))),
    "map-dicts": index(lambda document: document["weight_map"].update({DOWN: {}})),
    "shard-missing": lambda folder: (folder / "model/model-00002-of-00002.safetensors").unlink(),
}
INDEX_HARMLESS: dict[str, Damage] = {
    "no-metadata": index(lambda document: document.pop("metadata")),
    "metadata-wrong": index(lambda document: document.update(metadata={"total_size": -1})),
    "more-keys": index(lambda document: document.update(weight_format=[1, 2])),
}
HOOK_POINTS: tuple[Place, ...] = (("weight_map",), ("metadata",), ("weight_map", DOWN))
HEADER_PLACES: tuple[Place, ...] = ((DOWN, "dtype"), (DOWN, "shape"), (DOWN, "data_offsets"), (DOWN,), (EMBEDDINGS,))
# More than is needed, and no harm in it.
SPARE = ("entry-extra", "1e5-tensors", "metadata-large")
REFUSED_VALUES = ("nan-down", "infinite-down", "nan-gate", "nan-query", "infinite-output")
# Those that are refused because they look at every weight, or at what becomes of a text.
READERS = (prune("flap"), prune("obs"), prune("slimgpt"), prune("wanda-sp"), evaluate())


def weights() -> Iterator[Case]:
    commands, readers = every_command(), cycle(READERS)
    for name, damage in HEADERS.items():
        expected = EITHER if name in SPARE else REFUSED
        yield Case(f"header-{name}", damage, next(commands), expected=expected)
    for name, change in WHOLE.items():
        yield Case(f"header-json-{name}", header_text(change), next(commands), generated=True)
    for name, change in value_damages(HEADER_PLACES, 40, "header"):
        yield Case(
            f"header-value-{name.removeprefix('model.layers.1.')}", header_text(change), next(commands), generated=True
        )
    # Not `export`, which was told here not to look, and copies; nor rows that no text may use, of those that only copy.
    lookers = cycle((prune("magnitude"), prune("sparsegpt"), plan("flap")))
    for name, (tensor, value) in VALUES.items():
        chosen = [evaluate()] if tensor == EMBEDDINGS else [next(readers), next(lookers)]
        for command in chosen:
            sure = name in REFUSED_VALUES and command in READERS
            expected = REFUSED if sure else EITHER
            yield Case(f"weights-{name}-{called(command)}", poisoned(tensor, value), command, expected=expected)
    own_head = tensors(lambda found: found.update({"lm_head.weight": found[EMBEDDINGS] * 2}))
    for command in (prune("magnitude"), export("gguf"), evaluate()):
        yield Case(f"weights-head-beside-the-tied-flag-{command[0]}", own_head, command)


def indices() -> Iterator[Case]:
    commands = every_command()
    for name, damage in INDICES.items():
        yield Case(f"index-{name}", damage, next(commands), scene="sharded", expected=REFUSED)
    wrong = pointing("model-00001-of-00002.safetensors")  # which is where it is not, yet the file is one of the model's
    yield Case("index-wrong-shard", wrong, prune("flap"), scene="sharded", expected=SAME_OR_REFUSED)
    for name, damage in INDEX_HARMLESS.items():
        yield Case(f"index-{name}", damage, prune("flap"), scene="sharded", expected=SAME)
    for name, change in WHOLE.items():
        yield Case(f"index-{name}", by(change, INDEX), next(commands), scene="sharded", generated=True)
    for name, change in value_damages(HOOK_POINTS, 12, "index"):
        yield Case(
            f"index-value-{name.replace(DOWN, 'a-tensor')}",
            by(change, INDEX),
            next(commands),
            scene="sharded",
            generated=True,
        )
    deep = by(lambda _: f'{{"weight_map": {DEEP}}}'.encode(), INDEX)
    yield Case("index-map-deep", deep, plan(), scene="sharded", expected=REFUSED)


def cases() -> Iterator[Case]:
    yield from weights()
    yield from indices()
