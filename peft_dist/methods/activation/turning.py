"""Methods that turn a layer's input: W' = W R. A convolution takes its input in patches that overlap, so there
they turn W instead, which is the same by definition."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from peft_dist.contract import ActivationMethod, BaseLayer, Draw, Param, Params, Site, WeightMethod

if TYPE_CHECKING:
    from torch import Tensor


class Turning(ActivationMethod):
    """A method that turns what a layer takes; `at` a convolution it acts through W, where its backward keeps
    `full_size_through_weight` tensors of W's size."""

    full_size_through_weight: ClassVar[int] = 1

    def drawn_delta(self, p: Params, base: BaseLayer) -> Tensor:
        """dW with what chance leaves out of it while training, where p holds that."""
        raise NotImplementedError

    def delta(self, p: Params, base: BaseLayer) -> Tensor:
        return self.drawn_delta({name: t for name, t in p.items() if name != "drawn"}, base)

    def at(self, site: Site) -> Turning | ThroughWeight:  # type: ignore[override]
        return ThroughWeight(self) if site.kernel else self


@dataclass(frozen=True)
class ThroughWeight(WeightMethod):
    """`method`, by its dW alone."""

    method: Turning

    compose: ClassVar[Literal["add", "chain"]] = "chain"

    @property
    def full_size(self) -> int:  # type: ignore[override]
        return self.method.full_size_through_weight

    @property
    def prefix(self) -> str:  # type: ignore[override]
        return self.method.prefix

    def params(self, site: Site) -> dict[str, Param]:
        return self.method.params(site)

    def draws(self, site: Site) -> dict[str, Draw]:
        return self.method.draws(site)

    def start_from_base(self, p: Params, base: BaseLayer) -> None:
        self.method.start_from_base(p, base)

    def export(self, p: Params, site: Site) -> dict[str, Tensor] | None:
        return self.method.export(p, site)

    def restore(self, saved: Mapping[str, Tensor], site: Site) -> Mapping[str, Tensor]:
        return self.method.restore(saved, site)

    def delta(self, p: Params, base: BaseLayer) -> Tensor:
        return self.method.delta(p, base)

    def bias_delta(self, p: Params, base: BaseLayer) -> Tensor | None:
        return self.method.bias_delta(p, base)

    def added(self, p: Params, base: BaseLayer, x: Tensor) -> Tensor:
        y, shift = base.apply(self.method.drawn_delta(p, base), x), self.bias_delta(p, base)
        return y if shift is None else y + shift.view(-1, *(1,) * len(base.site.kernel))
