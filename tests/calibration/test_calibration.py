"""Texts, tokens and windows."""

import hashlib
import json
import logging
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.texts import read_text
from transformers import AutoModelForCausalLM, AutoTokenizer

from pyprune import InputError
from pyprune.calibration.sampling import sample_from_model
from pyprune.calibration.text import check_vocabulary, tokenize
from pyprune.calibration.windows import consecutive_windows, fingerprint, spread_windows

CPU = torch.device("cpu")


def test_txt_is_read_as_it_is(tmp_path: Path) -> None:
    text = " naïve\nlines\u2028kept \n\n"
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert read_text(tmp_path / "a.txt") == text
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read_text(tmp_path / "a.txt") == text


def test_jsonl_texts_are_joined_by_blank_lines(tmp_path: Path) -> None:
    texts = ["one\ntwo", "line separators \u2028 and \x85 inside", " spaces "]
    lines = [json.dumps({"id": 1, "text": text}, ensure_ascii=False) for text in texts]
    (tmp_path / "a.jsonl").write_bytes("\r\n".join([*lines, "", ""]).encode())
    assert read_text(tmp_path / "a.jsonl") == "\n\n".join(texts)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "has no text"),
        ("a.txt", b" \n\t", "has no text"),
        ("a.txt", b"caf\xe9", r"not UTF-8 text \(byte 3\)"),
        ("a.txt", None, "cannot be read: No such file"),
        ("a.pdf", b"text", r"a text is a file .txt, .jsonl, .json, .csv or .parquet"),
        ("a.jsonl", b"", "has no text"),
        ("a.jsonl", b'{"text": " "}', "has no text"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": "b"', "line 3: not valid JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"body": "b"}', "line 2: no `text` field"),
        ("a.jsonl", b'{"text": "a"}\n["text"]', "line 2: no `text` field"),
        ("a.jsonl", b'{"text": 5}', "line 1: no `text` field"),
        ("a.jsonl", b'{"text": "ab\\ud800"}', r"line 1: `text` is not valid Unicode \(character 2\)"),
        ("a.jsonl", b"[" * 100_000, "line 1: not valid JSON"),
    ],
)
def test_bad_texts(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        read_text(tmp_path / name)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_tokenize_puts_one_bos_first_and_no_eos(demo_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    text = "A house divided against itself cannot stand."
    tokens = tokenize(text, tokenizer)
    assert tokens.dtype == torch.int64
    assert tokens[0] == bos
    assert (tokens == bos).sum() == 1
    assert eos not in tokens
    assert tokenizer.decode(tokens[1:]) == text
    assert tokenize("<s>" + text, tokenizer).tolist() == tokens.tolist()

    tokenizer.bos_token = None
    assert tokenize(text, tokenizer).tolist() == tokens[1:].tolist()


def test_tokenize_of_a_long_text_does_not_warn(demo_model: Path) -> None:
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        text = "word " * 3000
        tokens = tokenize(text, AutoTokenizer.from_pretrained(demo_model))
        assert len(tokens) > 2048
        assert not records
        AutoTokenizer.from_pretrained(demo_model)(text)  # what the warning would have been
        assert "longer than" in records[0].getMessage()
    finally:
        logger.removeHandler(handler)


@pytest.mark.parametrize(("length", "samples", "seed"), [(40, 5, 0), (40, 16, 1), (100_000, 64, 2)])
def test_spread_windows_come_one_from_each_part(length: int, samples: int, seed: int) -> None:
    windows = spread_windows(torch.arange(length), samples, 8, seed)
    assert windows.shape == (samples, 8)
    assert torch.equal(windows, windows[:, :1] + torch.arange(8))  # runs of the text
    starts, possible = windows[:, 0].tolist(), length - 7
    for i, start in enumerate(starts):
        assert i * possible // samples <= start < (i + 1) * possible // samples
    assert len(set(starts)) == samples
    assert torch.equal(windows, spread_windows(torch.arange(length), samples, 8, seed))
    assert not torch.equal(windows, spread_windows(torch.arange(length), samples, 8, seed + 1))


def test_spread_windows_are_random_within_their_part() -> None:
    # 200 of 2000 starts, 50 seeds: the place within a part of ten is uniform, 1000 ± 5·√900 each of 10 000.
    starts = [spread_windows(torch.arange(2001), 200, 2, seed)[:, 0] for seed in range(50)]
    counts = (torch.cat(starts) % 10).bincount()
    assert len(counts) == 10
    assert (counts - 1000).abs().max() < 5 * 900**0.5


@pytest.mark.parametrize(
    ("length", "samples", "sequence_length", "hints"),
    [
        (39, 33, 8, ["at most 32 x 8", "at most 33 x 7"]),
        (7, 2, 8, ["at most 2 x 6"]),
        (10, 12, 8, ["at most 3 x 8"]),
        (7, 9, 8, []),
    ],
)
def test_text_too_short_for_spread_windows(length: int, samples: int, sequence_length: int, hints: list[str]) -> None:
    tokens = torch.arange(length)
    with pytest.raises(InputError) as error:
        spread_windows(tokens, samples, sequence_length, 0)
    message = str(error.value)
    assert f"has {length} tokens" in message
    assert f"need {sequence_length + samples - 1}" in message
    assert message.count("at most") == len(hints)
    for hint in hints:  # each hint is in the message, works, and is the largest that does
        assert hint in message
        _, _, most, _, long = hint.split()
        spread_windows(tokens, int(most), int(long), 0)
        with pytest.raises(InputError):
            spread_windows(tokens, int(most) + 1, int(long), 0)


def test_consecutive_windows() -> None:
    tokens = torch.arange(35)
    assert torch.equal(consecutive_windows(tokens, 10), torch.arange(30).view(3, 10))
    assert torch.equal(consecutive_windows(tokens, 10, max_windows=2), torch.arange(20).view(2, 10))
    assert torch.equal(consecutive_windows(tokens, 35, max_windows=9), tokens[None])
    with pytest.raises(InputError, match="has 35 tokens, but one window needs 36"):
        consecutive_windows(tokens, 36)


def test_sizes_out_of_range() -> None:
    tokens = torch.arange(10)
    with pytest.raises(InputError, match="0 windows asked"):
        spread_windows(tokens, 0, 4, 0)
    with pytest.raises(InputError, match="0 windows asked"):
        consecutive_windows(tokens, 4, max_windows=0)
    with pytest.raises(InputError, match="sequence length is 1"):
        spread_windows(tokens, 1, 1, 0)
    with pytest.raises(InputError, match="sequence length is 0"):
        consecutive_windows(tokens, 0)
    with pytest.raises(InputError, match="seed is -1"):
        spread_windows(tokens, 1, 4, -1)


def test_check_vocabulary() -> None:
    check_vocabulary(torch.tensor([[0, 99]]), 100)
    with pytest.raises(InputError, match="token id 100 is outside the model's vocabulary of 100"):
        check_vocabulary(torch.tensor([[0, 100]]), 100)
    with pytest.raises(InputError, match="token id -1 is outside"):
        check_vocabulary(torch.tensor([-1, 3]), 100)


def test_fingerprint_is_of_shape_and_ids() -> None:
    windows = torch.tensor([[1, 2, 3], [4, 5, 2**40]])
    expected = hashlib.sha256(struct.pack("<2q", 2, 3) + struct.pack("<6q", 1, 2, 3, 4, 5, 2**40)).hexdigest()
    assert fingerprint(windows) == expected
    assert fingerprint(windows.t().contiguous().t()) == expected
    assert fingerprint(windows.view(3, 2)) != expected


def test_sampled_windows(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint()  # BOS 1 and EOS 2, as LlamaConfig has them
    steps: list[tuple[int, int]] = []
    before = torch.get_rng_state()
    windows = sample_from_model(folder, 5, 24, 0, CPU, torch.float32, lambda *step: steps.append(step))
    assert torch.equal(torch.get_rng_state(), before)
    assert windows.shape == (5, 24)
    assert windows.dtype == torch.int64
    assert (windows[:, 0] == 1).all()
    assert not (windows == 2).any()
    assert steps == [(5 * position, 120) for position in range(1, 25)]
    assert torch.equal(windows, sample_from_model(folder, 5, 24, 0, CPU, torch.float32))
    assert not torch.equal(windows, sample_from_model(folder, 5, 24, 1, CPU, torch.float32))


def test_samples_follow_the_model_at_temperature_1(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint()
    samples = 20_000
    counts = sample_from_model(folder, samples, 2, 0, CPU, torch.float32)[:, 1].bincount(minlength=256)
    logits = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.tensor([[1]])).logits[0, 0]
    logits[2] = -torch.inf  # the EOS
    expected = samples * torch.softmax(logits.detach().double(), dim=-1)
    deviation = (counts - expected).abs() / expected.clamp(min=1).sqrt()
    assert deviation.max() < 5
    # All tokens matter: sampling from the 50 likeliest, transformers' default, would fail above.
    assert (expected > 25).sum() > 150


def test_batches_of_samples(tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyprune.calibration.sampling._sampling_batch", lambda *_: 2)
    steps: list[tuple[int, int]] = []
    windows = sample_from_model(tiny_checkpoint(), 5, 8, 0, CPU, torch.float32, lambda *step: steps.append(step))
    assert len({tuple(window) for window in windows.tolist()}) == 5
    assert steps[-1] == (40, 40)


def test_sampling_needs_a_first_token(tiny_checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match="names neither BOS nor EOS"):
        sample_from_model(tiny_checkpoint(family="qwen2"), 1, 4, 0, CPU, torch.float32)
    windows = sample_from_model(tiny_checkpoint(family="qwen2", eos_token_id=9), 2, 16, 0, CPU, torch.float32)
    assert (windows == 9).nonzero().tolist() == [[0, 0], [1, 0]]


@pytest.mark.gpu
def test_sampling_on_cuda_leaves_its_generator_alone(tiny_checkpoint: Callable[..., Path]) -> None:
    cuda = torch.device("cuda")
    before = torch.cuda.get_rng_state()
    windows = sample_from_model(tiny_checkpoint(), 5, 24, 0, cuda, torch.bfloat16)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert windows.device.type == "cpu"
    assert torch.equal(windows, sample_from_model(tiny_checkpoint(), 5, 24, 0, cuda, torch.bfloat16))
    assert not torch.equal(windows, sample_from_model(tiny_checkpoint(), 5, 24, 1, cuda, torch.bfloat16))
