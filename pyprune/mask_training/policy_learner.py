"""Masks of KV groups and FFN channels learned from losses alone, without gradients through the model.

Policy gradient for pruning: Gao et al., "Bypass Back-propagation", arXiv 2406.10576.
"""

import torch
from torch import Tensor

from ..allocation.budget import UnitScores
from ..architectures import ATTENTION, FFN, SUBLAYERS, LayerShape
from ..architectures.channel_selection import FFN_MIDDLE
from .importance import SPREAD
from .masked_model import ATTENTION_MIDDLE, MaskedModel, Masks
from .training import Learner, optimizer_tensors, restore_optimizer, step_seed

MASKS = 2  # drawn in every step
BASELINE_DECAY = 0.8  # of the moving average: about the paper's window of five steps
HOOK_POINTS = {ATTENTION: ATTENTION_MIDDLE, FFN: FFN_MIDDLE}


class UnitLearner(Learner):
    """Keep-probabilities σ(l) of every unit; masks are drawn, and what they lose moves the probabilities.

    A step draws two masks for the same windows. Their gradient estimate is the mean of (L - baseline)(mask - σ(l)),
    L the masked model's loss in excess of the whole model's on those windows, which takes the windows' own difficulty
    out of it; the baseline is L's moving average. After Adam's step one shift of all logits brings the expected
    parameters back to the budget (the paper projects probabilities; logits stay inside (0, 1) by themselves).
    """

    def __init__(
        self,
        masked: MaskedModel,
        shapes: list[LayerShape],
        windows: Tensor,
        ratio: float,
        start: list[UnitScores],
        learning_rate: float,
        seed: int,
    ) -> None:
        """windows: int64 [windows, tokens] on the model's device. start: logits by layer and sublayer; shifted."""
        self.masked, self.shapes, self.windows, self.ratio, self.seed = masked, shapes, windows, ratio, seed
        device = windows.device
        self.sizes = [shape.units(sublayer) for shape in shapes for sublayer in SUBLAYERS]
        costs = [torch.full((s.units(m),), s.unit_cost(m)) for s in shapes for m in SUBLAYERS]
        self.costs = torch.cat(costs).to(device, torch.float64)
        flat = torch.cat([own[sublayer] for own in start for sublayer in SUBLAYERS])
        self.values = torch.nn.Parameter(flat.to(device, torch.float32), requires_grad=False)
        self.optimizer = torch.optim.Adam([self.values], lr=learning_rate)
        self.generator = torch.Generator(device)
        self.baseline = torch.full((), float("nan"), device=device)
        self._shift()
        with masked.whole(), torch.no_grad():
            self.dense = torch.cat([masked.losses(window[None]) for window in windows]).float()

    @torch.no_grad()
    def step(self, chosen: Tensor, number: int) -> tuple[float, float]:
        self.generator.manual_seed(step_seed(self.seed, number))
        device = self.windows.device
        chosen = chosen.to(device)
        probability = self.values.sigmoid()
        drawn = torch.rand(MASKS, len(probability), generator=self.generator, device=device) < probability
        rows = len(chosen)
        self.masked.masks = self._masks(drawn.repeat_interleave(rows, 0))
        losses = self.masked.losses(self.windows[chosen].repeat(MASKS, 1)).float()
        excess = (losses - self.dense[chosen].repeat(MASKS)).view(MASKS, rows).mean(1)
        first = torch.isnan(self.baseline)
        baseline = torch.where(first, excess.mean(), self.baseline)
        advantage = excess - baseline
        self.values.grad = (advantage[:, None] * (drawn.float() - probability)).mean(0)
        self.optimizer.step()
        self.baseline = BASELINE_DECAY * baseline + (1 - BASELINE_DECAY) * excess.mean()
        self._shift()
        kept = (self.costs * self.values.sigmoid()).sum() / self.costs.sum()
        return float(losses.mean()), float(kept)

    def _masks(self, drawn: Tensor) -> Masks:
        """Split masks drawn for the whole model [rows, units] by layer and hook point [rows, 1, channels]."""
        parts = iter(drawn.split(self.sizes, 1))
        return [
            {
                HOOK_POINTS[sublayer]: next(parts).repeat_interleave(shape.unit_width(sublayer), 1)[:, None]
                for sublayer in SUBLAYERS
            }
            for shape in self.shapes
        ]

    def _shift(self) -> None:
        """Shift all logits so that the expected parameters are those of the ratio; by bisection, without a wait."""
        target = (1 - self.ratio) * self.costs.sum()
        wide = self.values.double()
        low, high = torch.full_like(target, -60.0), torch.full_like(target, 60.0)
        for _ in range(60):
            middle = (low + high) / 2
            over = (self.costs * (wide + middle).sigmoid()).sum() > target
            low, high = torch.where(over, low, middle), torch.where(over, middle, high)
        self.values.add_(((low + high) / 2).float())

    def scores(self) -> list[UnitScores]:
        """Logits of the units, float64 on the CPU by layer and sublayer."""
        parts = iter(self.values.detach().double().cpu().split(self.sizes))
        return [{sublayer: next(parts) for sublayer in SUBLAYERS} for _ in self.shapes]

    def state(self) -> dict[str, Tensor]:
        own = {"values": self.values.detach().clone(), "baseline": self.baseline}
        return own | {f"optimizer.{name}": value for name, value in optimizer_tensors(self.optimizer).items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.values.copy_(state["values"])
        self.baseline = state["baseline"].to(self.baseline.device)
        restore_optimizer(
            self.optimizer,
            {name.removeprefix("optimizer."): value for name, value in state.items() if name.startswith("optimizer.")},
        )


def start_logits(scores: list[UnitScores], comparable: bool) -> list[UnitScores]:
    """Standardise scores to logits: over the model if `comparable`, else within layer and sublayer."""
    pool = torch.cat([own[sublayer] for own in scores for sublayer in SUBLAYERS])
    return [
        {
            sublayer: SPREAD * _standardised(own[sublayer], pool if comparable else own[sublayer])
            for sublayer in SUBLAYERS
        }
        for own in scores
    ]


def _standardised(values: Tensor, pool: Tensor) -> Tensor:
    spread = float(pool.std()) if len(pool) > 1 else 0.0
    return (values - pool.mean()) / spread if spread > 0 else torch.zeros_like(values)
