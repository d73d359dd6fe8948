"""Where things lie in the repository."""

from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
ROOT = TESTS.parent
DEMO = ROOT / "models" / "llama-6m-gqa"
