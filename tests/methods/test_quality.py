"""On a trained model and real text: FLAP beats Wanda-sp, which beats magnitude, and the bias helps."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pyprune.calibration.source import TokenSource
from pyprune.checkpoint import CheckpointReader
from pyprune.checkpoint.load_model import load_model
from pyprune.evaluation.perplexity import perplexity
from pyprune.job.config import PruneConfig
from pyprune.pipeline.run import prune

CPU = torch.device("cpu")


@pytest.mark.slow
@pytest.mark.shared
def test_order_of_the_methods(demo_model: Path, shared_dir: Path, tmp_path: Path) -> None:
    """At 50 %, where the margins on this model are 30 % and more: the beginnings of both texts suffice."""
    for part in ("test", "valid"):
        (tmp_path / f"{part}.txt").write_text((shared_dir / "data" / f"wikitext2-{part}.txt").read_text()[:100_000])
    test_text = str(tmp_path / "test.txt")
    windows = TokenSource(test_text, demo_model, CheckpointReader(demo_model).config, CPU, torch.float32).evaluation(
        256, 8, 0
    )

    def pruned(method: str, **options: Any) -> float:
        output = tmp_path / "-".join([method, *map(str, options.values())])
        text = None if method == "magnitude" else str(tmp_path / "valid.txt")
        run = PruneConfig(
            str(demo_model), output, method, 0.5, options, text, samples=16, sequence_length=128, device="cpu"
        )
        assert abs(prune(run).ratio_met - 0.5) <= 0.005
        return perplexity(load_model(output, CPU, torch.float32), windows)

    dense = perplexity(load_model(demo_model, CPU, torch.float32), windows)
    with_bias, without = pruned("flap"), pruned("flap", compensation="none")
    wanda = pruned("wanda-sp")
    assert dense < with_bias < min(without, wanda)
    assert wanda < pruned("magnitude")
