"""Statistics of one output projection: moments of its input channels and norms of its weight columns."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError
from ..forward.token_weights import TokenWeights
from ..ops import ChannelMoments
from ..runtime import distributed


@dataclass
class ChannelStatistics:
    """Statistics of one output projection W (out x in) and its input X (tokens x in). All tensors are [in], on the CPU.

    `weight_squares` = Σ_o W_oj² and `weight_mean` = mean_o |W_oj|, float32. Without a text `count` is 0 and the
    moments are None. `nonfinite` entries of the input were NaN or Inf and counted as zero. `reference_fluctuation`
    is FLAP's as its authors' code computes it (float64), where asked for.
    """

    weight_squares: Tensor
    weight_mean: Tensor
    count: int = 0
    windows: int = 0
    mean: Tensor | None = None
    m2: Tensor | None = None
    reference_fluctuation: Tensor | None = None
    nonfinite: int = 0

    def fluctuation(self) -> Tensor:
        """Unbiased variance of each channel, v = M2 / (T - 1), float64 [in] (FLAP, arXiv 2312.11983, eq. 4)."""
        assert self.m2 is not None
        return self.m2.double() / (self.count - 1)

    def input_squares(self) -> Tensor:
        """s_j = (1 / N) Σ_tokens x_j² over N windows, float64 [in]."""
        assert self.m2 is not None
        assert self.mean is not None
        return (self.m2.double() + self.count * self.mean.double() ** 2) / self.windows

    TENSORS = ("weight_squares", "weight_mean", "mean", "m2", "reference_fluctuation")

    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.TENSORS if getattr(self, name) is not None}


class ReferenceFluctuation:
    """FLAP's fluctuation as the authors' code computes it, window by window, in float64.

    Their batch-1 running update compares each window with the mean *after* it was updated (an alias, not a copy,
    of the old one): v = 1/(N-1) Σ_{k=2..N} ((k-1)/k) Σ_t (x_kt - m_k)², m_k the mean of the first k window means.
    With a window's own moments, Σ_t (x_kt - m_k)² = M2_k + L (mean_k - m_k)².
    """

    def __init__(self, channels: int, device: torch.device) -> None:
        self.windows = 0
        self.mean = torch.zeros(channels, dtype=torch.float64, device=device)
        self.sum = torch.zeros_like(self.mean)

    def update(self, window: ChannelMoments) -> None:
        self.windows += 1
        k, own = self.windows, window.mean.double()
        self.mean += (own - self.mean) / k
        spread = window.m2.double() + window.count * (own - self.mean) ** 2
        self.sum += spread * ((k - 1) / k)

    def value(self) -> Tensor:
        return self.sum / max(self.windows - 1, 1)


class ChannelObserver:
    """Accumulates the statistics of one output projection while inputs pass by.

    `where` names layer and output projection in errors. `gain`: of the norm behind the projection, whose rows count
    times it. With `allow_nonfinite`, NaN and Inf count as zero and are
    tallied in `nonfinite`; otherwise `result` raises InputError if any came. In several processes each sees its own
    block of windows, in the order of ranks, and `result` gives all of them the statistics of all inputs.
    """

    def __init__(
        self, weight: Tensor, where: str, by_window: bool, allow_nonfinite: bool, gain: Tensor | None = None
    ) -> None:
        channels = weight.shape[1]
        self.where, self.allow_nonfinite = where, allow_nonfinite
        self.moments = ChannelMoments.zeros(channels, weight.device)
        self.reference = ReferenceFluctuation(channels, weight.device) if by_window else None
        self.windows = 0
        self.nonfinite = 0
        self._held: list[ChannelMoments] = []  # windows whose place in the order of all is known at the end
        self.weight_squares, self.weight_mean = column_norms(weight if gain is None else weight * gain[:, None], where)

    def observe(self, x: Tensor, weights: TokenWeights | None = None) -> None:
        """x: [windows, tokens, channels], the output projection's input; weights: of its tokens."""
        if self.allow_nonfinite:
            bad = ~torch.isfinite(x)
            self.nonfinite += int(bad.sum())
            x = x.masked_fill(bad, 0)
        self.windows += x.shape[0]
        if self.reference is None:
            self.moments.update(x, None if weights is None else weights.weight)
            return
        # As the authors' code counts, which knows no weights.
        for window in x:
            own = ChannelMoments.zeros(x.shape[-1], x.device)
            own.update(window)
            if distributed.world_size() == 1:
                self._add(self.reference, own)
            else:
                self._held.append(own)

    def _add(self, reference: ReferenceFluctuation, window: ChannelMoments) -> None:
        reference.update(window)
        self.moments.merge(window)

    def _merge(self) -> None:
        """The statistics of all processes' inputs, window by window as one process takes them, or at once."""
        if self.reference is None:
            merge_over_processes(self.moments)
        else:
            own = torch.stack([torch.stack((w.mean, w.m2)) for w in self._held])  # [own windows, 2, channels]
            tokens = self._held[0].count
            for mean, m2 in distributed.all_gather_rows(own):
                self._add(self.reference, ChannelMoments(tokens, mean, m2))
        self.windows, self.nonfinite = distributed.all_reduce_sum(self.windows, self.nonfinite)

    def result(self) -> ChannelStatistics:
        """The statistics; the observer is used up."""
        if distributed.world_size() > 1:
            self._merge()
        mean, m2 = self.moments.mean.cpu(), self.moments.m2.cpu()
        if self.moments.total is not None:  # weights of 1 on average, so that every formula below holds
            m2 = m2 * float(self.moments.count / self.moments.total)
        bad = int((~(torch.isfinite(mean) & torch.isfinite(m2))).sum())
        if bad:
            raise InputError(
                f"{self.where}: NaN or Inf activations in {bad} of {len(mean)} input channels; check the checkpoint, "
                "compute in float32 or bfloat16 (--dtype), or count them as zero with --allow-nonfinite"
            )
        return ChannelStatistics(
            self.weight_squares,
            self.weight_mean,
            count=self.moments.count,
            windows=self.windows,
            mean=mean,
            m2=m2,
            reference_fluctuation=None if self.reference is None else self.reference.value().cpu(),
            nonfinite=self.nonfinite,
        )


