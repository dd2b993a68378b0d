"""The prompt adapters of a model: their tensors from the first to the last day.

They sit on no layer: their tensors hang on the model itself, under `prompt_encoder`, as in HF PEFT.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peft_dist import inject
from peft_dist.adapted import bare
from peft_dist.base_layer import EmbeddingLayer, door
from peft_dist.config import PeftConfig
from peft_dist.contract import BaseLayer, PastMethod, PromptMethod
from peft_dist.errors import ConfigError, TaskError
from peft_dist.foreign_engine import refuse_foreign_engine
from peft_dist.pooled import PooledModule
from peft_dist.prompts.base import arguments, backbone, base_sizes, reads_one_way, refuse_recomputation
from peft_dist.sharding import set_whole, whole

PROMPTS = "prompt_encoder"


class PromptAdapters(PooledModule):
    """A model with a base, and the tensors of the prompt adapters that it has.

    Attributes:
        peft_config: name -> config. active_adapters: names. disabled: whether the bare base serves.
        methods: name -> the prompt method of an adapter as its tensors are here.
    """

    task_type: str | None = None
    base_model: Any

    def __init__(self, shared: inject.Adapters) -> None:
        super().__init__(shared.pool, PROMPTS)
        self._adapters, shared.prompts = shared, self
        self.peft_config: dict[str, PeftConfig] = {}
        self.disabled = False
        self.methods: dict[str, PromptMethod] = {}
        # Asked once.
        self._one_way: bool | None = None

    def get_base_model(self) -> Any:
        """The base itself, with its wrapped layers in it."""
        raise NotImplementedError

    @property
    def base(self) -> EmbeddingLayer:
        """The door to the input embeddings, which virtual tokens stand before."""
        return self._asked()[1]

    @property
    def word_embeddings(self) -> nn.Module:
        """The base's input embeddings."""
        return self._asked()[0]

    def _asked(self) -> tuple[nn.Module, EmbeddingLayer]:
        # A program that looks at every attribute of a model finds that this one is not there.
        try:
            return self._embedding()
        except ConfigError as error:
            raise AttributeError(str(error)) from error

    @property
    def prompt_tokens(self) -> dict[str, Tensor]:
        """Name -> numbers of all virtual tokens of an adapter, those of a decoder counted."""
        return {name: torch.arange(method.total_tokens) for name, method in self.methods.items()}  # type: ignore[attr-defined]

    def get_prompt_embedding_to_save(self, adapter_name: str) -> Tensor:
        """An adapter's tokens as a checkpoint holds them."""
        (name,) = self.base_model.known(adapter_name)
        p = {key: t.detach() for key, t in self.tensors(name).items()}
        with torch.no_grad():
            saved = self.methods[name].export(p, self.base.site)
        return (next(iter(p.values())) if saved is None else saved["prompt_embeddings"]).cpu()

    def begin(self, adapter: str, base: BaseLayer) -> None:
        """Fills an adapter's tensors as its method starts them; a collective where it reads a partitioned
        embedding."""
        self.fill(adapter)
        p = {key: t.detach() for key, t in self.tensors(adapter).items()}
        with torch.no_grad():
            self.methods[adapter].start_from_base(p, base)

    def complete(self, adapter: str, names: Sequence[str], base: BaseLayer) -> None:
        """Fills tensors that a checkpoint lacked from the method's start."""
        method, own = self.methods[adapter], self.tensors(adapter)
        with torch.no_grad():
            made = {name: whole(t) for name, t in own.items()}
            for name in names:
                self.wanted(adapter)[name].start(made[name])
            method.start_from_base(made, base)
            for name, t in own.items():
                if name not in names:
                    made[name] = whole(t)
            method.resume(made)
            for name, t in own.items():
                set_whole(t, made[name])

    def take_saved_form(self, adapter: str) -> None:
        """Lets go of what made an adapter's tokens and is not saved with them, before a checkpoint is read."""
        method = self.methods[adapter].saved_form()
        wanted = method.params(self.base.site)
        if wanted.keys() == self.wanted(adapter).keys():
            return
        refuse_foreign_engine(
            self,
            f"adapter {adapter!r} cannot be loaded: its checkpoint holds tokens without the network that makes "
            "them, in whose place they would be trained",
        )
        old = next(iter(self.tensors(adapter).values()))
        family = self._families[adapter]
        super().drop(adapter)
        self.hold(adapter, family, wanted, old.dtype, old.device)
        self.methods[adapter] = method
        for name, param in wanted.items():
            self.tensors(adapter)[name].requires_grad_(old.requires_grad and param.trainable)

    def drop(self, adapter: str) -> None:
        super().drop(adapter)
        self.methods.pop(adapter, None)

    def _check_prompt(self, config: Any) -> None:
        if config.task_type is None:
            raise TaskError(
                f"{type(config).__name__}.task_type: a prompt method needs one, such as CAUSAL_LM."
            )
        _, embedding = self._embedding()
        if isinstance(config, PastMethod):
            refuse_recomputation(self.get_base_model(), type(config).__name__)
            if "past_key_values" not in arguments(backbone(self.get_base_model())):
                raise ConfigError(
                    f"{type(config).__name__}: {type(self.get_base_model()).__name__} takes no past keys and "
                    "values. Use another prompt method, or LoRA."
                )
        config.fit(base_sizes(self.get_base_model(), embedding.site.out))

    def _embedding(self) -> tuple[nn.Module, EmbeddingLayer]:
        base = self.get_base_model()
        layer = inject.asked(base, "get_input_embeddings")
        own = bare(layer)
        if layer is None or not isinstance(own, nn.Embedding):
            raise ConfigError(f"{type(base).__name__} has no input embeddings, which a prompt method needs.")
        opened = door(own, "input embeddings")
        assert isinstance(opened, EmbeddingLayer)
        return layer, opened

    def _reads_one_way(self) -> bool:
        if self._one_way is None:
            self._one_way = reads_one_way(self.get_base_model())
        return self._one_way

    def _add_prompt(self, name: str, config: Any, low_cpu_mem_usage: bool, start: bool) -> None:
        _, embedding = self._embedding()
        method = config if start else config.saved_form()
        # Always fp32, as HF PEFT makes it, unless the base is more exact.
        dtype = torch.promote_types(embedding.dtype, torch.float32)
        device = "meta" if low_cpu_mem_usage else embedding.device
        self.hold(name, type(config).__name__, method.params(embedding.site), dtype, device)
        self.methods[name] = method
        if start and not low_cpu_mem_usage:
            try:
                self.begin(name, embedding)
            except BaseException:
                self.drop(name)
                raise
