"""AdaLoRA: dW = s B (E * A) with s = alpha / init_r, singular values E that a budget over all layers prunes.

Zhang et al. 2023, arXiv:2303.10512. From the sensitivity |w dL/dw| of every entry of A, B and E, smoothed over
the steps with its uncertainty, each triplet (a row of A, a column of B, an entry of E) gets an importance; after
each step the least important triplets of all layers lose their E, as many as a budget says that falls from the
initial total rank to the target by a cubic. A and B are held near orthogonal by a term of the loss.

The divisor is init_r + 1e-5, as in HF PEFT.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from peft_dist import starts
from peft_dist.contract import BaseLayer, Controller, Enter, Param, Params, Site, WeightMethod
from peft_dist.errors import ConfigError
from peft_dist.lazy import lazy
from peft_dist.methods.weight.lora import LoraConfig, per_channel

if TYPE_CHECKING:
    from torch import Tensor

torch = lazy("torch")

# What LoRA has and AdaLoRA has not, with the value that leaves it out.
_WITHOUT: dict[str, Any] = {
    "use_rslora": False,
    "alpha_pattern": {},
    "use_dora": False,
    "lora_bias": False,
    "loftq_config": {},
    "eva_config": None,
    "corda_config": None,
    "target_parameters": None,
}


@dataclass
class AdaLoraConfig(LoraConfig):
    """HF PEFT's AdaLoraConfig: LoraConfig's fields, and

    Args:
        r: not used, see init_r.
        rank_pattern: for each layer, by the name of its E, which triplets are left; filled while training.
        target_r: mean rank at the end. init_r: rank of every layer at the start.
        tinit: steps before the budget falls. tfinal: steps after it has fallen.
        deltaT: steps between two allocations.
        beta1, beta2: share of the past in the smoothed sensitivity and in its uncertainty, in (0, 1).
        orth_reg_weight: of the loss's term that holds A and B orthogonal, at least 0.
        total_step: of the training; must be given.
    """

    target_r: int = 8
    init_r: int = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None
    rank_pattern: dict[str, Any] | None = None

    layers: ClassVar[frozenset[str]] = frozenset({"linear", "conv2d"})

    def __post_init__(self) -> None:
        pattern = self.rank_pattern
        super().__post_init__()
        self.rank_pattern = pattern
        self.peft_type = "ADALORA"
        for name, absent in _WITHOUT.items():
            if getattr(self, name) != absent:
                raise ConfigError(
                    f"AdaLoraConfig.{name}: {getattr(self, name)!r}; AdaLoRA does not support it. Leave it out."
                )
        if self.runtime_config.ephemeral_gpu_offload:
            raise ConfigError(
                "AdaLoraConfig.runtime_config: ephemeral_gpu_offload is of DoRA alone. Leave it out."
            )
        if not isinstance(self.init_lora_weights, bool):
            raise ConfigError(
                f"AdaLoraConfig.init_lora_weights: {self.init_lora_weights!r} is not one of True, False."
            )
        if self.r != 8:
            warnings.warn("AdaLoraConfig.r is not used: the initial rank is `init_r`.", stacklevel=3)
        if self.total_step is None or self.total_step <= 0:
            raise ConfigError(
                f"AdaLoraConfig.total_step: {self.total_step!r}; the schedule needs the number of steps, at "
                "least 1."
            )
        if self.orth_reg_weight < 0:
            raise ConfigError(f"AdaLoraConfig.orth_reg_weight: {self.orth_reg_weight!r}; it is at least 0.")
        if self.tinit >= self.total_step - self.tfinal:
            raise ConfigError(
                f"AdaLoraConfig.tinit: {self.tinit} of {self.total_step} steps with tfinal {self.tfinal} leave "
                "none in which the budget falls. Decrease tinit or tfinal, or increase total_step."
            )
        for name in ("beta1", "beta2"):
            if not 0 < getattr(self, name) < 1:
                raise ConfigError(f"AdaLoraConfig.{name}: {getattr(self, name)!r}; it lies within (0, 1).")
        for name in ("init_r", "target_r", "deltaT"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ConfigError(
                    f"AdaLoraConfig.{name}: {getattr(self, name)!r}; it is a whole number of at least 1."
                )

    def _check_numbers(self) -> None:
        # A pattern holds masks here, not ranks.
        pattern, self.rank_pattern = self.rank_pattern, None
        super()._check_numbers()
        self.rank_pattern = pattern

    def at(self, site: Site) -> WeightMethod:
        return self

    def kept(self, site_name: str) -> list[bool] | None:
        """Which triplets are left at a layer; None where nothing was allocated yet."""
        return (self.rank_pattern or {}).get(f"{site_name}.lora_E")

    def rank(self, site: Site) -> int:
        kept = self.kept(site.name)
        return self.init_r if kept is None else sum(kept)

    def scaling(self, site: Site) -> float:
        alpha = self.lora_alpha if self.lora_alpha > 0 else self.init_r
        return alpha / (self.init_r + 1e-5)

    def params(self, site: Site) -> dict[str, Param]:
        r, zero = self.rank(site), self.init_lora_weights
        small = starts.gauss(0.02) if zero else starts.normal
        wanted = {
            "A": Param("lora_A", ("r", "in"), (r, site.in_), small),
            "E": Param("lora_E", ("r", "1"), (r, 1), starts.zeros if zero else starts.normal),
            "B": Param("lora_B", ("out", "r"), (site.out, r), small),
        }
        # HF PEFT counts a tensor of the rank among the parameters.
        wanted["num"] = Param(
            "ranknum", ("1",), (1,), starts.constant(self.init_r), False, persistent=False, counted=True
        )
        own = super().params(site).get("bias")
        return wanted if own is None else {**wanted, "bias": own}

    def delta(self, p: Params, base: BaseLayer) -> Tensor:
        return self.scaling(base.site) * (p["B"] @ (p["A"] * p["E"]))

    def factors(self, p: Params, site: Site) -> tuple[Tensor, Tensor] | None:
        return super().factors(self._as_lora(p), site)

    def low_rank(self, p: Params, base: BaseLayer) -> tuple[Tensor, Tensor, float] | None:
        return super().low_rank(self._as_lora(p), base)

    def added(self, p: Params, base: BaseLayer, x: Tensor) -> Tensor:
        p = self._as_lora(p)
        if base.site.groups == 1:
            return super().added(p, base, x)
        # A reads a group's channels alone, and all of its rows serve every group.
        h = base.apply(p["A"].repeat(base.site.groups, 1), x) * self.scaling(base.site)
        y = base.mix(p["B"], h)
        shift = self.bias_delta(p, base)
        return y if shift is None else y + per_channel(shift, base.site)

    def forward(self, p: Params, base: BaseLayer, x: Tensor, enter: Enter) -> Tensor:
        return super().forward(self._as_lora(p), base, x, enter)

    @classmethod
    def mixed(cls, methods: Any, p: Params, base: BaseLayer, x: Tensor) -> Tensor | None:
        return super().mixed(methods, cls._as_lora(p), base, x)

    @classmethod
    def add_mixed(cls, methods: Any, p: Params, base: BaseLayer, x: Tensor, y: Tensor) -> None:
        super().add_mixed(methods, cls._as_lora(p), base, x, y)

    @staticmethod
    def _as_lora(p: Params) -> dict[str, Tensor]:
        # LoRA's functions call each other, so p may have been folded already.
        if "E" not in p:
            return dict(p)
        return {**{name: t for name, t in p.items() if name != "E"}, "A": p["A"] * p["E"]}

    def extra_loss(self, sites: Mapping[str, Params]) -> Tensor | None:
        grams = [
            gram for p in sites.values() if "E" in p for gram in (p["A"] @ p["A"].mT, p["B"].mT @ p["B"])
        ]
        if not grams:
            return None
        away = [torch.linalg.norm(gram - torch.eye(len(gram)).to(gram)) for gram in grams]
        return self.orth_reg_weight * torch.stack(away).mean()

    def controller(self, sites: Mapping[str, Site]) -> Controller:
        return Budget(self)

    def export(self, p: Params, site: Site) -> dict[str, Tensor] | None:
        kept = self.kept(site.name)
        if kept is None or len(kept) != len(p["E"]):
            return None
        left = torch.tensor(kept, device=p["E"].device)
        cut = {"lora_A": p["A"][left], "lora_E": p["E"][left], "lora_B": p["B"][:, left]}
        return {**cut, **({"base_layer.bias": p["bias"]} if "bias" in p else {})}

    def fitted(self, tensors: Mapping[str, Tensor], here: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        # While training, tensors keep their first size; the triplets that a file has not are zero.
        made = dict(tensors)
        for key, own in here.items():
            if not key.endswith(".lora_E") or key not in tensors:
                continue
            kept = self.kept(key.removesuffix(".lora_E").removeprefix("base_model.model."))
            if kept is None or len(own) != len(kept) or len(tensors[key]) != sum(kept):
                continue
            left = torch.tensor(kept)
            for factor, axis in (("lora_A", 0), ("lora_E", 0), ("lora_B", 1)):
                name = key.replace("lora_E", factor)
                whole = torch.zeros(here[name].shape, dtype=tensors[name].dtype)
                made[name] = whole.index_copy(axis, left.nonzero().flatten(), tensors[name].cpu())
        return made


class Budget(Controller):
    """The ranks of all layers of one adapter, and what they are decided by.

    Attributes:
        sensitivity, uncertainty: (layer's name, tensor's name) -> smoothed, as large as the tensor.
        masked: whether the latest step took triplets away; between two such steps their E may grow again.
    """

    def __init__(self, config: AdaLoraConfig) -> None:
        self.config = config
        self.sensitivity: dict[tuple[str, str], Tensor] = {}
        self.uncertainty: dict[tuple[str, str], Tensor] = {}
        self.masked = False

    @property
    def last(self) -> int:
        """The step at which the budget has fallen."""
        return (self.config.total_step or 0) - self.config.tfinal

    def after_backward(self, sites: Mapping[str, Params], step: int) -> None:
        if step >= self.last:
            return
        old1, old2 = self.config.beta1, self.config.beta2
        with torch.no_grad():
            for site, p in _adapted(sites).items():
                for name in ("A", "B", "E"):
                    gradient = p[name].grad
                    if gradient is None:
                        continue
                    key, now = (site, name), (p[name] * gradient).abs()
                    zero = torch.zeros_like(now)
                    smooth = old1 * self.sensitivity.get(key, zero) + (1 - old1) * now
                    away = (now - smooth).abs()
                    self.sensitivity[key] = smooth
                    self.uncertainty[key] = old2 * self.uncertainty.get(key, zero) + (1 - old2) * away

    def after_step(self, sites: Mapping[str, Params], step: int) -> None:
        sites = _adapted(sites)
        self.masked = False
        if step > self.last:
            self._mask(sites)
            return
        budget = self.budget(sites, step)
        falling = step > self.config.tinit and step % self.config.deltaT == 0
        if falling or step == self.last:
            self._allocate(sites, budget)
            self._mask(sites)
        if step == self.last:
            self.sensitivity, self.uncertainty = {}, {}

    def settle(self, sites: Mapping[str, Params]) -> None:
        if self.masked:
            self._mask(_adapted(sites))

    def budget(self, sites: Mapping[str, Params], step: int) -> int:
        """The total rank at `step`."""
        first = sum(len(p["E"]) for p in sites.values())
        target = self.config.target_r * len(sites)
        if step <= self.config.tinit:
            return first
        share = 1 - (step - self.config.tinit) / (self.last - self.config.tinit)
        return int((first - target) * share**3 + target)

    def importance(self, site: str) -> Tensor:
        """Of each triplet of a layer: (r,)."""
        score = {
            name: self.sensitivity[site, name] * self.uncertainty[site, name] for name in ("A", "B", "E")
        }
        return score["E"].flatten() + (score["A"].mean(1) + score["B"].mean(0))

    def _allocate(self, sites: Mapping[str, Params], budget: int) -> None:
        """Decides which triplets are left, so that their number is the budget."""
        if any((site, "E") not in self.sensitivity for site in sites):
            return
        scores = {site: self.importance(site) for site in sites}
        every = torch.cat(list(scores.values()))
        dropped = len(every) - budget
        if dropped > 0:
            threshold = torch.kthvalue(every, dropped).values
            kept = {site: (score > threshold).tolist() for site, score in scores.items()}
        else:
            kept = {site: [True] * len(score) for site, score in scores.items()}
        self.config.rank_pattern = {f"{site}.lora_E": left for site, left in kept.items()}

    def _mask(self, sites: Mapping[str, Params]) -> None:
        self.masked = True
        with torch.no_grad():
            for site, p in sites.items():
                kept = self.config.kept(site)
                if kept is not None and len(kept) == len(p["E"]):
                    p["E"].masked_fill_(~torch.tensor(kept, device=p["E"].device)[:, None], 0.0)

    def state(self) -> dict[str, Tensor]:
        kept = {
            f"kept.{name.removesuffix('.lora_E')}": torch.tensor(left, dtype=torch.bool)
            for name, left in (self.config.rank_pattern or {}).items()
        }
        smoothed = {"sensitivity": self.sensitivity, "uncertainty": self.uncertainty}
        return kept | {
            f"{what}.{site}.{name}": tensor
            for what, held in smoothed.items()
            for (site, name), tensor in held.items()
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        held: dict[str, dict[tuple[str, str], Tensor]] = {"sensitivity": {}, "uncertainty": {}}
        kept = {}
        for key, tensor in state.items():
            what, _, rest = key.partition(".")
            if what == "kept":
                kept[f"{rest}.lora_E"] = tensor.tolist()
            else:
                site, _, name = rest.rpartition(".")
                held[what][site, name] = tensor
        self.config.rank_pattern = kept or None
        self.sensitivity, self.uncertainty = held["sensitivity"], held["uncertainty"]


def _adapted(sites: Mapping[str, Params]) -> dict[str, Params]:
    """The layers that hold triplets; others hold a bias or a whole module."""
    return {name: p for name, p in sites.items() if "E" in p}
