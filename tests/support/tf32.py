"""Products in TF32, emulated: the operands lose their last 13 bits."""

import torch
from torch import Tensor


def truncated(x: Tensor, bits: int) -> Tensor:
    """Float32 or float64 without its last bits."""
    integers = x.contiguous().view(torch.int32 if x.dtype == torch.float32 else torch.int64)
    return (integers & -(1 << bits)).view(x.dtype)


def in_float32(c: Tensor, left: Tensor, right: Tensor) -> None:
    """c −= left right, as split_tf32.subtract_product."""
    c.addmm_(truncated(left, 13), truncated(right, 13), alpha=-1)


def as_tensor_cores(c: Tensor, left: Tensor, right: Tensor) -> None:
    """subtract_product by operands of 10 bits, every 8 columns' sum truncated to float32."""
    left, right = (truncated(x, 13).double() for x in (left, right))
    total = torch.zeros(c.shape, dtype=torch.float64)
    for a, b in zip(left.split(8, dim=1), right.split(8), strict=True):
        total = truncated(total.addmm_(a, b), 29)
    c -= total.float()
