"""A variant of LoRA: LoRA underneath, and what the variant changes of it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from peft_dist import starts
from peft_dist.contract import BaseLayer, Enter, Method, Param, Params, Site, WeightMethod
from peft_dist.errors import CheckpointError, ConfigError, TargetError
from peft_dist.lazy import lazy

if TYPE_CHECKING:
    from torch import Tensor

torch = lazy("torch")


def with_start(wanted: dict[str, Param], start: Callable[[Tensor], object]) -> dict[str, Param]:
    """LoRA's tensors and beside them A0 and B0, frozen, of their shapes: what a start from the base keeps."""
    kept = {
        f"{name}0": Param(f"lora_start_{name}", param.dims, param.shape, start, trainable=False)
        for name, param in wanted.items()
        if name in ("A", "B")
    }
    return {**wanted, **kept}


@dataclass(frozen=True)
class Variant(WeightMethod):
    """All is LoRA's, or the variant's below; a subclass says what differs. It wraps, so variants combine.

    Args:
        lora: the LoraConfig, or another variant of it.
    """

    lora: Any

    prefix: ClassVar[str] = "lora_"

    @classmethod
    def sits_on(cls, lora: Any, site: Site) -> bool:
        """Whether LoRA with these settings becomes this variant at `site`.

        Raises:
            TargetError: it was asked for and cannot be had there.
        """
        return True

    def __getattr__(self, name: str) -> Any:
        if name == "lora" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.lora, name)

    @property
    def dropout(self) -> float:
        return self.lora.dropout

    def facts(self, site: Site) -> dict[str, Any]:
        return self.lora.facts(site)

    def params(self, site: Site) -> dict[str, Param]:
        return self.lora.params(site)

    def tied(self, site: Site) -> Method | None:
        return self.lora.tied(site)

    def start_from_base(self, p: Params, base: BaseLayer) -> None:
        self.lora.start_from_base(p, base)

    def restore(self, saved: Mapping[str, Tensor], site: Site) -> Mapping[str, Tensor]:
        return self.lora.restore(saved, site)

    def replace_base(self, p: Params, base: BaseLayer) -> None:
        self.lora.replace_base(p, base)

    def delta(self, p: Params, base: BaseLayer) -> Tensor:
        return self.lora.delta(p, base)

    def factors(self, p: Params, site: Site) -> tuple[Tensor, Tensor] | None:
        """(B (out, k), A (k, in)) with dW = B A; None where dW is no product of such."""
        return self.lora.factors(p, site)

    def bias_delta(self, p: Params, base: BaseLayer) -> Tensor | None:
        return self.lora.bias_delta(p, base)

    def added(self, p: Params, base: BaseLayer, x: Tensor) -> Tensor:
        return self.lora.added(p, base, x)

    def forward(self, p: Params, base: BaseLayer, x: Tensor, enter: Enter) -> Tensor:
        return self.lora.forward(p, base, x, enter)

    @classmethod
    def mixed(cls, methods: Sequence[Any], p: Params, base: BaseLayer, x: Tensor) -> Tensor | None:
        under = [method.lora for method in methods]
        return type(under[0]).mixed(under, p, base, x)


def linear_alone(lora: Any, site: Site) -> bool:
    """Whether a start for linear layers applies: an embedding takes LoRA's usual one instead, as in HF PEFT.

    Raises:
        TargetError: the layer is of another kind.
    """
    if site.kind != "embedding":
        check_kind(lora, site, "linear layers", ("linear",))
    return site.kind == "linear"


def check_kind(lora: Any, site: Site, layers: str, kinds: tuple[str, ...]) -> None:
    """Raises TargetError where the start is for layers of these kinds, and `site` is of another."""
    if site.kind not in kinds:
        raise TargetError(
            f"LoraConfig.init_lora_weights: {lora.init_lora_weights!r} starts {layers}; {site.name!r} is a "
            f"{site.kind}. Leave it out of the targets, or choose another start."
        )


def check_directions(lora: Any, site: Site) -> None:
    """Raises ConfigError where W has fewer directions than the rank."""
    r = lora.rank(site)
    if r > min(site.out, site.in_):
        raise ConfigError(
            f"LoraConfig.r: {r} at {site.name!r}, which is {site.out} x {site.in_}: init_lora_weights "
            f"{lora.init_lora_weights!r} takes at most {min(site.out, site.in_)} directions of it."
        )


class Residual(Variant):
    """A start from the base's own directions B0, A0: W gives them up at the start and the adapter takes them
    on, so that dW = s (B A - B0 A0).

    HF PEFT subtracts s B0 A0 from W in place. Here W stays: A0 and B0 are kept as frozen tensors beside A and
    B, and with them in the checkpoint nothing is decomposed again when it is loaded. HF PEFT ignores them and
    decomposes W.
    """

    @classmethod
    def sits_on(cls, lora: Any, site: Site) -> bool:
        return linear_alone(lora, site)

    @abstractmethod
    def start_factors(self, base: BaseLayer, r: int) -> tuple[Tensor, Tensor]:
        """(B0 (out, r), A0 (r, in)) of a linear layer."""

    def params(self, site: Site) -> dict[str, Param]:
        check_directions(self.lora, site)
        return with_start(super().params(site), starts.inherit)

    def restore(self, saved: Mapping[str, Tensor], site: Site) -> Mapping[str, Tensor]:
        there = [key for key in ("lora_start_A", "lora_start_B") if key in saved]
        if len(there) == 1:
            raise CheckpointError(
                f"{site.name}: the checkpoint has {there[0]} without its counterpart. It holds both, or, as HF PEFT's, "
                "neither."
            )
        return super().restore(saved, site)

    def start_from_base(self, p: Params, base: BaseLayer) -> None:
        super().start_from_base(p, base)
        B, A = self.start_factors(base, self.lora.rank(base.site))
        for name, value in (("B", B), ("A", A)):
            p[name].copy_(value)
            p[f"{name}0"].copy_(value)

    @staticmethod
    def widened(p: Params) -> dict[str, Tensor]:
        """The tensors of a LoRA of rank 2r that does the same: [B, -B0] and [A; A0]."""
        return {
            **{name: t for name, t in p.items() if name not in ("A0", "B0")},
            "A": torch.cat([p["A"], p["A0"]], dim=-2),
            "B": torch.cat([p["B"], -p["B0"]], dim=-1),
        }

    def delta(self, p: Params, base: BaseLayer) -> Tensor:
        return super().delta(self.widened(p), base)

    def factors(self, p: Params, site: Site) -> tuple[Tensor, Tensor] | None:
        return super().factors(self.widened(p), site)

    def added(self, p: Params, base: BaseLayer, x: Tensor) -> Tensor:
        return super().added(self.widened(p), base, x)

    def forward(self, p: Params, base: BaseLayer, x: Tensor, enter: Enter) -> Tensor:
        return super().forward(self.widened(p), base, x, enter)

    @classmethod
    def mixed(cls, methods: Sequence[Any], p: Params, base: BaseLayer, x: Tensor) -> Tensor | None:
        # Only trained tensors come stacked: each part runs by itself.
        return None
