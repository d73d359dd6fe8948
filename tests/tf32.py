"""Products in TF32, emulated: the operands lose their last 13 bits, sums stay in float32."""

import torch
from torch import Tensor


def truncated(x: Tensor, bits: int) -> Tensor:
    """Float32 or float64 without its last bits."""
    integers = x.contiguous().view(torch.int32 if x.dtype == torch.float32 else torch.int64)
    return (integers & -(1 << bits)).view(x.dtype)


def in_float32(c: Tensor, left: Tensor, right: Tensor) -> None:
    """c −= left right, as split_tf32.subtract_product."""
    c.addmm_(truncated(left, 13), truncated(right, 13), alpha=-1)
