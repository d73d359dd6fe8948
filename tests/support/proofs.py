"""Proofs of outputs within the test process, for the many tests of what is written and not of the process that proves.

A fresh interpreter takes seconds to import its libraries; test_export.py starts it for every loader.
"""

from pathlib import Path

import pytest
from torch import Tensor

from pyprune.evaluation import roundtrip
from pyprune.evaluation.logits_worker import logits_transformers


def _logits(model: Path, ids: Tensor, loader: str) -> Tensor:
    assert loader in ("transformers", "pyprune"), "a proof by any other loader needs a process of its own"
    return logits_transformers(str(model), ids, trust_remote_code=False)


def prove_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Load what is written by the same calls, and compare the same logits, in this process."""
    monkeypatch.setattr(roundtrip, "fresh_logits", _logits)
