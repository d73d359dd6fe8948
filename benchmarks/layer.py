"""One whole decoder layer pruned by `obs`, stage by stage, beside the same layer in the way of SlimGPT's authors.

    python benchmarks/layer.py [--device cuda] [--shapes llama-2-7b llama-2-13b] [--ratio 0.2] [--output FILE.json]

Random weights and hidden states, 128 x 2048 tokens. Ours: the two halves of the layer, each with the fit of what reads
the stream, dense and pruned stream, Hessian and stream error, inverse, exact choice, refit, and the second forward.
Theirs, in plain PyTorch: a float32 product for each window (their running H), a Cholesky inverse of all that is left
before every choice, heads one by one and channels in dynamic groups, and the second forward. Stages are timed with
the device idle before and after each.
"""

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyprune.architectures import ATTENTION, FFN, SUBLAYERS, expand
from pyprune.benchmark.machine import describe_machine
from pyprune.calibration.second_moments import HessianObserver, alignment_of
from pyprune.checkpoint import CheckpointReader
from pyprune.forward.layer_forward import LayerForward
from pyprune.methods.obs import Obs
from pyprune.methods.slimgpt import dynamic_groups
from pyprune.ops import add_split_product, damped_inverse, eliminate, lower_gram, refit
from pyprune.passes.base import ROUND_CHANNELS
from pyprune.passes.rewrite import pad_channels, rewrite_layer
from pyprune.testing.random_checkpoint import SHAPES, make_checkpoint

STAGES = ("inputs", "forward", "hessian", "inverse", "choice", "refit", "second forward")


