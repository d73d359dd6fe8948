"""Files that are none, names that are none, and limits of the system."""

import os
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

from cases import EITHER, REFUSED, SAME_OR_REFUSED, Case, Damage, called, evaluate, export, plan, prune
from run_cases import FILES, JOURNAL, resumed
from scenes import RUNS

INSTEAD = ("folder", "loop", "fifo", "dangling", "zeros")


def put(kind: str, path: Path) -> None:
    """Something that is no file of bytes, under that name."""
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "folder":
        path.mkdir()
        (path / "inside").touch()
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "dangling":
        path.symlink_to("nowhere/at/all")
    else:
        path.symlink_to("/dev/zero")


def instead_of(pattern: str, kind: str) -> Damage:
    def damage(folder: Path) -> None:
        put(kind, next(folder.glob(pattern), folder / pattern))

    return damage


# Read by every command that is given a model; the others may be absent.
NEEDED = ("model/config.json", "model/model.safetensors", "text.txt")
OPTIONAL = (
    "model/model.safetensors.index.json", "model/tokenizer.json", "model/tokenizer_config.json",
    "model/generation_config.json", "model/LICENSE",
)  # fmt: skip


def files() -> Iterator[Case]:
    commands = cycle((prune("flap"), evaluate()))
    for kind in INSTEAD:
        for name in NEEDED:
            yield Case(f"{kind}-as-{name}", instead_of(name, kind), next(commands), expected=REFUSED, generated=True)
        for name in OPTIONAL:
            yield Case(f"{kind}-as-{name}", instead_of(name, kind), next(commands), generated=True)
        yield Case(
            f"{kind}-as-a-model", instead_of("model", kind), prune(), scene="bare", expected=REFUSED, generated=True
        )
        yield Case(f"{kind}-as-journal", instead_of(JOURNAL, kind), resumed("killed"), scene="killed",
                   expected=SAME_OR_REFUSED, generated=True)  # fmt: skip
        yield Case(
            f"{kind}-as-plan", instead_of("out/plan.json", kind), resumed("finished"), scene="finished", generated=True
        )
        for scene, pattern in FILES.items():
            command = (*RUNS[scene][0], "--resume")
            yield Case(f"{kind}-as-{scene}", instead_of(pattern, kind), command, scene=scene, expected=SAME_OR_REFUSED,
                       generated=True, resumable=True)  # fmt: skip


def outputs() -> Iterator[Case]:
    for kind in INSTEAD:
        for command in () if kind == "dangling" else (prune("magnitude"), export("padded"), export("gguf")):
            yield Case(f"{kind}-as-output-of-{called(command)}", instead_of(command[2], kind), command,
                       expected=REFUSED, generated=True)  # fmt: skip
        yield Case(
            f"{kind}-as-partial", instead_of("out.partial", kind), prune("magnitude"), expected=REFUSED, generated=True
        )
        yield Case(
            f"{kind}-as-partial-resumed",
            instead_of("out.partial", kind),
            prune("magnitude", "--resume"),
            generated=True,
        )
        cache = instead_of(".pyprune-cache", kind)
        yield Case(f"{kind}-as-cache", cache, prune("flap"), generated=True, resumable=True)
        scratch = instead_of("out.gguf.unverified", kind)
        yield Case(f"{kind}-as-scratch-of-gguf", scratch, export("gguf"), generated=True)


def nothing(_: Path) -> None:
    pass


def renamed(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / "model").rename(folder / name)

    return damage


def with_words(command: tuple[str, ...], **words: str) -> tuple[str, ...]:
    return tuple(words.get(word, word) for word in command)


NAMES = {
    "of-300-bytes": "x" * 300,
    "of-255-bytes": "x" * 255,
    "of-250-bytes": "x" * 250,
    "of-5000-bytes": "/".join(["x" * 99] * 50),
    "with-a-nul": "a\0b",
    "empty": "",
    "above-a-file": "text.txt/out",
    "the-folder-itself": ".",
    "within-the-model": "model",
    "upwards": "..",
    "in-proc": "/proc/out",
}
MODELS = {
    "of-300-bytes": "x" * 300,
    "with-a-nul": "a\0b",
    "empty": "",
    "with-a-line-break": "no\nmodel",
    "not-utf-8": "no-\udcff\udcfe",
    "a-file": "text.txt",
    "a-tensor-file": "model/model.safetensors",
    "in-proc": "/proc/self",
    "of-a-hub": "nobody/no-such-model",
}


def names() -> Iterator[Case]:
    commands = cycle((prune("magnitude"), export("padded")))
    for name, value in NAMES.items():
        yield Case(f"output-named-{name}", nothing, with_words(next(commands), out=value), expected=REFUSED)
    readers = cycle((prune("magnitude"), evaluate(), plan(), export("gguf")))
    for name, value in MODELS.items():
        yield Case(f"model-named-{name}", nothing, with_words(next(readers), model=value), expected=REFUSED)
        yield Case(f"text-named-{name}", nothing, with_words(prune("flap"), **{"text.txt": value}), expected=EITHER)
        yield Case(f"cache-named-{name}", nothing, prune("magnitude", "--cache", value), expected=EITHER)
    raw = os.fsdecode(b"mod\xffel")
    moved = renamed(raw)
    for command in (prune("flap"), evaluate(), export("padded"), export("gguf"), plan()):
        yield Case(f"model-named-in-no-utf-8-{called(command)}", moved, with_words(command, model=raw))
    yield Case("model-moved-to-a-line-break", renamed("a\nmodel"), with_words(prune("flap"), model="a\nmodel"))
    for where in ("out", "out/cache", "out.partial", "text.txt", "out/../out/cache"):
        yield Case(f"cache-in-{where}", nothing, prune("flap", "--cache", where))


def limits() -> Iterator[Case]:
    for command in (prune("flap"), prune("obs"), export("padded"), export("gguf"), evaluate()):
        name = called(command)
        for size in (4096, 65_536, 540_000):
            expected = EITHER if command[0] == "evaluate" else SAME_OR_REFUSED
            if command[0] == "export":
                expected = EITHER
            yield Case(f"files-of-{size}-bytes-{name}", nothing, command, expected=expected, limits={"FSIZE": size},
                       resumable=True, generated=True)  # fmt: skip
        for count in (4, 7, 9, 12):
            yield Case(
                f"{count}-open-files-{name}", nothing, command, limits={"NOFILE": count}, resumable=True, generated=True
            )
        for megabytes in (1, 256):  # between, libraries in Rust end the process
            yield Case(f"memory-of-{megabytes}-mb-{name}", nothing, command, limits={"AS": megabytes << 20},
                       resumable=True, generated=True)  # fmt: skip


def cases() -> Iterator[Case]:
    yield from files()
    yield from outputs()
    yield from names()
    yield from limits()
