"""Registers the classes of pruned models as soon as transformers is imported, without importing it."""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_NAME = "transformers"


class _Loader(Loader):
    """transformers' loader, followed by our registration."""

    def __init__(self, own: Any) -> None:
        self._own = own

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._own.exec_module(module)
        if module.__spec__ is not None:
            module.__spec__.loader = self._own  # for callers that ask for its files or source
        _register()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)


class _Finder(MetaPathFinder):
    """Answers for transformers alone: others may ask where it is, and never import it."""

    def __init__(self) -> None:
        self._asking = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _NAME or self._asking:
            return None
        self._asking = True
        try:
            spec = importlib.util.find_spec(_NAME)
        finally:
            self._asking = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


def register_with_transformers() -> None:
    """Register now if transformers is imported already, else when it is."""
    if _NAME in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]
    importlib.import_module("pyprune.modeling")
