"""How fast pruned models run under transformers: prefill and decode of a published shape, dense and in each layout.

    python benchmarks/inference.py llama-2-7b --output benchmarks/results/inference-llama-2-7b-X.json
    python benchmarks/inference.py llama-2-7b --modes compile --layouts uniform-rounded nonuniform-rounded \\
        --ratios 0.5 --batches 1

Models have random weights, made on the device, and the classes that pyprune writes: stock ones where all layers are
alike, else its own with `per_layer_config`. Uniform: as `--uniform` chooses; non-uniform: shares of 0.3 to 1.0 by
layer, drawn, as many parameters (benchmarks/inference_layouts.py); rounded: FFN channels in multiples. All use sdpa and
transformers' StaticCache. Modes:

graph    RMSNorm, rotary embedding and SwiGLU in pyprune's kernels (pyprune/forward/fused.py), the prompt's forward and
         the step of decoding each captured as a CUDA graph; nothing is compiled.
compile  the step by torch.compile(mode="reduce-overhead", fullgraph=True), which takes up to minutes a row; the
         prompt's forward as it is, as in transformers' `generate`.
eager    transformers' forward as it is.

Prefill is the forward of the prompt into an empty cache, with the logits of its last token. Decoding is greedy from
`--context` tokens on. Seconds are medians of repetitions between synchronisations. Before a row is timed, its step's
logits are held against the forward without a cache. Floors: for prefill 2 x parameters of the decoder linears x tokens
(no attention scores) over the rate of a matrix product of the dense FFN; for decoding the bytes of the weights, without
the embeddings, and of the keys and values so far over the rate of a copy, which counts the bytes that it reads and
writes.
"""

import argparse
import functools
import gc
import inspect
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from common import prepare_device, run_table
from inference_layouts import LAYOUTS, layouts
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, StaticCache
from transformers.utils import logging

from pyprune.architectures import Family, LayerShape, family_of
from pyprune.benchmark.machine import describe_machine, installed_version
from pyprune.errors import InputError
from pyprune.forward.fused import fuse, fused_rotary
from pyprune.modeling import pruned_config
from pyprune.testing.random_checkpoint import SHAPES, checkpoint_config

MODES = ("eager", "compile", "graph")  # in this order on one model: fused modules stay
DENSE = "dense"
WARM_UP = 4  # calls before the first that counts: compiling, possibly once more, recording a graph, replaying it
# How far a step's logits may be from the forward without a cache, in multiples of the distance that another attention
# kernel makes there: deep random layers amplify a rounding (bfloat16, 32 layers of 4096: 5 % of the norm), so no fixed
# figure holds for all shapes. What rounding hides here, tests/benchmark/test_inference_benchmark.py holds to float32.
NOISE_MULTIPLE = 3.0
LEAST_NOISE = 1e-4


