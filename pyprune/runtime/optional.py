"""Packages that only an export needs, imported when one is asked for."""

import importlib
from typing import Any

from ..errors import InputError


def import_extra(module: str) -> Any:
    """The module of that name. InputError: it is not installed; `pip install 'pyprune[gguf]'` brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"the Python package {module} is needed ({error}): pip install 'pyprune[gguf]'") from error
