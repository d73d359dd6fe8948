"""The table that chooses a backend: its predicates, forcing, the error lines, and that a fallback is seen."""

import json
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.forked import run_script

from pyprune.errors import InputError
from pyprune.ops import Hessian, describe, describe_installation, dispatch, requirements, use_backend
from pyprune.ops.declaration import BACKENDS, OPERATORS, VERSIONS, Kernel, Operator
from pyprune.ops.dispatch import ENVIRONMENT_VARIABLE, choose, eligible_backends, unmet_requirement
from pyprune.ops.requirements import ON_CPU, ON_NVIDIA_GPU, Problem, core_targets

OPERATOR = "channel_moments"
CPU = torch.device("cpu")
GPU = torch.device("cuda:0")


class Installation:
    """A machine whose GPU and packages the test decides, put under the table's predicates."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.capability = (9, 0)
        self.modules = {"pyprune._core", "triton"}
        self.build = {"cuda": True, "cuda_architectures": ["sm_80", "sm_90a"]}
        monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: self.capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Test")
        monkeypatch.setattr(requirements, "import_optional", self.import_optional)
        monkeypatch.setattr(requirements, "core_build_info", lambda: self.build)
        monkeypatch.setenv("CC", "cc")
        dispatch.warn_once.cache_clear()

    def import_optional(self, name: str) -> tuple[SimpleNamespace | None, str]:
        if name in self.modules:
            return SimpleNamespace(__version__="3.6.0"), ""
        return None, f"No module named '{name}'"


@pytest.fixture
def installation(monkeypatch: pytest.MonkeyPatch) -> Installation:
    return Installation(monkeypatch)


def eligible(device: torch.device, dtype: torch.dtype = torch.bfloat16, shape: tuple[int, ...] = (8, 8)) -> set[str]:
    return set(eligible_backends(OPERATOR, Problem(device, dtype, shape)))


def failed_requirement(backend: str, device: torch.device = GPU, **changes: object) -> str:
    problem = Problem(device, torch.bfloat16, (8, 8))
    unmet = unmet_requirement(OPERATOR, backend, Problem(**(vars(problem) | changes)))
    assert unmet is not None
    return unmet.name


def test_a_complete_installation(installation: Installation) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert eligible(GPU, dtype) == {"cuda", "triton", "reference"}
        assert eligible(CPU, dtype) == {"cpu", "reference"}


def test_float64_is_the_reference_alone(installation: Installation) -> None:
    assert eligible(GPU, torch.float64) == eligible(CPU, torch.float64) == {"reference"}
    for backend, device in (("cuda", GPU), ("triton", GPU), ("cpu", CPU)):
        assert failed_requirement(backend, device, dtype=torch.float64) == "dtype bfloat16, float16 or float32"


def test_other_devices_are_the_reference_alone(installation: Installation) -> None:
    assert eligible(torch.device("meta")) == {"reference"}
    for backend in ("cuda", "triton"):
        assert failed_requirement(backend, CPU) == "input on an NVIDIA GPU"
    assert failed_requirement("cpu", GPU) == "input on the CPU"


def test_pytorch_for_amd_is_no_nvidia_gpu(installation: Installation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert eligible(GPU) == {"reference"}


def test_without_the_core(installation: Installation) -> None:
    installation.modules.remove("pyprune._core")
    assert eligible(GPU) == {"triton", "reference"}
    assert eligible(CPU) == {"reference"}
    assert failed_requirement("cuda") == "compiled core installed"


def test_core_without_cuda(installation: Installation) -> None:
    installation.build["cuda"] = False
    assert failed_requirement("cuda") == "compiled core with CUDA"
    assert eligible(CPU) == {"cpu", "reference"}


def test_core_for_another_gpu(installation: Installation) -> None:
    installation.capability = (10, 0)
    assert failed_requirement("cuda") == "compiled core for this GPU"
    assert eligible(GPU) == {"triton", "reference"}


def test_gpu_older_than_the_kernels(installation: Installation) -> None:
    installation.capability = (7, 5)
    assert failed_requirement("triton") == "compute capability 8.0 or later"
    assert eligible(GPU) == {"reference"}


def test_without_triton(installation: Installation) -> None:
    installation.modules.remove("triton")
    assert failed_requirement("triton") == "triton installed"


def test_triton_without_a_c_compiler(installation: Installation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", "")
    assert failed_requirement("triton") == "C compiler for Triton's launchers"


def test_sizes_past_int32(installation: Installation) -> None:
    assert eligible(GPU, shape=(2**31, 8)) == {"cuda", "reference"}
    assert eligible(GPU, shape=(2**31 - 1, 8)) == {"cuda", "triton", "reference"}
    assert failed_requirement("triton", shape=(2**31, 8)) == "rows and channels below 2^31"


@pytest.mark.parametrize(
    ("capability", "runnable"),
    [
        ((7, 5), []),
        ((8, 0), ["sm_80", "compute_80"]),
        ((8, 9), ["sm_80", "compute_80"]),
        ((9, 0), ["sm_90a", "compute_80"]),
        ((12, 1), ["compute_80"]),
    ],
)
def test_targets_that_a_device_runs(capability: tuple[int, int], runnable: list[str]) -> None:
    assert core_targets(capability, ["sm_80", "sm_90a", "compute_80"]) == runnable


def test_forcing(installation: Installation, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(2, 3)
    assert choose(OPERATOR, x).backend == "cpu"
    assert choose(OPERATOR, x).reasons["reference"] == "cpu is preferred"
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "reference")
    choice = choose(OPERATOR, x)
    assert choice.backend == "reference"
    assert choice.reasons == {
        "cuda": "the input is on cpu",
        "triton": "the input is on cpu",
        "cpu": "PYPRUNE_BACKEND=reference",
    }
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "")
    assert choose(OPERATOR, x).backend == "cpu"


def test_forcing_an_unknown_backend(installation: Installation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "gpu")
    message = "PYPRUNE_BACKEND=gpu is not a backend; choose cuda, triton, cpu, reference or unset it"
    with pytest.raises(InputError) as error:
        choose(OPERATOR, torch.zeros(2, 3))
    assert str(error.value) == message
    with pytest.raises(InputError):
        describe()


def test_forcing_an_ineligible_backend(installation: Installation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "cpu")
    with pytest.raises(InputError) as error:
        choose(OPERATOR, torch.zeros(2, 3, dtype=torch.float64))
    assert str(error.value) == (
        "PYPRUNE_BACKEND=cpu cannot run channel_moments here: the input is float64; "
        "the kernels read bfloat16, float16 and float32; eligible: reference"
    )


def test_a_missing_backend_is_logged_once(installation: Installation, caplog: pytest.LogCaptureFixture) -> None:
    installation.modules.remove("pyprune._core")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert choose(OPERATOR, torch.zeros(2, 3)).backend == "reference"
    assert caplog.messages == [
        "channel_moments on cpu cannot use cpu: "
        "the compiled core is not installed (No module named 'pyprune._core'); running reference"
    ]


def test_what_the_input_decides_is_not_logged(installation: Installation, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert choose(OPERATOR, torch.zeros(2, 3, dtype=torch.float64)).backend == "reference"
    assert not caplog.messages


def test_describe_lists_every_dtype_with_reasons(installation: Installation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    rows = {(row.device, row.dtype): row for row in describe() if row.operator == OPERATOR}
    assert set(rows) == {
        (device, dtype) for device in ("cpu", "cuda:0") for dtype in ("bfloat16", "float16", "float32", "float64")
    }
    assert rows["cpu", "bfloat16"].backend == "cpu"
    assert rows["cuda:0", "float64"].backend == "reference"
    first_choice = next(iter(OPERATORS[OPERATOR].kernels))
    assert rows["cuda:0", "bfloat16"].backend == first_choice
    assert set(rows["cuda:0", "bfloat16"].reasons) == set(BACKENDS) - {first_choice}
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "cpu")
    forced = {(row.device, row.dtype): row for row in describe() if row.operator == OPERATOR}
    assert forced["cuda:0", "bfloat16"].backend == "none"
    assert forced["cuda:0", "bfloat16"].reasons["cpu"] == "the input is on cuda:0"


def test_every_kernel_says_first_where_its_input_lies() -> None:
    """So that nothing is asked of a device that is not there, and no missing package is logged that would not help."""
    for operator in OPERATORS.values():
        for backend, kernel in operator.kernels.items():
            where = {"reference": (), "cpu": (ON_CPU,)}.get(backend, (ON_NVIDIA_GPU,))
            assert kernel.requirements[:1] == where, (operator.name, backend)


def run() -> None:
    """What a kernel of these tests does."""


@pytest.mark.parametrize(
    ("name", "versions", "backends", "message"),
    [
        ("hessian", {}, ["reference"], "operator hessian: hessian is declared already"),
        ("toy", {"Hessian": 1}, ["reference"], "operator toy: Hessian is declared already"),
        ("toy", {}, ["gpu", "reference"], "operator toy: gpu is not one of cuda, triton, cpu, reference"),
        ("toy", {}, ["reference", "cpu"], "operator toy: the last kernel has to be a reference"),
        ("toy", {}, ["cpu"], "operator toy: the last kernel has to be a reference"),
    ],
)
def test_a_declaration_that_does_not_fit(
    name: str, versions: dict[str, int], backends: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Operator(name, versions, {backend: Kernel(run) for backend in backends})
    assert "toy" not in OPERATORS
    with pytest.raises(ValueError, match="a reference that runs any input"):
        Operator("toy", {"toy_": 1}, {"reference": Kernel(run, (ON_CPU,))})
    assert "toy_" not in VERSIONS


def chosen() -> str:
    return choose(OPERATOR, torch.zeros(2, 3)).backend


def test_use_backend_nests_and_ends(installation: Installation, monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen() == "cpu"
    with use_backend("reference"):
        assert choose(OPERATOR, torch.zeros(2, 3)).reasons["cpu"] == 'use_backend("reference")'
        with use_backend("cpu"):
            assert chosen() == "cpu"
        assert chosen() == "reference"
        with use_backend(None):
            assert chosen() == "cpu"
        with pytest.raises(KeyError), use_backend("cpu"):
            raise KeyError
        assert chosen() == "reference"
    assert chosen() == "cpu"
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "reference")
    assert chosen() == "reference"
    with use_backend("cpu"):
        assert chosen() == "cpu"
    with use_backend(None):
        assert chosen() == "cpu"


def test_use_backend_holds_for_its_thread(installation: Installation) -> None:
    inside, asked = threading.Barrier(2, timeout=30), threading.Barrier(2, timeout=30)

    def ask(backend: str) -> str:
        with use_backend(backend):
            inside.wait()  # both are in
            found = chosen()
            asked.wait()
            return found

    with ThreadPoolExecutor(2) as threads, use_backend("reference"):
        assert list(threads.map(ask, ("cpu", "reference"))) == ["cpu", "reference"]
        assert threads.submit(chosen).result() == "cpu"
        assert chosen() == "reference"


def test_use_backend_refuses_unknown_names() -> None:
    with pytest.raises(InputError) as error, use_backend("gpu"):
        pass
    assert str(error.value) == "'gpu' is not a backend; choose cuda, triton, cpu, reference, or None to force none"


def test_use_backend_reaches_operators_by_either_name() -> None:
    """Through the function and torch.ops; those that are not written for it run as ever."""
    x, lower = torch.ones(2, 3), torch.zeros(3, 3)
    for call in (lambda: Hessian.zeros(3).update(x), lambda: torch.ops.pyprune.hessian_update(x, lower, None)):
        with use_backend("triton"), pytest.raises(InputError) as error:
            call()
        expected = 'use_backend("triton") cannot run hessian here: the input is on cpu; eligible: reference'
        assert str(error.value) == expected
        with use_backend("cpu"):  # the Hessian is not written for it
            call()
    assert lower.diagonal().tolist() == [2, 2, 2]


TOY = """
import torch
from torch import Tensor

