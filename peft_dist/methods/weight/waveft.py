"""WaveFT: dW = s idwt2(C), where C holds n trained numbers at places that a seed chose; s C without the
transform.

Bilican et al. 2025, arXiv:2505.12532. C is padded by what the wavelet's filters cut off, its quarters are the
four bands of one level, and what comes out is cut to the middle (out, in). HF PEFT knows the filters of db1 to
db10, sym2 to sym10 and coif1 to coif5 and fails in the forward with the longer ones that its config allows;
here all of them work.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from peft_dist import starts
from peft_dist.config import TargetedConfig
from peft_dist.contract import BaseLayer, Enter, Param, Params, Site
from peft_dist.errors import ConfigError, suggest
from peft_dist.lazy import lazy
from peft_dist.methods.weight.bias import BiasedMethod
from peft_dist.methods.weight.fourierft import check_number
from peft_dist.targets import by_pattern

if TYPE_CHECKING:
    from torch import Tensor

torch, fused = lazy("torch"), lazy("peft_dist.fused")
pywt = lazy("pywt")

# Family -> length of its filters.
FAMILIES = {
    **{f"db{n}": 2 * n for n in range(1, 39)},
    **{f"sym{n}": 2 * n for n in range(2, 21)},
    **{f"coif{n}": 6 * n for n in range(1, 18)},
}


@dataclass
class WaveFTConfig(TargetedConfig, BiasedMethod):
    """HF PEFT's WaveFTConfig.

    Args:
        n_frequency: trained numbers a layer, from 1 to out x in.
        scaling: s.
        wavelet_family: db1 to db38, sym2 to sym20 or coif1 to coif17.
        use_idwt: transform C; otherwise it is used as it is.
        random_loc_seed: of the places.
        fan_in_fan_out: the weight is stored (in, out); known from the layer, kept for checkpoints.
        bias: which biases are trained too: none, all, or those of the targets (waveft_only).
        layers_to_transform: indices of the layers to adapt; all where None.
        layers_pattern: name of the list of layers that those indices count.
        n_frequency_pattern: other numbers, by regular expressions on the ends of layers' names.
        proportional_parameters: share n_frequency x layers among the layers by their sizes.
        init_weights: True: start at 0, which changes nothing; False: at random.
    """

    n_frequency: int = 2592
    scaling: float = 25.0
    wavelet_family: str = "db1"
    use_idwt: bool = True
    random_loc_seed: int = 777
    fan_in_fan_out: bool = False
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    bias: str = "none"
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    n_frequency_pattern: dict[str, int] | None = field(default_factory=dict)
    proportional_parameters: bool = False
    init_weights: bool = True

    prefix: ClassVar[str] = "waveft_"
    own_biases: ClassVar[str] = "waveft_only"
    full_size: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "WAVEFT"
        self.check_layers()
        self.check_bias()
        if self.wavelet_family not in FAMILIES:
            raise ConfigError(
                f"WaveFTConfig.wavelet_family: {self.wavelet_family!r} is not one of db1 to db38, sym2 to "
                f"sym20, coif1 to coif17.{suggest(self.wavelet_family, FAMILIES)}"
            )

    def over(self, sites: Sequence[Site]) -> WaveFTConfig:
        if not self.proportional_parameters or not sites:
            return self
        sizes = {site.name: site.out * site.in_ for site in sites}
        budget = self.n_frequency * len(sizes) / sum(sizes.values())
        made = copy.copy(self)
        made.__dict__["shares"] = {name: max(1, round(size * budget)) for name, size in sizes.items()}
        return made

    def number(self, site: Site) -> int:
        """n at `site`."""
        shares = self.__dict__.get("shares", {})
        if site.name in shares:
            return shares[site.name]
        return by_pattern(self.n_frequency_pattern or {}, site.name, self.n_frequency)

    def facts(self, site: Site) -> dict[str, Any]:
        names = ("scaling", "random_loc_seed", "wavelet_family", "use_idwt")
        own = {f"waveft_{name}": getattr(self, name) for name in names}
        return {"waveft_n_frequency": self.number(site), **own}

    def params(self, site: Site) -> dict[str, Param]:
        n = self.number(site)
        check_number(type(self).__name__, n, site)
        start = starts.zeros if self.init_weights else starts.gauss(0.01)
        places = starts.some_places(site.out * site.in_, n, self.random_loc_seed)
        return {
            "spectrum": Param("waveft_spectrum", ("n",), (n,), start),
            "places": Param("waveft_places", ("n",), (n,), places, False, persistent=False, is_index=True),
            **self.bias_params(site),
        }

    def delta(self, p: Params, base: BaseLayer) -> Tensor:
        out, in_ = base.shape
        spectrum, places = p["spectrum"], p["places"]
        if not self.use_idwt:
            C = spectrum.new_zeros(out * in_).scatter(0, places, spectrum)
            return C.view(out, in_) * self.scaling
        cut = FAMILIES[self.wavelet_family] - 2
        rows, columns = ((size + cut + 1) // 2 * 2 for size in (out, in_))
        row, column = places // in_ + (rows - out) // 2, places % in_ + (columns - in_) // 2
        C = spectrum.new_zeros(rows * columns).scatter(0, row * columns + column, spectrum)
        low, high = _filters(self.wavelet_family)
        filters = torch.tensor([[low], [high]], dtype=spectrum.dtype, device=spectrum.device)
        dW = fused.synthesis(C.view(rows, columns), filters)
        top, left = (dW.shape[0] - out) // 2, (dW.shape[1] - in_) // 2
        return dW[top : top + out, left : left + in_] * self.scaling

    def forward(self, p: Params, base: BaseLayer, x: Tensor, enter: Enter) -> Tensor:
        return fused.by_delta(self, p, base, x, enter)


@functools.cache
def _filters(family: str) -> tuple[list[float], list[float]]:
    """The two filters of the inverse transform: low and high pass."""
    wavelet = pywt.Wavelet(family)
    return wavelet.rec_lo, wavelet.rec_hi
