"""RMSNorm and rotary embedding as operators: transformers' modules to the bit, and the kernels against float64."""

import copy
from typing import Any

import pytest
import torch
from support.family_models import small_model
from support.interpreter import INTERPRETED, mend, run_interpreted
from torch import Tensor
from transformers.activations import ACT2FN

from pyprune.architectures import FAMILIES
from pyprune.architectures.declaration import HALVES, NEIGHBOURS, RMS, RMS_PLUS_ONE
from pyprune.forward import fused
from pyprune.ops import rms_norm, rotate_, swiglu_
from pyprune.ops.requirements import KERNEL_DTYPES
from pyprune.ops.rms_norm import rms_norm_reference
from pyprune.ops.rotary import rotate_reference
from pyprune.ops.swiglu import swiglu_reference

# Norms that round as Llama's or Gemma's, to the bit in every type; OLMo's multiply before they round.
NORMS = [name for name, own in sorted(FAMILIES.items()) if own.norm in (RMS, RMS_PLUS_ONE) and "olmo" not in name]
# Rotary embeddings that transformers' function turns; ERNIE's are turned in float32.
ROTARIES = [name for name, own in sorted(FAMILIES.items()) if own.rotary in (HALVES, NEIGHBOURS) and name != "ernie4_5"]
each_family = pytest.mark.parametrize("name", sorted(FAMILIES))
each_dtype = pytest.mark.parametrize("dtype", KERNEL_DTYPES)
NORM_SHAPES = [(1, 1), (3, 5), (7, 64), (130, 96), (5, 4100), (2, 8192)]


def norm_case(rows: int, channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * 10007 + channels)
    x = torch.randn(rows, channels, generator=generator) * 3
    return x.to(dtype), torch.randn(channels, generator=generator).to(dtype)