from .declaration import Kernel, Operator
from .dispatch import choose_launch
from .requirements import FLOAT32, ON_CPU


@torch.library.custom_op("pyprune::toy", mutates_args=(), schema="(Tensor x) -> Tensor")
def toy(x: Tensor) -> Tensor:
    return choose_launch(TOY, x)(x)


def toy_reference(x: Tensor) -> Tensor:
    return 2 * x


def launch_cpu(x: Tensor) -> Tensor:
    return x + x + 100  # to be told apart


TOY = Operator(
    "toy",
    versions={"toy": 3},
    kernels={"cpu": Kernel(launch_cpu, (ON_CPU, FLOAT32)), "reference": Kernel(toy_reference)},
)
"""

FIND_TOY = """
import sys
import torch
import pyprune.ops
pyprune.ops.__path__.append(sys.argv[1])
from pyprune.ops import OPERATOR_VERSIONS, toy, use_backend
x = torch.ones(1)
assert (toy.toy(x).item(), toy.toy(x.double()).item()) == (102, 2)
with use_backend("reference"):
    assert torch.ops.pyprune.toy(x).item() == 2
assert OPERATOR_VERSIONS["toy"] == 3
from pyprune.cli.main import main
main(["backends", "--json"])
"""


def test_an_operator_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is added in a process of its own is chosen, versioned, and listed by `pyprune backends`."""
    (tmp_path / "toy.py").write_text(TOY)
    (tmp_path / "find_toy.py").write_text(FIND_TOY)
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    ended = run_script(tmp_path, tmp_path / "find_toy.py", tmp_path)
    assert ended.status == 0, ended.err.read_text()
    listed = json.loads(ended.out.read_text())["operators"]
    rows = {(row["device"], row["dtype"]): row for row in listed if row["operator"] == "toy"}
    assert rows["cpu", "float32"]["backend"] == "cpu"
    assert rows["cpu", "float64"]["backend"] == "reference"
    assert rows["cpu", "float64"]["reasons"]["cpu"] == "the input is float64; the kernels compute in float32"
    assert rows["cpu", "float32"]["reasons"]["cuda"] == "the operator is not written for this backend"


def test_describe_installation_names_what_is_missing(installation: Installation) -> None:
    installation.modules.clear()
    facts = describe_installation()
    assert facts["triton"] == "not installed (No module named 'triton')"
    assert facts["core"] == "not installed (No module named 'pyprune._core')"
    assert facts["torch"] == torch.__version__
