"""The Triton kernels compiled for sm_80 and sm_90 on any machine: registers, spills, memory, loads."""

import re

import pytest
import triton.language as tl
from pyprune.triton_kernels import channel_moments, rms_norm, rotary, selection, swiglu
from pyprune.triton_kernels.channel_moments import CONFIGURATIONS, Configuration
from support.machine_code import MachineCode, compile_kernel

ELEMENT_TYPES = {2: ("bf16", "fp16"), 4: ("fp32",)}


# A kernel with weights reads these, one without is compiled without them.
WEIGHTS = {"weights": "*fp32", "total": "*fp64", "out_total": "*fp32"}


def compile_chunk_moments(
    target: int,
    element: str,
    configuration: Configuration,
    whole_blocks: bool,
    merge_state: bool,
    weighted: bool = False,
) -> MachineCode:
    pointers = {"x": f"*{element}", "out_mean": "*fp32", "out_m2": "*fp32"} | (WEIGHTS if weighted else {})
    sizes = dict.fromkeys(("channels", "row_stride", "tiles_per_chunk", "longer_chunks", "tail_rows"), "i32")
    constants = {
        "TILE_ROWS": configuration.tile_rows,
        "TILE_CHANNELS": configuration.tile_channels,
        "STAGES": configuration.stages,
        "WHOLE_BLOCKS": whole_blocks,
        "MERGE_STATE": merge_state,
        "EARLY_MERGE": configuration.early_merge and not merge_state,
    } | ({} if weighted else dict.fromkeys(WEIGHTS))
    aligned = {*pointers, "channels", "row_stride"}
    types = pointers | sizes | {"count": "fp32"}
    return compile_kernel(
        channel_moments.chunk_moments, target, types, constants, aligned, num_warps=configuration.warps
    )


@pytest.mark.parametrize(("target", "element_size"), CONFIGURATIONS)
def test_chunk_moments_fits(target: int, element_size: int) -> None:
    configuration = CONFIGURATIONS[target, element_size]
    residents = []
    for element in ELEMENT_TYPES[element_size]:
        for whole_blocks, merge_state in ((True, False), (False, False), (True, True)):
            code = compile_chunk_moments(target, element, configuration, whole_blocks, merge_state)
            assert code.stack == 0, "a spill"
            residents.append(code.resident(target, configuration.warps))
            # A column's sum stays in one thread, and x is read 16 bytes at a time.
            assert "shfl" not in code.ptx
            reads = re.findall(r"(?:cp\.async\.c[ag]\.shared\.global|ld\.global[^\n]*\.v4\.b32)[^\n]*", code.ptx)
            assert reads
            assert all("v4.b32" in read or re.search(r"\], 0x10\b", read) for read in reads), reads
            assert ("griddepcontrol.launch_dependents" in code.ptx) == (configuration.early_merge and not merge_state)
    assert 1 <= configuration.resident <= min(residents), "not all resident programs fit on a multiprocessor"


@pytest.mark.parametrize(("target", "element_size", "merge_state"), [(80, 2, False), (90, 2, False), (90, 4, True)])
def test_weighted_chunk_moments_fits(target: int, element_size: int, merge_state: bool) -> None:
    configuration = CONFIGURATIONS[target, element_size]
    element = ELEMENT_TYPES[element_size][0]
    code = compile_chunk_moments(target, element, configuration, False, merge_state, weighted=True)
    assert code.stack == 0, "a spill"
    assert code.resident(target, configuration.warps) >= configuration.resident
    assert "shfl" not in code.ptx, "a column's sum stays in one thread"


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("target", sorted({target for target, _ in CONFIGURATIONS}))
def test_merge_chunks_fits(target: int, weighted: bool) -> None:
    early_merge = target >= 90
    pointers = dict.fromkeys(("chunk_mean", "chunk_m2", "state_mean", "state_m2"), "*fp32")
    pointers |= {"total": "*fp64", "chunk_total": "*fp32"} if weighted else {}
    sizes = dict.fromkeys(("channels", "chunks", "tiles_per_chunk", "longer_chunks", "tail_rows"), "i32")
    code = compile_kernel(
        channel_moments.merge_chunks,
        target,
        pointers | sizes | {"count": "fp32"},
        {
            "TILE_ROWS": 8,
            "GROUP": channel_moments.MERGE_GROUP,
            "BLOCK_CHANNELS": channel_moments.MERGE_CHANNELS,
            "EARLY_MERGE": early_merge,
        }
        | ({} if weighted else {"total": None, "chunk_total": None}),
        {*pointers, "channels"},
        num_warps=channel_moments.MERGE_WARPS,
        launch_pdl=early_merge,
    )
    assert code.stack == 0, "a spill"
    assert code.resident(target, channel_moments.MERGE_WARPS) >= 1
    assert ("griddepcontrol.wait" in code.ptx) == early_merge


