"""What holds of an accelerated tool, checked in its own Python: `python integration_checks.py llm-compressor`.

tests/integrations/test_integrations_patching.py runs the same on small packages that have the tools' patch points.
Only pyprune, PyTorch and the tool are imported. Prints one line of JSON: largest error of ours as a multiple of the
tool's own, both against float64.
"""

import inspect
import json
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from pyprune.integrations import accelerate, gptqmodel, llm_compressor
from pyprune.integrations.patching import Calls, fingerprint, source_name

# In units of the largest error of a correctly rounded result, below which a ratio of errors says nothing.
EPSILON = torch.finfo(torch.float32).eps


class LeavesTheBlock(Exception):
    pass


def inputs(channels: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """Batches as layers read them: [2, 40, C], rows [30, C], [1, 4C, C]; correlated, with scales of half a decade."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(channels) + torch.randn(channels, channels, generator=generator) / (2 * channels**0.5)
    mix *= 10 ** (0.5 * torch.rand(channels, generator=generator))
    shapes = ((2, 40, channels), (30, channels), (1, 4 * channels, channels))
    return [(torch.randn(shape, generator=generator) @ mix).to(dtype) for shape in shapes]


def gram(batches: list[Tensor]) -> Tensor:
    rows = torch.cat([x.reshape(-1, x.shape[-1]).double() for x in batches])
    return rows.T @ rows


def relative(value: Tensor, exact: Tensor) -> float:
    return ((value.double() - exact).norm() / exact.norm()).item()


def ratio(ours: Tensor, theirs: Tensor, exact: Tensor) -> float:
    """Our error over theirs, at most 2 unless ours is that of rounding the exact result."""
    own = relative(ours, exact)
    factor = own / max(relative(theirs, exact), EPSILON / 2)
    assert own <= EPSILON or factor <= 2, (own, relative(theirs, exact))
    return factor


def exact_factor(h: Tensor) -> Tensor:
    return torch.linalg.cholesky(torch.linalg.inv(h.double()), upper=True)


def linear(channels: int, outputs: int = 6) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(channels, outputs, bias=False)


def leave_by_exception(tool: str, run: Callable[[], None]) -> Calls:
    """Run in the block and leave it by an exception."""
    calls = None
    try:
        with accelerate(tool) as calls:
            run()
            raise LeavesTheBlock
    except LeavesTheBlock:
        pass
    assert calls is not None
    return calls


def llm_compressor_seams() -> dict[str, Any]:
    gptq = import_module("llmcompressor.modifiers.gptq.base")
    quantize = import_module("llmcompressor.modifiers.gptq.gptq_quantize")
    sparsegpt = import_module("llmcompressor.modifiers.pruning.sparsegpt.base")
    sparsify = import_module("llmcompressor.modifiers.pruning.sparsegpt.sgpt_sparsify")
    found = {f"gptq.{name}": getattr(gptq, name) for name in ("make_empty_hessian", "accumulate_hessian")}
    found |= {"gptq.prepare_batch": gptq.prepare_batch, "gptq.factorize_hessian": quantize.factorize_hessian}
    names = ("make_empty_hessian", "accumulate_hessian", "sparsify_weight")
    found |= {f"sparsegpt.{name}": getattr(sparsegpt, name) for name in names}
    found["onload"] = vars(sparsegpt.SparseGPTModifier)["_maybe_onload_hessian"]
    found |= {"torch": sparsify.torch, "sparsify": sparsify.sparsify_weight}
    return found


def gptq_hessian(module: nn.Linear, batches: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(H [1, C, C] as quantize_weight gets it, N) by the functions that stand at the patch points now."""
    seams = llm_compressor_seams()
    hessian, count = seams["gptq.make_empty_hessian"](module, device=torch.device("cpu")), torch.zeros(())
    for x in batches:
        hessian, count = seams["gptq.accumulate_hessian"](x, module, hessian, count)
    samples = count.clone()
    scales = {"scale": torch.ones(6, 1), "zero_point": torch.zeros(6, 1), "global_scale": None}
    hessians, counts = {module: hessian}, {module: count}
    _, stacked, *_ = seams["gptq.prepare_batch"]([module], [scales], hessians, counts)
    assert not hessians, "the tool consumes them"
    assert not counts
    return stacked, samples


def gptq_in_llm_compressor(channels: int, dtype: torch.dtype) -> dict[str, float]:
    module, batches = linear(channels), inputs(channels, dtype)
    theirs, their_count = gptq_hessian(module, batches)
    with accelerate("llm-compressor") as calls:
        ours, count = gptq_hessian(module, batches)
    assert calls.hessian_updates == len(batches)
    assert count == their_count == 4
    assert torch.equal(ours[0], ours[0].T)
    result = {"hessian": ratio(ours[0], theirs[0], gram(batches) * 2 / 4)}

    # One with a dead column, one that is not positive definite, one as it is.
    dead = theirs[0].clone()
    dead[3], dead[:, 3] = 0, 0
    hessians = torch.stack([dead, -theirs[0], theirs[0]])
    found = []
    for block in (False, True):
        weights, failed = torch.ones(3, 6, channels), torch.zeros(3, dtype=torch.bool)
        arguments = (weights, hessians.clone(), 0.01, failed)
        if block:
            with accelerate("llm-compressor") as calls:
                factors = llm_compressor_seams()["gptq.factorize_hessian"](*arguments)
            assert calls.inverse_factors == 3
        else:
            factors = llm_compressor_seams()["gptq.factorize_hessian"](*arguments)
        found.append((factors, weights, failed))
    (their_factors, their_weights, their_failed), (factors, weights, failed) = found
    assert torch.equal(failed, their_failed)
    assert failed.tolist() == [False, True, False]
    assert torch.equal(weights, their_weights)
    assert torch.equal(factors[1], torch.eye(channels))
    assert torch.equal(factors, factors.triu())
    dead[3, 3] = 1
    for name, index, h in (("factor, dead", 0, dead), ("factor", 2, theirs[0])):
        damped = h.double() + 0.01 * h.diagonal().double().mean() * torch.eye(channels, dtype=torch.float64)
        result[name] = ratio(factors[index], their_factors[index], exact_factor(damped))
    return result


def sparsegpt_in_llm_compressor(channels: int, dtype: torch.dtype) -> dict[str, float]:
    module, batches = linear(channels), inputs(channels, dtype)

    def accumulate() -> tuple[Tensor, int]:
        seams = llm_compressor_seams()
        hessian, count = seams["sparsegpt.make_empty_hessian"](module, device=torch.device("cpu")), 0
        for x in batches:
            hessian, count = seams["sparsegpt.accumulate_hessian"](x, module, hessian, count)
        return hessian, count

    def sparsify(hessian: Tensor) -> tuple[float, Tensor]:
        hessians = {module: hessian}
        loss, weight = llm_compressor_seams()["sparsegpt.sparsify_weight"](
            module=module,
            hessians_dict=hessians,
            sparsity=0.5,
            prune_n=2,
            prune_m=4,
            block_size=32,
            dampening_frac=0.01,
            preserve_sparsity_mask=False,
        )
        assert not hessians, "the tool consumes it"
        return loss, weight

    their_hessian, their_count = accumulate()
    indefinite = -their_hessian
    their_loss, their_weight = sparsify(their_hessian.clone())
    their_fallback = sparsify(indefinite.clone())
    with accelerate("llm-compressor") as calls:
        hessian, count = accumulate()
        loss, weight = sparsify(hessian)
        assert (calls.hessian_updates, calls.inverse_factors) == (len(batches), 1)
        fallback = sparsify(indefinite)
    assert count == their_count == 4
    # Complete by now, in place, and damped.
    exact = gram(batches) * 2 / 4
    result = {"hessian": ratio(hessian.triu(1), their_hessian.triu(1), exact.triu(1))}
    # Sums of a few hundred products, a condition number near 1e3: the same to a thousandth, with the same mask.
    assert abs(loss / their_loss - 1) < 1e-3, (loss, their_loss)
    assert torch.equal(weight == 0, their_weight == 0)
    assert relative(weight, their_weight.double()) < 1e-3
    # Its own fallback to the identity, by its own exception.
    assert fallback[0] == their_fallback[0]
    assert torch.equal(fallback[1], their_fallback[1])
    return result


class Offloading:
    """The part of SparseGPTModifier that keeps Hessians: on another device between the calls, hence as copies."""

    offload_hessians = True

    def __init__(self) -> None:
        self._hessians: dict[nn.Module, Tensor] = {}


def hessians_between_calls(channels: int) -> dict[str, float]:
    """With offloading, across the edge of the block and after an exception H is what the tool expects."""
    module, batches = linear(channels), inputs(channels, torch.bfloat16)
    originals = llm_compressor_seams()
    exact = gram(batches) * 2 / 4

    offloading, count = Offloading(), 0
    offloading._hessians[module] = originals["sparsegpt.make_empty_hessian"](module)
    open_hessian: dict[str, Tensor] = {}

    def first_two() -> None:
        nonlocal count
        seams = llm_compressor_seams()
        assert all(seams[name] is not originals[name] for name in originals if name not in ("torch", "sparsify"))
        assert seams["torch"] is torch
        assert seams["sparsify"] is originals["sparsify"]
        offloading._hessians[module] = seams["sparsegpt.make_empty_hessian"](module)
        for x in batches[:2]:
            with seams["onload"](offloading, module):
                hessian = offloading._hessians[module].clone()  # what a copy to the GPU is on a machine that has one
                hessian, count = seams["sparsegpt.accumulate_hessian"](x, module, hessian, count)
            offloading._hessians[module] = hessian.clone()
        for name, none in (("gptq", torch.zeros(())), ("sparsegpt", 0)):
            state = seams[f"{name}.make_empty_hessian"](module), none
            for x in batches[:2]:
                state = seams[f"{name}.accumulate_hessian"](x, module, *state)
            open_hessian[name] = state[0]

    leave_by_exception("llm-compressor", first_two)
    assert llm_compressor_seams() == originals
    so_far = gram(batches[:2])
    for hessian, scale in (
        (offloading._hessians[module], 2 / 3),
        (open_hessian["gptq"], 2),
        (open_hessian["sparsegpt"], 2 / 3),
    ):
        assert torch.equal(hessian, hessian.T)
        assert relative(hessian, scale * so_far) < 1e-6
    # And the other way round: begun outside, continued inside.
    with accelerate("llm-compressor"):
        accumulate = llm_compressor_seams()["sparsegpt.accumulate_hessian"]
        hessian, count = accumulate(batches[2], module, offloading._hessians[module], count)
        assert count == 4
        assert torch.equal(hessian, hessian.T)
    return {"hessian, across blocks": relative(hessian, exact) / EPSILON}


def gptqmodel_seams() -> dict[str, Any]:
    gptq = import_module("gptqmodel.quantization.gptq")
    names = ("add_batch", "materialize_global_hessian", "hessian_inverse", "process_batch")
    return {name: vars(gptq.GPTQ)[name] for name in names} | {"torch": gptq.torch}


def gptq_task(module: nn.Module) -> Any:
    gptq = import_module("gptqmodel.quantization.gptq")
    return gptq.GPTQ(module, gptq.QuantizeConfig(group_size=32, offload_to_disk=False))


def gptq_in_gptqmodel(channels: int, dtype: torch.dtype) -> dict[str, float]:
    batches = inputs(channels, dtype)

    def run() -> Any:
        task = gptq_task(linear(channels))
        for x in (*batches, batches[0][:0]):
            task.add_batch(x, None)
        task.materialize_global_hessian()
        return task

    theirs = run()
    with accelerate("gptqmodel") as calls:
        ours = run()
    assert calls.hessian_updates == len(batches)
    for name in ("nsamples", "fwd_counter", "_hessian_dirty", "_device_hessian_partials", "_device_sample_counts"):
        assert getattr(ours, name) == getattr(theirs, name), name
    tokens = sum(x.shape[:-1].numel() for x in batches)
    assert ours.nsamples == tokens
    assert torch.equal(ours.H, ours.H.T)
    result = {"hessian": ratio(ours.H, theirs.H, gram(batches) * 2 / tokens)}

    # As it is; of low rank with a negative eigenvalue, where damping has to be raised; and one that it floors, which
    # takes a hundred attempts.
    lifted = gram(batches[1:2]).float()
    lifted -= 0.1 * lifted.diagonal().mean() * torch.eye(channels)
    hessians = {"factor": theirs.H, "factor, raised damping": lifted, "factor, floored": torch.zeros_like(lifted)}
    for name in hessians if channels < 100 else ["factor"]:
        h = hessians[name]
        their_h, our_h = h.clone(), h.clone()
        their_factor, their_damping = theirs.hessian_inverse(their_h)
        with accelerate("gptqmodel") as calls:
            factor, damping = ours.hessian_inverse(our_h)
        assert calls.inverse_factors >= 1
        assert damping == their_damping
        assert torch.equal(our_h, their_h)
        damped = our_h.double() + damping * our_h.diagonal().double().mean() * torch.eye(channels).double()
        result[name] = ratio(factor, their_factor, exact_factor(damped))
    return result


def gptqmodel_between_calls(channels: int) -> dict[str, float]:
    """Partial sums that a block leaves behind, also by an exception and in inference mode, are the tool's own."""
    originals = gptqmodel_seams()
    batches = inputs(channels, torch.bfloat16)
    task, other = gptq_task(linear(channels)), gptq_task(nn.Conv2d(3, 4, 2))

    def first_two() -> None:
        seams = gptqmodel_seams()
        replaced = [name for name in originals if seams[name] is not originals[name]]
        assert replaced == ["add_batch", "materialize_global_hessian", "hessian_inverse"]
        with torch.inference_mode():
            for x in batches[:2]:
                task.add_batch(x, None)
            other.add_batch(torch.randn(2, 3, 5, 5), None)

    calls = leave_by_exception("gptqmodel", first_two)
    assert calls.hessian_updates == 2, "the convolution is the tool's"
    assert gptqmodel_seams() == originals
    (partial,) = task._device_hessian_partials.values()
    assert torch.equal(partial, partial.T)
    with torch.inference_mode():
        task.add_batch(batches[2], None)
        task.materialize_global_hessian()
    tokens = sum(x.shape[:-1].numel() for x in batches)
    error = relative(task.H, gram(batches) * 2 / tokens)
    assert error < 1e-6
    return {"hessian, across blocks": error / EPSILON}


# 40 channels are below every sweep; 1536 are swept, on a CPU as well.
CHECKS: dict[str, list[Callable[[], dict[str, float]]]] = {
    "llm-compressor": [
        lambda: gptq_in_llm_compressor(40, torch.bfloat16),
        lambda: gptq_in_llm_compressor(1536, torch.float32),
        lambda: sparsegpt_in_llm_compressor(64, torch.bfloat16),
        lambda: hessians_between_calls(40),
    ],
    "gptqmodel": [
        lambda: gptq_in_gptqmodel(64, torch.bfloat16),
        lambda: gptq_in_gptqmodel(1536, torch.float32),
        lambda: gptqmodel_between_calls(64),
    ],
}


@torch.no_grad()
def run_checks(tool: str) -> list[dict[str, float]]:
    return [check() for check in CHECKS[tool]]


def fingerprints(tool: str) -> dict[str, str]:
    """The patched functions of the installed tool as pyprune/integrations/known_sources.py lists them."""
    if tool == "gptqmodel":
        points = gptqmodel.patch_points()
    else:
        points = [point for some in llm_compressor.patch_points() for point in some]
    functions = [inspect.unwrap(vars(point.owner)[point.name]) for point in points]
    return {source_name(function): fingerprint(function) for function in functions}


if __name__ == "__main__":
    act = fingerprints if "--fingerprints" in sys.argv else run_checks
    print(json.dumps(act(sys.argv[1])))
