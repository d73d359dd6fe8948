"""Windows that a model writes itself, for when there is no text."""

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import BaseStreamer

from ..checkpoint import ModelInMemory
from ..checkpoint.load_model import load_model
from ..errors import InputError
from .windows import check_sizes


def sample_from_model(
    model_folder: str | Path | ModelInMemory,
    samples: int,
    sequence_length: int,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    progress: Callable[[int, int], None] | None = None,
    trust_remote_code: bool = False,
) -> torch.Tensor:
    """Windows that the model itself writes: int64 [samples, sequence_length] on the CPU.

    For when there is no text. Each window is BOS (the EOS where the model has no BOS) and then tokens drawn
    from the model at temperature 1; EOS is never drawn, so every window is full. The whole model is loaded,
    unlike in pruning itself. The same seed gives the same windows on the same kind of device with the same
    dtype and library versions; torch's global generators are left as they were. `progress` gets (tokens
    written, tokens in all). InputError: the model has neither BOS nor EOS.
    """
    check_sizes(samples, sequence_length)
    model = load_model(model_folder, device, dtype, trust_remote_code)
    eos = model.generation_config.eos_token_id
    ends = eos if isinstance(eos, list) else [] if eos is None else [eos]
    first = model.generation_config.bos_token_id
    if first is None:
        if not ends:
            raise InputError(f"{model_folder} names neither BOS nor EOS to start from: give a text")
        first = ends[0]
    # An own configuration, since generate() fills what a given one leaves open from the model's.
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_length=sequence_length,
        suppress_tokens=ends or None,
        pad_token_id=first,  # never written, since nothing ends early; named, so that no warning is printed
    )
    batch = _sampling_batch(model, first, sequence_length)
    windows: list[torch.Tensor] = []
    index = model.device.index or 0
    on_cuda = model.device.type == "cuda"
    generator = torch.cuda.default_generators[index] if on_cuda else torch.default_generator
    with torch.random.fork_rng(devices=[index] if on_cuda else []):
        generator.manual_seed(seed)
        for start in range(0, samples, batch):
            prompt = torch.full((min(batch, samples - start), 1), first, device=model.device)
            report = None
            if progress is not None:
                report = _ProgressStreamer(progress, start * sequence_length, samples * sequence_length)
            written = model.generate(prompt, attention_mask=torch.ones_like(prompt), streamer=report)
            windows.append(written.cpu())
    return torch.cat(windows)


def _sampling_batch(model: PreTrainedModel, first: int, sequence_length: int) -> int:
    """Number of windows to sample at once: as many as keep the KV cache below its share of the memory.

    The share, a quarter of a GPU or 4 GiB of main memory, does not depend on what is free at the moment,
    because another batch draws other tokens.
    """
    prompt = torch.full((1, 1), first, device=model.device)
    cache = model(prompt, use_cache=True).past_key_values
    try:
        bytes_per_token = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    except (AttributeError, TypeError):  # a state of another kind, or none: of unknown size
        return 1
    share = 4 << 30
    if model.device.type == "cuda":
        share = torch.cuda.get_device_properties(model.device).total_memory // 4
    return max(1, share // (bytes_per_token * sequence_length))


class _ProgressStreamer(BaseStreamer):
    """generate() hands each step's tokens to a streamer; this one only counts them."""

    def __init__(self, progress: Callable[[int, int], None], done: int, total: int) -> None:
        self.progress, self.done, self.total = progress, done, total

    def put(self, value: torch.Tensor) -> None:
        self.done += value.numel()
        self.progress(self.done, self.total)

    def end(self) -> None:
        pass
