"""Shares of several calibration texts: as they are typed, in windows, and in one order."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pyprune import InputError
from pyprune.calibration.mixture import interleaved, parts_of, spelled_texts


def test_spelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("odd=0.5").touch()
    assert spelled_texts([]) is None
    assert spelled_texts(["a.txt"]) == "a.txt"
    assert spelled_texts(["a.txt=1"]) == [("a.txt", 1.0)]
    assert spelled_texts(["a=b/c.txt=.25", "org/set:plain:train=7.5e-1"]) == [
        ("a=b/c.txt", 0.25),
        ("org/set:plain:train", 0.75),
    ]
    assert spelled_texts(["a.txt", "self"]) == [("a.txt", None), ("self", None)]
    assert spelled_texts(["odd=0.5"]) == "odd=0.5"  # a file of that name
    assert spelled_texts(["split=train/rows.csv"]) == "split=train/rows.csv"
    with pytest.raises(InputError, match=r"^a.txt=half: the share behind `=` is not a number: write it as a.txt=0.3$"):
        spelled_texts(["a.txt=half"])


@pytest.mark.parametrize(
    ("calibration", "samples", "counts"),
    [
        ("a", 7, [7]),
        ([("a", 0.5), ("b", 0.3), ("c", 0.2)], 10, [5, 3, 2]),
        ([("a", 0.5), ("b", 0.3), ("c", 0.2)], 8, [4, 2, 2]),  # 4, 2.4, 1.6: the largest remainder is c's
        ([("a", 0.33), ("b", 0.33), ("c", 0.33)], 128, [43, 43, 42]),
        ([("a", None), ("b", None)], 5, [3, 2]),
        ({"a": 0.9, "b": 0.1}, 128, [115, 13]),
    ],
)
def test_windows_by_share(calibration: Any, samples: int, counts: list[int]) -> None:
    parts = parts_of(calibration, samples)
    assert [part.windows for part in parts] == counts
    assert sum(part.share for part in parts) == pytest.approx(1)


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ([("a", 0.5), ("b", None)], r"^b has no share, others have one: give all texts a share \(TEXT=0.3\) or none$"),
        ([("a", 1.0), ("b", 0.0)], r"^b: its share is 0.0: it must be above 0, and all must sum to 1$"),
        ([("a", 1.5), ("b", -0.5)], "^b: its share is -0.5: it must be above 0"),
        ([("a", float("nan"))], "^a: its share is nan: it must be above 0"),
        (
            [("a", 0.3), ("b", 0.3)],
            r"^the shares of the calibration texts sum to 0.6: they must sum to 1, as in a=0.5 b=",
        ),
        ([("a", 0.3)], "sum to 0.3: they must sum to 1, as in a=1$"),
        ([("a", 0.5), ("a", 0.5)], "^a is given twice as a calibration text$"),
        ([("a", 0.999), ("b", 0.001)], "^b: its share 0.001 of 16 windows is not one: ask for more windows$"),
        ([("a", 0.5), "b"], "several texts are pairs"),
        ({}, "several texts are pairs"),
    ],
)
def test_shares_that_are_none(calibration: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parts_of(calibration, 16)


def test_every_beginning_has_all_texts_in_proportion() -> None:
    counts = [80, 32, 16]
    windows = [torch.full((count, 2), part) + torch.arange(count)[:, None] * 10 for part, count in enumerate(counts)]
    mixed = interleaved(windows)
    assert mixed.shape == (128, 2)
    for part, own in enumerate(windows):
        assert torch.equal(mixed[mixed[:, 0] % 10 == part], own)  # each in its order
    for length in range(1, 129):
        for part, count in enumerate(counts):
            assert abs(int((mixed[:length, 0] % 10 == part).sum()) - length * count / 128) <= 1
    assert torch.equal(interleaved(windows[:1]), windows[0])
