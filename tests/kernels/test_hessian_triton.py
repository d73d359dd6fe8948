"""The Hessian's Triton kernels on a machine without a GPU: compiled for sm_80 and sm_90, and interpreted.

`test_in_the_interpreter` runs this file once more (interpreter.py).
"""

import re
from dataclasses import replace

import pytest
import torch
from support.interpreter import INTERPRETED, mend, poison_memory, run_interpreted
from torch import Tensor

if not INTERPRETED:
    from pyprune.triton_kernels import hessian
    from pyprune.triton_kernels.channel_moments import CONFIGURATIONS as MOMENTS
    from pyprune.triton_kernels.hessian import FLUSH_ROWS, Configuration, divide_tiles, flush_steps_for, tile_count
    from support.machine_code import RESERVED_SHARED_MEMORY, SHARED_MEMORY, MachineCode, compile_kernel

    SIZES = ("rows", "steps", "part_steps", "flush_steps", "tile_rows", "whole_tiles", "split_tiles")

    def weight_arguments(element: str, weighted: bool) -> tuple[dict[str, str], dict[str, None]]:
        """Types of the weights' arguments, and those that are None: all without weights, the divisor but of fp16."""
        types = {"weights": "*fp32"} if weighted else {}
        types |= {"divisor": "*fp32"} if weighted and element == "fp16" else {}
        return types, dict.fromkeys({"weights", "divisor"} - types.keys())

    def compile_tma(element: str, configuration: Configuration, weighted: bool = False) -> MachineCode:
        tile, depth = configuration.tile, configuration.depth
        out = f"tensordesc<fp32[{tile},{tile}]>"
        types = {"x": f"tensordesc<{element}[{depth},{tile}]>", "lower": out, "workspace": out}
        pointers, absent = weight_arguments(element, weighted)
        return compile_kernel(
            hessian.hessian_tma,
            90,
            types | pointers | dict.fromkeys(SIZES, "i32"),
            {"TILE": tile, "DEPTH": depth, "BAND": configuration.band} | absent,
            set(pointers),
            num_warps=configuration.warps,
            num_stages=configuration.stages,
        )

    def compile_pointers(
        target: int, element: str, configuration: Configuration, unit: int, weighted: bool = False
    ) -> MachineCode:
        pointers = {"x": f"*{element}", "lower": "*fp32", "workspace": "*fp32"}
        weights, absent = weight_arguments(element, weighted)
        pointers |= weights
        return compile_kernel(
            hessian.hessian_pointers,
            target,
            pointers | dict.fromkeys((*SIZES, "channel_units", "stride_units"), "i32"),
            {
                "TILE": configuration.tile,
                "DEPTH": configuration.depth,
                "BAND": configuration.band,
                "UNIT": unit,
                "PRECISION": "tf32x3",
                "FLUSH": element != "fp32",
            }
            | absent,
            {*pointers} - {"x"} if unit == 1 else set(pointers),
            num_warps=configuration.warps,
            num_stages=configuration.stages,
        )

    @pytest.mark.parametrize("element", ["bf16", "fp16"])
    def test_tma_kernel_fits(element: str) -> None:
        code = compile_tma(element, hessian.TMA)
        assert code.stack == 0, "a spill"
        blocks = hessian.TMA.depth * 2 * hessian.TMA.tile * 2  # bytes
        assert code.shared <= SHARED_MEMORY[90] - RESERVED_SHARED_MEMORY
        # A block for every stage: with one fewer, which is what Triton 3.6 gives to a block that does not feed a
        # dot alone, the next load overwrites what wgmma still reads.
        assert code.shared >= hessian.TMA.stages * blocks
        assert "wgmma.mma_async" in code.ptx
        # The products of one step run while the next one is prepared; all are awaited before a flush and at the end.
        assert re.findall(r"wgmma\.wait_group\.sync\.aligned (\d+)", code.ptx) == ["1", "0", "0"]
        assert "cp.reduce.async.bulk.tensor" in code.ptx
        assert "cp.async.bulk.tensor" in code.ptx

    # (target, element, configuration, elements read at a time)
    POINTER_KERNELS = [
        (80, "bf16", hessian.POINTERS, 8),
        (80, "fp16", hessian.POINTERS, 8),
        (80, "fp32", hessian.FLOAT32, 4),
        (90, "fp32", hessian.FLOAT32, 4),
        *((target, element, hessian.ANY_WIDTH, 1) for target in (80, 90) for element in ("bf16", "fp16", "fp32")),
    ]

    @pytest.mark.parametrize(("target", "element", "configuration", "unit"), POINTER_KERNELS)
    def test_pointer_kernel_fits(target: int, element: str, configuration: Configuration, unit: int) -> None:
        code = compile_pointers(target, element, configuration, unit)
        assert code.stack == 0, "a spill"
        assert code.shared <= SHARED_MEMORY[target] - RESERVED_SHARED_MEMORY
        assert ("wgmma.mma_async" if target == 90 else "mma.sync") in code.ptx
        if unit > 1 and element != "fp32":
            # x is read 16 bytes at a time, for widths that 16 does not divide too. The tensor cores take no columns
            # of 32-bit elements: Triton 3.6 then turns one of the two blocks around as it copies it, 4 bytes at a time.
            copies = re.findall(r"cp\.async\.c[ag]\.shared\.global[^\n]*", code.ptx)
            assert copies
            assert all(re.search(r"\], 0x10\b", copy) for copy in copies), copies

    @pytest.mark.parametrize("element", ["bf16", "fp16"])
    def test_weighted_tma_kernel_fits(element: str) -> None:
        code = compile_tma(element, hessian.TMA, weighted=True)
        assert code.stack == 0, "a spill"
        assert code.shared <= SHARED_MEMORY[90] - RESERVED_SHARED_MEMORY
        # The weighted operand is in registers: one block fewer, which nothing reads after it was copied there. The
        # other one has a block for every stage, as without weights.
        assert code.shared >= (2 * hessian.TMA.stages - 1) * hessian.TMA.depth * 2 * hessian.TMA.tile
        assert re.search(r"wgmma\.mma_async[^;]*\}, \{%r\d+", code.ptx), "an operand in registers"
        # Four products a step, the last three of which run while the next operand is prepared: those of the step
        # before are done when its block is loaded anew.
        assert re.findall(r"wgmma\.wait_group\.sync\.aligned (\d+)", code.ptx) == ["3", "3", "3", "3", "0"]

    @pytest.mark.slow
    @pytest.mark.parametrize(("target", "element", "configuration", "unit"), POINTER_KERNELS)
    def test_weighted_pointer_kernel_fits(target: int, element: str, configuration: Configuration, unit: int) -> None:
        code = compile_pointers(target, element, configuration, unit, weighted=True)
        # A few registers too many of sm_80, where tf32x3 needs nearly all of them without weights.
        assert code.stack <= (288 if (target, element, unit) == (80, "fp32", 4) else 0)
        assert code.shared <= SHARED_MEMORY[target] - RESERVED_SHARED_MEMORY

    @pytest.mark.parametrize("weighted", [False, True])
    @pytest.mark.parametrize("target", [80, 90])
    def test_second_launch_and_sums_fit(target: int, weighted: bool) -> None:
        for tile in (64, 128):
            code = compile_kernel(
                hessian.add_parts,
                target,
                {"lower": "*fp32", "workspace": "*fp32"}
                | dict.fromkeys(("channels", "parts", "tile_rows", "whole_tiles", "split_tiles"), "i32"),
                {"TILE": tile, "BAND": 12, "STRIP": hessian.STRIP_ROWS},
                {"lower", "workspace"},
                num_warps=4,
            )
            assert code.stack == 0, "a spill"
        for element, configuration in (("bf16", MOMENTS[target, 2]), ("fp32", MOMENTS[target, 4])):
            code = compile_kernel(
                hessian.chunk_sums,
                target,
                {"x": f"*{element}", "out": "*fp32", "weights": "*fp32"}
                | dict.fromkeys(("channels", "row_stride", "tiles_per_chunk", "longer_chunks", "tail_rows"), "i32"),
                {
                    "TILE_ROWS": configuration.tile_rows,
                    "TILE_CHANNELS": configuration.tile_channels,
                    "STAGES": configuration.stages,
                }
                | ({} if weighted else {"weights": None}),
                {"x", "out", "row_stride"},
                num_warps=configuration.warps,
            )
            assert code.stack == 0, "a spill"
            assert code.resident(target, configuration.warps) >= configuration.resident

    @pytest.mark.parametrize("channels", [1, 128, 129, 1000, 4096, 28672])
    @pytest.mark.parametrize("multiprocessors", [1, 108, 132])
    @pytest.mark.parametrize("rows", [1, 300, 2048, 32768, 2**31 - 1])
    def test_division_covers_all_rows(rows: int, channels: int, multiprocessors: int) -> None:
        tiles = tile_count(channels, hessian.TMA.tile)
        steps = -(-rows // hessian.TMA.depth)
        division = divide_tiles(tiles, steps, multiprocessors)
        assert division.whole + division.split == tiles
        assert 0 <= steps - (division.parts - 1) * division.part_steps <= division.part_steps
        flush_steps = flush_steps_for(steps, hessian.TMA.depth)
        assert 0 < flush_steps * hessian.TMA.depth <= FLUSH_ROWS

    def test_a_nearly_empty_wave_is_split() -> None:
        """5120 channels: 820 tiles, six waves of 132 and 28 left, which 112 of 132 programs share."""
        division = divide_tiles(tile_count(5120, hessian.TMA.tile), 512, 132)
        assert (division.whole, division.split, division.parts) == (792, 28, 4)
        assert divide_tiles(tile_count(4096, hessian.TMA.tile), 512, 132).split == 0

    @pytest.mark.slow
    def test_in_the_interpreter() -> None:
        run_interpreted(__file__)

else:
    import triton
    import triton.language as tl

    mend()

    from pyprune.triton_kernels import hessian
    from pyprune.triton_kernels.hessian import Configuration, divide_tiles, hessian_triton, tile_count

    def small(configuration: Configuration) -> Configuration:
        """Small tiles, so that a few channels make many; the real table is compiled above."""
        return replace(configuration, tile=16, depth=16, band=2)

    TMA, POINTERS = small(hessian.TMA), small(hessian.POINTERS)

    @pytest.fixture(autouse=True)
    def small_chunks_and_poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(hessian, "FLUSH_ROWS", 48)
        poison_memory(monkeypatch)

    def integers(rows: int, channels: int, dtype: torch.dtype) -> Tensor:
        """Rows whose products and their sums are exact in float32."""
        return torch.randint(-3, 4, (rows, channels), generator=torch.Generator().manual_seed(rows)).to(dtype)

    def assert_exact(
        x: Tensor, configuration: Configuration, multiprocessors: int, weights: Tensor | None = None
    ) -> None:
        channels = x.shape[1]
        below = torch.ones(channels, channels, dtype=torch.bool).tril()
        lower = torch.where(below, 3.0, torch.nan)
        sums = torch.ones(channels)
        hessian_triton(x, lower, sums, configuration, multiprocessors, weights)
        values = x.float() if weights is None else weights[:, None] * x.float()
        assert torch.equal(lower[below], (values.t() @ values + 3)[below])
        assert torch.equal(sums, (values if weights is None else weights[:, None] * values).sum(0) + 1)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize(("rows", "channels"), [(1, 8), (37, 24), (300, 56)])
    def test_tma(rows: int, channels: int, dtype: torch.dtype) -> None:
        assert_exact(integers(rows, channels, dtype), TMA, multiprocessors=7)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    @pytest.mark.parametrize(("rows", "channels"), [(1, 1), (37, 5), (130, 33), (300, 40)])
    def test_pointers(rows: int, channels: int, dtype: torch.dtype) -> None:
        assert_exact(integers(rows, channels, dtype), POINTERS, multiprocessors=7)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    @pytest.mark.parametrize("configuration", [TMA, POINTERS], ids=["tma", "pointers"])
    def test_weights(configuration: Configuration, dtype: torch.dtype) -> None:
        """Powers of two from 1/4 to 4, signs and zeros, which leave all sums exact; in split tiles too."""
        if configuration.tma and dtype == torch.float32:
            pytest.skip("the tensor memory accelerator's kernel reads 16-bit rows")
        for rows, channels, multiprocessors in ((37, 24, 7), (300, 40, 40)):
            weights = 2.0 ** torch.randint(-2, 3, (rows,), generator=torch.Generator().manual_seed(1))
            weights[::5] *= -1
            weights[::11] = 0
            assert_exact(integers(rows, channels, dtype), configuration, multiprocessors, weights)

    def test_weights_beyond_float16() -> None:
        """2¹⁸ squared is no float16, and its sums of small integers are exact in float32."""
        x, weights = integers(60, 24, torch.float16), torch.full((60,), 2.0**18)
        weights[::2] = 2.0**15
        lower = torch.zeros(24, 24)
        hessian_triton(x, lower, None, TMA, 7, weights)
        values = weights[:, None] * x.float()
        assert torch.equal(lower.tril(), (values.t() @ values).tril())

    @pytest.mark.parametrize("configuration", [TMA, POINTERS], ids=["tma", "pointers"])
    @pytest.mark.parametrize(("multiprocessors", "split"), [(4, 2), (40, 6)])
    def test_split_tiles(configuration: Configuration, multiprocessors: int, split: int) -> None:
        channels = 40  # 6 tiles
        x = integers(800, channels, torch.bfloat16)
        division = divide_tiles(tile_count(channels, configuration.tile), 50, multiprocessors)
        assert (division.split, division.parts > 1) == (split, True)
        assert_exact(x, configuration, multiprocessors)

    @pytest.mark.parametrize("view", ["wide rows", "one apart", "single row"])
    def test_strides(view: str) -> None:
        wide = integers(100, 64, torch.bfloat16)
        x = {"wide rows": wide[:, :33], "one apart": wide[:, 1:34], "single row": wide[7:8, :33]}[view]
        assert_exact(x, POINTERS, multiprocessors=7)

    def test_tma_reads_rows_that_lie_apart() -> None:
        buffer = torch.full((60, 64), torch.nan, dtype=torch.bfloat16)
        buffer[1:50, 8:48] = integers(49, 40, torch.bfloat16)
        assert_exact(buffer[1:50, 8:48], TMA, multiprocessors=7)

    @triton.jit
    def store_tiles(out, tile_rows, BAND: tl.constexpr):
        row, column = hessian.tile_of(tl.program_id(0), tile_rows, BAND)
        tl.store(out + 2 * tl.program_id(0), row)
        tl.store(out + 2 * tl.program_id(0) + 1, column)

    @pytest.mark.parametrize(("band", "tile_rows"), [(2, 5), (4, 1), (4, 3), (4, 4), (4, 5), (4, 11), (12, 13)])
    def test_every_tile_comes_once(tile_rows: int, band: int) -> None:
        expected = [(row, column) for row in range(tile_rows) for column in range(row + 1)]
        out = torch.zeros(len(expected), 2, dtype=torch.int32)
        store_tiles[(len(expected),)](out, tile_rows, BAND=band)
        assert sorted(map(tuple, out.tolist())) == expected
