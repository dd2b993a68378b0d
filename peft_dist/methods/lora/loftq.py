"""LoftQ: W is replaced by Q = q(W - s B' A'), what quantisation leaves of it, and s B A starts as the r principal
directions of W - Q; repeated `loftq_iter` times with B' A' of the time before.

Li et al. 2023, arXiv:2310.08659. q is NF4 in blocks of 64, or 8 bits a row. A' and B' are saved, so that the
base is replaced when the adapter is loaded without another decomposition. HF PEFT leaves s out of the start.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peft_dist import starts
from peft_dist.contract import BaseLayer, Param, Params, Site
from peft_dist.errors import ConfigError
from peft_dist.lazy import lazy
from peft_dist.methods.lora.variant import Variant, linear_alone, with_start

if TYPE_CHECKING:
    from torch import Tensor

torch = lazy("torch")

# The quantiles of a normal distribution that NF4's sixteen codes stand for (arXiv:2305.14314, appendix E).
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
BLOCK = 64
_DONE = "loftq_replaced"


def nf4(W: Tensor) -> Tensor:
    """W as NF4 stores it: in blocks of 64 along its memory, each scaled by its largest entry."""
    flat = W.flatten()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    scale = blocks.abs().amax(1, keepdim=True).clamp(min=torch.finfo(W.dtype).tiny)
    codes = torch.tensor(NF4, dtype=W.dtype, device=W.device)
    nearest = torch.bucketize(blocks / scale, (codes[1:] + codes[:-1]) / 2)
    return (codes[nearest] * scale).flatten()[: len(flat)].view_as(W)


def int8(W: Tensor) -> Tensor:
    """W in whole 127ths of each row's largest entry."""
    scale = W.abs().amax(1, keepdim=True).clamp(min=torch.finfo(W.dtype).tiny) / 127
    return (W / scale).round() * scale


def quantised(W: Tensor, bits: int) -> Tensor:
    """What `bits` bits keep of W.

    Raises:
        ConfigError: they are neither 4 nor 8.
    """
    if bits not in (4, 8):
        raise ConfigError(f"LoftQConfig.loftq_bits: {bits!r} is not one of 4, 8.")
    return nf4(W) if bits == 4 else int8(W)


def principal(W: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """(B (out, r), A (r, in)): the r principal directions of W, their strength in equal parts on both."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    root = S[:r].sqrt()
    return U[:, :r] * root, root[:, None] * Vh[:r]


def loftq_init(
    weight: Tensor, num_bits: int, reduced_rank: int, num_iter: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """(Q (out, in), A (r, in), B (out, r)) for an adapter whose s is 1, by HF PEFT's name and arguments."""
    if num_iter < 1:
        raise ConfigError(f"loftq_init: num_iter is {num_iter!r}; it is at least 1.")
    W = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    Q, (B, A), _ = alternated(W, num_bits, reduced_rank, num_iter)
    return Q.to(weight.dtype), A, B


def alternated(W: Tensor, bits: int, r: int, iterations: int) -> Any:
    """(Q, (B, A), (B', A')): what is left of W, its complement's directions, and those of the time before or
    None."""
    before, factors, Q = None, None, W
    for _ in range(iterations):
        before = factors
        Q = quantised(W if before is None else W - before[0] @ before[1], bits)
        factors = principal(W - Q, r)
    return Q, factors, before


class Loftq(Variant):
    """LoRA beside a base that is replaced by what its quantisation keeps."""

    @classmethod
    def sits_on(cls, lora: Any, site: Site) -> bool:
        return linear_alone(lora, site)

    def params(self, site: Site) -> dict[str, Param]:
        return with_start(super().params(site), starts.zeros)

    def start_from_base(self, p: Params, base: BaseLayer) -> None:
        super().start_from_base(p, base)
        if base.is_quantised:  # type: ignore[attr-defined]
            raise ConfigError(
                f"init_lora_weights 'loftq': {base.site.name!r} is quantised already. Load the base in full, or call "
                "replace_lora_weights_loftq on this one with init_lora_weights True."
            )
        settings, r = self.lora.loftq_config, self.lora.rank(base.site)
        W = base.weight()
        W = W.to(torch.promote_types(W.dtype, torch.float32))
        root = self.lora.scaling(base.site) ** 0.5
        _, factors, before = alternated(W, settings["loftq_bits"], r, settings["loftq_iter"])
        for names, found in ((("B", "A"), factors), (("B0", "A0"), before)):
            for name, factor in zip(names, found or (), strict=False):
                p[name].copy_(factor / root)

    def replace_base(self, p: Params, base: BaseLayer) -> None:
        layer: Any = base.layer  # type: ignore[attr-defined]
        if layer.__dict__.get(_DONE):
            return
        W = base.weight()
        exact = W.to(torch.promote_types(W.dtype, torch.float32))
        start = self.lora.scaling(base.site) * (p["B0"] @ p["A0"])
        base.add_(quantised(exact - start, self.lora.loftq_config["loftq_bits"]) - exact)  # type: ignore[attr-defined]
        layer.__dict__[_DONE] = True
