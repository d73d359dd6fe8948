"""The table that chooses a backend: its predicates, forcing, the error lines, and that a fallback is seen."""

import logging
from types import SimpleNamespace

import pytest
import torch

from pyprune.errors import InputError
from pyprune.ops import describe, describe_installation
from pyprune.ops import dispatch as backends
from pyprune.ops.dispatch import ENVIRONMENT_VARIABLE, Problem, choose, eligible_backends, unmet_requirement

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
        monkeypatch.setattr(backends, "import_optional", self.import_optional)
        monkeypatch.setattr(backends, "core_build_info", lambda: self.build)
        monkeypatch.setenv("CC", "cc")
        backends.warn_once.cache_clear()

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
    assert backends.core_targets(capability, ["sm_80", "sm_90a", "compute_80"]) == runnable


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
    first_choice = backends.PREFERENCE[OPERATOR, "cuda"][0]
    assert rows["cuda:0", "bfloat16"].backend == first_choice
    assert set(rows["cuda:0", "bfloat16"].reasons) == set(backends.BACKENDS) - {first_choice}
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "cpu")
    forced = {(row.device, row.dtype): row for row in describe()}
    assert forced["cuda:0", "bfloat16"].backend == "none"
    assert forced["cuda:0", "bfloat16"].reasons["cpu"] == "the input is on cuda:0"


def test_every_preference_ends_with_the_reference() -> None:
    """So that a choice always exists."""
    for (operator, _), order in backends.PREFERENCE.items():
        assert order[-1] == "reference"
        assert backends.REQUIREMENTS[operator]["reference"] == ()
        assert set(order) <= set(backends.REQUIREMENTS[operator]) <= set(backends.BACKENDS)


def test_describe_installation_names_what_is_missing(installation: Installation) -> None:
    installation.modules.clear()
    facts = describe_installation()
    assert facts["triton"] == "not installed (No module named 'triton')"
    assert facts["core"] == "not installed (No module named 'pyprune._core')"
    assert facts["torch"] == torch.__version__
