"""Modules that are imported when first used, so that reading a config never pays for torch."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any


class _Lazy(ModuleType):
    """Stands for a module and imports it at the first attribute access. It is not in `sys.modules`, so
    whoever imports the module itself meanwhile gets the real one."""

    def __getattr__(self, attribute: str) -> Any:
        module = self.__dict__.get("_module")
        if module is None:
            module = self.__dict__["_module"] = importlib.import_module(self.__name__)
        return getattr(module, attribute)


def lazy(name: str) -> Any:
    """The module `name`, imported at its first attribute access."""
    return _Lazy(name)
