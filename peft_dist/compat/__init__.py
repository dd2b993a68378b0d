"""HF PEFT's module paths and names, for programs that import them: `peft_dist.tuners.lora.layer.LoraLayer`.

The one place that knows HF PEFT's layout. A path is a module made when it is imported; a name of it is looked up
when it is used: a layer's class by its method's folder, else in `table.PUBLIC`, which says where it is here. With
`install` the same modules serve as `peft`.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterable
from email.message import Message
from types import ModuleType
from typing import Any

from peft_dist.compat.table import LAYERS_IN, PATHS, PUBLIC, REFUSED, TOP
from peft_dist.config import PEFT_VERSION
from peft_dist.errors import ConfigError
from peft_dist.lazy import lazy

tuner_layer = lazy("peft_dist.tuner_layer")

HOUSE = "peft_dist"


class Path(ModuleType):
    """One module of HF PEFT's layout."""

    def __getattr__(self, name: str) -> Any:
        path = self.__name__.partition(".")[2]
        if f"{path}.{name}" in PATHS:
            return importlib.import_module(f"{HOUSE}.{path}.{name}")
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        value = resolve(path, name)
        self.__dict__[name] = value
        return value


def resolve(path: str, name: str) -> Any:
    """What HF PEFT's module `path` calls `name`.

    Raises:
        AttributeError: there is no such name.
    """
    parts = path.split(".")
    if len(parts) > 1 and parts[0] == "tuners" and parts[1] in LAYERS_IN:
        try:
            return tuner_layer.layer_class(parts[1].upper(), name)
        except AttributeError:
            pass
    if name in REFUSED or name in PUBLIC:
        return _found(name)
    try:
        return getattr(importlib.import_module(HOUSE), name)
    except AttributeError:
        raise AttributeError(f"module '{HOUSE}.{path}' has no attribute {name!r}") from None


def at_top(name: str) -> Any:
    """What `peft_dist` itself has of HF PEFT's names beside its own.

    Raises:
        AttributeError: there is no such name.
    """
    if name not in TOP:
        raise AttributeError(f"module '{HOUSE}' has no attribute {name!r}")
    return _found(name)


def _found(name: str) -> Any:
    if name in REFUSED:
        if name not in _made:
            _made[name] = _refused(name, REFUSED[name])
        return _made[name]
    module, _, attribute = PUBLIC[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


_made: dict[str, Any] = {}


def _refused(name: str, why: str) -> Any:
    """A class whose making, or a function whose call, says that it is not here."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        raise ConfigError(f"{name}: {why}")

    if name[0].isupper():
        return type(name, (), {"__init__": __init__, "__doc__": why})

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise ConfigError(f"{name}: {why}")

    refuse.__name__ = name
    return refuse


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Makes the modules, and says which version `peft` is where it is not installed."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        package, _, rest = fullname.partition(".")
        if package != HOUSE or rest not in PATHS:
            return None
        inside = any(other.startswith(f"{rest}.") for other in PATHS)
        return importlib.machinery.ModuleSpec(fullname, self, is_package=inside)

    def create_module(self, spec: Any) -> ModuleType:
        return Path(spec.name, "As in HF PEFT.")

    def exec_module(self, module: ModuleType) -> None:
        return None

    def find_distributions(self, context: Any = None) -> Iterable[Any]:
        if serves_as_peft() and getattr(context, "name", None) in (None, "peft"):
            yield _Distribution()


class _Distribution(importlib.metadata.Distribution):
    """What `importlib.metadata.version("peft")` finds where no `peft` is installed."""

    def read_text(self, filename: str) -> str | None:
        return None

    def locate_file(self, path: Any) -> Any:
        return path

    @property
    def metadata(self) -> Any:
        message = Message()
        message["Name"], message["Version"] = "peft", PEFT_VERSION
        return message


FINDER = _Finder()


def enter() -> None:
    """Lets the paths be imported; once a process."""
    if FINDER not in sys.meta_path:
        sys.meta_path.append(FINDER)


def serves_as_peft() -> bool:
    """Whether `import peft` gives this package."""
    return sys.modules.get("peft") is sys.modules.get(HOUSE)


# Where other libraries keep HF PEFT's classes from the moment on when they were imported.
_KEPT_IN = ("transformers.trainer", "transformers.trainer_utils")


def install() -> None:
    """From now on `import peft` gives this package, and every `from peft... import ...` its names: for programs
    that cannot be edited, and for libraries that ask `isinstance(model, peft.PeftModel)`.

    Whether `peft` is installed or not. To be called before `from peft import ...` lines; again, it does nothing.
    """
    house = importlib.import_module(HOUSE)
    enter()
    for name in [name for name in sys.modules if name == "peft" or name.startswith("peft.")]:
        del sys.modules[name]
    sys.modules["peft"] = house
    # In one go, as `import peft` would; those of this package's own keep their names.
    for path in PATHS:
        sys.modules[f"peft.{path}"] = importlib.import_module(f"{HOUSE}.{path}")
    _look_again(house)


def _look_again(house: Any) -> None:
    """What libraries found out about `peft` before."""
    known = sys.modules.get("transformers.utils.import_utils")
    for name in ("is_peft_available", "_is_package_available", "is_peft_greater_or_equal"):
        clear = getattr(getattr(known, name, None), "cache_clear", None)
        if clear is not None:
            clear()
    for name in _KEPT_IN:
        module = sys.modules.get(name)
        if module is not None:
            module.PeftModel, module.PeftMixedModel = house.PeftModel, house.PeftMixedModel  # type: ignore[attr-defined]
