"""Standard errors of perplexities against their spread over many texts."""

import math

import pytest
import torch

from pyprune.evaluation.standard_error import paired_difference, perplexity_error


def draws(texts: int, windows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses of two models [texts, windows] that share what makes a window hard."""
    generator = torch.Generator().manual_seed(0)
    hard = 3 + 0.5 * torch.randn(texts, windows, generator=generator, dtype=torch.float64)
    own = 0.05 * torch.randn(2, texts, windows, generator=generator, dtype=torch.float64)
    return hard + own[0], 1.02 * hard + own[1]


def test_errors_are_the_spread_over_texts() -> None:
    texts, windows = 1000, 32
    pruned, dense = draws(texts, windows)
    found = [paired_difference(p, d) for p, d in zip(pruned.tolist(), dense.tolist(), strict=True)]
    perplexities = pruned.mean(1).exp()
    differences = perplexities - dense.mean(1).exp()
    assert [difference for difference, _ in found] == pytest.approx(differences.tolist())
    # A standard deviation over 1000 texts is known to 2.2 %.
    mean_error = sum(perplexity_error(losses) or 0 for losses in pruned.tolist()) / texts
    assert mean_error == pytest.approx(perplexities.std().item(), rel=0.09)
    mean_paired = sum(error or 0 for _, error in found) / texts
    assert mean_paired == pytest.approx(differences.std().item(), rel=0.09)
    assert mean_paired < mean_error / 5  # the pairs share most of it


def test_one_window_has_no_error() -> None:
    assert perplexity_error([3.0]) is None
    assert paired_difference([3.0], [2.0]) == (math.exp(3) - math.exp(2), None)
    assert paired_difference([3.0, 4.0], [3.0, 4.0]) == (0.0, 0.0)
