"""Tokenizers in GGUF: llama.cpp must yield the token ids that transformers yields."""

import json
import shutil
import struct
import types
from pathlib import Path
from typing import Any

import pytest
from support.gguf_models import add_tokenizer
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pyprune.errors import InputError
from pyprune.exporters.gguf_vocabulary import (
    BYTE,
    CONTROL,
    NORMAL,
    PRE_TOKENIZERS,
    PROBE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Vocabulary,
    read_vocabulary,
    split,
)

gguf = pytest.importorskip("gguf")

TEXTS = [
    PROBE,
    "",
    "\n",
    "a\n\nb\n",
    "½ Äpfel",
    "The river was wide, and nobody had crossed it since the bridge fell in the winter of 1887.",
    "We're told that the ferryman's house stood on the other bank; that isn't what the old maps show.",
    "In 1902 a calibration pass counted 3,417 people in the valley (1,204 of them children) and 96 mills.",
    "The mills ground wheat, barley and oats: about 12.5 tonnes a day, six days a week.",
    "By the end of the century most of them had closed, and the people had moved to the towns.",
    "for (int i = 0; i < 10; ++i) {  total += weights[i] * inputs[i];  }",
    "    An indented line,\ta tab, two  spaces   and three; then a line end.\r\n",
    "What remains of the first bridge is a pier of grey stone, twenty feet high, with ivy on it.",
    'He said: "You\'ll find it if you follow the water" -- and so they did, all 7 of them!',
    "The children of the miller were three, and the youngest of them was the one who stayed.",
]


def read(folder: Path, size: int, **config: Any) -> Vocabulary:
    return read_vocabulary(folder, types.SimpleNamespace(vocab_size=size, **config))


