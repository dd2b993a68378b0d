"""VB-LoRA: dW = B A, whose rows and columns are made of vectors from one bank, shared by all layers: each piece
is the softmax-weighted sum of the k bank vectors with the highest logits.

Li et al. 2024, arXiv:2405.15179. With `save_only_topk_weights` a checkpoint holds the k indices and k - 1 weights
of a piece in place of its logits: enough to infer and to merge, not to train.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from peft_dist import starts
from peft_dist.config import TargetedConfig
from peft_dist.contract import Param, Params, Site
from peft_dist.errors import BaseLayerError, ConfigError, UntrainableError
from peft_dist.lazy import lazy
from peft_dist.methods.weight.low_rank import LowRankMethod

if TYPE_CHECKING:
    from torch import Tensor

torch, F = lazy("torch"), lazy("torch.nn.functional")


@dataclass
class VBLoRAConfig(TargetedConfig, LowRankMethod):
    """HF PEFT's VBLoRAConfig.

    Args:
        r: rank, at least 1.
        num_vectors: vectors in the bank. vector_length: of each; divides the sizes of every target.
        topk: how many of them make a piece, at least 1.
        save_only_topk_weights: small checkpoints, which are for inference and merging only.
        vblora_dropout: share of the branch's input that is zeroed while training, in [0, 1).
        fan_in_fan_out: the weight is stored (in, out); known from the layer, kept for checkpoints.
        bias: which biases are trained too: none, all, or those of the targets (vblora_only).
        init_vector_bank_bound: the bank starts uniform between minus it and it.
        init_logits_std: the logits start normal with it.
        layers_to_transform: indices of the layers to adapt; all where None.
        layers_pattern: name of the list of layers that those indices count.
    """

    r: int = 4
    num_vectors: int = 256
    vector_length: int = 256
    topk: int = 2
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    save_only_topk_weights: bool = False
    vblora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    modules_to_save: list[str] | None = None
    init_vector_bank_bound: float = 0.02
    init_logits_std: float = 0.1
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    prefix: ClassVar[str] = "vblora_"
    own_biases: ClassVar[str] = "vblora_only"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "VBLORA"
        self.check_layers(of_str=False)
        self.check_bias()
        for name in ("r", "num_vectors", "vector_length", "topk"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"VBLoRAConfig.{name}: {value!r}; a whole number of at least 1.")
        if self.topk > self.num_vectors:
            raise ConfigError(
                f"VBLoRAConfig.topk: {self.topk}; it is at most num_vectors, which is {self.num_vectors}."
            )
        if not 0 <= self.vblora_dropout < 1:
            raise ConfigError(f"VBLoRAConfig.vblora_dropout: {self.vblora_dropout!r}; it lies in [0, 1).")

    @property
    def dropout(self) -> float:
        return self.vblora_dropout

    def shared(self, sites: Sequence[Site]) -> dict[str, Param]:
        start = starts.uniform(self.init_vector_bank_bound)
        size = (self.num_vectors, self.vector_length)
        return {"bank": Param("vblora_vector_bank", ("vectors", "length"), size, start)}

    def params(self, site: Site) -> dict[str, Param]:
        for name, size in (("in", site.in_), ("out", site.out)):
            if size % self.vector_length:
                raise BaseLayerError(
                    f"{site.name}: vector_length {self.vector_length} does not divide its {name} size {size}. "
                    "Choose one that divides the sizes of every target, or leave this layer out."
                )
        start, h, b = starts.gauss(self.init_logits_std), self.num_vectors, self.vector_length
        a_shape, b_shape = (self.r, site.in_ // b, h), (site.out // b, self.r, h)
        return {
            "A": Param("vblora_logits_A", ("r", "pieces", "vectors"), a_shape, start),
            "B": Param("vblora_logits_B", ("pieces", "r", "vectors"), b_shape, start),
            **self.bias_params(site),
        }

    def check_training(self, p: Params, site: Site) -> None:
        if self.save_only_topk_weights and p["A"][0, 0].isinf().any():
            raise UntrainableError(
                f"{site.name}: this adapter was saved with save_only_topk_weights=True, which leaves its logits "
                "infinite, so it cannot be trained further. Call eval(), or train from a whole checkpoint."
            )

    def facts(self, site: Site) -> dict[str, Any]:
        return {"r": self.r, "topk": self.topk}

    def pair(self, p: Params, site: Site) -> tuple[Tensor, Tensor]:
        A, B = (self.pieces(p[name], p["bank"]) for name in ("A", "B"))
        return A.flatten(1), B.mT.flatten(0, 1)

    def pieces(self, logits: Tensor, bank: Tensor) -> Tensor:
        """(..., length): the mixture of bank vectors that logits (..., vectors) mean."""
        highest, indices = logits.flatten(0, -2).topk(self.topk, dim=-1)
        mixed = F.embedding_bag(indices, bank, per_sample_weights=highest.softmax(-1), mode="sum")
        return mixed.view(*logits.shape[:-1], -1)

    def export(self, p: Params, site: Site) -> dict[str, Tensor] | None:
        if not self.save_only_topk_weights or site.kind == "module":
            return None
        wanted = self.params(site).items()
        saved = {param.saved or param.key: p[name] for name, param in wanted if name not in ("A", "B")}
        for name in ("A", "B"):
            highest, indices = p[name].topk(self.topk, dim=-1)
            saved[f"vblora_logits_{name}_topk_indices"] = indices.to(self.smallest_int())
            # The last weight is what the others leave of 1.
            saved[f"vblora_logits_{name}_topk_weights"] = highest.softmax(-1)[..., :-1].contiguous()
        return saved

    def smallest_int(self) -> Any:
        """The dtype in which an index of a vector is saved."""
        for dtype, bits in ((torch.uint8, 8), (torch.int16, 15), (torch.int32, 31)):
            if self.num_vectors < 2**bits:
                return dtype
        return torch.int64

    def restore(self, saved: Mapping[str, Tensor], site: Site) -> Mapping[str, Tensor]:
        restored = {key: t for key, t in saved.items() if "_topk_" not in key}
        for name in ("vblora_logits_A", "vblora_logits_B"):
            indices, weights = (saved.get(f"{name}_topk_{what}") for what in ("indices", "weights"))
            if indices is None or weights is None:
                continue
            weights = torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], dim=-1)
            nothing = weights.new_full((*weights.shape[:-1], self.num_vectors), float("-inf"))
            restored[name] = nothing.scatter(-1, indices.long(), weights.log())
        return restored