class Stages:
    """Seconds by stage."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = dict.fromkeys(STAGES, 0.0)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        self.wait()
        start = time.perf_counter()
        yield
        self.wait()
        self.seconds[stage] += time.perf_counter() - start


class Layer:
    """A layer of a model's shape with random weights, hidden states of many windows, and its forward."""

    def __init__(self, shape: str, samples: int, length: int, device: torch.device, folder: Path) -> None:
        sizes = SHAPES[shape] | {"layers": 1, "vocab_size": 256}
        self.reader = CheckpointReader(make_checkpoint(folder / shape, **sizes))
        windows = torch.randint(0, 256, (samples, length), generator=torch.Generator().manual_seed(0))
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.forward = LayerForward(self.reader, windows, device, dtype)
        self.shape = self.reader.shapes[0]
        size = (samples, length, self.shape.hidden_size)
        generator = torch.Generator(device).manual_seed(0)
        self.hidden = torch.randn(size, generator=generator, device=device, dtype=dtype)

    def build(self, kept: dict[str, Tensor] | None = None, weight: dict[str, Tensor] | None = None) -> nn.Module:
        tensors = self.reader.read_layer(0)
        if kept is None:
            return self.forward.build(list(tensors.items()), 0)
        pruned = rewrite_layer(self.reader.family, tensors, self.shape, kept, {}, weight)
        config = copy.copy(self.reader.config.per_layer_config[0])
        config.num_attention_heads = len(kept[ATTENTION]) * self.shape.heads_per_group
        config.num_key_value_heads = len(kept[ATTENTION])
        config.intermediate_size = len(kept[FFN])
        if len(kept[FFN]) < self.shape.intermediate_channels:  # as pyprune does
            config.intermediate_size = -(-len(kept[FFN]) // ROUND_CHANNELS) * ROUND_CHANNELS
        pruned = pad_channels(self.reader.family, pruned, config.intermediate_size)
        return self.forward.build(list(pruned.items()), 0, config)

    def parts(self, hidden: Tensor) -> tuple[Tensor, ...]:
        return hidden.split(self.forward.batch)

    def advance(self, block: nn.Module, module: str, hidden: Tensor) -> None:
        for part in self.parts(hidden):
            part.copy_(self.forward.run_sublayer(block, 0, module, part))

    def driver_weight(self, block: nn.Module, module: str) -> Tensor:
        return block.get_parameter(self.reader.family.output_proj(module) + ".weight").data.float()

    def count(self, module: str, ratio: float) -> int:
        return round(ratio * self.shape.units(module))


@torch.no_grad()
def ours(layer: Layer, ratio: float, stages: Stages) -> None:
    method = Obs()
    pruned, dense = layer.hidden.clone(), layer.hidden.clone()
    kept = {module: torch.arange(layer.shape.units(module)) for module in SUBLAYERS}
    weights: dict[str, Tensor] = {}
    original = block = layer.build()
    for module in SUBLAYERS:
        with stages.time("inputs"):
            align(layer, original, module, dense, pruned, method)
        observer = HessianObserver(
            layer.driver_weight(block, module).shape[1], pruned.device, "layer", method.centred, False
        )
        inputs: list[Tensor] = []
        for dense_part, part in zip(layer.parts(dense), layer.parts(pruned), strict=True):
            with stages.time("forward"):
                goal = layer.forward.run_sublayer(original, 0, module, dense_part)
                dense_part.copy_(goal)
                with layer.forward.observed(block, {layer.forward.family.output_proj(module): inputs.append}):
                    result = layer.forward.run_sublayer(block, 0, module, part)
            with stages.time("hessian"):
                observer.observe_stream_error(observer.observe(inputs.pop()), goal - result)
        width, count = layer.shape.unit_width(module), layer.count(module, ratio)
        with stages.time("hessian"):
            second_moments = observer.result()
        with stages.time("inverse"):
            inverse = damped_inverse(second_moments.hessian, method.damping).inverse
        with stages.time("refit"):
            target = layer.driver_weight(block, module)
            add_split_product(target, second_moments.cross, inverse, method.effective_target_share)
        with stages.time("choice"):
            elimination = eliminate(inverse, lower_gram(target), count, width)
        with stages.time("refit"):
            weights[module] = refit(target, elimination)
        mask = torch.ones(layer.shape.units(module), dtype=torch.bool)
        mask[elimination.order.cpu()] = False
        kept[module] = mask.nonzero().flatten()
        del inverse, elimination, target, second_moments, observer
        block = layer.build(kept, weights)
        with stages.time("second forward"):
            layer.advance(block, module, pruned)


def align(layer: Layer, original: nn.Module, module: str, dense: Tensor, pruned: Tensor, method: Obs) -> None:
    """The work of fitting the matrices that read the stream to its change; the layer goes on with its own."""
    norm = original.get_submodule(layer.reader.family.norm(module))
    observer = HessianObserver(layer.shape.hidden_size, pruned.device, "layer", False, False)
    for dense_part, part in zip(layer.parts(dense), layer.parts(pruned), strict=True):
        x = norm(part)
        observer.observe_stream_error(observer.observe(x), norm(dense_part).float() - x.float())
    change = alignment_of(observer.result(), method.damping, "layer")
    for matrix in layer.reader.family.input_projs(module):
        weight = original.get_parameter(matrix + ".weight").float()
        weight.addmm(weight, change, alpha=method.effective_input_share).to(pruned.dtype)


@torch.no_grad()
def authors(layer: Layer, ratio: float, stages: Stages) -> None:
    """SlimGPT (arXiv 2412.18110, algorithm 1) in plain PyTorch, its Hessian as SparseGPT's code has it."""
    hidden = layer.hidden.clone()
    kept = {module: torch.arange(layer.shape.units(module)) for module in SUBLAYERS}
    weights: dict[str, Tensor] = {}
    block = layer.build()
    for module in SUBLAYERS:
        weight = layer.driver_weight(block, module)
        hessian = torch.zeros(weight.shape[1], weight.shape[1], device=weight.device)
        inputs: list[Tensor] = []
        windows = 0
        for part in layer.parts(hidden):
            with (
                stages.time("forward"),
                layer.forward.observed(block, {layer.forward.family.output_proj(module): inputs.append}),
            ):
                layer.forward.run_sublayer(block, 0, module, part)
            with stages.time("hessian"):
                for x in inputs.pop():  # a window at a time
                    hessian *= windows / (windows + 1)
                    windows += 1
                    scaled = (2 / windows) ** 0.5 * x.float().t()
                    hessian += scaled.matmul(scaled.t())
        width, count = layer.shape.unit_width(module), layer.count(module, ratio)
        left = remove_as_published(hessian, weight, count, width, stages)
        weights[module] = weight[:, left]
        kept[module] = (left[::width] // width).cpu()
        block = layer.build(kept, weights)
        with stages.time("second forward"):
            layer.advance(block, module, hidden)


def remove_as_published(hessian: Tensor, weight: Tensor, count: int, width: int, stages: Stages) -> Tensor:
    """Columns that stay; `weight` is compensated in place. The inverse of what is left is made anew at each step."""
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    left = torch.arange(weight.shape[1], device=weight.device)
    for size in dynamic_groups(count) if width == 1 else [1] * count:
        with stages.time("inverse"):
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian[left][:, left]))
        with stages.time("choice"):
            own = weight[:, left]
            if width == 1:
                errors = own.square().sum(0) / inverse.diagonal()
            else:
                blocks = inverse.unflatten(1, (-1, width)).unflatten(0, (-1, width)).diagonal(dim1=0, dim2=2)
                pivots = torch.linalg.cholesky(blocks.movedim(-1, 0)).diagonal(dim1=1, dim2=2).flatten() ** 2
                errors = (own.square().sum(0) / pivots).reshape(-1, width).sum(1)
            chosen = torch.sort(errors, stable=True).indices[:size]
            columns = expand(chosen.cpu(), width).to(weight.device)
        with stages.time("refit"):
            block = inverse[columns][:, columns]
            weight[:, left] = own - torch.linalg.solve(block, own[:, columns], left=False) @ inverse[columns]
            stays = torch.ones(len(left), dtype=torch.bool, device=left.device)
            stays[columns] = False
            left = left[stays]
    return left


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shapes", nargs="+", default=["llama-2-7b", "llama-2-13b"], choices=list(SHAPES))
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for shape in arguments.shapes:
            layer = Layer(shape, arguments.samples, arguments.sequence_length, device, Path(scratch))
            warm = Layer(shape, 8, arguments.sequence_length, device, Path(scratch) / "warm")
            row: dict[str, Any] = {"shape": shape, "ratio": arguments.ratio}
            for name, way in (("ours", ours), ("authors", authors)):
                way(warm, arguments.ratio / 4, Stages(device))  # kernels are loaded, memory is there
                stages = Stages(device)
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                way(layer, arguments.ratio, stages)
                row[name] = {"seconds": stages.seconds, "total": sum(stages.seconds.values())}
                if device.type == "cuda":
                    row[name]["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
            row["speedup"] = row["authors"]["total"] / row["ours"]["total"]
            rows.append(row)
            print(f"{shape}, ratio {arguments.ratio:g}, {arguments.samples} x {arguments.sequence_length} tokens")
            for stage in STAGES:
                pair = [row[name]["seconds"][stage] for name in ("ours", "authors")]
                print(f"  {stage:16} {pair[0]:8.3f} s   authors' way {pair[1]:8.3f} s")
            print(
                f"  {'total':16} {row['ours']['total']:8.3f} s   authors' way {row['authors']['total']:8.3f} s", end=""
            )
            print(f"   {row['speedup']:.1f} x", flush=True)
            del layer, warm
    if arguments.output:
        document = {"machine": describe_machine(device), "rows": rows}
        arguments.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
