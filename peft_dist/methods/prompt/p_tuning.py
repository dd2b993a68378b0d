"""P-tuning: virtual tokens that a small network makes of learned embeddings.

tokens = MLP(E), or MLP(LSTM(E)) with a bidirectional LSTM along the tokens. What is saved is the tokens, so a
loaded adapter has no network: trained on, it is prompt tuning from there.

Liu et al. 2021, arXiv:2103.10385.
"""

from __future__ import annotations

import enum
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from peft_dist import starts
from peft_dist.config import PromptLearningConfig
from peft_dist.contract import Param, Params, Site
from peft_dist.errors import ConfigError
from peft_dist.lazy import lazy
from peft_dist.methods.prompt.encoded import EncodedPrompt

if TYPE_CHECKING:
    from torch import Tensor

torch = lazy("torch")


class PromptEncoderReparameterizationType(enum.StrEnum):
    """The network."""

    MLP = "MLP"
    LSTM = "LSTM"


@dataclass
class PromptEncoderConfig(PromptLearningConfig, EncodedPrompt):
    """HF PEFT's PromptEncoderConfig.

    Args:
        encoder_reparameterization_type: MLP or LSTM.
        encoder_hidden_size: of the network; the base's width where it is not given.
        encoder_num_layers: of the LSTM; an MLP always has its three.
        encoder_dropout: between the LSTM's layers, in [0, 1).
    """

    encoder_reparameterization_type: PromptEncoderReparameterizationType | str = (
        PromptEncoderReparameterizationType.MLP
    )
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0

    prefix: ClassVar[str] = "prompt_"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "P_TUNING"
        try:
            kind = PromptEncoderReparameterizationType(self.encoder_reparameterization_type)
        except ValueError:
            raise ConfigError(
                f"PromptEncoderConfig.encoder_reparameterization_type: "
                f"{self.encoder_reparameterization_type!r} is neither MLP nor LSTM."
            ) from None
        self.encoder_reparameterization_type = kind
        if not 0 <= self.encoder_dropout < 1:
            raise ConfigError(
                f"PromptEncoderConfig.encoder_dropout: {self.encoder_dropout!r}; it is in [0, 1)."
            )

    def params(self, site: Site) -> dict[str, Param]:
        tokens, hidden = self.total_tokens, self.encoder_hidden_size or site.out
        made = {"embedding.weight": ((tokens, site.out), starts.normal)}
        if not self.inference_mode:
            if self.encoder_reparameterization_type == "LSTM":
                made |= _lstm(site.out, hidden, self.encoder_num_layers)
                made |= _linear("mlp_head.0", 2 * hidden, 2 * hidden) | _linear(
                    "mlp_head.2", 2 * hidden, site.out
                )
            else:
                if self.encoder_num_layers != 2:
                    warnings.warn(
                        f"PromptEncoderConfig.encoder_num_layers: {self.encoder_num_layers} is ignored for MLP, "
                        "which always has the same layers.",
                        stacklevel=2,
                    )
                made |= _linear("mlp_head.0", site.out, hidden) | _linear("mlp_head.2", hidden, hidden)
                made |= _linear("mlp_head.4", hidden, site.out)
        return {
            name: Param(
                f"prompt_encoder.{name}",
                ("tokens", "out") if name == "embedding.weight" else ("to", "from")[: len(shape)],
                shape,
                start,
                saved="prompt_embeddings" if name == "embedding.weight" else name,
            )
            for name, (shape, start) in made.items()
        }

    def embeds(self, p: Params, training: bool = False) -> Tensor:
        h = p["embedding.weight"]
        if "mlp_head.0.weight" not in p:
            return h
        weights = [t for name, t in p.items() if name.startswith("lstm_head.")]
        if weights:
            layers, hidden = len(weights) // 8, weights[1].shape[1]
            zero = h.new_zeros(2 * layers, 1, hidden)
            dropout = float(self.encoder_dropout)
            h = torch.lstm(h[None], (zero, zero), weights, True, layers, dropout, training, True, True)[0][0]
        last = "mlp_head.2" if weights else "mlp_head.4"
        for layer in ("mlp_head.0", "mlp_head.2", "mlp_head.4"):
            h = torch.nn.functional.linear(h, p[f"{layer}.weight"], p[f"{layer}.bias"])
            if layer == last:
                return h
            h = h.relu()
        raise AssertionError("an MLP has a last layer")


def _linear(name: str, from_: int, to: int) -> dict:
    return {
        f"{name}.weight": ((to, from_), starts.kaiming_uniform),
        f"{name}.bias": ((to,), starts.uniform(from_**-0.5)),
    }


def _lstm(width: int, hidden: int, layers: int) -> dict:
    made = {}
    for layer in range(layers):
        for way in ("", "_reverse"):
            taken = width if layer == 0 else 2 * hidden
            for name, shape in (
                ("weight_ih", (4 * hidden, taken)),
                ("weight_hh", (4 * hidden, hidden)),
                ("bias_ih", (4 * hidden,)),
                ("bias_hh", (4 * hidden,)),
            ):
                made[f"lstm_head.{name}_l{layer}{way}"] = (shape, starts.uniform(hidden**-0.5))
    return made
