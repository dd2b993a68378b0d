"""BOFT: y = s (W B^T x) + b, where B is a product of m orthogonal factors, each of Cayley blocks between a
butterfly's permutations: B = F_m ... F_1, F_i = P_i diag(R_i) P_i^T.

Liu et al. 2024, arXiv:2311.06243. HF PEFT without its CUDA extension makes one factor, whatever the config says;
here there are as many as it says. Dropout replaces blocks of one factor by I while training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from peft_dist import starts
from peft_dist.config import TargetedConfig
from peft_dist.contract import BaseLayer, Draw, Param, Params, Site
from peft_dist.errors import ConfigError
from peft_dist.lazy import lazy
from peft_dist.methods.activation.oft import cayley, kept, turn
from peft_dist.methods.activation.turning import Turning
from peft_dist.methods.weight.bias import OwnBias

if TYPE_CHECKING:
    from torch import Tensor

torch = lazy("torch")


@dataclass
class BOFTConfig(TargetedConfig, OwnBias, Turning):
    """HF PEFT's BOFTConfig.

    Args:
        boft_block_size: b, which divides in; 0 where `boft_block_num` is given.
        boft_block_num: in / b; 0 where `boft_block_size` is given.
        boft_n_butterfly_factor: m, from 1; with more than one b and in / b are even, and 2^(m-1) divides in / b.
        boft_dropout: share of the blocks of one factor that are I while training, in [0, 1).
        fan_in_fan_out: the weight is stored (in, out); known from the layer, kept for checkpoints.
        bias: which biases are trained too: none, all, or those of the targets (boft_only).
        init_weights: True: start at B = I and s = 1; False: at random.
        layers_to_transform: indices of the layers to adapt; all where None.
        layers_pattern: name of the list of layers that those indices count.
    """

    boft_block_size: int = 4
    boft_block_num: int = 0
    boft_n_butterfly_factor: int = 1
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    boft_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    modules_to_save: list[str] | None = None
    init_weights: bool = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    prefix: ClassVar[str] = "boft_"
    own_biases: ClassVar[str] = "boft_only"
    layers: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv2d", "conv3d"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "BOFT"
        self.check_layers(of_str=False)
        self.check_bias()
        if (self.boft_block_size != 0) == (self.boft_block_num != 0):
            raise ConfigError(
                f"BOFTConfig: boft_block_size = {self.boft_block_size} and boft_block_num = "
                f"{self.boft_block_num}; one of them is given, the other is 0, since their product is in."
            )
        if self.boft_n_butterfly_factor < 1:
            raise ConfigError(
                f"BOFTConfig.boft_n_butterfly_factor: {self.boft_n_butterfly_factor!r}; it is at least 1."
            )
        if self.init_weights not in (True, False):
            raise ConfigError(f"BOFTConfig.init_weights: {self.init_weights!r} is not one of True, False.")
        if not 0 <= self.boft_dropout < 1:
            raise ConfigError(f"BOFTConfig.boft_dropout: {self.boft_dropout!r}; it lies in [0, 1).")

    @property
    def full_size_through_weight(self) -> int:  # type: ignore[override]
        # Each factor's input but the first, what s scales, and dW.
        return self.boft_n_butterfly_factor + 1

    def blocks(self, site: Site) -> tuple[int, int]:
        """(number, size) of a factor's blocks at `site`."""
        name = "boft_block_num" if self.boft_block_num else "boft_block_size"
        part, m = getattr(self, name), self.boft_n_butterfly_factor
        if part < 1 or site.in_ % part:
            raise ConfigError(f"BOFTConfig.{name}: {part!r} does not divide in = {site.in_} of {site.name}.")
        other = site.in_ // part
        num, b = (part, other) if self.boft_block_num else (other, part)
        if m > 1 and (num % 2 ** (m - 1) or b % 2):
            raise ConfigError(
                f"BOFTConfig.boft_n_butterfly_factor: {m} at {site.name}, where in = {site.in_} has {num} blocks "
                f"of {b}; 2^{m - 1} has to divide their number, and 2 their size."
            )
        return num, b

    def facts(self, site: Site) -> dict[str, Any]:
        return {
            "boft_block_num": self.blocks(site)[0],
            "boft_block_size": self.blocks(site)[1],
        }

    def params(self, site: Site) -> dict[str, Param]:
        (num, b), m = self.blocks(site), self.boft_n_butterfly_factor
        R = starts.zeros if self.init_weights else starts.gauss(0.1)
        s = starts.ones if self.init_weights else starts.gauss(0.1, mean=1.0)
        # HF PEFT's convolution holds it the other way round.
        scale = (("1", "out"), (1, site.out)) if site.kernel else (("out", "1"), (site.out, 1))
        return {
            "R": Param("boft_R", ("factors", "blocks", "b", "b"), (m, num, b, b), R),
            "s": Param("boft_s", *scale, s),
            **self.bias_params(site),
        }

    def draws(self, site: Site) -> dict[str, Draw]:
        # The last one chooses the factor.
        return {"drawn": Draw((self.blocks(site)[0] + 1,))} if self.boft_dropout else {}

    def rotation(self, p: Params) -> Tensor:
        """The factors' blocks (m, blocks, b, b)."""
        R = p["R"]
        R = cayley((0.5 * (R - R.mT)).flatten(0, 1)).view(R.shape)
        if "drawn" not in p:
            return R
        chosen = int(p["drawn"][-1] * len(R))
        thinned = kept(R[chosen], p["drawn"][:-1], self.boft_dropout)
        return torch.cat([R[:chosen], thinned[None], R[chosen + 1 :]])

    def before(self, p: Params, base: BaseLayer, x: Tensor) -> Tensor:
        R = self.rotation(p)
        for i in range(len(R) - 1, -1, -1):
            order = butterfly(x.shape[-1], R.shape[-1], i).to(x.device)
            x = turn(x if i == 0 else x[..., order.argsort()], R[i])
            x = x if i == 0 else x[..., order]
        return x

    def after(self, p: Params, base: BaseLayer, y: Tensor) -> Tensor:
        s, b = p["s"].flatten(), base.bias()
        y = y * s if b is None else (y - b) * s + b
        return self.with_bias(y, p, base)

    def drawn_delta(self, p: Params, base: BaseLayer) -> Tensor:
        W = base.weight().to(p["R"].dtype)
        R, turned = self.rotation(p).mT, W
        for i in range(len(R)):
            order = butterfly(W.shape[-1], R.shape[-1], i).to(W.device)
            turned = turn(turned if i == 0 else turned[:, order.argsort()], R[i])
            turned = turned if i == 0 else turned[:, order]
        return p["s"].view(-1, 1) * turned - W


def butterfly(size: int, b: int, i: int) -> Tensor:
    """The order of factor i's entries: within each b 2^i of them, the even halves of blocks before the odd."""
    order = torch.arange(size)
    if i == 0:
        return order
    return order.view(-1, b * 2**i // (b // 2) // 2, 2, b // 2).transpose(1, 2).reshape(-1)