def build(config: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """A model of random weights on the device."""
    with device:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.eval()


@functools.cache
def cache_argument(model_class: type) -> str:
    """What a model's forward calls the cache: transformers renamed past_key_values, and warns of the old name."""
    return "cache" if "cache" in inspect.signature(model_class.forward).parameters else "past_key_values"


def forward(model: Any, ids: Tensor, cache: StaticCache | None, call: Callable[..., Any] | None = None) -> Tensor:
    """Logits [batch, vocabulary] after the last of `ids` [batch, tokens], by `call` or the model's forward."""
    named: dict[str, Any] = {"use_cache": False} if cache is None else {cache_argument(type(model)): cache}
    return (call or model)(ids, logits_to_keep=1, **named).logits[:, -1]


def rewind(cache: StaticCache, tokens: int) -> None:
    """Have the cache hold its first `tokens` tokens only."""
    for layer in cache.layers:
        layer.cumulative_length.fill_(tokens)


class Decoder:
    """Greedy decoding of one token at a time behind `prompt` [batch, tokens], up to `steps` times."""

    def __init__(self, model: Any, mode: str, prompt: Tensor, first: Tensor, steps: int) -> None:
        """`first`: the token that the first step reads, [batch, 1]."""
        self.model, self.context, self.first = model, prompt.shape[1], first
        self.cache = StaticCache(config=model.config, max_cache_len=self.context + max(steps, WARM_UP))
        forward(model, prompt, self.cache)  # allocates the cache, each layer by its own KV heads
        self.tokens = first.clone()
        self.call: Callable[..., Any] | None = None
        if mode == "compile":
            self.call = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
        self.step: Callable[[], None] = self._step
        start = time.perf_counter()
        if mode == "graph":
            self.step = captured(self._step)
        elif mode == "compile":
            for _ in range(WARM_UP):
                self.step()
        synchronize(first.device)
        self.prepare_seconds = time.perf_counter() - start

    def start(self) -> None:
        """Back to the prompt's end."""
        rewind(self.cache, self.context)
        self.tokens.copy_(self.first)

    def _step(self) -> None:
        if self.call is not None:
            torch.compiler.cudagraph_mark_step_begin()
        self.logits = forward(self.model, self.tokens, self.cache, self.call)
        self.tokens.copy_(self.logits.argmax(-1, keepdim=True))


def captured(call: Callable[[], None]) -> Callable[[], None]:
    """The replay of a call as a CUDA graph: it reads and writes the tensors that the call did."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):  # libraries and kernels allocate and load what they need
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(call: Callable[[], object], device: torch.device, repeat: int, before: Callable[[], object]) -> float:
    """Median seconds of a call; `before` runs ahead of each, outside the time."""
    times = []
    for _ in range(repeat):
        before()
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def random_ids(model: Any, batch: int, tokens: int, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)
    return torch.randint(0, model.config.vocab_size, (batch, tokens), generator=generator, device=device)


class Prefill:
    """The forward of a prompt [batch, tokens] into an empty cache; `logits` of its last token."""

    def __init__(self, model: Any, mode: str, ids: Tensor) -> None:
        self.model, self.ids = model, ids
        self.cache = StaticCache(config=model.config, max_cache_len=ids.shape[1])
        self._forward()  # allocates the cache
        self.run: Callable[[], None] = captured(self._forward) if mode == "graph" else self._forward

    def _forward(self) -> None:
        rewind(self.cache, 0)
        self.logits = forward(self.model, self.ids, self.cache)


def prefill_seconds(model: Any, mode: str, batch: int, arguments: argparse.Namespace, device: torch.device) -> float:
    prefill = Prefill(model, mode, random_ids(model, batch, arguments.prompt, device))
    return seconds_of(prefill.run, device, arguments.repeat, lambda: None)


def distance_of(logits: Tensor, expected: Tensor) -> float:
    """Relative to the norm of the expected ones."""
    return float(torch.linalg.vector_norm(logits.float() - expected) / torch.linalg.vector_norm(expected))


def expected_logits(model: Any, ids: Tensor) -> tuple[Tensor, float]:
    """Float32 logits [batch, vocabulary] without a cache, and how far another attention kernel's are from them."""
    expected = forward(model, ids, None).float()
    with sdpa_kernel(SDPBackend.MATH):
        return expected, distance_of(forward(model, ids, None), expected)


def decode(
    model: Any,
    mode: str,
    ids: Tensor,
    expected: tuple[Tensor, float],
    arguments: argparse.Namespace,
    device: torch.device,
) -> dict[str, float]:
    """Seconds of a step, of its preparation, and the distance of its logits from the `expected` ones.

    ids: [batch, context + 1]. expected: as of `expected_logits`. AssertionError: the distance is more than rounding.
    """
    decoder = Decoder(model, mode, ids[:, :-1], ids[:, -1:], arguments.steps)
    decoder.start()
    decoder.step()
    distance, limit = distance_of(decoder.logits, expected[0]), NOISE_MULTIPLE * max(expected[1], LEAST_NOISE)
    assert distance <= limit, (
        f"{mode}: logits with the static cache are {distance:.2g} off the others, over {limit:.2g}"
    )

    def run() -> None:
        for _ in range(arguments.steps):
            decoder.step()

    total = seconds_of(run, device, arguments.repeat, decoder.start)
    return {
        "decode_seconds_a_step": total / arguments.steps,
        "prepare_seconds": decoder.prepare_seconds,
        "logits_distance": distance,
        "logits_noise": expected[1],
    }


def timed(model: Any, family: Family, arguments: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """Figures of one model in every mode and batch; whoever asks for the next one is through with the last."""
    ids = {batch: random_ids(model, batch, arguments.context + 1, device) for batch in arguments.batches}
    expected = {batch: expected_logits(model, own) for batch, own in ids.items()}  # before modules are fused
    for mode in (mode for mode in MODES if mode in arguments.modes):
        if mode == "graph":
            for block in model.model.layers:
                fuse(block, family, model.config.hidden_act)
        for batch in arguments.batches:
            with fused_rotary(family) if mode == "graph" else nullcontext():
                seconds = prefill_seconds(model, mode, batch, arguments, device)
                release(device)
                step = decode(model, mode, ids[batch], expected[batch], arguments, device)
            yield (
                {"mode": mode, "batch": batch, "prefill_seconds": seconds}
                | step
                | {
                    "prefill_tokens_per_second": batch * arguments.prompt / seconds,
                    "decode_tokens_per_second": batch / step["decode_seconds_a_step"],
                }
            )
            torch._dynamo.reset()  # compiled code keeps the model and its graphs' memory
            release(device)


def measure_model(
    layout: str,
    ratio: float,
    shapes: list[LayerShape],
    config: Any,
    rates: dict[str, Any],
    arguments: argparse.Namespace,
    device: torch.device,
) -> list[dict[str, Any]]:
    """The rows of one model: every mode and batch."""
    start = time.perf_counter()
    model = build(config, device, DTYPES[arguments.dtype])
    synchronize(device)
    about = {
        "layout": layout,
        "ratio": ratio,
        "class": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "decoder_parameters": sum(shape.parameters for shape in shapes),
        "sizes": sorted({(shape.kv_groups, shape.intermediate_channels) for shape in shapes}),
        "build_seconds": time.perf_counter() - start,
    }
    rows = []
    for figures in timed(model, family_of(config.model_type), arguments, device):
        floors = floor_seconds(model, about["decoder_parameters"], shapes, figures["batch"], rates, arguments)
        row = about | figures | floors
        row |= {
            "prefill_share_of_floor": floors["prefill_floor_seconds"] / row["prefill_seconds"],
            "decode_share_of_floor": floors["decode_floor_seconds"] / row["decode_seconds_a_step"],
        }
        print(line(row), file=sys.stderr)
        rows.append(row)
    return rows


def release(device: torch.device) -> None:
    """Give the memory of what is no longer used back."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measured_rates(hidden: int, channels: int, arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Bytes per second of a copy; FLOP/s of [tokens, hidden] x [hidden, channels], by the batch that has the tokens."""
    dtype = DTYPES[arguments.dtype]
    source = torch.ones(2**30 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    rates: dict[str, Any] = {"product": {}}
    calls = {"copy": (lambda: target.copy_(source), 2 * source.nbytes)}
    weight = torch.randn(channels, hidden, dtype=dtype, device=device)
    for batch in arguments.batches:
        tokens = batch * arguments.prompt
        x = torch.randn(tokens, hidden, dtype=dtype, device=device)
        calls[str(batch)] = (lambda x=x: torch.nn.functional.linear(x, weight), 2 * tokens * hidden * channels)
    for name, (call, work) in calls.items():
        for _ in range(WARM_UP):
            call()
        rate = work / seconds_of(call, device, 10, lambda: None)
        if name == "copy":
            rates["copy"] = rate
        else:
            rates["product"][name] = rate
    return rates


def floor_seconds(
    model: Any,
    decoder_parameters: int,
    shapes: list[LayerShape],
    batch: int,
    rates: dict[str, Any],
    arguments: argparse.Namespace,
) -> dict[str, float]:
    """Seconds that prefill and a step of decoding cannot be faster than."""
    embeddings = 0 if model.config.tie_word_embeddings else model.get_input_embeddings().weight.nbytes
    weights = sum(parameter.nbytes for parameter in model.parameters()) - embeddings
    width = sum(2 * shape.kv_groups * shape.head_dim for shape in shapes) * model.dtype.itemsize  # bytes a token
    mean_context = arguments.context + (arguments.steps + 1) / 2
    return {
        "prefill_floor_seconds": 2 * decoder_parameters * batch * arguments.prompt / rates["product"][str(batch)],
        "decode_floor_seconds": (weights + batch * mean_context * width) / rates["copy"],
    }


def compare(rows: list[dict[str, Any]]) -> None:
    """Put into each row its tokens per second over the dense row's, and the uniform row's, of the mode and batch."""
    by_key = {(row["mode"], row["batch"], row["layout"], row["ratio"]): row for row in rows}
    for row in rows:
        others = {"dense": (DENSE, 0.0)}
        if row["layout"].startswith("nonuniform"):
            others["uniform"] = (row["layout"].removeprefix("non"), row["ratio"])
        for name, other in others.items():
            base = by_key.get((row["mode"], row["batch"], *other))
            if base is not None:
                for phase in ("prefill", "decode"):
                    figure = f"{phase}_tokens_per_second"
                    row[f"{phase}_against_{name}"] = row[figure] / base[figure]


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """All rows, measured. InputError: sizes that are impossible, a mode that the device has not."""
    device = prepare_device(arguments)
    if "graph" in arguments.modes and device.type != "cuda":
        raise InputError("--modes graph needs a GPU: a CPU has eager and compile")
    sizes = SHAPES[arguments.shape]
    config = checkpoint_config(**sizes)
    family: Family = family_of(config.model_type)
    dense = family.shapes(config)
    wanted = [(DENSE, 0.0, dense, config)]
    for ratio in arguments.ratios:
        of_ratio = layouts(dense, ratio, arguments.multiple, arguments.seed)
        for name in (name for name in LAYOUTS if name in arguments.layouts):
            shapes = of_ratio[name]
            wanted.append((name, ratio, shapes, pruned_config(family, config, shapes, False, False)))
    start = time.perf_counter()
    with torch.no_grad():
        rates = measured_rates(config.hidden_size, config.intermediate_size, arguments, device)
        rows: list[dict[str, Any]] = []
        for name, ratio, shapes, own in wanted:
            release(device)
            rows += measure_model(name, ratio, shapes, own, rates, arguments, device)
    compare(rows)
    return {
        "machine": describe_machine(device) | {"transformers": installed_version("transformers")},
        "shape": arguments.shape,
        "sizes": sizes,
        **{
            name: getattr(arguments, name)
            for name in ("dtype", "prompt", "context", "steps", "repeat", "multiple", "seed")
        },
        "attention": "sdpa",
        "copy_bytes_per_second": rates["copy"],
        "product_flops_per_second": rates["product"],
        "seconds": time.perf_counter() - start,
        "rows": rows,
    }


def line(row: dict[str, Any]) -> str:
    """One row of the table; ratios where they are known."""
    cells = [f"{row['layout']:18} {row['ratio']:.2f} {row['mode']:7} {row['batch']:5} {row['parameters'] / 1e9:8.3f}"]
    for phase in ("prefill", "decode"):
        cells += [f"{row[f'{phase}_tokens_per_second']:9.1f}", f"{row[f'{phase}_share_of_floor']:5.0%}"]
        for other in ("dense", "uniform"):
            ratio = row.get(f"{phase}_against_{other}", math.nan)
            cells.append("     –" if math.isnan(ratio) else f"{ratio:6.2f}")
    return " ".join([*cells, f"{row['prepare_seconds']:6.1f}"])


HEAD = (
    "layout             ratio mode   batch  G param   prefill  floor /dense /unif    decode  floor /dense /unif prep, s"
)
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES, metavar="SHAPE", help=", ".join(SHAPES))
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=LAYOUTS, help="beside the dense model")
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.2, 0.5])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--modes", nargs="+", choices=MODES, help="default: graph on a GPU, else eager")
    parser.add_argument("--prompt", type=int, default=2048, help="tokens of the prefill")
    parser.add_argument("--context", type=int, default=128, help="tokens in the cache when decoding begins")
    parser.add_argument("--steps", type=int, default=128, help="tokens decoded")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--multiple", type=int, default=128, help="of FFN channels, in the rounded layouts")
    parser.add_argument("--seed", type=int, default=0, help="of the non-uniform sizes")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2, help="threads on a CPU")
    parser.add_argument("--output", type=Path, help="write the figures and the machine as JSON")
    return parser


def main() -> None:
    parser = argument_parser()
    arguments = parser.parse_args()
    arguments.modes = arguments.modes or (["graph"] if arguments.device.startswith("cuda") else ["eager"])
    logging.set_verbosity_error()  # reads of global sizes where layers differ
    run_table(parser, arguments, run, HEAD, line)


if __name__ == "__main__":
    main()
