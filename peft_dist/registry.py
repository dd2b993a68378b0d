"""Methods of a user's own, and what is known by a method's type or a task, under HF PEFT's names.

The mappings are views of the catalog: a method that is registered is in all of them at once. They import a
class when it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from peft_dist.catalog import (
    ALL_TASKS,
    METHODS,
    Entry,
    PeftType,
    TaskType,
    config_class,
    is_free,
    mixes,
    prefix_of,
)
from peft_dist.config import PeftConfig
from peft_dist.contract import Method
from peft_dist.errors import ConfigError, TakenError, suggest
from peft_dist.lazy import lazy

tuner = lazy("peft_dist.tuner")
tasks = lazy("peft_dist.tasks")


def register_peft_method(
    *,
    name: str,
    config_cls: type,
    model_cls: type | None = None,
    prefix: str | None = None,
    is_mixed_compatible: bool = False,
) -> None:
    """Makes a method known: to the mappings below, `PeftConfig.from_pretrained`, `get_peft_model` and jobs.

    Args:
        name: of the method, in lower case; `PeftType` has it in capitals (`PeftType.extend`).
        config_cls: its config. It may be the method itself, by the contract of `peft_dist.contract`.
        model_cls: for a config that is no such method, a subclass of `peft_dist.BaseTuner` with HF PEFT's
            injection hooks.
        prefix: what its tensors' names start with; `name_` by default.
        is_mixed_compatible: whether it may stand beside others in a `PeftMixedModel`.

    Raises:
        ConfigError: a name that ends in an underscore, is not of lower case, or that `PeftType` lacks; a prefix
            that is not the class's own; classes that are no method. TakenError: a name or a prefix that another
            method has. Nothing is changed then.
    """
    if name.endswith("_"):
        raise ConfigError(f"register_peft_method: {name!r}; a name does not end in an underscore.")
    if not name.islower():
        raise ConfigError(f"register_peft_method: {name!r}; a name is of lower case.")
    if name.upper() not in PeftType.__members__:
        raise ConfigError(
            f"register_peft_method: PeftType has no {name.upper()!r}.{suggest(name.upper(), PeftType.__members__)} "
            f"Add it first: PeftType.extend({name.upper()!r})."
        )
    chosen = f"{name}_" if prefix is None else prefix
    if not is_free(name.upper()):
        raise TakenError(f"register_peft_method: there is a method {name!r} already. Choose another name.")
    other = next((m for m in METHODS if m != name.upper() and prefix_of(m) == chosen), None)
    if other is not None:
        raise TakenError(
            f"register_peft_method: the prefix {chosen!r} is that of {other.lower()!r}. Choose another."
        )
    for cls in (model_cls, config_cls):
        own = getattr(cls, "prefix", None)
        if isinstance(own, str) and own != chosen:
            raise ConfigError(
                f"register_peft_method: the prefix is {chosen!r}, but {cls.__name__}.prefix is {own!r}. "  # type: ignore[union-attr]
                "They are to be the same."
            )
    if not (isinstance(config_cls, type) and issubclass(config_cls, PeftConfig)):
        raise ConfigError(f"register_peft_method: config_cls is {config_cls!r}, no subclass of PeftConfig.")
    is_method = issubclass(config_cls, Method)
    if not is_method and not (isinstance(model_cls, type) and issubclass(model_cls, tuner.BaseTuner)):
        raise ConfigError(
            f"register_peft_method: {config_cls.__name__} is no method by peft_dist.contract, and model_cls is "
            f"{model_cls!r}, no subclass of peft_dist.BaseTuner. One of the two is needed."
        )
    if not is_method and not getattr(model_cls, "prefix", None):
        model_cls.prefix = chosen  # type: ignore[union-attr]
    lines = (config_cls.__doc__ or name).strip().splitlines()
    METHODS[name.upper()] = Entry(
        config_cls,
        chosen,
        ALL_TASKS,
        True,
        lines[0].rstrip("."),
        None if is_method else model_cls,
        is_mixed_compatible,
    )


class Column(Mapping[str, Any]):
    """One fact of every method, by its type; read from the catalog when asked."""

    def __init__(self, of: Callable[[str], Any], keys: Callable[[], list[str]]) -> None:
        self._of, self._keys = of, keys

    def __getitem__(self, key: str) -> Any:
        if key not in self._keys():
            raise KeyError(key)
        return self._of(str(key))

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys())

    def __len__(self) -> int:
        return len(self._keys())

    def __repr__(self) -> str:
        return repr(dict(self))


def _types() -> list[str]:
    return [PeftType[name] for name in METHODS]


def _prefix(name: str) -> str:
    """As HF PEFT registers it: the method's name where its tensors hang on no layer of their own."""
    start = prefix_of(name)
    return start if start.rstrip("_") in _NAMED_OTHERWISE or mixes(name) else f"{str(name).lower()}_"


# Prefixes of methods that stand alone on their layers.
_NAMED_OTHERWISE = frozenset({"osf", "poly"})


def _mixing() -> list[str]:
    return [PeftType[name] for name in METHODS if mixes(name)]


PEFT_TYPE_TO_CONFIG_MAPPING = Column(config_class, _types)
PEFT_TYPE_TO_TUNER_MAPPING = Column(lambda name: tuner.tuner_class(name), _types)
PEFT_TYPE_TO_PREFIX_MAPPING = Column(_prefix, _types)
PEFT_TYPE_TO_MIXED_MODEL_MAPPING = Column(lambda name: tuner.tuner_class(name), _mixing)
MODEL_TYPE_TO_PEFT_MODEL_MAPPING = Column(lambda name: tasks.TASK_CLASSES[name], lambda: list(TaskType))
