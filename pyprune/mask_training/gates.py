"""Gates that are 0 or 1 going forward and let gradients pass to their logits."""

from collections.abc import Callable

import torch
from torch import Tensor

Gate = Callable[[Tensor, torch.Generator], Tensor]

GUMBEL_TEMPERATURE = 0.4  # of the authors' code


def reinmax(logits: Tensor, generator: torch.Generator, temperature: float = 1.0) -> Tensor:
    """Bernoulli samples with ReinMax's gradient, of second order (Liu et al. 2023, arXiv 2304.08612, algorithm 2).

    logits: any shape and floating type; `generator` on their device. Returns 0 or 1 in their type, where
    d out / d logits = 2 π1 (1 - π1) - π0 (1 - π0) / 2 with π0 = σ(l), D the sample, π1 = (D + σ(l / temperature)) / 2.
    """
    probability = logits.sigmoid()
    sample = _sample(probability, generator)
    with torch.no_grad():
        middle = (sample + (logits / temperature).sigmoid()) / 2
        tiny = torch.finfo(logits.dtype).eps  # a saturated gate's middle is 0 or 1: its logit must stay finite
        shift = torch.logit(middle, eps=tiny) - logits
    soft = 2 * (shift + logits).sigmoid() - probability / 2
    return soft - soft.detach() + sample


def gumbel_sigmoid(logits: Tensor, generator: torch.Generator, temperature: float = GUMBEL_TEMPERATURE) -> Tensor:
    """Straight-through Gumbel-sigmoid samples (Jang et al. 2017, Maddison et al. 2017): the authors' code of DISP-LLM.

    As `reinmax`; the gradient is that of σ((l + logistic noise) / temperature).
    """
    uniform = torch.rand(logits.shape, generator=generator, device=logits.device, dtype=torch.float32)
    tiny = torch.finfo(torch.float32).tiny
    noise = torch.log(uniform.clamp_min(tiny)) - torch.log1p(-uniform)
    soft = ((logits + noise.to(logits.dtype)) / temperature).sigmoid()
    return soft - soft.detach() + (soft.detach() > 0.5).to(logits.dtype)


def _sample(probability: Tensor, generator: torch.Generator) -> Tensor:
    uniform = torch.rand(probability.shape, generator=generator, device=probability.device, dtype=torch.float32)
    return (uniform < probability.detach()).to(probability.dtype)


GATES: dict[str, Gate] = {"reinmax": reinmax, "gumbel": gumbel_sigmoid}