def rotary_case(batch: int, heads: int, tokens: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Heads as attention has them, a transposed view; other angles in every sequence."""
    generator = torch.Generator().manual_seed(heads * tokens)
    x = torch.randn(batch, tokens, heads * head_dim, generator=generator).to(dtype)
    angles = torch.randn(batch, tokens, head_dim, generator=generator)
    return x.view(batch, tokens, heads, head_dim).transpose(1, 2), angles.cos().to(dtype), angles.sin().to(dtype)


def rounding(dtype: torch.dtype) -> float:
    """Two roundings to nearest; Triton's interpreter truncates what it converts to bfloat16."""
    return torch.finfo(dtype).eps * (2 if INTERPRETED and dtype == torch.bfloat16 else 1) * 1.01


def assert_rms_norm(x: Tensor, weight: Tensor, found: Tensor, eps: float, plus_one: bool = False) -> None:
    """Against float64: roundings of the normed row and of the product, and float32 sums."""
    exact = rms_norm_reference(x.double(), weight.double(), eps, plus_one)
    unit = rounding(x.dtype) + (x.shape[-1] / 2 + 4) * torch.finfo(torch.float32).eps
    # A normed value below the smallest normal one loses bits before the weight multiplies it.
    smallest = torch.finfo(x.dtype).tiny * torch.finfo(x.dtype).eps * (1 + weight.abs().double())
    assert found.dtype == x.dtype
    # 1 + w is rounded in float32: by half a unit of 1, however small the sum.
    smallest = (
        smallest
        + torch.finfo(torch.float32).eps * (x.double() / x.double().square().mean(-1, keepdim=True).sqrt()).abs()
    )
    assert ((found.double() - exact).abs() <= unit * exact.abs() + smallest).all()


def swiglu_case(rows: int, channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows + channels)
    return tuple((4 * torch.randn(rows, channels, generator=generator)).to(dtype) for _ in range(2))


def assert_swiglu(gate: Tensor, up: Tensor, found: Tensor, activation: str = "silu") -> None:
    """Against float64: f and the product rounded; the exponential in float32 to two units."""
    exact = gate.double()
    swiglu_reference(exact, up.double(), activation)
    smallest = torch.finfo(gate.dtype).tiny * torch.finfo(gate.dtype).eps * (1 + up.abs().double())
    # silu(x) = x / (1 + exp(-x)): for x ≪ 0 the error of the argument's own rounding, |x| units, comes in.
    size = gate.abs().double()
    if activation == "gelu_tanh":  # of the argument 1.6 x + 0.07 x³, and of its five operations
        size = 5 * (1.6 * size + 0.072 * size**3)
        # The reference's 1 + tanh has no digits left below -5.
        smallest = smallest + 2 * torch.finfo(torch.float64).eps * (gate.double() * up.double()).abs()
    unit = rounding(gate.dtype) + (4 + 2 * size) * torch.finfo(torch.float32).eps
    assert ((found.double() - exact).abs() <= unit * exact.abs() + smallest).all()


def assert_rotary(x: Tensor, cos: Tensor, sin: Tensor, found: Tensor, neighbours: bool = False) -> None:
    """Against float64: each product rounded once, and their sum."""
    exact = x.double()
    rotate_reference(exact, cos.double(), sin.double(), neighbours)
    # What the sum of the products' sizes would be: of what turns together, no angle makes it larger than the root of 2.
    size = x.abs().double()
    turned = (
        torch.stack([size[..., 1::2], size[..., ::2]], -1).flatten(-2)
        if neighbours
        else size.roll(size.shape[-1] // 2, -1)
    )
    bound = size + turned
    smallest = 3 * torch.finfo(x.dtype).tiny * torch.finfo(x.dtype).eps
    assert ((found.double() - exact).abs() <= rounding(x.dtype) * bound + smallest).all()


if INTERPRETED:
    mend()
    from pyprune.triton_kernels.rms_norm import rms_norm_triton
    from pyprune.triton_kernels.rotary import rotate_triton
    from pyprune.triton_kernels.swiglu import swiglu_triton

    @each_dtype
    @pytest.mark.parametrize(("rows", "channels"), NORM_SHAPES)
    def test_rms_norm_kernel(rows: int, channels: int, dtype: torch.dtype) -> None:
        x, weight = norm_case(rows, channels, dtype)
        for plus_one in (False, True):
            assert_rms_norm(x, weight, rms_norm_triton(x, weight, 1e-5, plus_one), 1e-5, plus_one)

    @each_dtype
    @pytest.mark.parametrize("size", [(1, 1, 1, 2), (2, 3, 5, 8), (2, 17, 3, 64), (1, 5, 4, 96)])
    @pytest.mark.parametrize("shared", [False, True])
    def test_rotary_kernel(size: tuple[int, int, int, int], shared: bool, dtype: torch.dtype) -> None:
        x, cos, sin = rotary_case(*size, dtype)
        if shared:
            cos, sin = cos[:1], sin[:1]
        for neighbours in (False, True):
            found = x.clone()
            rotate_triton(found, cos, sin, neighbours)
            assert_rotary(x, cos, sin, found, neighbours)

    @each_dtype
    @pytest.mark.parametrize(("rows", "channels"), NORM_SHAPES)
    def test_swiglu_kernel(rows: int, channels: int, dtype: torch.dtype) -> None:
        gate, up = swiglu_case(rows, channels, dtype)
        for activation in ("silu", "gelu_tanh"):
            found = torch.cat([gate, up], dim=-1)
            halves = found.chunk(2, dim=-1)
            swiglu_triton(*halves, activation == "gelu_tanh")
            assert_swiglu(gate, up, halves[0], activation)
            assert torch.equal(halves[1], up)

else:

    @pytest.mark.slow
    def test_in_the_interpreter() -> None:
        run_interpreted(__file__)

    @pytest.mark.parametrize("name", NORMS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_rms_norm_is_transformers_own(name: str, dtype: torch.dtype) -> None:
        """Also where a norm is over the heads (Qwen3)."""
        family = FAMILIES[name]
        x, weight = norm_case(6, 40, dtype)
        norm = family.norm_class(40, eps=1e-5).to(dtype)
        norm.weight.data.copy_(weight)
        assert torch.equal(norm(x), rms_norm(x, weight, 1e-5, family.norm == RMS_PLUS_ONE))

    @pytest.mark.parametrize("part", [8, 4])
    @pytest.mark.parametrize("name", ROTARIES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_rotary_is_transformers_own(name: str, dtype: torch.dtype, part: int) -> None:
        """part: channels of the 8 of a head that turn, where the family's function has the others to itself."""
        family = FAMILIES[name]
        apply = family.source().apply_rotary_pos_emb
        q, cos, sin = rotary_case(2, 3, 5, 8, dtype)
        cos, sin = cos[..., :part], sin[..., :part]
        k = q[:, :1].clone()
        try:
            expected = apply(q, k, cos, sin)
        except RuntimeError:
            assert part < 8
            return
        for heads in (q, k):
            rotate_(heads[..., :part], cos, sin, family.rotary == NEIGHBOURS)
        assert torch.equal(q, expected[0])
        assert torch.equal(k, expected[1])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(("activation", "own"), [("silu", "silu"), ("gelu_tanh", "gelu_pytorch_tanh")])
    def test_the_gated_unit_is_transformers_own(activation: str, own: str, dtype: torch.dtype) -> None:
        """Of separate matrices, and of the halves of one."""
        both = torch.cat(swiglu_case(5, 7, dtype), dim=-1)
        gate, up = both.chunk(2, dim=-1)
        expected = ACT2FN[own](gate) * up
        for first, second in ((gate.clone(), up.clone()), (gate, up)):
            swiglu_(first, second, activation)
            torch.testing.assert_close(first, expected, rtol=8 * torch.finfo(dtype).eps, atol=0)

    @each_family
    def test_a_fused_layer_is_the_layer(name: str) -> None:
        family = FAMILIES[name]
        model = small_model(family)
        block = model.get_submodule(family.layers)[-1]
        fused_block = copy.deepcopy(block)
        fused.fuse(fused_block, family, fused.activation_of(model.config))
        left = fused.unfused(family, model.config)
        assert ("the middle of the FFN" in left) != any(isinstance(m, fused.FusedFFN) for m in fused_block.modules())
        assert ("norms" in left) != any(isinstance(m, fused.FusedRMSNorm) for m in fused_block.modules())
        assert list(fused_block.state_dict()) == list(block.state_dict())
        seen: list[tuple[Any, ...]] = []
        hook = block.register_forward_hook(
            lambda _, given, named, result: seen.append((given, named, result)), with_kwargs=True
        )
        with torch.no_grad():
            model(torch.arange(3, 15)[None], use_cache=False)
            hook.remove()
            given, named, expected = seen[0]
            with fused.fused_rotary(family):
                found = fused_block(*given, **named)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)

    def test_a_copied_norm_has_a_weight_of_its_own() -> None:
        norm = fused.FusedRMSNorm(torch.nn.Parameter(torch.ones(8)), 1e-6)
        other = copy.deepcopy(norm)
        other.load_state_dict({"weight": torch.full((8,), 2.0)}, assign=True)
        x = torch.randn(3, 8)
        assert torch.equal(other(x), 2 * norm(x))

    def test_operators_are_well_formed() -> None:
        x, weight = norm_case(4, 6, torch.float32)
        for plus_one in (False, True):
            torch.library.opcheck(rms_norm, (x, weight, 1e-6, plus_one))
            torch.library.opcheck(rotate_, (*rotary_case(2, 3, 4, 6, torch.float32), plus_one))
        for activation in ("silu", "gelu_tanh"):
            torch.library.opcheck(swiglu_, (*swiglu_case(3, 5, torch.float32), activation))

    @pytest.mark.parametrize(
        ("x", "weight", "message"),
        [
            (torch.zeros(2, 3), torch.zeros(4), "needs one of its last size"),
            (torch.zeros(2, 3, dtype=torch.int32), torch.zeros(3), "floating type"),
        ],
    )
    def test_rms_norm_refuses(x: Tensor, weight: Tensor, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            rms_norm(x, weight, 1e-6)

    def test_rotary_refuses() -> None:
        x, cos, sin = rotary_case(2, 3, 4, 6, torch.float32)
        for wrong, message in (
            ((x[..., :5], cos, sin), "even head_dim"),
            ((x, cos[:, :3], sin), "one row a token"),
            ((x, cos.double(), sin), "float64"),
            ((x, cos[:1], sin), "sin"),
        ):
            with pytest.raises(ValueError, match=message):
                rotate_(*wrong)

    def test_swiglu_refuses() -> None:
        for gate, up, message in (
            (torch.zeros(2, 3), torch.zeros(3), "need to be alike"),
            (torch.zeros(2), torch.zeros(2).double(), "float64"),
            (torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.int32), "floating type"),
        ):
            with pytest.raises(ValueError, match=message):
                swiglu_(gate, up)

    def test_another_activation_stays() -> None:
        family = FAMILIES["llama"]
        sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "num_hidden_layers": 1}
        block = family.build_layer(family.config_class(**sizes, hidden_act="gelu"), 0)
        own = block.mlp
        fused.fuse(block, family, "gelu")
        assert block.mlp is own

    def test_nothing_of_nothing() -> None:
        swiglu_(torch.zeros(0, 3), torch.zeros(0, 3))
        assert rms_norm(torch.zeros(0, 3), torch.ones(3), 1e-6).shape == (0, 3)
        rotate_(torch.zeros(0, 1, 2, 4), torch.zeros(1, 2, 4), torch.zeros(1, 2, 4))

    @pytest.mark.gpu
    @each_dtype
    def test_kernels_on_the_gpu(dtype: torch.dtype) -> None:
        assert fused.runs_fused(torch.device("cuda"), dtype)
        for rows, channels in [*NORM_SHAPES, (3, 32768), (4, 40000)]:
            x, weight = (t.cuda() for t in norm_case(rows, channels, dtype))
            for plus_one in (False, True):
                assert_rms_norm(x, weight, rms_norm(x, weight, 1e-5, plus_one), 1e-5, plus_one)
        for size in ((2, 17, 33, 64), (1, 40, 128, 128), (2, 5, 4, 96)):
            x, cos, sin = (t.cuda() for t in rotary_case(*size, dtype))
            found = x.clone()
            rotate_(found, cos, sin)
            assert_rotary(x, cos, sin, found)
            found = x.clone()
            rotate_(found, cos[:1], sin[:1])
            assert_rotary(x, cos[:1], sin[:1], found)
            part = size[-1] // 4 * 2
            for neighbours in (False, True):
                found, angles = x.clone(), (cos[..., :part], sin[..., :part])
                rotate_(found[..., :part], *angles, neighbours)
                assert_rotary(x[..., :part], *angles, found[..., :part], neighbours)
                assert torch.equal(found[..., part:], x[..., part:])
        for rows, channels in NORM_SHAPES:
            gate, up = (t.cuda() for t in swiglu_case(rows, channels, dtype))
            found = gate.clone()
            swiglu_(found, up)
            assert_swiglu(gate, up, found)
            for activation in ("silu", "gelu_tanh"):
                halves = torch.cat([gate, up], dim=-1).chunk(2, dim=-1)
                swiglu_(*halves, activation)
                assert_swiglu(gate, up, halves[0], activation)
                assert torch.equal(halves[1], up)
            found = gate.clone().T
            swiglu_(found, up.T)
            assert_swiglu(gate.T, up.T, found)
