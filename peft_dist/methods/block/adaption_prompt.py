"""Adaption prompts (LLaMA-Adapter): the last attention modules also look at n learned tokens, behind a gate.

y = attention(x) + O(g softmax(Q(x) K(P)ᵀ / sqrt(width of a head)) V(P)), P (n, hidden), g one number that starts at
0; Q, K, V, O are the module's own frozen projections, O without its bias, which HF PEFT adds a second time. GPT-2's
has no O, as in HF PEFT.

Zhang et al. 2023, arXiv:2303.16199.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from peft_dist import starts
from peft_dist.config import TargetedConfig
from peft_dist.contract import BlockMethod, Param, Params, Site
from peft_dist.errors import ConfigError, TargetError
from peft_dist.lazy import lazy

torch = lazy("torch")

# Architecture -> what its attention modules are called.
ATTENTION = {"llama": "self_attn", "mistral": "self_attn", "gpt2": "attn"}


@dataclass
class AdaptionPromptConfig(TargetedConfig, BlockMethod):
    """HF PEFT's AdaptionPromptConfig.

    Args:
        target_modules: what the attention modules are called; the architecture's name for them by default.
        adapter_len: n, at least 1. adapter_layers: on how many of them it sits, counted from the last.
    """

    target_modules: str | None = None
    adapter_len: int | None = None
    adapter_layers: int | None = None

    prefix: ClassVar[str] = "adaption_"
    is_adaption_prompt: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "ADAPTION_PROMPT"
        for name in ("adapter_len", "adapter_layers"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ConfigError(
                    f"AdaptionPromptConfig.{name}: {value!r}; it is a whole number of at least 1."
                )

    def blocks(self, names: Sequence[str], architecture: str | None) -> Sequence[str]:
        for name in ("adapter_len", "adapter_layers"):
            if getattr(self, name) is None:
                raise ConfigError(
                    f"AdaptionPromptConfig.{name}: must be given; a whole number of at least 1."
                )
        if architecture not in ATTENTION:
            raise ConfigError(
                f"AdaptionPromptConfig: model type {architecture!r} is not supported; {', '.join(ATTENTION)} are."
            )
        if self.target_modules is None:
            self.target_modules = ATTENTION[architecture]
        found = [name for name in names if name.endswith(f".{self.target_modules}")]
        if len(found) < self.adapter_layers:  # type: ignore[operator]
            raise TargetError(
                f"AdaptionPromptConfig.adapter_layers: {self.adapter_layers}, but {len(found)} modules are what "
                f"target_modules {self.target_modules!r} says."
            )
        return found[-self.adapter_layers :]  # type: ignore[operator]

    def params(self, site: Site) -> dict[str, Param]:
        shapes = dict(site.tensors)
        # A Linear's weight is stored (out, in), HF's Conv1D's (in, out).
        if "q_proj.weight" in shapes:
            hidden = shapes["q_proj.weight"][1]
        elif "c_attn.weight" in shapes:
            hidden = shapes["c_attn.weight"][0]
        else:
            raise TargetError(
                f"AdaptionPromptConfig.target_modules: {site.name!r} is no attention module with projections of "
                "its own. Name those that are."
            )
        assert self.adapter_len is not None
        shape = (1, self.adapter_len, hidden)
        return {
            "prompt": Param("adaption_prompt", ("1", "tokens", "hidden"), shape, starts.normal),
            "gate": Param("adaption_gate", ("1",), (1,), starts.zeros),
        }

    def around(self, p: Params, block: Any, output: Any, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        P = p["prompt"].to(x.dtype)
        if hasattr(block, "c_attn"):
            joint = _bare(block.c_attn)
            q, (_, k, v) = joint(x).chunk(3, -1)[0], joint(P).chunk(3, -1)
        else:
            q, k, v = _bare(block.q_proj)(x), _bare(block.k_proj)(P), _bare(block.v_proj)(P)
        q, k, v = (t.unflatten(-1, (-1, block.head_dim)).transpose(1, 2) for t in (q, k, v))
        if "position_embeddings" in kwargs:
            cos, sin = (t.unsqueeze(1) for t in kwargs["position_embeddings"])
            first, second = q.chunk(2, -1)
            q = q * cos + torch.cat([-second, first], -1) * sin
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        exact = torch.promote_types(x.dtype, torch.float32)
        scores = (q @ k.transpose(2, 3) / block.head_dim**0.5).softmax(-1, dtype=exact)
        looks = (p["gate"] * scores).to(v.dtype)
        out = _bare(block.o_proj) if hasattr(block, "o_proj") else None
        if v.shape[2] < block.head_dim and out is not None:
            # Few tokens: O of each head's V, once for all positions.
            values = (
                (v[0, :, :, None] * torch.eye(v.shape[1]).to(v)[:, None, :, None]).flatten(2).flatten(0, 1)
            )
            added = looks.transpose(1, 2).flatten(2) @ _linear(out, values)
        else:
            added = (looks @ v).transpose(1, 2).flatten(2)
            added = added if out is None else _linear(out, added)
        return output[0] + added, *output[1:]


def _linear(layer: Any, x: Any) -> Any:
    """The layer without its bias, which the module's own output has."""
    y = layer(x)
    return y if getattr(layer, "bias", None) is None else y - layer(x.new_zeros(1, x.shape[-1]))[0]


def _bare(layer: Any) -> Any:
    """The frozen layer itself: what other adapters do to it they do to its own input."""
    while hasattr(layer, "base_layer"):
        layer = layer.base_layer
    return layer
