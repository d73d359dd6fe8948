"""The tokenizer of a checkpoint folder in the terms of GGUF, so that llama.cpp yields transformers' token ids.

Everything is read off the tokenizer that transformers loads, and where a setting can be seen in what that tokenizer
does (BOS before a text, a space before it, how it splits), it is.
"""

import base64
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, pre_tokenizers

from ..calibration.text import load_tokenizer
from ..errors import InputError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # token types of GGUF
SPECIAL = ("bos", "eos", "unk", "pad")
SPACE = "▁"  # how SentencePiece writes a space
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Names that llama.cpp knows (src/llama-vocab.cpp) with how each splits a text before merging, one expression after the
# other, and whether a piece that is a token as it stands is taken without merging.
PRE_TOKENIZERS: dict[str, tuple[tuple[str, ...], bool]] = {
    "gpt-2": ((_GPT2,), False),
    "smollm": ((r"\p{N}", _GPT2), False),
    "llama-bpe": ((_LLAMA3,), True),
    "smaug-bpe": ((_LLAMA3,), False),
    "qwen2": ((_LLAMA3.replace("{1,3}", ""),), False),
    "tekken": ((_TEKKEN,), True),
    "deepseek-coder": ((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", r"\p{N}"), False),
}
FALLBACK = "default"
# Splits differently under any two of these: contractions in both cases, digits alone and in rows, after letters and
# spaces, punctuation in rows and before line ends, several spaces and line ends, capitals, other scripts.
PROBE = (
    "I'VE we've  12 345 6789a b12 3.14 \n\n \n\t x!?\n\n ... \r\n<=>$5 CamelCase ABCdef 'Tis it'll, (y) _z\n"
    "œuvre нещо 在apple工作1314151天～ कुछ ١٢٣ é 🚀✅  \n   end  "
)


@dataclass
class Vocabulary:
    """Tokenizer fields of a GGUF file.

    model: `gpt2` (byte-level BPE), `llama` (SentencePiece BPE) or `t5` (SentencePiece Unigram). tokens, types and,
    unless `gpt2`, scores: one for each row of the embeddings, in the order of the ids. merges: `left right`, `gpt2`
    only. pre: llama.cpp's name of the pre-tokenizer. special: ids of SPECIAL, as far as there are any.
    flags: further booleans by key, such as `add_space_prefix`.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None = None
    merges: list[str] | None = None
    charsmap: bytes | None = None
    special: dict[str, int] = field(default_factory=dict)
    flags: dict[str, bool] = field(default_factory=dict)
    chat_template: str | list[dict[str, str]] | None = None
    warnings: list[str] = field(default_factory=list)

    def add_to(self, writer: Any) -> None:
        """Enter all of it as metadata of a gguf.GGUFWriter."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
        writer.add_token_types(self.types)
        if self.merges is not None:
            writer.add_token_merges(self.merges)
        if self.charsmap is not None:
            writer.add_precompiled_charsmap(self.charsmap)
        for kind, token in self.special.items():
            getattr(writer, f"add_{kind}_token_id")(token)
        for key, value in self.flags.items():
            writer.add_bool(f"tokenizer.ggml.{key}", value)
        if self.chat_template:
            writer.add_chat_template(self.chat_template)


def read_vocabulary(folder: Path, config: Any) -> Vocabulary:
    """The vocabulary of a checkpoint folder, with `config.vocab_size` tokens.

    Ids without a token become unused tokens; tokens beyond the embeddings are left out, with a warning.
    InputError: no tokenizer there, or of a kind that llama.cpp does not have.
    """
    if not any((folder / name).is_file() for name in _FILES):  # transformers makes an empty one for some families
        raise InputError(f"{folder}: no tokenizer there ({', '.join(_FILES)}); a GGUF file holds the tokenizer too")
    tokenizer = load_tokenizer(folder)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise InputError(f"{folder}: a tokenizer in Python only cannot go into a GGUF file; a tokenizer.json is needed")
    description = json.loads(backend.to_str())
    model = description["model"]
    kind, byte_level = model["type"], "ByteLevel" in json.dumps(description["pre_tokenizer"])
    if kind == "BPE" and byte_level:
        vocabulary = _byte_level(backend, description)
    elif kind == "BPE" and model["byte_fallback"]:
        vocabulary = _sentencepiece(backend, description)
    elif kind == "Unigram":
        vocabulary = _unigram(backend, description)
    else:
        raise InputError(
            f"{folder}: a {kind} tokenizer of this kind cannot go into a GGUF file; byte-level BPE, SentencePiece BPE "
            "with byte fallback, and Unigram can"
        )
    _fit(vocabulary, config.vocab_size, folder)
    _add_special(vocabulary, tokenizer, config)
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    vocabulary.chat_template = template
    return vocabulary


def _byte_level(backend: Tokenizer, description: dict[str, Any]) -> Vocabulary:
    model = description["model"]
    pre, warnings = recognise(backend, bool(model["ignore_merges"]))
    warnings += _left_out(description["normalizer"], "NFC")  # which llama.cpp lacks, and nearly no text needs
    # A byte-level token never holds a space, so neither does half of one.
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    tokens, types = _tokens(model["vocab"], description["added_tokens"])
    return Vocabulary("gpt2", pre, tokens, types, merges=merges, warnings=warnings)


def recognise(backend: Tokenizer, ignore_merges: bool) -> tuple[str, list[str]]:
    """llama.cpp's name for a byte-level tokenizer's splitting, and warnings: the one that splits PROBE alike.

    So a spelling of an expression, or a vocabulary, that llama.cpp's converter has never seen is no obstacle.
    """
    pieces = _pieces(backend.pre_tokenizer)
    alike = {name: ignores for name, (expressions, ignores) in PRE_TOKENIZERS.items() if pieces == split(expressions)}
    for name, ignores in alike.items():
        if ignores == ignore_merges:
            return name, []
    if alike:
        name = next(iter(alike))
        return name, [
            f"pre-tokenizer {name} taken, which differs where a whole word is a token that merges do not make"
        ]
    return FALLBACK, [
        f"pre-tokenizer not recognised: llama.cpp's {FALLBACK!r} is taken, which may split some texts into other tokens"
    ]


def split(expressions: tuple[str, ...]) -> list[str]:
    """PROBE in pieces, in byte-level letters: each expression splits what the one before left."""
    splits: list[Any] = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in expressions]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return _pieces(pre_tokenizers.Sequence([*splits, byte_level]))


def _pieces(pre_tokenizer: Any) -> list[str]:
    return [piece for piece, _ in pre_tokenizer.pre_tokenize_str(PROBE)]


def _sentencepiece(backend: Tokenizer, description: dict[str, Any]) -> Vocabulary:
    model = description["model"]
    missing = {f"<0x{byte:02X}>" for byte in range(256)} - model["vocab"].keys()
    if missing:  # llama.cpp ends the process when it meets a character that it has no tokens for
        raise InputError(f"the tokenizer lacks the byte token {min(missing)}, without which llama.cpp cannot use it")
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    # llama.cpp joins the two tokens whose joint token has the highest score. SentencePiece gives its own scores in the
    # order of the merges, too.
    scores: dict[str, float] = {}
    for rank, (left, right) in enumerate(merges, 1):
        scores.setdefault(left + right, -float(rank))
    tokens, types = _tokens(model["vocab"], description["added_tokens"], model["unk_token"], byte_tokens=True)
    flags, warnings = _spaces(backend, tokens, types)
    warnings += _left_out(description["normalizer"], "Prepend", "Replace")
    warnings += _left_out(description["pre_tokenizer"], "Metaspace")
    warnings += _foreign_joins(tokens, types, set(merges))
    by_id = [scores.get(token, 0.0) for token in tokens]
    return Vocabulary("llama", "default", tokens, types, by_id, flags=flags, warnings=warnings)


def _foreign_joins(tokens: list[str], types: list[int], merges: set[tuple[str, ...]]) -> list[str]:
    """A warning where two tokens make a third and the tokenizer does not merge them: llama.cpp does."""
    normal = {token for token, kind in zip(tokens, types, strict=True) if kind == NORMAL}
    pairs = ((token[:cut], token[cut:]) for token in normal for cut in range(1, len(token)))
    foreign = [pair for pair in pairs if normal.issuperset(pair) and pair not in merges]
    if not foreign:
        return []
    example = " + ".join(min(foreign))
    return [f"pairs of tokens that llama.cpp joins and the tokenizer does not: {len(foreign)}, such as {example}"]


def _unigram(backend: Tokenizer, description: dict[str, Any]) -> Vocabulary:
    model = description["model"]
    scores = dict(model["vocab"])
    ids = {token: number for number, (token, _) in enumerate(model["vocab"])}
    unknown = None if model["unk_id"] is None else model["vocab"][model["unk_id"]][0]
    tokens, types = _tokens(ids, description["added_tokens"], unknown, byte_tokens=model["byte_fallback"])
    flags, warnings = _spaces(backend, tokens, types)
    collapses = _encode(backend, "a  b") == _encode(backend, "a b")
    trims = _encode(backend, "a ") == _encode(backend, "a")
    flags["remove_extra_whitespaces"] = collapses and trims
    warnings += _left_out(description["normalizer"], "Precompiled", "Replace", "Strip")
    warnings += _left_out(description["pre_tokenizer"], "Metaspace")
    if collapses != trims:
        warnings.append("llama.cpp removes extra spaces inside a text and after it, or none; none is taken")
    if model["byte_fallback"]:
        warnings.append("llama.cpp's Unigram tokenizer has no byte fallback: characters without a token become unknown")
    by_id = [scores.get(token, 0.0) for token in tokens]
    charsmap = _charsmap(description["normalizer"])
    return Vocabulary("t5", "default", tokens, types, by_id, charsmap=charsmap, flags=flags, warnings=warnings)


def _steps(component: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer of a tokenizer.json, one part after the other."""
    if component is None:
        return []
    return component.get("normalizers") or component.get("pretokenizers") or [component]


def _left_out(component: dict[str, Any] | None, *known: str) -> list[str]:
    """Warn of each part that llama.cpp does not have; other settings express what the `known` parts do."""
    foreign = [step["type"] for step in _steps(component) if step["type"] not in known]
    return [f"the tokenizer's step {kind} is left out: llama.cpp does not have it" for kind in foreign]


def _encode(backend: Tokenizer, text: str) -> list[str]:
    return backend.encode(text, add_special_tokens=False).tokens


def _spaces(backend: Tokenizer, tokens: list[str], types: list[int]) -> tuple[dict[str, bool], list[str]]:
    """Return whether a space goes before a text, and a warning where llama.cpp puts one that the tokenizer does not."""
    space = SPACE if "".join(_encode(backend, "a")).startswith(SPACE) else ""
    warnings = []
    special = next((token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL), None)
    expected = {" a": f"{space}{SPACE}a"}
    if special is not None:
        expected[f"a{special}a"] = f"{space}a{special}{space}a"
    if any("".join(_encode(backend, text)) != pieces for text, pieces in expected.items()):
        warnings.append(
            "llama.cpp puts a space before a text that begins with one, and after a special token in a text"
        )
    return {"add_space_prefix": bool(space)}, warnings


def _tokens(
    vocabulary: dict[str, int], added: list[dict[str, Any]], unknown: str | None = None, byte_tokens: bool = False
) -> tuple[list[str], list[int]]:
    """Tokens and types by id, up to the highest id; gaps are unused tokens."""

    def kind(token: str) -> int:
        if token == unknown:
            return UNKNOWN
        return BYTE if byte_tokens and _BYTE.fullmatch(token) else NORMAL

    by_id = {number: (token, kind(token)) for token, number in vocabulary.items()}
    for entry in added:
        token = entry["content"]
        if token == unknown:
            continue
        # llama.cpp's converter takes such tokens for control tokens whatever they say of themselves.
        if entry["special"] or re.fullmatch(r"<[|｜].*[|｜]>", token):
            by_id[entry["id"]] = token, CONTROL
        else:
            by_id[entry["id"]] = token.replace(SPACE, " "), USER_DEFINED  # looked for in the text as it stands
    rows = [by_id.get(number, (f"[PAD{number}]", UNUSED)) for number in range(max(by_id, default=-1) + 1)]
    return [token for token, _ in rows], [kind for _, kind in rows]


def _charsmap(normalizer: dict[str, Any] | None) -> bytes | None:
    """SentencePiece's table of normalised characters, where a tokenizer.json has one."""
    for step in _steps(normalizer):
        if step["type"] == "Precompiled" and step["precompiled_charsmap"]:
            return base64.b64decode(step["precompiled_charsmap"])
    return None


def _fit(vocabulary: Vocabulary, size: int, folder: Path) -> None:
    """Fit the tokens to the embeddings' rows: llama.cpp takes the size of one from the other."""
    tokens, types, scores = vocabulary.tokens, vocabulary.types, vocabulary.scores or []
    beyond = len(tokens) - size
    if beyond > 0:
        vocabulary.warnings.append(
            f"tokens that have no embedding and are left out: {beyond}, from {tokens[size]!r} on"
        )
        del tokens[size:], types[size:], scores[size:]
    unused = range(len(tokens), size)
    tokens += [f"[PAD{number}]" for number in unused]
    types += [UNUSED] * len(unused)
    if vocabulary.scores is not None:
        scores += [0.0] * len(unused)
    token, count = Counter(tokens).most_common(1)[0]
    if count > 1:  # llama.cpp ends the process
        raise InputError(f"{folder}: two tokens of the tokenizer would be {token!r} in a GGUF file")


def _add_special(vocabulary: Vocabulary, tokenizer: Any, config: Any) -> None:
    """Ids of the special tokens, and which of them the tokenizer puts before and after a text."""
    for kind in SPECIAL:
        token = getattr(tokenizer, f"{kind}_token_id", None)
        if token is None:
            token = getattr(config, f"{kind}_token_id", None)
        if isinstance(token, int) and 0 <= token < config.vocab_size:
            vocabulary.special[kind] = token
    if "eos" not in vocabulary.special:
        vocabulary.warnings.append("the tokenizer has no EOS token: llama.cpp takes one by its own rules")
    bare, whole = (list(tokenizer("a", add_special_tokens=own)["input_ids"]) for own in (False, True))
    before, after = ([vocabulary.special[kind]] if kind in vocabulary.special else [] for kind in ("bos", "eos"))
    add_bos = bool(before) and whole[:1] == before
    add_eos = bool(after) and whole[-1:] == after
    vocabulary.flags |= {"add_bos_token": add_bos, "add_eos_token": add_eos}
    if whole != before * add_bos + bare + after * add_eos:
        vocabulary.warnings.append("special tokens other than BOS and EOS around a text are left out")