def vocabulary_file(vocabulary: Vocabulary, file: Path) -> Path:
    """A GGUF file of a vocabulary alone."""
    writer = gguf.GGUFWriter(file, "llama")
    vocabulary.add_to(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return file


def check_tokens(folder: Path, vocabulary: Vocabulary, file: Path, texts: list[str]) -> None:
    pytest.importorskip("llama_cpp")
    from pyprune.evaluation.llama_cpp import tokens_gguf

    expected = AutoTokenizer.from_pretrained(folder)(texts)["input_ids"]
    for text, own, theirs in zip(texts, tokens_gguf(vocabulary_file(vocabulary, file), texts), expected, strict=True):
        assert own == theirs, text


def demo_copy(demo_model: Path, folder: Path, **changes: Any) -> Path:
    """The tokenizer of the built-in model with changes in tokenizer.json, in its model where it has the key."""
    folder.mkdir()
    for file in demo_model.glob("tokenizer*"):
        shutil.copyfile(file, folder / file.name)
    file = folder / "tokenizer.json"
    description = json.loads(file.read_text())
    for key, value in changes.items():
        (description["model"] if key in description["model"] else description)[key] = value
    file.write_text(json.dumps(description))
    return folder


def test_the_built_in_tokenizer(demo_model: Path, tmp_path: Path) -> None:
    vocabulary = read(demo_model, 8192)
    assert (vocabulary.model, vocabulary.pre, vocabulary.warnings) == ("gpt2", "smollm", [])
    assert vocabulary.special == {"bos": 0, "eos": 1}
    assert vocabulary.flags == {"add_bos_token": True, "add_eos_token": False}
    assert vocabulary.types == [CONTROL] * 2 + [NORMAL] * 8190
    check_tokens(demo_model, vocabulary, tmp_path / "model.gguf", TEXTS)


@pytest.mark.shared
@pytest.mark.llama_cpp
@pytest.mark.parametrize("model", ["llama-6m-gqa", "llama-24m-mha", "llama-23m-gqa"])
def test_wikitext_in_the_trained_models(model: str, shared_dir: Path, tmp_path: Path) -> None:
    lines = (shared_dir / "data" / "wikitext2-test.txt").read_text().splitlines()
    folder = shared_dir / "models" / model
    check_tokens(folder, read(folder, 8192), tmp_path / "model.gguf", [line for line in lines if line.strip()][:300])


@pytest.mark.parametrize("name", list(PRE_TOKENIZERS))
def test_pre_tokenizers(name: str, demo_model: Path, tmp_path: Path) -> None:
    """Each as published tokenizers spell it: recognised, and split by llama.cpp as by transformers."""
    expressions, ignore_merges = PRE_TOKENIZERS[name]
    steps: list[dict[str, Any]] = [
        {"type": "Digits", "individual_digits": True}
        if expression == r"\p{N}"
        else {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
        for expression in expressions
    ]
    whole = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    if name in ("gpt-2", "smollm"):
        steps[-1] = whole
    else:
        steps.append(whole | {"use_regex": False})
    pre_tokenizer = {"type": "Sequence", "pretokenizers": steps}
    folder = demo_copy(demo_model, tmp_path / "model", pre_tokenizer=pre_tokenizer, ignore_merges=ignore_merges)
    vocabulary = read(folder, 8192)
    assert (vocabulary.pre, vocabulary.warnings) == (name, [])
    check_tokens(folder, vocabulary, tmp_path / "model.gguf", TEXTS)


def test_the_probe_tells_pre_tokenizers_apart() -> None:
    splits = {(*split(expressions), str(ignores)) for expressions, ignores in PRE_TOKENIZERS.values()}
    assert len(splits) == len(PRE_TOKENIZERS)


def test_fallbacks_are_named(demo_model: Path, tmp_path: Path) -> None:
    words = {"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}, {"type": "ByteLevel", "use_regex": False}]}
    words["pretokenizers"][1] |= {"add_prefix_space": False, "trim_offsets": True}  # type: ignore[index]
    vocabulary = read(demo_copy(demo_model, tmp_path / "words", pre_tokenizer=words), 8192)
    assert vocabulary.pre == "default"
    assert ["not recognised: llama.cpp's 'default' is taken" in line for line in vocabulary.warnings] == [True]

    folder = demo_copy(demo_model, tmp_path / "merges", ignore_merges=True, normalizer={"type": "Lowercase"})
    vocabulary = read(folder, 8192)
    assert vocabulary.pre == "smollm"
    assert ["smollm taken" in vocabulary.warnings[0], "Lowercase" in vocabulary.warnings[1]] == [True, True]


def test_sizes_that_differ_from_the_embeddings(tmp_path: Path) -> None:
    tokens = len(add_tokenizer(tmp_path, pad_token="<pad>"))
    vocabulary = read(tmp_path, 97)
    assert vocabulary.tokens[tokens - 1 : tokens + 1] == ["<pad>", f"[PAD{tokens}]"]
    assert vocabulary.types[tokens - 1 :] == [CONTROL] + [UNUSED] * (97 - tokens)
    assert vocabulary.special == {"bos": 0, "eos": 1, "pad": tokens - 1}
    assert vocabulary.warnings == []
    vocabulary = read(tmp_path, tokens - 1)
    assert "<pad>" not in vocabulary.tokens
    assert vocabulary.special == {"bos": 0, "eos": 1}
    assert vocabulary.warnings == ["tokens that have no embedding and are left out: 1, from '<pad>' on"]


def test_special_tokens(tmp_path: Path) -> None:
    """What the configuration knows and the tokenizer does not; what is put around a text; two chat templates."""
    tokenizer = add_tokenizer(tmp_path, bos_token=None)
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    tokenizer.add_tokens(["<|user|>", "plain▁token"])
    tokenizer.save_pretrained(tmp_path)
    vocabulary = read(tmp_path, 97, bos_token_id=0, eos_token_id=[5, 6])
    assert vocabulary.special == {"bos": 0, "eos": 1}
    assert vocabulary.flags == {"add_bos_token": True, "add_eos_token": False}
    by_token = dict(zip(vocabulary.tokens, vocabulary.types, strict=True))
    assert (by_token["<|user|>"], by_token["plain token"]) == (CONTROL, USER_DEFINED)
    reader = gguf.GGUFReader(vocabulary_file(vocabulary, tmp_path / "model.gguf"))
    assert reader.get_field("tokenizer.chat_template").contents() == "{{ messages }}"
    assert reader.get_field("tokenizer.chat_template.tool_use").contents() == "{{ tools }}"
    assert reader.get_field("tokenizer.ggml.bos_token_id").contents() == 0

    backend = tokenizer.backend_tokenizer
    ends = [("<s>", 0), ("</s>", 1), ("a", 3)]
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=ends)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(tmp_path)
    assert read(tmp_path, 97).flags == {"add_bos_token": False, "add_eos_token": True}
    backend.post_processor = processors.TemplateProcessing(single="a $A", special_tokens=ends)
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path)
    vocabulary = read(tmp_path, 97)
    assert vocabulary.flags == {"add_bos_token": False, "add_eos_token": False}
    assert ["no EOS" in vocabulary.warnings[0], "special tokens other than" in vocabulary.warnings[1]] == [True, True]


def sentencepiece(spaces: str) -> Tokenizer:
    """A BPE tokenizer as transformers makes of SentencePiece's: merges of every two tokens that make a third.

    spaces: `prepend`, as Llama 2's tokenizer.json has it, or a prepend_scheme of Metaspace, as transformers 5 has it.
    """
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=special, show_progress=False)
    trained.train_from_iterator(TEXTS, trainer)
    vocabulary = trained.get_vocab()
    pairs = [
        (number, token[:cut], token[cut:])
        for token, number in vocabulary.items()
        if number >= len(special)
        for cut in range(1, len(token))
        if min(vocabulary.get(token[:cut], 0), vocabulary.get(token[cut:], 0)) >= len(special)
    ]
    merges = [(left, right) for _, left, right in sorted(pairs)]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if spaces == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=spaces, split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> Path:
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("spaces", ["prepend", "first", "always", "never"])
def test_sentencepiece(spaces: str, tmp_path: Path) -> None:
    tokenizer = sentencepiece(spaces)
    folder, size = save(tokenizer, tmp_path / spaces), tokenizer.get_vocab_size()
    vocabulary = read(folder, size)
    assert (vocabulary.model, vocabulary.pre) == ("llama", "default")
    assert vocabulary.types == [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * (size - 259)
    assert vocabulary.special == {"bos": 1, "eos": 2, "unk": 0}
    assert vocabulary.flags["add_space_prefix"] == (spaces != "never")
    # llama.cpp knows only the first way; texts that show the difference are those of the warning.
    differs = spaces in ("first", "always")
    assert ["puts a space before a text" in line for line in vocabulary.warnings] == [True] * differs
    texts = [*TEXTS, "日本 🚀", "a</s>b", " lead", "trail "]
    if differs:
        texts = [text for text in texts if not text.startswith(" ") and "</s>" not in text]
    check_tokens(folder, vocabulary, tmp_path / "model.gguf", texts)


def test_merges_that_sentencepiece_would_add(tmp_path: Path) -> None:
    description = json.loads(sentencepiece("prepend").to_str())
    left, right = description["model"]["merges"].pop()
    description["pre_tokenizer"] = {"type": "Digits", "individual_digits": True}
    vocabulary = read(save(Tokenizer.from_str(json.dumps(description)), tmp_path), 2000)
    known = f"llama.cpp joins and the tokenizer does not: 1, such as {left} + {right}"
    assert vocabulary.warnings == [
        "the tokenizer's step Digits is left out: llama.cpp does not have it",
        f"pairs of tokens that {known}",
    ]


def unigram(scheme: str, normalizer: Any = None) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.UnigramTrainer(vocab_size=400, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.decoder = decoders.Metaspace()
    ends = [("<s>", 1), ("</s>", 2)]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    return tokenizer


# Without the first lines: of two ways with the same score (141 as 1, 41 or 14, 1) each library takes its own.
UNIGRAM_TEXTS = [*(text for text in TEXTS[4:] if not text.startswith(" ")), "日本 x"]


@pytest.mark.parametrize("spaces", ["never", "always", "removed"])
def test_unigram(spaces: str, tmp_path: Path) -> None:
    normalizer = None
    if spaces == "removed":
        steps = [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
        normalizer = normalizers.Sequence(steps)
    tokenizer = unigram("never" if spaces == "never" else "always", normalizer)
    folder, size = save(tokenizer, tmp_path / spaces), tokenizer.get_vocab_size()
    vocabulary = read(folder, size)
    assert vocabulary.model == "t5"
    assert vocabulary.types[:4] == [UNKNOWN, CONTROL, CONTROL, NORMAL]
    assert vocabulary.flags == {
        "add_space_prefix": spaces != "never",
        "remove_extra_whitespaces": spaces == "removed",
        "add_bos_token": True,
        "add_eos_token": True,
    }
    check_tokens(folder, vocabulary, tmp_path / "model.gguf", UNIGRAM_TEXTS)


def test_normalised_characters(tmp_path: Path) -> None:
    """SentencePiece's table, here with one entry, Q to q: a double array of 32-bit units, and the replacements.

    A unit: label in bits 0 to 7, bit 8 that a replacement ends here, from bit 10 on what its children's places are
    xored with; a replacement's unit has bit 31 and where it begins.
    """
    units = [0] * 1024
    units[0] = 256 << 10
    place = 256 ^ ord("Q")
    units[place] = ord("Q") | 1 << 8 | (place ^ 512) << 10
    units[512] = 1 << 31
    table = struct.pack("<I1024I", 4096, *units) + b"q\0"
    tokenizer = unigram("always", normalizers.Sequence([normalizers.Precompiled(table), normalizers.Lowercase()]))
    description = json.loads(tokenizer.to_str())
    assert description["normalizer"]["normalizers"].pop() == {"type": "Lowercase"}
    folder = save(Tokenizer.from_str(json.dumps(description)), tmp_path / "table")
    vocabulary = read(folder, tokenizer.get_vocab_size())
    assert vocabulary.charsmap == table
    assert not any("left out" in line for line in vocabulary.warnings)
    texts = ["Quiet Quarry", "quiet quarry", *UNIGRAM_TEXTS]
    expected = AutoTokenizer.from_pretrained(folder)(texts[:2])["input_ids"]
    assert expected[0] == expected[1]
    check_tokens(folder, vocabulary, tmp_path / "model.gguf", texts)
    vocabulary = read(save(tokenizer, tmp_path / "lower"), tokenizer.get_vocab_size())
    assert "the tokenizer's step Lowercase is left out: llama.cpp does not have it" in vocabulary.warnings


def test_tokenizers_that_llama_cpp_lacks(demo_model: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "words")
    with pytest.raises(InputError, match="a WordLevel tokenizer of this kind"):
        read(tmp_path / "words", 97)

    description = json.loads(sentencepiece("prepend").to_str())
    del description["model"]["vocab"]["<0x41>"]
    with pytest.raises(InputError, match="lacks the byte token <0x41>"):
        read(save(Tokenizer.from_str(json.dumps(description)), tmp_path / "bytes"), 2000)

    tokenizer = sentencepiece("prepend")
    tokenizer.add_tokens(["[PAD1500]"])
    with pytest.raises(InputError, match=r"two tokens of the tokenizer would be '\[PAD1500\]'"):
        read(save(tokenizer, tmp_path / "twice"), 2000)
