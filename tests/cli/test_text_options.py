"""Texts on the command line: several with shares, what plan.json says of them, and a text that changed."""

import json
from pathlib import Path

import pytest
import torch
from support.command_line import run

import pyprune
from pyprune.calibration.mixture import interleaved
from pyprune.calibration.sampling import sample_from_model
from pyprune.calibration.source import TokenSource
from pyprune.calibration.windows import fingerprint
from pyprune.checkpoint import CheckpointReader
from pyprune.errors import InputError

SMALL = ("--samples", 8, "--sequence-length", 16, "--device", "cpu")


@pytest.fixture
def texts(tmp_path: Path) -> list[Path]:
    """Two files: a .txt and a .csv whose text is in the column `body`."""
    (tmp_path / "a.txt").write_text("".join(f"In the year {n} the harvest was good. " for n in range(60)))
    (tmp_path / "b.csv").write_text("id,body\n" + "".join(f"{n},Chapter {n} tells of the sea.\n" for n in range(60)))
    return [tmp_path / "a.txt", tmp_path / "b.csv"]


def test_shares(texts: list[Path], demo_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shares = [f"{texts[0]}=0.5", f"{texts[1]}=0.25", "self=0.25"]
    words = [word for share in shares for word in ("--calibration", share)]
    ended = run(
        capsys, "prune", demo_model, tmp_path / "out", "--method", "wanda-sp", "--ratio", 0.3, *words,
        "--text-column", "body", *SMALL, "--json",
    )  # fmt: skip
    assert ended.status == 0, ended.err
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    calibration = plan["calibration"]
    assert calibration["text"] == ", ".join(shares)
    assert [calibration[name] for name in ("samples", "sequence_length", "packing")] == [8, 16, "concatenate"]
    assert [(own["text"], own["share"], own["windows"]) for own in calibration["sources"]] == [
        (str(texts[0]), 0.5, 4), (str(texts[1]), 0.25, 2), ("self", 0.25, 2),
    ]  # fmt: skip
    assert plan["identity"]["sources"] == [own["fingerprint"] for own in calibration["sources"]]

    config, cpu = CheckpointReader(demo_model).config, torch.device("cpu")
    read = [
        TokenSource(str(text), demo_model, config, cpu, torch.float32, column="body").calibration(count, 16, 0)
        for text, count in zip(texts, (4, 2), strict=True)
    ]
    dtype = getattr(torch, plan["dtype"])
    sampled = sample_from_model(demo_model, 2, 16, 0, cpu, dtype)
    assert calibration["fingerprint"] == fingerprint(interleaved([*read, sampled]))
    assert calibration["sources"][2]["fingerprint"] == fingerprint(sampled)


def test_shares_of_python(texts: list[Path], demo_model: Path, tmp_path: Path) -> None:
    """A mapping and pairs of texts of any kind are the same mixture."""
    kept = []
    for number, calibration in enumerate(
        ({str(texts[0]): 0.5, "self": 0.5}, [([texts[0].read_text()], None), ("self", None)])
    ):
        record = pyprune.prune(
            demo_model, tmp_path / str(number), "wanda-sp", 0.3, calibration=calibration,
            samples=4, sequence_length=16, device="cpu",
        )  # fmt: skip
        assert record.calibration is not None
        kept.append((record.calibration["fingerprint"], record.layers))
    assert kept[0] == kept[1]


def test_the_same_rows_as_a_data_set(texts: list[Path], demo_model: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    documents = [f"Chapter {n} tells of the sea." for n in range(20)]
    rows = datasets.Dataset.from_dict({"body": documents})
    config, cpu = CheckpointReader(demo_model).config, torch.device("cpu")
    windows = [
        TokenSource(text, demo_model, config, cpu, torch.float32, column="body").calibration(8, 64, 0)
        for text in (rows, rows.to_iterable_dataset(), documents)
    ]
    assert torch.equal(windows[0], windows[1])
    assert torch.equal(windows[0], windows[2])  # fewer tokens than a stream is read for: all of them


def test_a_text_that_changed_is_found(
    texts: list[Path], demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        """Ends a run as a signal would."""

    def killed(*arguments: object, **named: object) -> None:
        raise Killed

    def prune(resume: bool) -> pyprune.PruneRecord:
        return pyprune.prune(
            demo_model, tmp_path / "out", "wanda-sp", 0.3, calibration={str(text): 0.5 for text in texts},
            text_column="body", samples=8, sequence_length=16, device="cpu", resume=resume,
        )  # fmt: skip

    with monkeypatch.context() as patch:
        patch.setattr("pyprune.pipeline.run.finalize", killed)
        with pytest.raises(Killed):
            prune(resume=False)
    before = texts[1].read_text()
    texts[1].write_text(before + "60,One more row.\n")
    with pytest.raises(InputError, match=rf"^{texts[1]}: not the text that this run began with"):
        prune(resume=True)
    texts[1].write_text(before)
    assert prune(resume=True).ratio_met > 0


def test_one_result_a_text(
    texts: list[Path], demo_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ("--sequence-length", 16, "--max-windows", 2, "--device", "cpu", "--text-column", "body")
    both = [word for text in texts for word in ("--text", text)]
    ended = run(capsys, "evaluate", demo_model, *both, *small, "--json")
    assert ended.status == 0, ended.err
    assert list(ended.json["texts"]) == [str(text) for text in texts]
    for text in texts:
        alone = run(capsys, "evaluate", demo_model, "--text", text, *small, "--json")
        assert alone.json["perplexity"] == ended.json["texts"][str(text)]["perplexity"]
    shown = run(capsys, "evaluate", demo_model, *both, *small).out
    assert all(str(text) in shown for text in texts)
    assert shown.count("perplexity") == 2
    twice = run(capsys, "evaluate", demo_model, "--text", texts[0], "--text", texts[0], *small)
    assert twice.status == 2
    assert f"--text names {texts[0]} twice" in twice.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("a.txt=0.5", "self"), "self has no share, others have one: give all texts a share (TEXT=0.3) or none"),
        (
            ("a.txt=0.5", "self=0.4"),
            "the shares of the calibration texts sum to 0.9: they must sum to 1, as in a.txt=0.556",
        ),
        (("a.txt=1", "self=0"), "self: its share is 0.0: it must be above 0, and all must sum to 1"),
        (("a.txt=x",), "a.txt=x: the share behind `=` is not a number: write it as a.txt=0.3"),
        (("a.txt=0.99", "self=0.01"), "self: its share 0.01 of 8 windows is not one: ask for more windows"),
        (("c.txt",), "c.txt: cannot be read: No such file or directory"),
        (("b.csv",), "b.csv, line 1: no `text` field with a string, and no `messages`; it has `id`, `body`"),
    ],
)
def test_bad_calibrations(
    words: tuple[str, ...], message: str, texts: list[Path], demo_model: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    options = [word for each in words for word in ("--calibration", each)]
    ended = run(capsys, "prune", demo_model, tmp_path / "out", "--method", "flap", "--ratio", 0.3, *options, *SMALL)
    assert ended.status == 2
    assert message in ended.err
    assert len(ended.err.strip().splitlines()) == 1
    assert not list(tmp_path.glob("out*"))
