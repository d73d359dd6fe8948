"""A small share of `make torture`: signals at random moments and commands started at once do no harm."""

import subprocess
import sys

import pytest
from support.paths import TESTS

TORTURE = TESTS / "torture"


@pytest.mark.slow
def test_a_share() -> None:
    """14 signals, of which every command gets one, a pair and a triple."""
    done = subprocess.run([sys.executable, TORTURE, "--share", "0.07"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
