"""The network that makes all gates' logits of a model from fixed noise (DISP-LLM, arXiv 2410.11988, §3.3)."""

import torch
from torch import Tensor, nn

NOISE_WIDTH = 32
STATE_WIDTH = 64  # in each direction


class Hypernetwork(nn.Module):
    """z [gates, 32], fixed → bidirectional GRU (64 each way) → LayerNorm → GELU → a linear 128 → width for each gate.

    The recurrent part is what gates of a model share: a step for one moves the others. `prior` is added to the logits:
    the authors' constant 3 (all gates open), or a warm start, in which case the linears begin at zero so that training
    begins at the prior. Weights and z are float32, drawn from `seed` on the CPU, whatever the device.
    """

    noise: Tensor

    def __init__(self, widths: list[int], seed: int, prior: list[Tensor] | float = 3.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.recurrent = nn.GRU(NOISE_WIDTH, STATE_WIDTH, bidirectional=True)
            self.norm = nn.LayerNorm(2 * STATE_WIDTH)
            heads = [nn.Linear(2 * STATE_WIDTH, width, bias=False) for width in widths]
        self.heads = nn.ModuleList(heads)
        self.register_buffer("noise", torch.randn(len(widths), NOISE_WIDTH, generator=generator))
        warm = not isinstance(prior, float)
        for number, (head, width) in enumerate(zip(heads, widths, strict=True)):
            if warm:
                nn.init.zeros_(head.weight)
            own = torch.full((width,), prior) if isinstance(prior, float) else prior[number].float().cpu()
            self.register_buffer(f"prior_{number}", own.clone())

    def forward(self) -> list[Tensor]:
        """Logits of every gate, float32 [width] each."""
        states, _ = self.recurrent(self.noise)
        states = nn.functional.gelu(self.norm(states))
        heads = enumerate(zip(self.heads, states, strict=True))
        return [head(state) + getattr(self, f"prior_{number}") for number, (head, state) in heads]
