"""Round one linear layer to 4 bits with GPTQ (arXiv 2210.17323), on pyprune's Hessian and inverse factor.

GPTQ's error, in the units of the layer's output, is compared with that of rounding each weight to its nearest."""

import torch

from pyprune.ops import Hessian, inverse_factor

torch.manual_seed(0)
linear = torch.nn.Linear(256, 128, bias=False)
mixing = torch.randn(256, 256) / 16  # correlated inputs, as those of real layers are

hessian = Hessian.zeros(256)
for _ in range(8):
    hessian.update(torch.randn(512, 256) @ mixing)  # [rows, in]
h = hessian.finish()  # [in, in]
u = inverse_factor(h, damping=0.01).factor  # upper triangular, uᵀu = (h + damping)⁻¹

w = linear.weight.detach()  # [out, in]
step = w.abs().amax(1) / 7  # [out], of 4 bits


def nearest(column: torch.Tensor) -> torch.Tensor:
    return (column / step).round().clamp(-8, 7) * step


quantized, rest = torch.empty_like(w), w.clone()
for j in range(w.shape[1]):
    quantized[:, j] = nearest(rest[:, j])
    error = (rest[:, j] - quantized[:, j]) / u[j, j]
    rest[:, j:] -= torch.outer(error, u[j, j:])  # later columns make up for the error

for name, result in (("nearest", torch.stack([nearest(c) for c in w.T], 1)), ("gptq", quantized)):
    print(f"{name}: error {((w - result) @ h * (w - result)).sum() / (w @ h * w).sum():.2e} of the output's energy")
