"""What callers may rely on: a number for every public operator.

It goes up when for the same input a result changes beyond rounding, and when a signature, a schema or the layout of a
state or result changes. It stays when only speed, memory, rounding, backends or messages change. A name that is in
`pyprune.ops.__all__` stays there. tests/test_ops_versions.py holds signatures, schemas and results to these numbers.
"""

from collections.abc import Mapping
from types import MappingProxyType

# A class has the number of what it holds: states, and what the operators of the same file return.
OPERATOR_VERSIONS: Mapping[str, int] = MappingProxyType(
    {
        "ChannelMoments": 1,
        "DampedInverse": 1,
        "Elimination": 1,
        "Hessian": 1,
        "InverseFactor": 1,
        "add_split_product": 1,
        "channel_moments_update": 1,
        "channel_moments_update_reference": 1,
        "damped_inverse": 1,
        "eliminate": 1,
        "grouped_cholesky_errors": 1,
        "grouped_cholesky_errors_reference": 1,
        "hessian_finish": 1,
        "hessian_update": 1,
        "inverse_factor": 1,
        "lower_gram": 1,
        "refit": 1,
        "rms_norm": 1,
        "rms_norm_gather": 1,
        "rotate_": 1,
        "scatter_add_": 1,
        "scatter_add_rms_norm_gather_": 1,
        "sparsify_": 1,
        "spd_inverse": 1,
        "spd_inverse_factor": 1,
        "swiglu_": 1,
    }
)
