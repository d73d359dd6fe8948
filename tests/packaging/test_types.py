"""The sources are typed, and so is every expression of a caller of the operators: one run of mypy says both."""

import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import ROOT

CONSUMER = """
from torch import Tensor
from pyprune.ops import OPERATOR_VERSIONS, Hessian, InverseFactor, inverse_factor, rms_norm, spd_inverse, swiglu_

def factor_of(rows: Tensor) -> InverseFactor:
    hessian = Hessian.zeros(rows.shape[-1], sums=True)
    hessian.update(rows)
    return inverse_factor(hessian.finish(centred=True), damping=0.01)

def step(x: Tensor, weight: Tensor) -> tuple[Tensor, int]:
    normed = rms_norm(x, weight, 1e-6)
    swiglu_(normed, x)
    inverse, info = spd_inverse(normed, 0.1)
    return inverse + info, OPERATOR_VERSIONS["rms_norm"]
"""


STRICT = """
[[tool.mypy.overrides]]
module = ["right", "wrong"]
disallow_any_expr = true
disallow_untyped_calls = true
warn_return_any = true
"""


@pytest.mark.slow
def test_sources_and_a_caller(tmp_path: Path) -> None:
    """With the project's own settings, and stricter ones for the two callers, of which one has three errors."""
    (tmp_path / "right.py").write_text(CONSUMER)
    wrong = CONSUMER.replace("1e-6", "'1e-6'").replace("damping=0.01", "damping=None").replace("int]", "str]")
    (tmp_path / "wrong.py").write_text(wrong)
    settings = (ROOT / "pyproject.toml").read_text().replace('packages = ["pyprune"]', "")
    (tmp_path / "pyproject.toml").write_text(settings + STRICT)
    files = ["pyprune", str(tmp_path / "right.py"), str(tmp_path / "wrong.py")]
    command = [sys.executable, "-m", "mypy", "--config-file", str(tmp_path / "pyproject.toml"), *files]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    errors = [line for line in found.stdout.splitlines() if ": error: " in line]
    assert len(errors) == 3, found.stdout + found.stderr
    assert not [line for line in errors if "wrong.py" not in line]
    for part in ('Argument "damping" to "inverse_factor"', 'Argument 3 to "rms_norm"', "tuple[Tensor, str]"):
        assert sum(part in line for line in errors) == 1, found.stdout
    assert found.stdout.splitlines()[-1].startswith("Found 3 errors in 1 file (checked "), found.stdout
