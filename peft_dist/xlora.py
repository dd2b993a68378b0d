"""What `XLoraModel` has beside a tuner's functions: the mixture's settings and its latest weights."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from peft_dist.errors import AdapterError


class MixtureOfLora:
    """X-LoRA's part."""

    @property
    def xlora_config(self: Any) -> Any:
        """The config of the active mixture, or of the first one."""
        for name in [*self.active_adapters, *self.peft_config]:
            if self.peft_config[name].peft_type == "XLORA":
                return self.peft_config[name]
        raise AdapterError("the model has no adapter of XLORA.")

    def set_topk_lora(self: Any, value: int | None) -> None:
        """How many experts a token uses; all where None."""
        self.xlora_config.top_k_lora = value

    def set_global_scaling_weight(self: Any, weight: float) -> None:
        """The factor of all that the experts add."""
        self.xlora_config.global_scaling_weight = weight

    def get_global_scaling_weight(self: Any) -> float:
        """The factor of all that the experts add."""
        return self.xlora_config.global_scaling_weight

    def set_scaling_pass_value(self: Any, value: float | None) -> None:
        """The weights in the first run; 1 / the number of experts where None."""
        config = self.xlora_config
        config.scaling_pass_value = 1 / len(config.adapters) if value is None else value

    def get_latest_scalings(self: Any) -> Tensor | None:
        """The weights (rows, positions, layers, experts) of the latest forward; None before the first."""
        config = self.xlora_config
        name = next(name for name, each in self.peft_config.items() if each is config)
        made = self.look_ahead.given.get(name)
        return None if made is None else made[config.reads[0]]

    def enable_scalings_logging(self: Any) -> None:
        """Keeps the weights of each forward from now on."""
        self.look_ahead.logs = True

    def disable_scalings_logging(self: Any) -> None:
        """Keeps no more; what is kept stays."""
        self.look_ahead.logs = False

    def clear_scalings_log(self: Any) -> None:
        """Lets go of what was kept."""
        self.look_ahead.log.clear()

    def get_scalings_log(self: Any) -> list[Tensor]:
        """The weights that were kept, each (rows, positions, layers, experts), in a list of the caller's own."""
        return [next(iter(made.values())) for made in self.look_ahead.log]

    def get_bucketed_scalings_log(self: Any) -> dict[int, tuple[list[int], list[Tensor]]]:
        """The weights that were kept, by their number of positions: where they stood in the log, and they."""
        buckets: dict[int, tuple[list[int], list[Tensor]]] = {}
        for place, scalings in enumerate(self.get_scalings_log()):
            places, kept = buckets.setdefault(scalings.shape[1], ([], []))
            places.append(place)
            kept.append(scalings)
        return buckets

    def add_weighted_adapter(self: Any, *args: Any, **kwargs: Any) -> None:
        """Refuses."""
        raise TypeError("XLoraModel does not support add_weighted_adapter: combine its experts as LoRA.")
