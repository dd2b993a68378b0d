"""Prefix tuning: learned keys and values before those of each layer's attention.

A row of `prompt_embeddings` (n, layers x 2 x heads x width of a head) is one virtual token's keys and values, all
layers after another: K_0, V_0, K_1, V_1, ... With `prefix_projection` an MLP makes them of n embeddings while
training; what is saved is what it made, so a loaded adapter has no MLP. In a base with an encoder and a decoder
the decoder's own attention gets them; with two submodules layer l gets entries 4l and 4l + 1 counted around the
end, as HF PEFT has it.

Li and Liang 2021, arXiv:2101.00190.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from peft_dist import starts
from peft_dist.config import PromptLearningConfig
from peft_dist.contract import BaseSizes, Param, Params, PastMethod, Site
from peft_dist.errors import ConfigError
from peft_dist.lazy import lazy
from peft_dist.methods.prompt.encoded import EncodedPrompt

if TYPE_CHECKING:
    from torch import Tensor

torch = lazy("torch")


@dataclass
class PrefixTuningConfig(PromptLearningConfig, EncodedPrompt, PastMethod):
    """HF PEFT's PrefixTuningConfig. Its `token_dim` and `num_attention_heads` are those of the keys.

    Args:
        init_weights: "zero" starts with keys and values of zero; None at random.
        encoder_hidden_size: of the MLP; `token_dim` where it is not given.
        prefix_projection: train an MLP that makes the keys and values.
    """

    init_weights: Literal["zero"] | None = None
    encoder_hidden_size: int | None = None
    prefix_projection: bool = False

    prefix: ClassVar[str] = "prompt_"
    of_the_base: ClassVar[frozenset[str]] = frozenset({"token_dim", "num_attention_heads"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "PREFIX_TUNING"
        if self.init_weights not in (None, "zero"):
            raise ConfigError(
                f"PrefixTuningConfig.init_weights: {self.init_weights!r}; it is 'zero' or None."
            )

    def sizes_of(self, sizes: BaseSizes) -> dict[str, int]:
        if not sizes.num_kv_layers or not sizes.num_kv_heads or not sizes.kv_width:
            raise ConfigError("PrefixTuningConfig: the base's config does not say its layers and heads.")
        if self.num_layers is not None and self.num_layers < sizes.num_kv_layers:
            raise ConfigError(
                f"PrefixTuningConfig.num_layers: {self.num_layers}, but the base has {sizes.num_kv_layers}. "
                "Leave it out."
            )
        return {
            "token_dim": sizes.num_kv_heads * sizes.kv_width,
            "num_layers": sizes.num_kv_layers,
            "num_attention_heads": sizes.num_kv_heads,
        }

    @property
    def width(self) -> int:
        """Of a token: keys and values of all layers."""
        assert self.num_layers is not None and self.token_dim is not None
        return self.num_layers * 2 * self.token_dim

    def params(self, site: Site) -> dict[str, Param]:
        n, d = self.num_tokens, self.token_dim
        last = starts.zeros if self.init_weights == "zero" else None
        if not self.prefix_projection or self.inference_mode:
            return {"embedding.weight": _table((n, self.width), last or starts.normal)}
        assert d is not None
        hidden = self.encoder_hidden_size or d
        made = {"embedding.weight": _table((n, d), starts.normal)}
        for layer, from_, to, start in ((0, d, hidden, None), (2, hidden, self.width, last)):
            for kind, dims, shape, own in (
                ("weight", ("to", "from"), (to, from_), starts.kaiming_uniform),
                ("bias", ("to",), (to,), starts.uniform(from_**-0.5)),
            ):
                name = f"transform.{layer}.{kind}"
                made[name] = Param(f"prompt_encoder.{name}", dims, shape, start or own, saved=name)
        return made

    def embeds(self, p: Params, training: bool = False) -> Tensor:
        h = p["embedding.weight"]
        if "transform.0.weight" in p:
            linear = torch.nn.functional.linear
            h = linear(h, p["transform.0.weight"], p["transform.0.bias"]).tanh()
            h = linear(h, p["transform.2.weight"], p["transform.2.bias"])
        return h

    def past(self, p: Params, training: bool = False) -> Sequence[tuple[Tensor, Tensor]]:
        assert self.num_layers is not None and self.num_attention_heads is not None
        entries = self.embeds(p, training).unflatten(1, (2 * self.num_layers, self.num_attention_heads, -1))
        entries = entries.permute(1, 2, 0, 3)
        firsts = [2 * (self.num_transformer_submodules or 1) * layer for layer in range(self.num_layers)]
        return [(entries[i % len(entries)], entries[(i + 1) % len(entries)]) for i in firsts]


def _table(shape: tuple[int, int], start) -> Param:
    return Param(
        "prompt_encoder.embedding.weight", ("tokens", "width"), shape, start, saved="prompt_embeddings"
    )