@pytest.mark.parametrize("target", [80, 90])
@pytest.mark.parametrize(("channels", "plus_one"), [(128, False), (5120, True), (8192, False), (32768, True)])
def test_rms_norm_fits(channels: int, plus_one: bool, target: int) -> None:
    width = 1 << (channels - 1).bit_length()
    constants = {"ROWS": max(1, rms_norm.TILE // width), "CHANNELS": width, "OUT": tl.bfloat16, "PLUS_ONE": plus_one}
    types = {"x": "*bf16", "weight": "*bf16", "out": "*bf16", "rows": "i32", "channels": "i32", "eps": "fp32"}
    aligned = {"x", "weight", "out", "channels"}
    code = compile_kernel(rms_norm.rms_norm_rows, target, types, constants, aligned, num_warps=rms_norm.WARPS)
    assert code.stack == 0, "a spill"
    assert re.search(r"ld\.global[^\n]*\.v4\.b32", code.ptx), "narrow reads"
    assert code.resident(target, rms_norm.WARPS) >= (2 if channels <= 8192 else 1)


@pytest.mark.parametrize("target", [80, 90])
@pytest.mark.parametrize(("channels", "index"), [(4096, "i64"), (5120, "i32"), (8192, "i32"), (32768, "i64")])
def test_selection_fits(channels: int, index: str, target: int) -> None:
    """The kernel of all steps, of which the others are parts."""
    count, warps = channels // 2, selection.warps(channels)
    pointers = dict.fromkeys(("residual", "update", "weight", "out"), "*bf16")
    pointers |= dict.fromkeys(("update_index", "index"), f"*{index}")
    sizes = dict.fromkeys(("channels", "update_count", "count"), "i32")
    lanes = selection.lanes(count, channels)
    width = 1 << (channels - 1).bit_length()
    constants = {"CHANNELS": width, "UPDATE_LANES": lanes, "LANES": lanes, "OUT": tl.bfloat16}
    kernel, types = selection.scatter_add_rms_norm_gather_rows, pointers | sizes | {"eps": "fp32"}
    code = compile_kernel(kernel, target, types, constants, {*pointers, *sizes}, num_warps=warps)
    assert code.stack == 0, "a spill"
    assert code.resident(target, warps) * warps >= 32
    # The row is read 16 bytes at a time, 8 channels of 2; a selection's lanes go to the threads in turn, one channel an
    # access, and change hands nowhere: what is in shared memory are the sums of the warps.
    threads = 32 * warps
    assert len(re.findall(r"ld\.global[^\n]*\.v4\.b32", code.ptx)) == width // threads // 8
    assert len(re.findall(r"ld\.global\.b16", code.ptx)) == 4 * lanes // threads
    assert len(re.findall(r"st\.global\.b16", code.ptx)) == 2 * lanes // threads
    assert code.shared <= 4 * warps
    # Between the writes and the reading of the row every thread waits for the others.
    before = code.ptx.partition("bar.sync")[0]
    assert "st.global.b16" in before
    assert "v4.b32" not in before


@pytest.mark.parametrize(("target", "neighbours"), [(80, False), (90, False), (90, True)])
def test_rotate_heads_fits(target: int, neighbours: bool) -> None:
    pointers = dict.fromkeys(("x", "cos", "sin"), "*bf16")
    sizes = ("tokens", "heads", "head_dim", "x_batch", "x_token", "x_head", "angle_batch", "angle_token")
    types = pointers | dict.fromkeys(sizes, "i32")
    constants = {"HEADS": rotary.HEADS, "HALF": 64, "NEIGHBOURS": neighbours}
    aligned = {*pointers, "head_dim", "x_batch", "x_token", "x_head", "angle_batch", "angle_token"}
    code = compile_kernel(rotary.rotate_heads, target, types, constants, aligned, num_warps=rotary.WARPS)
    assert code.stack == 0, "a spill"
    # Neighbours are read one channel at a time, both of a pair in one line of the cache.
    assert neighbours or re.search(r"ld\.global[^\n]*\.v4\.b32", code.ptx), "narrow reads"


@pytest.mark.parametrize(("target", "gelu"), [(80, False), (90, False), (90, True)])
def test_swiglu_fits(target: int, gelu: bool) -> None:
    types = {"gate": "*bf16", "up": "*bf16"} | dict.fromkeys(("channels", "blocks", "gate_row", "up_row"), "i32")
    constants, aligned = {"BLOCK": swiglu.BLOCK, "GELU": gelu}, {*types} - {"blocks"}
    code = compile_kernel(swiglu.swiglu_elements, target, types, constants, aligned, num_warps=swiglu.WARPS)
    assert code.stack == 0, "a spill"
    assert len(re.findall(r"ld\.global[^\n]*\.v4\.b32", code.ptx)) == 4
