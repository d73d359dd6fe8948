"""Depth of error curves, which cached ones suffice; a killed calibration pass continues at its layer."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.texts import harvest

from pyprune.allocation.residual import deepest_cut
from pyprune.architectures import ATTENTION, FFN, LayerShape
from pyprune.checkpoint import save_cached
from pyprune.checkpoint.content import Content
from pyprune.errors import InputError
from pyprune.job.config import PruneConfig
from pyprune.passes import calibrate as survey
from pyprune.passes import error_curves as curves
from pyprune.passes.layer_cache import LayerLog
from pyprune.pipeline.run import prune

SHAPE = LayerShape(hidden_size=64, head_dim=16, kv_groups=4, heads_per_group=2, intermediate_channels=100)


@pytest.mark.parametrize(("ratio", "tenths"), [(0.01, 1), (0.2, 4), (0.21, 5), (0.3, 6), (0.5, 10), (0.9, 10)])
def test_depth_follows_the_ratio(ratio: float, tenths: int) -> None:
    assert deepest_cut(ratio) == tenths
    assert curves.removals(SHAPE, FFN, tenths) == min(99, 10 * tenths)
    assert curves.removals(SHAPE, ATTENTION, tenths) == 3


def curve(length: int, negligible: int) -> torch.Tensor:
    """Errors that are negligible up to so many removals."""
    errors = torch.arange(length, dtype=torch.float64)
    return torch.where(errors <= negligible, errors * 1e-9, errors)


def test_a_deeper_file_gives_what_a_survey_of_this_depth_would(tmp_path: Path) -> None:
    heads = {ATTENTION: torch.arange(4, dtype=torch.float64)}
    ordinary, dead = heads | {FFN: curve(61, 5)}, heads | {FFN: curve(100, 70)}
    shallow = heads | {FFN: curve(61, 45)}  # negligible at 4 tenths, where a calibration pass would go on, but not at 6
    files = [(tmp_path / f"{tenths}.safetensors", {"tenths": tenths}) for tenths in (4, 6, 10)]
    job: Any = SimpleNamespace(reader=SimpleNamespace(shapes=[SHAPE, SHAPE], layers=2), accepts=lambda *_: True)

    def write(file: tuple[Path, dict[str, Any]], *layers: dict[str, torch.Tensor]) -> None:
        path, identity = file
        tensors = {f"{k}.{m}": c.clone() for k, own in enumerate(layers) for m, c in own.items()}
        save_cached(tensors, path, {}, identity)

    assert curves.first_curves(job, files, 4) is None
    write(files[1], ordinary, dead)
    found = curves.first_curves(job, files, 4)
    assert found is not None
    assert [len(own[FFN]) for own in found] == [41, 100]
    write(files[1], ordinary, shallow)
    assert curves.first_curves(job, files, 4) is None
    write(files[2], ordinary | {FFN: curve(100, 5)}, shallow | {FFN: curve(100, 45)})
    found = curves.first_curves(job, files, 4)
    assert found is not None
    assert [len(own[FFN]) for own in found] == [41, 100]


def test_the_log_stays_for_a_kill_alone(tmp_path: Path) -> None:
    file = tmp_path / "cache" / "survey.safetensors"
    tensors = {"a": torch.randn(3)}
    job: Any = SimpleNamespace(reader=SimpleNamespace(content=Content(tmp_path)))
    for error in (KeyboardInterrupt, InputError, None):
        try:
            with LayerLog(job, file, {}) as log:
                known = log.read(2)
                log.write(2, tensors, {"counts": "1"})
                if error is not None:
                    raise error("stop")
        except (KeyboardInterrupt, InputError):
            pass
        assert log.folder.exists() == (error is KeyboardInterrupt)
        if error is InputError:  # the second round found what the first had left
            assert known is not None
            assert torch.equal(known[0]["a"], tensors["a"])
            assert known[1]["counts"] == "1"
    assert not file.parent.exists()
    with LayerLog(job, file, {}, writes=False) as log:
        log.write(0, tensors, {})
        assert log.read(0) is None


@pytest.mark.parametrize(
    ("method", "module", "observe"), [("flap", survey, "observe_layer"), ("obs", curves, "curve_of")]
)
def test_a_killed_survey_goes_on(
    method: str, module: Any, observe: str, tiny_checkpoint: Callable[..., Path], demo_model: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    model = tiny_checkpoint(family="llama", layers=4, dtype="bfloat16", tokenizer=demo_model)
    text = tmp_path / "text.txt"
    text.write_text(harvest())

    def options(name: str) -> PruneConfig:
        folder = tmp_path / name
        return PruneConfig(str(model), folder / "out", method, 0.4, {}, str(text), 8, 32, device="cpu", resume=True)

    prune(options("whole"))
    original, calls = getattr(module, observe), 0
    each = 2 if method == "obs" else 1  # calls a layer

    def killed(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2 * each + 1:
            raise KeyboardInterrupt
        return original(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(module, observe, killed)
        with pytest.raises(KeyboardInterrupt):
            prune(options("killed"))
        prune(options("killed"))
    assert calls == (2 + 2) * each + 1  # the third layer's call that failed; no layer twice
    files = sorted(file.name for file in (tmp_path / "whole" / "out").glob("*.safetensors"))
    assert files == ["model.safetensors"]
    for name in files:
        whole, resumed = ((tmp_path / run / "out" / name).read_bytes() for run in ("whole", "killed"))
        assert whole == resumed
