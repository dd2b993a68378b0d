"""Virtual tokens: which prompt adapters serve which rows of a batch, and what the base then gets.

This is the half of a PeftModel that is about prompt methods. They sit on no layer: their tensors hang on the
model itself, under `prompt_encoder`, as in HF PEFT.
"""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from peft_dist import inject
from peft_dist.adapted import AdapterModule
from peft_dist.base_layer import EmbeddingLayer, door
from peft_dist.config import PeftConfig
from peft_dist.errors import AdapterError, ConfigError, TaskError
from peft_dist.pool import PooledModule
from peft_dist.sharding import is_partitioned, reach

PROMPTS = "prompt_encoder"


class PromptedModel(PooledModule):
    """A model with a base before whose input virtual tokens may stand. `PeftModel` is the one that there is.

    Attributes:
        peft_config: name -> config. active_adapters: names. disabled: whether the bare base serves.
    """

    def __init__(self, shared: inject.Adapters) -> None:
        super().__init__(shared.pool, PROMPTS)
        self._adapters = shared
        self.peft_config: dict[str, PeftConfig] = {}
        self.disabled = False

    def get_base_model(self) -> Any:
        """The base itself, with its wrapped layers in it."""
        raise NotImplementedError

    @property
    def base(self) -> EmbeddingLayer:
        """The door to the input embeddings, which virtual tokens stand before."""
        return self._embedding()[1]

    def _check_prompt(self, config: Any) -> None:
        if config.task_type is None:
            raise TaskError(
                f"{type(config).__name__}.task_type: a prompt method needs one, such as CAUSAL_LM."
            )
        if getattr(getattr(self.get_base_model(), "config", None), "is_encoder_decoder", False):
            raise ConfigError(
                f"{type(config).__name__}: not supported on an encoder-decoder base. Use LoRA or IA3."
            )
        self._embedding()

    def _embedding(self) -> tuple[nn.Module, EmbeddingLayer]:
        base = self.get_base_model()
        layer = base.get_input_embeddings() if hasattr(base, "get_input_embeddings") else None
        bare = layer
        while isinstance(bare, AdapterModule):
            bare = bare.base_layer
        if layer is None or not isinstance(bare, nn.Embedding):
            raise ConfigError(f"{type(base).__name__} has no input embeddings, which a prompt method needs.")
        opened = door(bare, "input embeddings")
        assert isinstance(opened, EmbeddingLayer)
        return layer, opened

    def _add_prompt(self, name: str, config: Any, low_cpu_mem_usage: bool, start: bool) -> None:
        _, embedding = self._embedding()
        facts = self.get_base_model().config
        config.token_dim = embedding.site.out
        config.num_transformer_submodules = config.num_transformer_submodules or 1
        config.num_layers = config.num_layers or getattr(facts, "num_hidden_layers", None)
        config.num_attention_heads = config.num_attention_heads or getattr(facts, "num_attention_heads", None)
        # Always fp32, as HF PEFT makes it, unless the base is more exact.
        dtype = torch.promote_types(embedding.dtype, torch.float32)
        device = "meta" if low_cpu_mem_usage else embedding.device
        self.hold(name, type(config).__name__, config.params(embedding.site), dtype, device)
        if start and not low_cpu_mem_usage:
            p = {key: t.detach() for key, t in self.tensors(name).items()}
            with torch.no_grad():
                for key, param in self.wanted(name).items():
                    param.start(p[key])
                config.start_from_base(p, embedding)

    def _generate_prompted(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The base's generate behind virtual tokens; gives the ids that it was given before its own."""
        base = self.get_base_model()
        if args:
            kwargs["inputs" if "input_ids" not in kwargs else "input_ids"] = args[0]
        input_ids = kwargs.pop("input_ids", None)
        input_ids = kwargs.pop("inputs", None) if input_ids is None else input_ids
        if input_ids is None:
            raise ConfigError("generate: a prompt adapter needs input_ids. Give them.")
        if kwargs.get("num_beams", 1) != 1 and self._rows_choose():
            raise ConfigError("generate: num_beams above 1 cannot be used with adapter_names.")
        if "max_length" in kwargs:
            kwargs.setdefault("max_new_tokens", kwargs.pop("max_length") - input_ids.shape[1])
        mask = kwargs.pop("attention_mask", None)
        mask = self._shown(input_ids, kwargs) if mask is None else mask
        prompted = self._prompted({"input_ids": input_ids, "attention_mask": mask})
        prompted.pop("position_ids", None)
        given = base.generate(**prompted, **kwargs)
        new = given if isinstance(given, Tensor) else given.sequences
        before = input_ids.repeat_interleave(new.shape[0] // input_ids.shape[0], 0)
        whole = torch.cat([before, new], dim=1)
        if isinstance(given, Tensor):
            return whole
        given.sequences = whole
        return given

    def _shown(self, input_ids: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """The attention mask that generate infers where none is given: padding is hidden unless it ends
        texts too."""
        settings = kwargs.get("generation_config") or self.get_base_model().generation_config
        pad = kwargs.get("pad_token_id", settings.pad_token_id)
        ends = kwargs.get("eos_token_id", settings.eos_token_id)
        if pad is None or pad in (ends if isinstance(ends, (list, tuple)) else [ends]):
            return torch.ones_like(input_ids)
        return input_ids.ne(pad).long()

    def _rows_choose(self) -> bool:
        rows = self._adapters.current.rows
        return rows is not None and rows.adapters is not None

    def _prompt_of(self, choice: str | None) -> str | None:
        names = self.active_adapters if choice is None else [choice]
        prompts = [name for name in names if name in self.adapters]
        if len(prompts) > 1:
            raise AdapterError(
                f"prompt adapters {', '.join(prompts)} are active at once. Activate one of them."
            )
        return prompts[0] if prompts else None

    def _prompting(self) -> bool:
        if self.disabled or not self.adapters:
            return False
        rows = self._adapters.current.rows
        choices = (
            [s.adapter for s in rows.segments] if rows is not None and rows.adapters is not None else [None]
        )
        return any(self._prompt_of(choice) is not None for choice in choices)

    def _others_may_prompt(self) -> bool:
        """Whether another rank may run this batch with virtual tokens, and so ask for the partitioned
        embeddings before the base's forward: all ranks must gather weights in one order."""
        return bool(self.adapters) and not self.disabled and is_partitioned(self._embedding()[1].layer.weight)

    def _bound(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        names = list(inspect.signature(self.get_base_model().forward).parameters)
        return {**dict(zip(names, args, strict=False)), **kwargs}

    def _prompted(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """A forward's arguments with each row's virtual tokens before its own; rows with fewer are padded on
        the left, where the mask hides it and positions do not count it."""
        layer, _ = self._embedding()
        embeds = inputs.pop("inputs_embeds", None)
        input_ids = inputs.pop("input_ids", None)
        if embeds is None:
            embeds = layer(input_ids)
        num_rows = embeds.shape[0]
        prompts = self._prompts(num_rows)
        longest = max((len(p) for p in prompts if p is not None), default=0)
        self._adapters.current.padding = None
        if not longest:
            return {**inputs, "inputs_embeds": embeds}
        counts = torch.tensor([0 if p is None else len(p) for p in prompts], device=embeds.device)
        prefix = torch.stack(
            [
                torch.cat(
                    [embeds.new_zeros(longest - (0 if p is None else len(p)), embeds.shape[2])]
                    + ([] if p is None else [p.to(embeds.dtype)])
                )
                for p in prompts
            ]
        )
        inputs["inputs_embeds"] = torch.cat([prefix, embeds], dim=1)
        for name in ("position_ids", "token_type_ids"):
            if inputs.pop(name, None) is not None:
                warnings.warn(f"{name} are not used with prompt adapters; they are left out.", stacklevel=4)
        mask, uneven = inputs.get("attention_mask"), bool((counts < longest).any())
        if mask is None and uneven:
            mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
        if mask is not None:
            shown = torch.arange(longest, device=mask.device) >= longest - counts[:, None].to(mask.device)
            mask = inputs["attention_mask"] = torch.cat([shown.to(mask.dtype), mask], dim=1)
        if uneven:
            self._adapters.current.padding = longest - counts
            places = torch.arange(longest + embeds.shape[1], device=embeds.device)
            inputs["position_ids"] = (places - (longest - counts[:, None])).clamp(min=0)
        labels = inputs.get("labels")
        if labels is not None and labels.ndim == 2 and labels.shape[1] == embeds.shape[1]:
            inputs["labels"] = torch.cat([labels.new_full((num_rows, longest), -100), labels], dim=1)
        for name in ("start_positions", "end_positions"):
            if inputs.get(name) is not None:
                inputs[name] = inputs[name] + longest
        return inputs

    def _prompts(self, num_rows: int) -> list[Tensor | None]:
        rows = self._adapters.current.rows
        choices = [None] * num_rows if rows is None or rows.adapters is None else list(rows.adapters)
        if len(choices) != num_rows:
            raise AdapterError(
                f"{len(choices)} adapters are named for {num_rows} sequences. Name one for each."
            )
        names = [self._prompt_of(choice) for choice in choices]
        made: dict[str | None, Tensor] = {}
        # In one order on every rank, since a user's own engine may have partitioned them.
        for name in dict.fromkeys(n for n in names if n is not None):
            p = self.tensors(name)
            reach(self, p.values())
            made[name] = self.peft_config[name].embeds(p)  # type: ignore[attr-defined]
        return [made.get(name) for name in names]
