"""A base with adapters on its layers: what `PeftModel.base_model` is. `model` is the base itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peft_dist import inject, merge
from peft_dist.config import PeftConfig
from peft_dist.contract import Controller, Method, Params
from peft_dist.pool import PooledModule
from peft_dist.recompute import remember


class BaseTuner(PooledModule):
    """A base with wrapped layers. Tensors that all layers of an adapter share hang on it.

    Args:
        model: the base. peft_config: adapter -> config; shared with whoever owns the adapters.
        adapters: what its adapters share.
    """

    def __init__(
        self, model: nn.Module, peft_config: dict[str, PeftConfig], adapters: inject.Adapters
    ) -> None:
        super().__init__(adapters.pool, "")
        adapters.common = self
        self.model = model
        self.peft_config = peft_config
        self._adapters = adapters
        self.controllers: dict[str, Controller] = {}

    def __getattr__(self, attribute: str) -> Any:
        try:
            return super().__getattr__(attribute)
        except AttributeError:
            if attribute == "model":
                raise
            return getattr(self.model, attribute)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self.reading(kwargs):
            outputs = self.model(*args, **kwargs)
        loss = getattr(outputs, "loss", None)
        extra = self.extra_loss() if isinstance(loss, Tensor) and torch.is_grad_enabled() else None
        if extra is not None:
            outputs.loss = loss + extra
        return outputs

    @contextlib.contextmanager
    def reading(self, kwargs: dict[str, Any]) -> Iterator[None]:
        """Takes what adapters read of a batch out of a call's `kwargs`; their layers find it within the
        context."""
        names = {name for config in self.peft_config.values() for name in getattr(config, "reads", ())}
        current = self._adapters.current
        before = current.batch
        current.batch = {**before, **{name: kwargs.pop(name) for name in names if name in kwargs}}
        if (current.batch or current.rows) and getattr(self.model, "is_gradient_checkpointing", False):
            remember(self.model, current)
        try:
            yield
        finally:
            current.batch = before

    # --- what acts on an adapter as a whole

    def sites(self, adapter: str) -> dict[str, Params]:
        """The tensors of the adapter's method at each of its layers, by the layer's name in the bare base."""
        modules = self._adapters.sites.get(adapter, {})
        return {name: module.held(adapter) for name, module in modules.items()}

    def extra_loss(self) -> Tensor | None:
        """The sum of the terms that the adapters which serve now add to the loss, a scalar; None where there
        is none."""
        terms = []
        for name in self._serving():
            config: Any = self.peft_config[name]
            if isinstance(config, Method) and type(config).extra_loss is not Method.extra_loss:
                term = config.extra_loss(self.sites(name))
                terms += [] if term is None else [term]
        return torch.stack(terms).sum() if terms else None

    def after_backward(self, step: int) -> None:
        """To be called between the backward and the optimizer's step, where a method needs it (AdaLoRA)."""
        for name, controller in self._acting():
            controller.after_backward(self.sites(name), step)

    def after_step(self, step: int) -> None:
        """To be called after the optimizer's step, where a method needs it (AdaLoRA)."""
        for name, controller in self._acting():
            controller.after_step(self.sites(name), step)

    def update_and_allocate(self, global_step: int) -> None:
        """Both of the above at once, by AdaLoRA's name in HF PEFT: after the backward, with the gradients
        still there, before or after the optimizer's step."""
        self.after_backward(global_step)
        self.after_step(global_step)

    def add_controller(self, adapter: str) -> None:
        """Makes what acts on the adapter as a whole, where its method has such a thing."""
        config: Any = self.peft_config[adapter]
        modules: Mapping[str, Any] = self._adapters.sites.get(adapter, {})
        sites = {name: module.base.site for name, module in modules.items()}
        made = config.controller(sites) if isinstance(config, Method) else None
        if made is not None:
            self.controllers[adapter] = made

    def _acting(self) -> list[tuple[str, Controller]]:
        serving = self._serving()
        return [(name, each) for name, each in self.controllers.items() if name in serving]

    def _serving(self) -> list[str]:
        """The adapters that serve rows of the batch, or else the active ones."""
        rows = self._adapters.current.rows
        named = [s.adapter for s in rows.segments] if rows is not None and rows.adapters is not None else [None]
        active = self.active_adapters if None in named else []
        return [name for name in self.peft_config if name in named or name in active]

    @property
    def active_adapters(self) -> list[str]:
        """The names that serve rows which name none."""
        return next((list(m.active_adapters) for _, m in inject.adapter_modules(self.model)), [])

    # --- merged, disabled

    def merge_adapter(self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False) -> None:
        """Adds the named adapters' changes to the base's weights in place; the active ones where none is
        named."""
        merge.refuse_unmergeable(self.peft_config, adapter_names)
        merge.merge(self.model, adapter_names, safe_merge)

    def unmerge_adapter(self) -> None:
        """Takes merged adapters out of the base's weights again."""
        merge.unmerge(self.model)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: Sequence[str] | None = None
    ) -> nn.Module:
        """The base with the named adapters merged for good and no wrappers."""
        merge.refuse_unmergeable(self.peft_config, adapter_names)
        return merge.merge_and_unload(self.model, adapter_names, safe_merge)

    def unload(self) -> nn.Module:
        """The bare base, its weights as they were, without adapters or wrappers."""
        return merge.unload(self.model)

    def enable_adapter_layers(self) -> None:
        """Lets adapters serve."""
        for _, module in inject.adapter_modules(self.model):
            module.disabled = False

    def disable_adapter_layers(self) -> None:
        """Lets the bare base serve."""
        for _, module in inject.adapter_modules(self.model):
            module.disabled = True
