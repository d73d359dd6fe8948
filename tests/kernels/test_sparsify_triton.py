"""The kernel that walks a block of columns, in Triton's interpreter, and whether it fits the devices."""

import pytest
import torch
from support.interpreter import INTERPRETED, mend, poison_memory, run_interpreted
from support.spd_matrices import hessian

from pyprune.ops import inverse_factor
from pyprune.ops.sparsify import block_mask, walk_reference

if not INTERPRETED:

    @pytest.mark.slow
    def test_in_the_interpreter() -> None:
        run_interpreted(__file__)

    @pytest.mark.parametrize("target", [80, 90])
    @pytest.mark.parametrize("group", [0, 4, 8])
    def test_fits(group: int, target: int) -> None:
        from pyprune.triton_kernels import sparsify
        from support.machine_code import compile_kernel

        pointers = dict.fromkeys(("block", "factor", "errors", "losses"), "*fp32") | {"mask": "*u8"}
        sizes = dict.fromkeys(("row_stride", "factor_stride", "rows", "columns"), "i32")
        constants = {
            "ZEROS": group // 2, "GROUP": max(group, 1), "MASKED": group == 0, "ROWS": sparsify.ROWS, "COLUMNS": 128,
        }  # fmt: skip
        aligned = {*pointers, *sizes}
        code = compile_kernel(
            sparsify.walk_columns, target, pointers | sizes, constants, aligned, num_warps=sparsify.WARPS
        )
        assert code.stack == 0, "a spill"
        assert code.resident(target, sparsify.WARPS) >= 3

else:
    mend()
    from pyprune.triton_kernels.sparsify import walk_block

    PATTERNS = [(2, 4), (4, 8), (1, 3), (0, 0)]  # zeros, group; 0: masked beforehand

    @pytest.fixture(autouse=True)
    def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
        poison_memory(monkeypatch)

    @pytest.mark.parametrize(
        ("columns", "rows", "zeros", "group"),
        [
            *((columns, rows, *pattern) for pattern in PATTERNS for columns, rows in ((24, 1), (48, 17))),
            *((120, 5, *pattern) for pattern in ((4, 8), (0, 0))),
        ],
    )
    def test_walks_as_the_reference_does(columns: int, rows: int, zeros: int, group: int) -> None:
        """To rounding: e = w / U, and one product and difference a step on either side."""
        wide = torch.randn(rows, columns + 9, generator=torch.Generator().manual_seed(columns))
        block = wide[:, 4 : columns + 4]
        factor = inverse_factor(hessian(columns, 3 * columns), 0.01).factor
        mask = block_mask(block, factor.diagonal(), 0.4, [rows]) if group == 0 else None
        expected = block.clone()
        errors, losses = walk_reference(expected, factor, mask, zeros, group)
        own_errors, own_losses = walk_block(block, factor, mask, zeros, group)
        assert torch.equal(block == 0, expected == 0)
        torch.testing.assert_close(block, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(own_errors, errors, rtol=1e-5, atol=1e-5 * errors.abs().max().item())
        torch.testing.assert_close(own_losses, losses, rtol=1e-5, atol=0)

    def test_of_equal_ones_the_first_goes() -> None:
        block = torch.ones(3, 8)
        walk_block(block, torch.eye(8), None, 2, 4)
        assert torch.equal(block, torch.tensor([0.0, 0, 1, 1]).repeat(3, 2))
