"""(IA)^3: y = l * (W x + b), or W (l * x) + b in feed-forward layers.

Liu et al. 2022, arXiv:2205.05638.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from peft_dist import starts
from peft_dist.config import TargetedConfig, name_set
from peft_dist.contract import ActivationMethod, BaseLayer, Enter, Param, Params, Site
from peft_dist.errors import ConfigError
from peft_dist.lazy import lazy
from peft_dist.targets import ends_in

if TYPE_CHECKING:
    from torch import Tensor

fused = lazy("peft_dist.fused")
saved_tensors = lazy("peft_dist.saved_tensors")


@dataclass
class IA3Config(TargetedConfig, ActivationMethod):
    """HF PEFT's IA3Config.

    Args:
        feedforward_modules: which targets are scaled at their input: suffixes, or one regular expression; a
            subset of the targets.
        fan_in_fan_out: the weight is stored (in, out); known from the layer, kept for checkpoints.
        init_ia3_weights: True: start at 1, which changes nothing; False: at random.
    """

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    feedforward_modules: list[str] | str | None = None
    fan_in_fan_out: bool = False
    modules_to_save: list[str] | None = None
    init_ia3_weights: bool = True

    prefix: ClassVar[str] = "ia3_"
    layers: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv2d", "conv3d"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "IA3"
        self.feedforward_modules = name_set(self.feedforward_modules)
        names = (self.feedforward_modules, self.target_modules)
        forward, targets = (None if isinstance(each, str) or each is None else set(each) for each in names)
        outside = sorted(forward - targets) if forward is not None and targets is not None else []
        if outside:
            raise ConfigError(
                f"IA3Config.feedforward_modules: {outside[0]!r} is not in target_modules; it must be a "
                "subset of them."
            )

    def is_feedforward(self, site: Site) -> bool:
        """Whether `site` is scaled at its input."""
        return ends_in(self.feedforward_modules or [], site.name)

    def params(self, site: Site) -> dict[str, Param]:
        start = starts.ones if self.init_ia3_weights else starts.normal
        ones = (1,) * len(site.kernel)
        if self.is_feedforward(site):
            channels = site.in_ // math.prod(site.kernel) * site.groups
            return {"l": Param("ia3_l", ("1", "in", *map(str, ones)), (1, channels, *ones), start)}
        if site.kernel:
            return {"l": Param("ia3_l", ("1", "out", *map(str, ones)), (1, site.out, *ones), start)}
        return {"l": Param("ia3_l", ("out", "1"), (site.out, 1), start)}

    def _scale(self, p: Params, site: Site) -> Tensor:
        return p["l"] if site.kernel else p["l"].flatten()

    def before(self, p: Params, base: BaseLayer, x: Tensor) -> Tensor:
        return x * self._scale(p, base.site) if self.is_feedforward(base.site) else x

    def after(self, p: Params, base: BaseLayer, y: Tensor) -> Tensor:
        return y if self.is_feedforward(base.site) else y * self._scale(p, base.site)

    def forward(self, p: Params, base: BaseLayer, x: Tensor, enter: Enter) -> Tensor:
        if self.is_feedforward(base.site):
            if frozen := fused.plain(base, x, p["l"]):
                return fused.scaled_input(x, *frozen, p["l"])
        elif given := self._scaled([p], [base], x):
            return given[0]
        return super().forward(p, base, x, enter)

    @classmethod
    def together(
        cls, methods: Sequence[IA3Config], ps: Sequence[Params], bases: Sequence[BaseLayer], x: Tensor
    ) -> Sequence[Tensor] | None:
        if any(method.is_feedforward(base.site) for method, base in zip(methods, bases, strict=True)):
            return None
        return cls._scaled(ps, bases, x)

    @staticmethod
    def _scaled(ps: Sequence[Params], bases: Sequence[BaseLayer], x: Tensor) -> Sequence[Tensor] | None:
        """What layers give whose outputs are scaled, where they may be scaled in place; else None."""
        scales = [p["l"] for p in ps]
        frozen = [fused.exactly(base, x, scale) for base, scale in zip(bases, scales, strict=True)]
        if x.device.type != "cpu" or not all(frozen) or saved_tensors.are_hooked():
            return None
        return fused.scaled_outputs(x, [(*each, scale) for each, scale in zip(frozen, scales, strict=True)])

    def delta(self, p: Params, base: BaseLayer) -> Tensor:
        W, shift = base.weight(), p["l"].flatten() - 1
        if not self.is_feedforward(base.site):
            return shift[:, None] * W
        kernel, groups = math.prod(base.site.kernel), base.site.groups
        seen = W.shape[1] // kernel
        if seen != len(shift):
            # Each row of W sees the channels of its group alone.
            shift = shift.view(groups, seen).repeat_interleave(len(W) // groups, dim=0)
        return W * shift.repeat_interleave(kernel, dim=-1)

    def bias_delta(self, p: Params, base: BaseLayer) -> Tensor | None:
        if self.is_feedforward(base.site) or not base.site.bias:
            return None
        return (p["l"].flatten() - 1) * base.bias()  # type: ignore[operator]
