"""PeftMixedModel: adapters of several methods on one base, active together, in the order they were set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft_dist import inject
from peft_dist.catalog import mixes
from peft_dist.config import PeftConfig
from peft_dist.errors import AdapterError, ConfigError
from peft_dist.model import MIXED, TASK_CLASSES, PeftModel

# Why adapters of a method stand alone; a prompt method's reason is the same for all of them.
REASONS = {
    "ADAPTION_PROMPT": "it changes what whole attention modules give, and not by a weight of theirs",
    "XLORA": "it decides itself, batch by batch, how strongly adapters on its layers act",
    "POLY": "what it adds depends on each row's task, so it has no weight to compose or to merge",
    "OSF": "it takes the layer's weight apart and trains the parts, so there is one of it on a layer",
}
_OF_PROMPTS = "it adds virtual tokens and sits on no layer"


class PeftMixedModel(PeftModel):
    """As `PeftModel`, where adapters of several methods are active together.

    Each acts on the layer as those set before it left it, or adds to what they add (`docs/methods.md`).
    """

    def _add(self, name: str, config: PeftConfig, *args: Any, **kwargs: Any) -> None:
        check_mixes(config)
        super()._add(name, config, *args, **kwargs)

    def delete_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Removes an adapter, or several; none where one of them is unknown or merged.

        Raises:
            AdapterError: one is unknown, or merged.
        """
        names = self._known(adapter_name)
        for place, module in inject.adapter_modules(self.get_base_model()):
            if merged := [name for name in names if name in module.merged_adapters]:
                raise AdapterError(
                    f"{place}: adapter {merged[0]!r} is merged. Unmerge it before deleting it."
                )
        for name in names:
            super().delete_adapter(name)


def check_mixes(config: PeftConfig) -> None:
    """Whether adapters of this method can stand beside others'.

    Raises:
        ConfigError: they cannot; says why.
    """
    if not mixes(str(config.peft_type)):
        reason = REASONS.get(str(config.peft_type), _OF_PROMPTS if config.is_prompt_learning else "")
        raise ConfigError(
            f"{type(config).__name__}: {config.peft_type} cannot be mixed with other methods"
            + (f": {reason}." if reason else ": it was registered so.")
        )


TASK_CLASSES[MIXED] = PeftMixedModel
