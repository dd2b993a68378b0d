"""OFT: y = W (R^T x) + b, where R has (b, b) orthogonal blocks on its diagonal, R = (I - Q)(I + Q)^-1 of trained
skew Q (Cayley), or the first terms of its Neumann series.

Qiu et al. 2023, arXiv:2306.07280; the series: Qiu et al. 2025, arXiv:2506.19847. COFT keeps |Q| within eps by
projecting the tensor itself whenever it is used. An embedding's vectors are turned, not its ids; a convolution's
blocks lie along channels x kernel. Where HF PEFT folds turned patches together without dividing by how often
they overlap, so that a new adapter changes the output, here W is turned. `module_dropout` replaces blocks by I
while training, as in the paper; HF PEFT makes the layer for it and never calls it.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from peft_dist import starts
from peft_dist.config import TargetedConfig
from peft_dist.contract import BaseLayer, Draw, Enter, Param, Params, Site
from peft_dist.errors import ConfigError
from peft_dist.lazy import lazy
from peft_dist.methods.activation.turning import Turning
from peft_dist.methods.weight.bias import OwnBias

if TYPE_CHECKING:
    from torch import Tensor

torch, fused = lazy("torch"), lazy("peft_dist.fused")


@dataclass
class OFTConfig(TargetedConfig, OwnBias, Turning):
    """HF PEFT's OFTConfig.

    Args:
        r: number of blocks; 0 where `oft_block_size` is given.
        oft_block_size: b; 0 where `r` is given. Either goes to the nearest divisor where it is none.
        module_dropout: share of the blocks that are I while training, in [0, 1).
        fan_in_fan_out: the weight is stored (in, out); known from the layer, kept for checkpoints.
        bias: which biases are trained too: none, all, or those of the targets (oft_only).
        init_weights: True: start at R = I; False: at random.
        layers_to_transform: indices of the layers to adapt; all where None.
        layers_pattern: name of the list of layers that those indices count.
        coft: keep R near I. eps: how near.
        block_share: one block for all places.
        use_cayley_neumann: R by a series instead of an inverse.
        num_cayley_neumann_terms: of that series.
    """

    r: int = 0
    oft_block_size: int = 32
    module_dropout: float = 0.0
    target_modules: list[str] | str | None = None
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "oft_only"] = "none"
    exclude_modules: list[str] | str | None = None
    init_weights: bool = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    coft: bool = False
    eps: float = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5

    prefix: ClassVar[str] = "oft_"
    own_biases: ClassVar[str] = "oft_only"
    layers: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv2d", "conv3d", "embedding"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "OFT"
        self.check_layers(of_str=False)
        self.check_bias()
        if (self.r != 0) == (self.oft_block_size != 0):
            raise ConfigError(
                f"OFTConfig: r = {self.r} and oft_block_size = {self.oft_block_size}; one of them is given, the "
                "other is 0, since r x oft_block_size = in."
            )
        for name in ("r", "oft_block_size"):
            if getattr(self, name) < 0:
                raise ConfigError(f"OFTConfig.{name}: {getattr(self, name)!r}; it is positive, or 0.")
        if self.init_weights not in (True, False):
            raise ConfigError(f"OFTConfig.init_weights: {self.init_weights!r} is not one of True, False.")
        if not 0 <= self.module_dropout < 1:
            raise ConfigError(f"OFTConfig.module_dropout: {self.module_dropout!r}; it lies in [0, 1).")

    @classmethod
    def check_age(cls, values: Mapping[str, Any]) -> None:
        if "oft_block_size" not in values and "r" in values:
            raise ConfigError(
                "OFTConfig.oft_block_size: the file has none, so a version of HF PEFT before 0.14 wrote it, whose "
                "tensors mean something else. Train the adapter again."
            )
        number = re.match(r"(\d+)\.(\d+)", str(values.get("peft_version") or "0.0"))
        is_old = number is None or (int(number[1]), int(number[2])) < (0, 18)
        if values.get("use_cayley_neumann") and is_old:
            warnings.warn(
                "OFTConfig.use_cayley_neumann: HF PEFT before 0.18 had another series; the adapter may say "
                "something else here. Train it again.",
                stacklevel=4,
            )

    def block_size(self, site: Site) -> int:
        """b at `site`: what is asked for, or what divides and is nearest to it."""
        size = turned_size(site)
        fits = nearest_divisor(size, self.r or self.oft_block_size)
        return size // fits if self.r else fits

    def facts(self, site: Site) -> dict[str, Any]:
        size = self.block_size(site)
        return {"r": turned_size(site) // size, "oft_block_size": size}

    def params(self, site: Site) -> dict[str, Param]:
        size, b = turned_size(site), self.block_size(site)
        name, wish, fits = ("r", self.r, size // b) if self.r else ("oft_block_size", self.oft_block_size, b)
        if fits != wish:
            warnings.warn(
                f"OFTConfig.{name}: {wish} does not divide the {size} columns of {site.name}; {fits} is used.",
                stacklevel=2,
            )
        shape = (1 if self.block_share else size // b, b * (b - 1) // 2)
        key = "oft_embedding_R.weight" if site.kind == "embedding" else "oft_R.weight"
        start = starts.zeros if self.init_weights else starts.gauss(0.1)
        return {"Q": Param(key, ("blocks", "b(b-1)/2"), shape, start), **self.bias_params(site)}

    def draws(self, site: Site) -> dict[str, Draw]:
        if not self.module_dropout or self.block_share or site.kind == "embedding":
            return {}
        return {"drawn": Draw((turned_size(site) // self.block_size(site),))}

    def rotation(self, p: Params) -> Tensor:
        """R's blocks (blocks, b, b)."""
        R = p["R"] if "R" in p else self._rotation(fused.skew(self._entries(p)))
        return kept(R, p["drawn"], self.module_dropout) if "drawn" in p else R

    def _entries(self, p: Params) -> Tensor:
        Q = p["Q"]
        if self.coft:
            with torch.no_grad():
                Q.copy_(self._projected(Q))
            # What the backward keeps is not the tensor that the next forward may project again.
            Q = Q.clone()
        return Q

    def _projected(self, Q: Tensor) -> Tensor:
        eps = self.eps / math.sqrt(Q.shape[0])
        size = (2 * Q.square().sum(1, keepdim=True)).sqrt()
        return torch.where(size <= eps, Q, eps * Q / size)

    def _rotation(self, Q: Tensor) -> Tensor:
        I = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
        if not self.use_cayley_neumann:
            return cayley(Q)
        # I + 2 Q + 2 Q^2 + ... + Q^n; HF PEFT's series of four terms is the one of three.
        n = max(self.num_cayley_neumann_terms - 1, 3)
        if self.num_cayley_neumann_terms < 3:
            return (I + 2 * Q if self.num_cayley_neumann_terms == 2 else I + 0 * Q).expand(Q.shape)
        R, power = I + 2 * Q, Q
        for _ in range(n - 2):
            power = power @ Q
            R = R + 2 * power
        return R + power @ Q

    def made(self, sites: Mapping[str, Params]) -> Mapping[str, Params]:
        alike: dict[Any, dict[str, Tensor]] = {}
        for name, p in sites.items():
            if "Q" in p and self._is_series(p):
                Q = p["Q"]
                alike.setdefault((Q.shape[1], Q.dtype, Q.device), {})[name] = Q
        return {
            name: _with_inverse(*each)
            for Qs in alike.values()
            for name, each in zip(Qs, fused.rotations(list(Qs.values())), strict=True)
        }

    def before(self, p: Params, base: BaseLayer, x: Tensor) -> Tensor:
        return x if base.site.kind == "embedding" else turn(x, self.rotation(p))

    def after(self, p: Params, base: BaseLayer, y: Tensor) -> Tensor:
        y = turn(y, self.rotation(p)) if base.site.kind == "embedding" else y
        return self.with_bias(y, p, base)

    def forward(self, p: Params, base: BaseLayer, x: Tensor, enter: Enter) -> Tensor:
        if self._is_series(p) and (ys := self._by_series([p], [base], x)):
            return self.with_bias(ys[0], p, base)
        if not (frozen := fused.plain(base, x, p["Q"])):
            return super().forward(p, base, x, enter)
        R = self.rotation(p)
        R = R.expand(base.site.in_ // R.shape[-1], -1, -1)
        return self.with_bias(fused.turned(x, [(*frozen, R, None)])[0], p, base)

    def _is_series(self, p: Params) -> bool:
        """Whether R is I + 2 Q + 2 Q^2 + 2 Q^3 + Q^4 of each block's own Q, and nothing else."""
        is_usual = self.use_cayley_neumann and self.num_cayley_neumann_terms == 5
        return is_usual and not self.coft and not self.block_share and "drawn" not in p

    @classmethod
    def together(
        cls, methods: Sequence[OFTConfig], ps: Sequence[Params], bases: Sequence[BaseLayer], x: Tensor
    ) -> Sequence[Tensor] | None:
        if not all(m._is_series(p) for m, p in zip(methods, ps, strict=True)):
            return None
        if len({p["Q"].shape for p in ps}) > 1:
            return None
        ys = cls._by_series(ps, bases, x)
        return ys and [m.with_bias(y, p, base) for m, y, p, base in zip(methods, ys, ps, bases, strict=True)]

    @staticmethod
    def _by_series(ps: Sequence[Params], bases: Sequence[BaseLayer], x: Tensor) -> tuple[Tensor, ...] | None:
        """What layers without their own biases give, where they may be computed without being called."""
        Qs = [p["Q"] for p in ps]
        frozen = [fused.foldable(base, x, Q) for base, Q in zip(bases, Qs, strict=True)]
        if not (folds := all(frozen)):
            frozen = [fused.plain(base, x, Q) for base, Q in zip(bases, Qs, strict=True)]
        if not all(frozen):
            return None
        turns = [(p["R"], p.get("Z")) for p in ps] if all("R" in p for p in ps) else fused.rotations(Qs)
        return fused.turned(x, [(*f, *turn) for f, turn in zip(frozen, turns, strict=True) if f], folds)

    def drawn_delta(self, p: Params, base: BaseLayer) -> Tensor:
        W = base.weight().to(p["Q"].dtype)
        if base.site.kind == "embedding":
            return turn(W.T, self.rotation(p)).T - W
        return turn(W, self.rotation(p).mT) - W


def _with_inverse(R: Tensor, Z: Tensor | None) -> Params:
    return {"R": R} if Z is None else {"R": R, "Z": Z}


def turned_size(site: Site) -> int:
    """The length of what R turns: a row of W, or an embedding's vector."""
    return site.out if site.kind == "embedding" else site.in_


def nearest_divisor(size: int, wish: int) -> int:
    """The divisor of `size` nearest to `wish`, the smaller of two as near."""
    if wish >= size:
        return size
    lower = next(n for n in range(wish, 0, -1) if size % n == 0)
    higher = next(n for n in range(wish, size + 1) if size % n == 0)
    return lower if wish - lower <= higher - wish else higher


def cayley(Q: Tensor) -> Tensor:
    """(I - Q)(I + Q)^-1 (n, b, b) of skew Q."""
    exact = Q.to(torch.promote_types(Q.dtype, torch.float32))
    I = torch.eye(Q.shape[-1], dtype=exact.dtype, device=Q.device)
    return torch.linalg.solve(I + exact, (I - exact).expand(exact.shape), left=False).to(Q.dtype)


def kept(R: Tensor, drawn: Tensor, share: float) -> Tensor:
    """R (blocks, b, b) with a share of its blocks, rounded down, replaced by I: those of the smallest draws."""
    num, left_out = int(share * len(drawn)), torch.zeros_like(drawn, dtype=torch.bool)
    left_out[drawn.topk(num, largest=False)[1]] = True
    I = torch.eye(R.shape[-1], dtype=R.dtype, device=R.device)
    return torch.where(left_out[:, None, None], I, R)


def turn(x: Tensor, R: Tensor) -> Tensor:
    """x (..., blocks x b) times the diagonal of blocks R (blocks or 1, b, b)."""
    b = R.shape[-1]
    blocks = x.to(R.dtype).unflatten(-1, (-1, b))
    if len(R) == 1:
        return (blocks @ R[0]).flatten(-2)
    rows = blocks.flatten(0, -3).transpose(0, 1)
    return torch.bmm(rows, R).transpose(0, 1).reshape(x.shape)
