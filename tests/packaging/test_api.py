"""The public functions of `import pyprune`, and what importing it costs."""

import importlib
import json
import math
import pkgutil
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from support.proofs import prove_here
from transformers import AutoTokenizer

import pyprune
from pyprune import InputError, PruneRecord
from pyprune.job.record import FORMAT

SMALL = {"samples": 4, "sequence_length": 32}
# What neither of the four needs a Python package or a GPU for, that may be absent.
OPTIONAL = ("vllm", "llm_compressor", "gptqmodel", "logits_worker", "__main__", "triton_kernels")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("".join(f"In the year {n} the harvest was good; the mill ground until spring. " for n in range(99)))
    return file


def cpu_seconds(*command: str) -> float:
    """User and system seconds of a process and its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_import_loads_neither_torch_nor_transformers() -> None:
    code = "import sys, pyprune; print(sorted({'torch', 'transformers', 'numpy', 'click'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "[]\n"


# Each in a fork of a Python that has of PyTorch what transformers imports, and nothing else.
IMPORTED_FIRST = """
import importlib.util, os, sys
import torch._dynamo, torch.distributed.tensor
for order in ("import pyprune, transformers", "import transformers, pyprune"):
    if os.fork() == 0:
        assert not {"pyprune", "transformers"} & {*sys.modules}
        importlib.util.find_spec("transformers")
        exec(order)
        importlib.util.find_spec("transformers")
        config = transformers.AutoConfig.for_model("pyprune_llama")
        print(type(config).__name__, transformers.__spec__.loader.__class__.__module__, flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.mark.slow
def test_classes_are_registered_with_transformers() -> None:
    """Whichever is imported first; asking where transformers is, as libraries do, uses nothing up."""
    run = subprocess.run([sys.executable, "-c", IMPORTED_FIRST], capture_output=True, text=True)
    assert run.stdout.splitlines() == ["PyPruneLlamaConfig _frozen_importlib_external"] * 2, run.stderr[-500:]


def test_registration_can_be_left_out() -> None:
    code = "import os, sys; os.environ['PYPRUNE_REGISTER'] = '0'; import pyprune, transformers\n"
    code += "print('pyprune.modeling' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "False\n"


# Of the CPU seconds of `import torch`.
SHARES = {"--version": 0.3, "--help": 0.3, "prune --help": 1.3}


@pytest.mark.slow
def test_help_is_quick() -> None:
    """What else the machine does adds to either: each run follows one of the import, and of both the least counts.

    Of the same rounds alone, since how much it does changes. The first runs may write bytecode as well; a command is
    measured until its share is right, at most eight times.
    """
    for arguments, bound in SHARES.items():
        shares: list[float] = []
        imported = helped = math.inf
        while len(shares) < 8 and not (shares and shares[-1] <= bound):
            imported = min(imported, cpu_seconds(sys.executable, "-c", "import torch"))
            helped = min(helped, cpu_seconds(sys.executable, "-m", "pyprune", *arguments.split()))
            shares.append(helped / imported)
        assert shares[-1] <= bound, (arguments, shares)


def test_no_room_takes_a_functions_name(demo_model: Path) -> None:
    """Importing a submodule sets an attribute of its package: it must not replace a function."""
    for module in pkgutil.walk_packages(pyprune.__path__, "pyprune."):
        if not any(part in module.name for part in OPTIONAL):
            importlib.import_module(module.name)
    for _ in range(2):
        assert "obs" in pyprune.list_methods()
        estimate = pyprune.estimate(demo_model, "magnitude", 0.3, device="cpu")
        assert estimate.parameters["decoder_linears"][1] < estimate.parameters["decoder_linears"][0]
        with pytest.raises(InputError):
            pyprune.prune(demo_model, ratio=0.3)
        with pytest.raises(InputError):
            pyprune.evaluate(demo_model)
        with pytest.raises(InputError):
            pyprune.export(demo_model, "out", "no such format")


def test_prune_evaluate_export(demo_model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prove_here(monkeypatch)
    steps: list[str] = []
    record = pyprune.prune(
        demo_model, tmp_path / "out", "flap", 0.3, calibration=str(text), uniform=True, evaluate_on=str(text),
        evaluation_length=32, max_windows=2, device="cpu", progress=lambda *step: steps.append(step[0]), **SMALL
    )  # fmt: skip
    assert isinstance(record, PruneRecord)
    assert abs(record.ratio_met - 0.3) < 0.05
    assert record.output == tmp_path / "out"
    assert record.options["uniform"] is True
    assert {"calibration", "prune", "evaluate"} <= set(steps)
    written = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert record.to_json() == {name: value for name, value in written.items() if name != "digest"}
    assert PruneRecord.from_json(written, record.output) == record
    result = pyprune.evaluate(
        tmp_path / "out", str(text), sequence_length=32, max_windows=2, reference=demo_model, device="cpu"
    )
    assert record.evaluation is not None
    assert result["perplexity"] == record.evaluation["pruned"]["perplexity"]
    assert pyprune.export(tmp_path / "out", tmp_path / "stock", "stock")["verification"]["verified"]


def test_texts_of_python(demo_model: Path, text: Path, tmp_path: Path) -> None:
    """A file, its documents, and its token ids prune alike."""
    from support.texts import read_text

    from pyprune.calibration.text import tokenize
    from pyprune.calibration.windows import spread_windows

    documents = [text.read_text()]
    ids = tokenize(read_text(text), AutoTokenizer.from_pretrained(demo_model))
    windows = spread_windows(ids, 4, 32, 0)
    kept = []
    for number, calibration in enumerate((str(text), documents, windows)):
        sizes = {} if calibration is windows else SMALL
        record = pyprune.prune(
            demo_model, tmp_path / str(number), "wanda-sp", 0.3, calibration=calibration, device="cpu", **sizes
        )
        kept.append(record.layers)
        assert record.calibration is not None
        assert [record.calibration["samples"], record.calibration["sequence_length"]] == [4, 32]
    assert kept[0] == kept[1] == kept[2]
    for wrong, word in ((windows[0], "shape"), (windows + 10**6, "vocabulary"), ([""], "no text"), ([1], "strings")):
        with pytest.raises(InputError, match=word):
            pyprune.prune(demo_model, tmp_path / "wrong", "flap", 0.3, calibration=wrong, device="cpu", **SMALL)
    assert not (tmp_path / "wrong").exists()


def test_an_estimate(demo_model: Path) -> None:
    """Typed, and the document that `pyprune estimate --json` prints; what is of a GPU alone is left out on a CPU."""
    estimate = pyprune.estimate(demo_model, "magnitude", 0.3, device="cpu")
    assert isinstance(estimate, pyprune.Estimate)
    document = estimate.to_json()
    assert document["bytes"] == estimate.bytes
    assert document["passes"] == estimate.passes
    assert not {"rates", "hidden_states", "recomputed_activations"} & document.keys()
    here = pyprune.estimate(demo_model, "flap", 0.3, on="h200", samples=2, sequence_length=32)
    assert {"rates", "hidden_states", "peak_memory_by_pass", "windows_a_batch"} <= here.to_json().keys()
    assert here.seconds == sum(step["seconds"] for step in here.passes)
    assert here.to_json()["layers"] is None  # kept although it is None: sizes follow from the text


@pytest.mark.parametrize(
    ("document", "message"),
    [({"format": "pyprune-plan-2"}, "format"), ({"format": FORMAT}, "is missing")],
    ids=["format", "entries"],
)
def test_a_record_that_is_none(document: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        PruneRecord.from_json(document)
