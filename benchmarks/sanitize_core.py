"""Drive every path of the CUDA kernels over small odd shapes, for compute-sanitizer.

    compute-sanitizer --tool memcheck|racecheck|synccheck|initcheck python benchmarks/sanitize_core.py

benchmarks/sanitize/ has one file for each operator. Exit status 1 if a result is far from the float64 one: to 1e-3,
correctness proper is the tests' business.
"""

import importlib
import sys
from pathlib import Path

import torch


def main() -> int:
    wrong, count = [], 0
    for file in sorted((Path(__file__).parent / "sanitize").glob("*.py")):
        for case, right in importlib.import_module(f"sanitize.{file.stem}").cases():
            count += 1
            if not right:
                wrong.append(case)
    torch.cuda.synchronize()
    print(f"{count - len(wrong)} of {count} cases right", *wrong, sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
