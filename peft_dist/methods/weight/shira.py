"""SHiRA: dW is sparse: trained numbers at r x (in + out) fixed places, 0 elsewhere.

Bhardwaj et al. 2024, arXiv:2406.13175. The places are saved beside the numbers, so a mask that cannot be made
again is no loss. A mask of one's own: `config.mask_fn = f`, where f(layer, r) gives a tensor like the layer's
weight, with r x (in + out) ones.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from peft_dist import starts
from peft_dist.config import TargetedConfig
from peft_dist.contract import BaseLayer, Enter, Param, Params, Site, WeightMethod
from peft_dist.errors import BaseLayerError, ConfigError
from peft_dist.lazy import lazy

if TYPE_CHECKING:
    from torch import Tensor

torch, fused = lazy("torch"), lazy("peft_dist.fused")


def random_mask(base_layer: Any, r: int, random_seed: int | None = None, **kwargs: Any) -> Tensor:
    """r x (in + out) ones at random in zeros of the shape of the layer's weight (out, in).

    Args:
        base_layer: with `out_features` and `in_features`. r: as in ShiraConfig.
        random_seed: of the choice; None is one seed too, that of a new generator.
    """
    out, in_ = base_layer.out_features, base_layer.in_features
    mask = torch.zeros(out * in_, dtype=torch.bool)
    return mask.index_fill_(0, starts.places(out * in_, r * (out + in_), random_seed), True).view(out, in_)


def _places(t: Tensor, size: int, in_: int, n: int, seed: int | None) -> Tensor:
    # In the mask's own order.
    flat = starts.places(size, n, seed).sort()[0]
    return t.copy_(torch.stack([flat // in_, flat % in_]))


@dataclass
class ShiraConfig(TargetedConfig, WeightMethod):
    """HF PEFT's ShiraConfig.

    Args:
        r: so many numbers for each row and column of W: r x (in + out), at most in x out.
        mask_type: "random", or a name of one's own, with `mask_fn` set on the config.
        random_seed: of the random mask.
        fan_in_fan_out: the weight is stored (in, out); known from the layer, kept for checkpoints.
        init_weights: True: start at 0, which changes nothing; False: at random.

    Attributes:
        mask_fn: f(layer, r) -> mask; not saved.
    """

    r: int = 32
    mask_type: str = "random"
    random_seed: int | None = None
    target_modules: list[str] | str | None = None
    fan_in_fan_out: bool = False
    init_weights: bool = True
    modules_to_save: list[str] | None = None

    prefix: ClassVar[str] = "shira_"
    full_size: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "SHIRA"
        if not isinstance(self.r, int) or self.r < 1:
            raise ConfigError(f"ShiraConfig.r: {self.r!r}; it is a whole number of at least 1.")
        self.mask_fn: Callable[..., Any] | None = random_mask if self.mask_type == "random" else None
        if self.mask_fn is None and not self.inference_mode:
            warnings.warn(
                f"ShiraConfig.mask_type: {self.mask_type!r} is no mask that is known here. Set config.mask_fn = "
                "f, where f(layer, r) gives the mask.",
                stacklevel=3,
            )

    def facts(self, site: Site) -> dict[str, Any]:
        return {"r": self.r, "scaling": 1.0}

    def params(self, site: Site) -> dict[str, Param]:
        out, in_, n = site.out, site.in_, self.r * (site.out + site.in_)
        if n > out * in_:
            raise ConfigError(
                f"ShiraConfig.r: {self.r} asks for {n} numbers at {site.name}, which has {out} x {in_} = "
                f"{out * in_}; it is at most {out * in_ // (out + in_)} there."
            )
        places = (
            functools.partial(_places, size=out * in_, in_=in_, n=n, seed=self.random_seed)
            if self.mask_fn is random_mask
            else starts.inherit
        )
        return {
            "weight": Param(
                "shira_weight", ("n",), (n,), starts.zeros if self.init_weights else starts.normal
            ),
            "indices": Param("shira_indices", ("2", "n"), (2, n), places, trainable=False, is_index=True),
        }

    def start_from_base(self, p: Params, base: BaseLayer) -> None:
        if self.mask_fn is random_mask:
            return
        if self.mask_fn is None:
            raise ConfigError(
                f"ShiraConfig.mask_fn: mask_type is {self.mask_type!r}, and no mask_fn says which places of "
                f"{base.site.name} are trained. Set config.mask_fn, or mask_type='random'."
            )
        places = self.mask_fn(base.layer, self.r).eq(1).nonzero().T  # type: ignore[attr-defined]
        if places.shape != p["indices"].shape:
            raise BaseLayerError(
                f"{base.site.name}: mask_fn chose {places.shape[-1]} places; r = {self.r} is for "
                f"{p['weight'].numel()}. Choose r x (in + out)."
            )
        p["indices"].copy_(places)

    def export(self, p: Params, site: Site) -> dict[str, Tensor]:
        # HF PEFT's file holds int32.
        return {"shira_weight": p["weight"], "shira_indices": p["indices"].to(torch.int32)}

    def restore(self, saved: Mapping[str, Tensor], site: Site) -> Mapping[str, Tensor]:
        return {key: t.to(torch.int64) if key == "shira_indices" else t for key, t in saved.items()}

    def delta(self, p: Params, base: BaseLayer) -> Tensor:
        out, in_ = base.shape
        row, column = p["indices"]
        return p["weight"].new_zeros(out * in_).scatter(0, row * in_ + column, p["weight"]).view(out, in_)

    def forward(self, p: Params, base: BaseLayer, x: Tensor, enter: Enter) -> Tensor:
        return fused.by_delta(self, p, base, x, enter)
