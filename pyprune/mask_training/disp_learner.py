"""DISP-LLM's learner: gates of all selections from one hypernetwork, trained on the frozen model's own loss."""

import torch
from torch import Tensor

from ..architectures import LayerShape
from ..architectures.channel_selection import SELECTIONS, width
from .budget import kept_share
from .gates import Gate
from .hypernetwork import Hypernetwork
from .masked_model import MaskedModel
from .training import Learner, optimizer_tensors, restore_optimizer, step_seed

WEIGHT_DECAY = 0.05  # AdamW's, in paper and code


class SelectionLearner(Learner):
    """The loss is the masked model's cross-entropy + `budget_weight` · |ln(kept / (1 - ratio))| (2410.11988, eq. 8).

    `kept` is the share of parameters by the sampled gates, not by their probabilities, as in the authors' code.
    """

    def __init__(
        self,
        masked: MaskedModel,
        shapes: list[LayerShape],
        windows: Tensor,
        ratio: float,
        prior: list[dict[str, Tensor]] | None,
        gate: Gate,
        learning_rate: float,
        budget_weight: float,
        seed: int,
    ) -> None:
        """windows: int64 [windows, tokens] on the model's device.

        prior: logits to start from, float32 [width] by layer and selection; None: the authors' constant.
        """
        self.masked, self.shapes, self.windows, self.ratio = masked, shapes, windows, ratio
        self.gate, self.budget_weight, self.seed = gate, budget_weight, seed
        device = windows.device
        widths = [width(shape, name) for shape in shapes for name in SELECTIONS]
        flat = 3.0 if prior is None else [own[name] for own in prior for name in SELECTIONS]
        self.network = Hypernetwork(widths, seed, flat).to(device)
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=learning_rate, weight_decay=WEIGHT_DECAY, fused=device.type == "cuda"
        )
        self.generator = torch.Generator(device)

    def step(self, chosen: Tensor, number: int) -> tuple[float, float]:
        self.generator.manual_seed(step_seed(self.seed, number))
        gates = self._named([self.gate(logits, self.generator) for logits in self.network()])
        self.masked.masks = gates
        loss = self.masked.losses(self.windows[chosen.to(self.windows.device)]).mean()
        counts = [{name: own[name].sum() for name in SELECTIONS} for own in gates]
        kept = kept_share(self.shapes, counts)
        penalty = self.budget_weight * torch.log(kept / (1 - self.ratio)).abs()
        self.optimizer.zero_grad(set_to_none=True)
        (loss + penalty).backward()
        self.optimizer.step()
        return float(loss.detach()), float(kept.detach())

    @torch.no_grad()
    def logits(self) -> list[dict[str, Tensor]]:
        """Logits of every gate, float32 [width] on the CPU by layer and selection."""
        return self._named([logits.cpu() for logits in self.network()])

    def _named(self, flat: list[Tensor]) -> list[dict[str, Tensor]]:
        several = len(SELECTIONS)
        return [
            dict(zip(SELECTIONS, flat[several * layer : several * (layer + 1)], strict=True))
            for layer in range(len(self.shapes))
        ]

    def state(self) -> dict[str, Tensor]:
        network = {f"network.{name}": value.detach().clone() for name, value in self.network.state_dict().items()}
        return network | {f"optimizer.{name}": value for name, value in optimizer_tensors(self.optimizer).items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        parts: dict[str, dict[str, Tensor]] = {"network": {}, "optimizer": {}}
        for key, value in state.items():
            part, name = key.split(".", 1)
            parts[part][name] = value
        self.network.load_state_dict(parts["network"])
        restore_optimizer(self.optimizer, parts["optimizer"])
