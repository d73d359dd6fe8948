"""Operators: one a file, with its schema, its reference in plain PyTorch, the launch of each backend
and its declaration.

The names in __all__ are public and stay: README.md in this folder describes them, OPERATOR_VERSIONS says what of their
behaviour may be relied on, and __init__.pyi has their types, which torch.library's wrapper hides.
"""

import functools

from torch.library import CustomOpDef

from .dispatch import describe, describe_installation, use_backend
from .eliminate import Elimination, eliminate, refit
from .gather_scatter import rms_norm_gather, scatter_add_, scatter_add_rms_norm_gather_
from .grouped_cholesky import grouped_cholesky_errors, grouped_cholesky_errors_reference
from .hessian import Hessian, hessian_finish, hessian_update, lower_gram
from .inverse_factor import InverseFactor, inverse_factor, spd_inverse_factor
from .moments import ChannelMoments, channel_moments_update, channel_moments_update_reference
from .rms_norm import rms_norm
from .rotary import rotate_
from .sparsify import sparsify_
from .spd_inverse import DampedInverse, damped_inverse, spd_inverse
from .split_tf32 import add_split_product
from .swiglu import swiglu_
from .versions import OPERATOR_VERSIONS

__all__ = [
    "OPERATOR_VERSIONS",
    "ChannelMoments",
    "DampedInverse",
    "Elimination",
    "Hessian",
    "InverseFactor",
    "add_split_product",
    "channel_moments_update",
    "channel_moments_update_reference",
    "damped_inverse",
    "describe",
    "describe_installation",
    "eliminate",
    "grouped_cholesky_errors",
    "grouped_cholesky_errors_reference",
    "hessian_finish",
    "hessian_update",
    "inverse_factor",
    "lower_gram",
    "refit",
    "rms_norm",
    "rms_norm_gather",
    "rotate_",
    "scatter_add_",
    "scatter_add_rms_norm_gather_",
    "sparsify_",
    "spd_inverse",
    "spd_inverse_factor",
    "swiglu_",
    "use_backend",
]

# help() and inspect.signature() of an operator show the function that it was made of.
for _name in __all__:
    _operator = globals()[_name]
    if isinstance(_operator, CustomOpDef):
        functools.update_wrapper(_operator, _operator._init_fn)
