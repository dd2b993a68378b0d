"""Names that a base's layers had when an adapter was saved, where they have others now.

transformers renames layers from version to version (`visual.blocks` is `model.visual.blocks` now) and says how, for
checkpoints of bases; a model of one's own may say it in `_checkpoint_conversion_mapping`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor

from peft_dist.checkpoint.layout import BASE_PREFIX
from peft_dist.checkpoint.reading import renamed_by
from peft_dist.lazy import lazy

transformers = lazy("transformers")
conversion_mapping = lazy("transformers.conversion_mapping")
core_model_loading = lazy("transformers.core_model_loading")


def as_called_now(
    model: Any, tensors: Mapping[str, Tensor], unknown: Collection[str]
) -> dict[str, Tensor] | None:
    """The tensors with the `unknown` ones under the names that their layers have now; None where nobody says how."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    rename = _renaming(base)
    if rename is None:
        return None
    now = {}
    for key, tensor in tensors.items():
        is_below = key in unknown and key.startswith(BASE_PREFIX)
        now[BASE_PREFIX + rename(key.removeprefix(BASE_PREFIX)) if is_below else key] = tensor
    return now if now.keys() != tensors.keys() else None


def _renaming(base: Any) -> Callable[[str], str] | None:
    own = getattr(base, "_checkpoint_conversion_mapping", None)
    if own:
        return lambda name: renamed_by(own, name)
    if not isinstance(base, transformers.PreTrainedModel):
        return None
    steps = [
        step
        for step in conversion_mapping.get_model_conversion_mapping(base, add_legacy=False)
        if isinstance(step, core_model_loading.WeightRenaming)
    ]
    return (lambda name: core_model_loading.apply_renamings(name, steps)) if steps else None
