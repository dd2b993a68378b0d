"""Each adapter's own copies of biases, so that adapters with biases stand side by side: of the layers that
its method sits on (`bias: all` and `NAME_only`), and of those that it does not sit on (`all`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from peft_dist import starts
from peft_dist.contract import BaseLayer, Param, Params, Site, WeightMethod
from peft_dist.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class BiasCopy(WeightMethod):
    """b' in the place of b; W stays.

    Args:
        channels_first: what the layer gives has its channels before its places, as images have.
    """

    channels_first: bool = False
    prefix: ClassVar[str] = "bias"

    def params(self, site: Site) -> dict[str, Param]:
        return {"bias": Param("own_bias", ("out",), (site.bias,), starts.inherit, saved="bias")}

    def start_from_base(self, p: Params, base: BaseLayer) -> None:
        p["bias"].copy_(base.bias())  # type: ignore[arg-type]

    def delta(self, p: Params, base: BaseLayer) -> Tensor:
        W = base.weight()
        return W.new_zeros(W.shape)

    def bias_delta(self, p: Params, base: BaseLayer) -> Tensor:
        return p["bias"] - base.bias()  # type: ignore[operator]

    def added(self, p: Params, base: BaseLayer, x: Tensor) -> Tensor:
        shift = self.bias_delta(p, base)
        places = x.ndim - 2 if self.channels_first else len(base.site.kernel)
        return shift.view(-1, *(1,) * places)


@dataclass(frozen=True)
class Unchanged(WeightMethod):
    """No change at all: of an attention module in which only a part that it reads has an adapter."""

    prefix: ClassVar[str] = "unchanged"

    def params(self, site: Site) -> dict[str, Param]:
        return {}

    def delta(self, p: Params, base: BaseLayer) -> Tensor:
        W = base.weight()
        return W.new_zeros(W.shape)


class OwnBias:
    """Of a method whose config has `bias`: one tensor more where a layer has a bias.

    Attributes:
        bias: `none`; `all`: every bias of the model; or `own_biases`: those of its layers.
        own_biases: the third value's name, such as `vera_only`.
    """

    bias: str
    own_biases: ClassVar[str]

    def check_bias(self) -> None:
        """Refuses a value of `bias` that is none of the three; HF PEFT takes any name before `_only`."""
        allowed = ("none", "all", self.own_biases)
        if self.bias not in allowed and not self.bias.endswith("_only"):
            raise ConfigError(
                f"{type(self).__name__}.bias: {self.bias!r} is not one of {', '.join(allowed)}."
            )

    def bias_params(self, site: Site) -> dict[str, Param]:
        """The bias, where it is trained."""
        if self.bias == "none" or not site.bias:
            return {}
        saved = "base_layer.bias"
        return {"bias": Param("own_bias", ("out",), (site.bias,), starts.inherit, saved=saved)}

    def start_from_base(self, p: Params, base: BaseLayer) -> None:
        if "bias" in p:
            p["bias"].copy_(base.bias())  # type: ignore[arg-type]

    def bias_delta(self, p: Params, base: BaseLayer) -> Tensor | None:
        return p["bias"] - base.bias() if "bias" in p else None  # type: ignore[operator]

    def with_bias(self, y: Tensor, p: Params, base: BaseLayer) -> Tensor:
        """y, as the layer gives it, and what the bias adds."""
        shift = self.bias_delta(p, base)
        return y if shift is None else y + shift.view(-1, *(1,) * len(base.site.kernel))


class BiasedMethod(OwnBias, WeightMethod):
    """One that adds to W."""
