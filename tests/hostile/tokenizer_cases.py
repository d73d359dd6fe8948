"""Damage to the tokenizer, the generation settings and the text."""

import json
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

from cases import REFUSED, SAME, Case, Damage, evaluate, export, plan, prune
from config_cases import by
from documents import DEEP, WHOLE, Place, value_damages

TOKENIZER, SETTINGS, GENERATION = (f"model/{n}.json" for n in ("tokenizer", "tokenizer_config", "generation_config"))
HOOK_POINTS: tuple[Place, ...] = (
    ("model",), ("model", "vocab"), ("model", "merges"), ("model", "type"), ("added_tokens",),
    ("added_tokens", 0, "id"),
    ("pre_tokenizer",), ("post_processor",), ("decoder",), ("version",), ("truncation",), ("normalizer",),
)  # fmt: skip
SETTING_PLACES: tuple[Place, ...] = tuple(
    (name,) for name in ("tokenizer_class", "bos_token", "eos_token", "model_max_length", "backend")
)
GENERATION_PLACES: tuple[Place, ...] = tuple((name,) for name in ("bos_token_id", "eos_token_id", "use_cache"))


def edited(file: str, change: Callable[[dict[str, Any]], object]) -> Damage:
    def change_text(text: bytes) -> bytes:
        document = json.loads(text)
        change(document)
        return json.dumps(document).encode()

    return by(change_text, file)


def _vocabulary(change: Callable[[dict[str, int]], object]) -> Damage:
    return edited(TOKENIZER, lambda document: change(document["model"]["vocab"]))


def _beyond(vocabulary: dict[str, int]) -> None:
    """Every token's id is one that the model has no embedding for."""
    vocabulary.update({token: number + 10**6 for token, number in vocabulary.items()})


VOCABULARIES: dict[str, Damage] = {
    "ids-beyond": _vocabulary(_beyond),
    "ids-equal": _vocabulary(lambda vocabulary: vocabulary.update(dict.fromkeys(vocabulary, 7))),
    "id-2-to-31": _vocabulary(lambda vocabulary: vocabulary.update({"Ġthe": 2**31})),
    "id-2-to-40": _vocabulary(lambda vocabulary: vocabulary.update({"Ġthe": 2**40})),
    "id-negative": _vocabulary(lambda vocabulary: vocabulary.update({"Ġthe": -1})),
    "empty": _vocabulary(lambda vocabulary: vocabulary.clear()),
    "merges-of-nothing": edited(TOKENIZER, lambda document: document["model"].update(merges=["a b c", "zzz"])),
    "added-beyond": edited(TOKENIZER, lambda document: document["added_tokens"][0].update(id=10**9)),
    "regex-that-hangs": edited(
        TOKENIZER,
        lambda document: document.update(
            pre_tokenizer={"type": "Split", "behavior": "Isolated", "invert": False,
                           "pattern": {"Regex": "(a*)*(a|aa)+$"}}
        ),
    ),
    "template-unknown": edited(
        TOKENIZER,
        lambda document: document["post_processor"].update(single=[{"SpecialToken": {"id": "?", "type_id": 0}}]),
    ),
}  # fmt: skip
CLASSES: dict[str, Damage] = {
    "class-of-remote-code": edited(
        SETTINGS, lambda document: document.update(auto_map={"AutoTokenizer": ["evil.Tokenizer", None]})
    ),
    "class-unknown": edited(SETTINGS, lambda document: document.update(tokenizer_class="NoSuchTokenizer")),
    "class-other": edited(SETTINGS, lambda document: document.update(tokenizer_class="BertTokenizer")),
    "template-endless": edited(
        SETTINGS, lambda document: document.update(chat_template="{% for i in range(10**9) %}x{% endfor %}")
    ),
    "template-list": edited(SETTINGS, lambda document: document.update(chat_template=[{"name": 1}])),
}
TEXTS: dict[str, bytes] = {
    "empty": b"",
    "blank": b" \n" * 3000,
    "short": b"one two",
    "not-utf-8": b"the \xff\xfe harvest " * 1000,
    "utf-16": ("the harvest was good " * 500).encode("utf-16"),
    "nuls": bytes(20_000),
    "binary": bytes(range(256)) * 100,
    "surrogates-in-utf-8": b"the \xed\xa0\x80 harvest " * 1000,
    "one-long-word": b"x" * 300_000,
    "bom": b"\xef\xbb\xbf" + b"the harvest was good " * 500,
    "special-tokens": b"<s></s>" * 2000,
}
LINES: dict[str, bytes] = {
    "empty": b"",
    "deep": f'{{"text": {DEEP}}}\n'.encode(),
    "null": b'{"text": null}\n',
    "list": b'{"text": ["a", "b"]}\n',
    "number": b'{"text": 7}\n',
    "bare-string": b'"the harvest"\n' * 100,
    "surrogate": b'{"text": "the \\ud800 harvest was good"}\n' * 200,
    "nul": b'{"text": "the \\u0000 harvest was good"}\n' * 200,
    "half": b'{"text": "the harvest was good"}\n{"text": "the',
    "digits": b'{"text": "the harvest", "n": ' + b"1" * 5000 + b"}\n",
    "blank-lines": b'\n\n{"text": "the harvest was good for once"}\n\n' * 200,
}


def written(name: str, content: bytes) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return damage


def texts() -> Iterator[Case]:
    commands = cycle((prune("flap"), evaluate(), prune("obs")))
    for name, content in TEXTS.items():
        yield Case(f"text-{name}", written("text.txt", content), next(commands))
    for name, content in LINES.items():
        command = tuple("text.jsonl" if word == "text.txt" else word for word in next(commands))
        yield Case(f"lines-{name}", written("text.jsonl", content), command)


def cases() -> Iterator[Case]:
    commands = cycle((prune("flap"), evaluate(), export("gguf"), prune("wanda-sp"), export("padded"), plan()))
    readers = cycle((prune("flap"), evaluate(), export("gguf")))
    damaged = ((TOKENIZER, HOOK_POINTS, 36, readers), (SETTINGS, SETTING_PLACES, 20, readers))
    for file, places, count, own in (*damaged, (GENERATION, GENERATION_PLACES, 9, commands)):
        kind = file.removeprefix("model/").removesuffix(".json")
        for name, change in (*WHOLE.items(), *value_damages(places, count, kind)):
            yield Case(f"{kind}-{name}", by(change, file), next(own), generated=True)
    for name, damage in (VOCABULARIES | CLASSES).items():
        yield Case(f"vocabulary-{name}", damage, next(readers))
    for name, command in {"prune": prune("flap"), "evaluate": evaluate()}.items():
        yield Case(f"tokenizer-ids-beyond-the-vocabulary-{name}", _vocabulary(_beyond), command, expected=REFUSED)
    more = edited(SETTINGS, lambda document: document.update(a_key_of_tomorrow=[1, {}]))
    yield Case("tokenizer-another-key", more, prune("flap"), expected=SAME)
    yield from texts()
