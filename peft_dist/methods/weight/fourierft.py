"""FourierFT: dW = s Re ifft2(F), where F (out, in) holds n trained numbers at places that a seed chose.

Gao et al. 2024, arXiv:2405.03003. The places follow from the seed as in HF PEFT, so no checkpoint holds them.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from peft_dist import starts
from peft_dist.config import TargetedConfig
from peft_dist.contract import BaseLayer, Enter, Param, Params, Site
from peft_dist.errors import ConfigError
from peft_dist.lazy import lazy
from peft_dist.methods.weight.bias import BiasedMethod
from peft_dist.targets import by_pattern

if TYPE_CHECKING:
    from torch import Tensor

torch, fused = lazy("torch"), lazy("peft_dist.fused")


@dataclass
class FourierFTConfig(TargetedConfig, BiasedMethod):
    """HF PEFT's FourierFTConfig.

    Args:
        n_frequency: trained numbers a layer, from 1 to out x in.
        scaling: s.
        random_loc_seed: of the places.
        fan_in_fan_out: the weight is stored (in, out); known from the layer, kept for checkpoints.
        bias: which biases are trained too: none, all, or those of the targets (fourier_only).
        layers_to_transform: indices of the layers to adapt; all where None.
        layers_pattern: name of the list of layers that those indices count.
        n_frequency_pattern: other numbers, by regular expressions on the ends of layers' names.
        init_weights: True: start at 0, which changes nothing; False: at random.
    """

    n_frequency: int = 1000
    scaling: float = 150.0
    random_loc_seed: int | None = 777
    fan_in_fan_out: bool = False
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    bias: str = "none"
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    n_frequency_pattern: dict[str, int] | None = field(default_factory=dict)
    init_weights: bool = False

    prefix: ClassVar[str] = "fourierft_"
    own_biases: ClassVar[str] = "fourier_only"
    full_size: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "FOURIERFT"
        self.check_layers()
        self.check_bias()

    def number(self, site: Site) -> int:
        """n at `site`."""
        return by_pattern(self.n_frequency_pattern or {}, site.name, self.n_frequency)

    def facts(self, site: Site) -> dict[str, Any]:
        own = {f"fourierft_{name}": getattr(self, name) for name in ("scaling", "random_loc_seed")}
        return {"fourierft_n_frequency": self.number(site), **own}

    def params(self, site: Site) -> dict[str, Param]:
        n = self.number(site)
        check_number(type(self).__name__, n, site)
        start = starts.zeros if self.init_weights else starts.normal
        places = functools.partial(_places, shape=(site.out, site.in_), n=n, seed=self.random_loc_seed)
        return {
            "spectrum": Param("fourierft_spectrum", ("n",), (n,), start),
            "places": Param(
                "fourierft_places", ("2n",), (2 * n,), places, False, persistent=False, is_index=True
            ),
            **self.bias_params(site),
        }

    def delta(self, p: Params, base: BaseLayer) -> Tensor:
        spectrum = p["spectrum"]
        # There is no transform in half precision.
        exact = spectrum.to(torch.promote_types(spectrum.dtype, torch.float32))
        dW = real_transform(exact * self.scaling, p["places"], *base.shape)
        return dW.to(spectrum.dtype)

    def forward(self, p: Params, base: BaseLayer, x: Tensor, enter: Enter) -> Tensor:
        return fused.by_delta(self, p, base, x, enter)


def _places(t: Tensor, shape: tuple[int, int], n: int, seed: int | None) -> Tensor:
    return t.copy_(halves(starts.places(shape[0] * shape[1], n, seed), *shape))


def halves(places: Tensor, out: int, in_: int) -> Tensor:
    """Where each entry (u, v) of a matrix (out, in) and its mirror image (-u, -v) are among the first
    in // 2 + 1 columns, the images after the entries: a transform's real part is that of both halved, which
    these columns say all of. An image that they do not need is one past the end."""
    width = in_ // 2 + 1
    u, v = places // in_, places % in_
    is_right = v >= width
    u, v = torch.where(is_right, -u % out, u), torch.where(is_right, in_ - v, v)
    # The first column, and the middle one of an even number, hold both an entry and its image.
    image = torch.where((v == 0) | (2 * v == in_), -u % out * width + v, out * width)
    return torch.cat([u * width + v, image])


def real_transform(values: Tensor, halves: Tensor, out: int, in_: int) -> Tensor:
    """Re ifft2 of a matrix (out, in) with `values` at the places of these `halves`."""
    size = out * (in_ // 2 + 1)
    F = values.new_zeros(size + 1).index_add(0, halves, (values / 2).repeat(2))
    return torch.fft.irfft2(F[:size].view(out, -1), s=(out, in_))


def check_number(where: str, n: int, site: Site) -> None:
    """Refuses a number of trained entries that a layer cannot have."""
    if not 1 <= n <= site.out * site.in_:
        raise ConfigError(
            f"{where}.n_frequency: {n!r} at {site.name}; it lies between 1 and out x in = "
            f"{site.out} x {site.in_} = {site.out * site.in_}."
        )