def merge_over_processes(moments: ChannelMoments) -> None:
    """Make the moments of this process's rows those of all processes' rows, to the same bits in each.

    n = Σ n_r, m = Σ n_r m_r / n, M2 = Σ (M2_r + n_r (m_r − m)²), in float64 (Chan, Golub & LeVeque 1983). n > 0.
    """
    own = moments.mean.double()
    rows = moments.total.double() if moments.total is not None else own.new_tensor(float(moments.count))
    (moments.count,) = distributed.all_reduce_sum(moments.count)
    mean, total = rows * own, rows.clone()
    distributed.all_reduce_(mean, total)
    mean /= total
    if moments.total is not None:
        moments.total.copy_(total)
    m2 = moments.m2.double() + rows * (own - mean) ** 2
    distributed.all_reduce_(m2)
    moments.mean.copy_(mean)
    moments.m2.copy_(m2)


def column_norms(weight: Tensor, where: str) -> tuple[Tensor, Tensor]:
    """(Σ_o W_oj², mean_o |W_oj|) of W [out, in], float32 [in] on the CPU, without a temporary of W's size.

    InputError, naming `where`, if a column holds NaN or Inf.
    """
    working = torch.promote_types(weight.dtype, torch.float32)
    squares = torch.linalg.vector_norm(weight, dim=0, dtype=working).float() ** 2
    absolute = torch.linalg.vector_norm(weight, ord=1, dim=0, dtype=working).float() / weight.shape[0]
    bad = int((~torch.isfinite(squares)).sum())
    if bad:
        raise InputError(f"{where}: NaN or Inf weights in {bad} of {len(squares)} columns; check the checkpoint")
    return squares.cpu(), absolute.cpu()
