"""Versions of public operators: a number for each, from the declaration in its file.

It goes up when for the same input a result changes beyond rounding, and when a signature, a schema or the layout of a
state or result changes. It stays when only speed, memory, rounding, backends or messages change. A name that is in
`pyprune.ops.__all__` stays there. tests/ops/test_ops_versions.py holds signatures, schemas and results to these
numbers.
"""

from collections.abc import Mapping
from types import MappingProxyType

from .declaration import VERSIONS

# A view of what the declarations fill: complete once pyprune.ops is imported.
OPERATOR_VERSIONS: Mapping[str, int] = MappingProxyType(VERSIONS)
