"""OLoRA: B starts as the first r orthonormal columns of W's QR decomposition and A as the rows that go with
them.

Büyükakyüz 2024, arXiv:2406.01775. HF PEFT decomposes the transposed weight of a Conv1D, whose factors then do
not fit; here W is (out, in) on every layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from peft_dist.contract import BaseLayer
from peft_dist.lazy import lazy
from peft_dist.methods.lora.variant import Residual

if TYPE_CHECKING:
    from torch import Tensor

torch = lazy("torch")


class Olora(Residual):
    """LoRA from W = Q R."""

    def start_factors(self, base: BaseLayer, r: int) -> tuple[Tensor, Tensor]:
        W = base.weight()
        Q, R = torch.linalg.qr(W.to(torch.promote_types(W.dtype, torch.float32)))
        return Q[:, :r], R[:r]
