"""Poly: y = W x + A_t B_t x / r, where each task mixes low-rank skills: A_t and B_t are the sums of the skills' A
and B, weighted by what a router has learned for the task. With `n_splits` each part of the input and output has a
mixture of its own (multi-head routing).

Ponti et al. 2023, arXiv:2202.13914; multi-head routing: Caccia et al. 2023, arXiv:2211.03831. Each sequence says
its task by `task_ids`. While training the weights are relaxed Bernoulli draws, else sigmoids; both normalised.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from peft_dist import starts
from peft_dist.config import TargetedConfig
from peft_dist.contract import BaseLayer, Draw, Param, Params, Site, WeightMethod
from peft_dist.errors import BaseLayerError, ConfigError, RowsError
from peft_dist.lazy import lazy

if TYPE_CHECKING:
    from torch import Tensor

torch = lazy("torch")


@dataclass
class PolyConfig(TargetedConfig, WeightMethod):
    """HF PEFT's PolyConfig.

    Args:
        r: rank of each skill, at least 1.
        init_weights: True: the skills' B are zero; False: both are random.
        poly_type: "poly".
        n_tasks: how many tasks; `task_ids` are below it. n_skills: how many each layer has.
        n_splits: parts of the input and the output with a mixture each; divides the sizes of every target.
    """

    r: int = 8
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    init_weights: bool = True
    poly_type: Literal["poly"] = "poly"
    n_tasks: int = 1
    n_skills: int = 4
    n_splits: int = 1

    prefix: ClassVar[str] = "poly_"
    merges: ClassVar[bool] = False
    reads: ClassVar[tuple[str, ...]] = ("task_ids",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "POLY"
        for name in ("r", "n_tasks", "n_skills", "n_splits"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"PolyConfig.{name}: {value!r}; a whole number of at least 1.")
        if self.poly_type != "poly":
            raise ConfigError(
                f"PolyConfig.poly_type: {self.poly_type!r} is not 'poly', the only one there is."
            )

    def params(self, site: Site) -> dict[str, Param]:
        q, s, r = self.n_splits, self.n_skills, self.r
        for name, size in (("in", site.in_), ("out", site.out)):
            if size % q:
                raise BaseLayerError(
                    f"{site.name}: n_splits {q} does not divide its {name} size {size}. Choose one that "
                    "divides the sizes of every target, or leave this layer out."
                )
        first = starts.transposed(starts.kaiming_uniform)
        last = starts.zeros if self.init_weights else first
        a_shape, b_shape = (q, s, site.in_ // q, r), (q, s, r, site.out // q)
        router, near_0 = (self.n_tasks, q * s), starts.uniform(1e-3)
        return {
            "A": Param("poly_lora_A", ("splits", "skills", "in / splits", "r"), a_shape, first),
            "B": Param("poly_lora_B", ("splits", "skills", "r", "out / splits"), b_shape, last),
            "router": Param("poly_router.module_logits", ("tasks", "splits x skills"), router, near_0),
        }

    def facts(self, site: Site) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("r", "n_tasks", "n_skills", "n_splits", "poly_type")}

    def draws(self, site: Site) -> dict[str, Draw]:
        return {"noise": Draw((self.n_splits * self.n_skills,), each="sequence")}

    def mixtures(self, p: Params, site: Site) -> tuple[Tensor, Tensor]:
        """A (rows, in, r) and B (rows, r, out), one of each for every entry of `task_ids`."""
        tasks = p["task_ids"].to(p["router"].device).flatten()
        wrong = tasks[(tasks < 0) | (tasks >= self.n_tasks)]
        if len(wrong):
            raise RowsError(
                f"{site.name}: task_ids holds {wrong[0].item()}, but the adapter has {self.n_tasks} tasks, "
                "counted from 0."
            )
        logits = p["router"][tasks]
        if "noise" in p:
            # The relaxed Bernoulli distribution at temperature 1: Maddison et al. 2017, arXiv:1611.00712.
            logits = logits + p["noise"].to(logits.dtype).logit(eps=torch.finfo(torch.float32).eps)
        weights = logits.sigmoid().unflatten(1, (self.n_splits, -1))
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-12)
        A = torch.einsum("bqs,qsir->bqir", weights, p["A"]).flatten(1, 2)
        B = torch.einsum("bqs,qsro->brqo", weights, p["B"]).flatten(2)
        return A, B / self.r

    def delta(self, p: Params, base: BaseLayer) -> Tensor:
        """dW of the one task that all sequences have."""
        if len(p["task_ids"].unique()) != 1:
            raise BaseLayerError(
                f"{base.site.name}: sequences of several tasks have no one weight; run one task at a time."
            )
        one = {key: t for key, t in p.items() if key != "noise"}
        A, B = self.mixtures({**one, "task_ids": p["task_ids"][:1]}, base.site)
        return (A[0] @ B[0]).T

    def added(self, p: Params, base: BaseLayer, x: Tensor) -> Tensor:
        A, B = self.mixtures(p, base.site)
        if x.shape[0] % len(A):
            raise RowsError(
                f"{base.site.name}: {len(A)} task_ids for an input of {x.shape[0]} rows. Give one per sequence."
            )
        # Tokens of one sequence, and its beams, stand side by side.
        return torch.bmm(torch.bmm(x.reshape(len(A), -1, x.shape[-1]), A), B).view(*x.shape[:-1], -1)
