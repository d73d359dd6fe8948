"""The compiled core's Hessian kernel: bitwise against float64 on integers, drift on random rows, refusals."""

import pytest
import torch
from torch import Tensor

core = pytest.importorskip("pyprune._core", reason="pyprune was installed without its compiled core")

pytestmark = pytest.mark.skipif(not hasattr(core, "hessian_update_cuda"), reason="the core was built without nvcc")
on_hopper = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="no device of compute capability 9.0",
    ),
]
BLOCK = 64  # above the diagonal only blocks of this size on it may be written


def update(
    x: Tensor,
    lower: Tensor,
    sums: Tensor | None,
    multiprocessors: int = 132,
    weights: Tensor | None = None,
    factor: Tensor | None = None,
) -> None:
    """One update through raw addresses, with a NaN-filled workspace. weights: [rows], padded here, NaN beyond."""
    size = core.hessian_update_cuda_workspace(*x.shape, multiprocessors)
    workspace = torch.full((size // 4,), float("nan"), device="cuda")
    padded = None
    if weights is not None:
        multiple = -(-len(x) // 64) * 64
        padded = torch.full((multiple + 64,), float("nan"), device="cuda")
        padded[:multiple] = 0
        padded[: len(x)] = weights
    core.hessian_update_cuda(
        x.data_ptr(),
        str(x.dtype).removeprefix("torch."),
        x.shape[0],
        x.shape[1],
        x.stride(0),
        lower.data_ptr(),
        lower.stride(0),
        0 if sums is None else sums.data_ptr(),
        workspace.data_ptr(),
        size,
        multiprocessors,
        torch.cuda.current_stream().cuda_stream,
        0 if padded is None else padded.data_ptr(),
        0 if factor is None else factor.data_ptr(),
    )


def integers(rows: int, channels: int, stride: int, dtype: torch.dtype) -> Tensor:
    """[rows, channels] of -2 … 2, `stride` apart, NaN between them."""
    memory = torch.full((rows, stride), float("nan"), dtype=dtype, device="cuda")
    memory[:, :channels] = torch.randint(-2, 3, (rows, channels), device="cuda").to(dtype)
    return memory[:, :channels]


class TestOnHopper:
    pytestmark = on_hopper

    @pytest.mark.parametrize("with_sums", [False, True])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize(
        ("rows", "channels", "padding", "lower_padding"),
        [
            (1, 8, 0, 0),
            (63, 72, 8, 4),
            (64, 256, 0, 0),
            (129, 264, 16, 8),
            (4097, 1024, 0, 12),
            (10000, 1352, 24, 4),
            (2500, 4104, 0, 0),
        ],
    )
    def test_integers_are_exact(
        self, rows: int, channels: int, padding: int, lower_padding: int, dtype: torch.dtype, with_sums: bool
    ) -> None:
        x = integers(rows, channels, channels + padding, dtype)
        memory = torch.full((channels, channels + lower_padding), float("nan"), device="cuda")
        lower = memory[:, :channels]
        block = torch.arange(channels, device="cuda") // BLOCK
        writable = block[:, None] >= block
        lower[writable] = 3.0
        sums = torch.ones(channels, device="cuda") if with_sums else None
        update(x, lower, sums)
        exact = x.double().T @ x.double() + 3
        assert torch.equal(lower.tril().double(), exact.tril())
        assert lower[~writable].isnan().all()
        assert memory[:, channels:].isnan().all()
        if sums is not None:
            assert torch.equal(sums.double(), x.double().sum(0) + 1)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize(
        ("rows", "channels", "multiprocessors"),
        [(1, 8, 132), (63, 72, 132), (64, 256, 132), (129, 264, 132), (4097, 1024, 4), (10000, 1352, 132)],
    )
    def test_weights(self, rows: int, channels: int, multiprocessors: int, dtype: torch.dtype) -> None:
        """Powers of two from 1/16 to 1, and 0, times 16: sums of integers are exact."""
        x = integers(rows, channels, channels + 8, dtype)
        weights = 2.0 ** -torch.randint(0, 5, (rows,), device="cuda")
        weights[::7] = 0
        factor = torch.tensor(16.0, device="cuda")
        lower, sums = torch.full((channels, channels), 3.0, device="cuda"), torch.ones(channels, device="cuda")
        update(x, lower, sums, multiprocessors, weights, factor)
        rows64 = x.double()
        exact = (16 * weights.double()[:, None] * rows64).T @ rows64 + 3
        assert torch.equal(lower.tril().double(), exact.tril())
        assert torch.equal(sums.double(), 16 * weights.double() @ rows64 + 1)

    def test_weights_of_one_have_the_bits_without(self) -> None:
        x = torch.randn(20000, 2048, device="cuda", dtype=torch.bfloat16)
        results = []
        for weights in (None, *[torch.ones(20000, device="cuda")] * 3):
            lower, sums = torch.zeros(2048, 2048, device="cuda"), torch.zeros(2048, device="cuda")
            update(x, lower, sums, weights=weights)
            results.append((lower.tril(), sums))
        for lower, sums in results[1:]:
            assert torch.equal(lower, results[0][0])
            assert torch.equal(sums, results[0][1])

    def test_few_multiprocessors(self) -> None:
        x = integers(9000, 776, 776, torch.bfloat16)
        lower = torch.zeros(776, 776, device="cuda")
        update(x, lower, None, multiprocessors=4)
        assert torch.equal(lower.tril().double(), (x.double().T @ x.double()).tril())

    def test_same_bits_three_times(self) -> None:
        x = torch.randn(20000, 2048, device="cuda", dtype=torch.bfloat16)
        results = []
        for _ in range(3):
            lower, sums = torch.zeros(2048, 2048, device="cuda"), torch.zeros(2048, device="cuda")
            update(x, lower, sums)
            results.append((lower.tril(), sums))
        for lower, sums in results[1:]:
            assert torch.equal(lower, results[0][0])
            assert torch.equal(sums, results[0][1])

    @pytest.mark.parametrize("multiprocessors", [2, 132])  # chunks of 3072 and 1536 rows
    def test_drift_of_the_diagonal(self, multiprocessors: int) -> None:
        x = torch.randn(262144, 512, device="cuda", dtype=torch.bfloat16)
        lower = torch.zeros(512, 512, device="cuda")
        update(x, lower, None, multiprocessors)
        exact = torch.stack([part.double().square().sum(0) for part in x.split(16384)]).sum(0)
        drift = (lower.diagonal().double() / exact - 1).mean()
        assert abs(drift) <= 1e-5  # KERNELS.md §2

    def test_no_rows(self) -> None:
        lower = torch.full((8, 8), float("nan"), device="cuda")
        update(torch.empty(0, 8, device="cuda", dtype=torch.bfloat16), lower, None)
        assert lower.isnan().all()


VALID = {
    "x_ptr": 1 << 20,
    "dtype": "bfloat16",
    "rows": 64,
    "channels": 64,
    "row_stride": 64,
    "lower_ptr": 1 << 20,
    "lower_stride": 64,
    "sums_ptr": 0,
    "workspace_ptr": 1 << 20,
    "workspace_bytes": 1 << 20,
    "multiprocessors": 132,
    "stream": 0,
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float32"}, "dtype must be bfloat16 or float16"),
        ({"rows": -1}, "rows must not be negative"),
        ({"channels": 60}, "channels must be a multiple of 8, got 60"),
        ({"row_stride": 68}, "row_stride must be a multiple of 8, got 68"),
        ({"row_stride": 56}, "row_stride must not be below channels"),
        ({"rows": (1 << 31) - 1, "row_stride": 1 << 30}, "more memory than can exist"),
        ({"x_ptr": 0}, "x_ptr is null"),
        ({"x_ptr": (1 << 20) + 8}, "x_ptr is not aligned to 16 bytes"),
        ({"lower_ptr": (1 << 20) + 4}, "lower_ptr is not aligned to 16 bytes"),
        ({"lower_stride": 66}, "lower_stride must be a multiple of 4, got 66"),
        ({"lower_stride": 60}, "lower_stride must not be below channels"),
        ({"sums_ptr": 2}, "sums_ptr is not aligned to 4 bytes"),
        ({"weights_ptr": (1 << 20) + 8}, "weights_ptr is not aligned to 16 bytes"),
        ({"weights_ptr": 1 << 20, "factor_ptr": 2}, "factor_ptr is not aligned to 4 bytes"),
        ({"workspace_bytes": 16}, "the workspace has 16 bytes and needs 32"),
        ({"workspace_ptr": 0}, "workspace_ptr is null"),
        ({"multiprocessors": 0}, "multiprocessors must be positive"),
    ],
)
def test_refusals(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        core.hessian_update_cuda(**{**VALID, **changes})


def test_workspace_holds_a_word_for_each_band_of_each_tile() -> None:
    assert core.hessian_update_cuda_workspace(0, 4096, 132) == 0
    assert core.hessian_update_cuda_workspace(1, 4096, 132) == 16 + 136 * 16
