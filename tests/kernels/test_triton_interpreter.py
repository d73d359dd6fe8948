"""The Triton kernels on a CPU, in Triton's interpreter, against float64.

`test_in_the_interpreter` runs this file once more (interpreter.py); the other tests exist only there.
"""

import pytest
import torch
from support.interpreter import INTERPRETED, mend, poison_memory, run_interpreted
from torch import Tensor

if not INTERPRETED:

    @pytest.mark.slow
    def test_in_the_interpreter() -> None:
        run_interpreted(__file__)

else:
    from support.moments_bounds import assert_as_good_as_torch, assert_within_analysed_bound

    mend()

    from pyprune.triton_kernels import channel_moments as kernels
    from pyprune.triton_kernels.channel_moments import Configuration, channel_moments_triton, divide_rows

    # Small tiles, so that a few rows make many chunks; the real table is compiled in test_triton_compile.py.
    SMALL = Configuration(4, 16, warps=1, stages=2, resident=1, waves=1, early_merge=False)
    DTYPES = (torch.bfloat16, torch.float16, torch.float32)

    @pytest.fixture(autouse=True)
    def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
        poison_memory(monkeypatch)

    def moments(
        batches: list[Tensor], multiprocessors: int = 40, configuration: Configuration = SMALL
    ) -> tuple[Tensor, Tensor]:
        mean, m2 = torch.zeros(2, batches[0].shape[1])
        count = 0
        for x in batches:
            channel_moments_triton(x, count, mean, m2, configuration, multiprocessors)
            count += len(x)
        return mean, m2

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("rows", "channels"), [(1, 1), (3, 5), (64, 16), (65, 17), (131, 33), (300, 40)])
    def test_matches_float64(rows: int, channels: int, dtype: torch.dtype) -> None:
        torch.manual_seed(rows)
        x = (torch.randn(rows, channels) * 2 + 5).to(dtype)
        if rows == 1:
            assert_within_analysed_bound(x, *moments([x]), merges=1)
        else:
            assert_as_good_as_torch(x, *moments([x]))

    def test_divides_into_many_chunks_of_two_lengths() -> None:
        chunks = divide_rows(1003, 40, 40, SMALL)
        assert (chunks.count, chunks.tiles, chunks.longer, chunks.tail_rows) == (13, 19, 3, 3)

    def test_more_chunks_than_one_group_of_the_merge(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(kernels, "SMALLEST_CHUNK_TILES", 1)
        torch.manual_seed(5)
        x = torch.randn(4 * 150 + 1, 3)
        assert divide_rows(*x.shape, 150, SMALL).count == 150
        assert_as_good_as_torch(x, *moments([x], multiprocessors=150))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_several_calls(dtype: torch.dtype) -> None:
        torch.manual_seed(1)
        x = (torch.randn(300, 33) - 3).to(dtype)
        batches = list(x.split([1, 2, 97, 200]))
        assert_as_good_as_torch(x, *moments(batches), merges=4)

    def test_massive_first_row() -> None:
        """A shift by the first row would be off by 8.6e-2 at 131072 rows."""
        torch.manual_seed(2)
        x = torch.randn(500, 17)
        x[0] = 3000.0
        x = x.bfloat16()
        assert_as_good_as_torch(x, *moments([x]))

    def test_offset() -> None:
        """Σx² − (Σx)²/n would be off by 5e-3 at 131072 rows."""
        torch.manual_seed(3)
        x = (torch.randn(500, 17) + 100).bfloat16()
        assert_as_good_as_torch(x, *moments([x]))

    @pytest.mark.parametrize("view", ["wide rows", "one apart", "single row"])
    def test_strides(view: str) -> None:
        torch.manual_seed(4)
        wide = torch.randn(200, 64).bfloat16()
        x = {"wide rows": wide[:, :33], "one apart": wide[:, 1:34], "single row": wide[7:8, :33]}[view]
        assert_within_analysed_bound(x, *moments([x]), merges=1)

    def weighted_moments(x: Tensor, roots: Tensor, cuts: list[int], multiprocessors: int = 40) -> tuple[Tensor, Tensor]:
        mean, m2 = torch.zeros(2, x.shape[1])
        total, count = torch.zeros((), dtype=torch.float64), 0
        for part, own in zip(x.tensor_split(cuts), roots.tensor_split(cuts), strict=True):
            channel_moments_triton(part, count, mean, m2, SMALL, multiprocessors, own, total)
            total += own.double().square().sum()
            count += len(part)
        return mean, m2

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("rows", "channels"), [(1, 1), (3, 5), (67, 17)])
    def test_weights(rows: int, channels: int, dtype: torch.dtype) -> None:
        """Of 1, 2 and 3, whose squares are as many copies of the row; and of 0, a row that is not there."""
        torch.manual_seed(rows)
        x = (torch.randn(rows, channels) * 2 + 5).to(dtype)
        copies = torch.randint(0, 4, (rows,))
        copies[0] = 1
        repeated = x.repeat_interleave(copies.square(), 0)
        for cuts in ([], [rows // 3]):
            found = weighted_moments(x, copies.float(), cuts)
            assert_within_analysed_bound(repeated, *found, merges=1 + len(cuts))

    def test_weights_of_many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(kernels, "SMALLEST_CHUNK_TILES", 1)
        torch.manual_seed(5)
        x, roots = torch.randn(4 * 150 + 1, 3), torch.ones(601)
        assert divide_rows(*x.shape, 150, SMALL).count == 150
        roots[:300] = 0
        assert_as_good_as_torch(x[300:], *weighted_moments(x, roots, [], multiprocessors=150))

    def test_nothing_weighs_anything() -> None:
        for rows in (3, 200):
            mean, m2 = weighted_moments(torch.randn(rows, 33), torch.zeros(rows), [1])
            assert not mean.any()
            assert not m2.any()

    def test_nan_stays_in_its_channel() -> None:
        x = torch.randn(300, 33)
        clean = moments([x])
        x[297, 4] = torch.nan
        for found, expected in zip(moments([x]), clean, strict=True):
            assert found[4].isnan()
            found[4] = expected[4]
            assert torch.equal(found, expected)

    def test_same_bits_three_times() -> None:
        x = torch.randn(200, 33).bfloat16()
        first, second, third = (torch.stack(moments([x])) for _ in range(3))
        assert torch.equal(first, second)
        assert torch.equal(first, third)
