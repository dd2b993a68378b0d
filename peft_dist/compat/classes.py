"""Classes of HF PEFT that programs ask `isinstance` for, beside those of a method's layers."""

from __future__ import annotations

from typing import Any

from torch import nn

from peft_dist.adapted import AdaptedBlock, AdapterModule, Replaced
from peft_dist.tuner_layer import Answers, BaseTunerLayer, layer_class, peft_types


def _class(name: str, stands_for: Any, base: Any = object) -> Any:
    kind = type(base) if base is not object else Answers
    return kind(name, (base,), {"stands_for": staticmethod(stands_for), "__module__": __name__})


def _is_trained_whole(module: AdapterModule) -> bool:
    return isinstance(module, Replaced) and not peft_types(module)


def _has_tokens(module: AdapterModule) -> bool:
    return hasattr(module, "token_adapter")


AuxiliaryTrainingWrapper = _class(
    "AuxiliaryTrainingWrapper", lambda module: _is_trained_whole(module) or _has_tokens(module)
)
ModulesToSaveWrapper = _class("ModulesToSaveWrapper", _is_trained_whole, AuxiliaryTrainingWrapper)
TrainableTokensWrapper = _class("TrainableTokensWrapper", _has_tokens, AuxiliaryTrainingWrapper)
AdaptedAttention = _class("AdaptedAttention", lambda module: isinstance(module, AdaptedBlock))
LycorisLayer = _class(
    "LycorisLayer", lambda module: bool(peft_types(module) & {"LOHA", "LOKR"}), BaseTunerLayer
)


def _none(module: AdapterModule) -> bool:
    return False


# Layers over libraries for quantised or parallel weights that this package has no door to.
SVDQuantLinear = _class("SVDQuantLinear", _none, layer_class("LORA"))
GPTQLoraLinear = _class("GPTQLoraLinear", _none, layer_class("LORA"))
AqlmLoraLinear = _class("AqlmLoraLinear", _none, layer_class("LORA"))
AwqLoraLinear = _class("AwqLoraLinear", _none, layer_class("LORA"))
TorchaoLoraLinear = _class("TorchaoLoraLinear", _none, layer_class("LORA"))
LoraParallelLinear = _class("LoraParallelLinear", _none, layer_class("LORA"))


def _xlora(kind: str | None) -> Any:
    def stands_for(module: AdapterModule) -> bool:
        return "XLORA" in peft_types(module) and (
            kind is None or type(module.get_base_layer()).__name__ == kind
        )

    return stands_for


XLoraLayer = _class("XLoraLayer", _xlora(None))
XLoraLinearLayer = _class("XLoraLinearLayer", _xlora("Linear"), XLoraLayer)
XLoraEmbeddingLayer = _class("XLoraEmbeddingLayer", _xlora("Embedding"), XLoraLayer)
XLoraConv2dLayer = _class("XLoraConv2dLayer", _xlora("Conv2d"), XLoraLayer)


class BufferDict(nn.Module):
    """Buffers by name, as HF PEFT's layers keep those of their adapters."""

    def __init__(self, buffers: Any = None, persistent: bool = False) -> None:
        super().__init__()
        self.persistent = persistent
        self.update(buffers or {})

    def __getitem__(self, key: str) -> Any:
        return self._buffers[key]

    def __setitem__(self, key: str, buffer: Any) -> None:
        self.register_buffer(key, buffer, persistent=self.persistent)

    def __delitem__(self, key: str) -> None:
        del self._buffers[key]

    def __len__(self) -> int:
        return len(self._buffers)

    def __iter__(self) -> Any:
        return iter(self._buffers)

    def __contains__(self, key: str) -> bool:
        return key in self._buffers

    def keys(self) -> Any:
        """The names."""
        return self._buffers.keys()

    def items(self) -> Any:
        """(name, buffer)."""
        return self._buffers.items()

    def values(self) -> Any:
        """The buffers."""
        return self._buffers.values()

    def update(self, buffers: Any) -> None:
        """Takes in more of them."""
        for key, buffer in dict(buffers).items():
            self[key] = buffer


class MultiplicativeDropoutLayer(nn.Module):
    """Replaces a share p of square blocks (..., n, b, b) by the identity while training."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Any) -> Any:
        if not self.training or self.p == 0:
            return x
        eye = x.new_zeros(x.shape[-2:]).fill_diagonal_(1)
        kept = (x.new_empty(*x.shape[:-2], 1, 1).uniform_() >= self.p).to(x.dtype)
        return kept * x + (1 - kept) * eye


class RankAllocator:
    """AdaLoRA's budget is a method's controller here; a model's is driven by `update_and_allocate`."""

    def __init__(self, model: Any, peft_config: Any, adapter_name: str) -> None:
        self.peft_config, self.adapter_name = peft_config, adapter_name
        self._tuner = getattr(model, "base_model", model)

    def update_and_allocate(self, model: Any, global_step: int, force_mask: bool = False) -> None:
        """One step of the budget."""
        self._tuner.update_and_allocate(global_step)
