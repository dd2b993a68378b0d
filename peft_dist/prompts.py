"""Virtual tokens: which prompt adapters serve which rows of a batch, and what the base then gets.

This is the half of a PeftModel that is about prompt methods. They sit on no layer: their tensors hang on the
model itself, under `prompt_encoder`, as in HF PEFT.

Rows may have different numbers of virtual tokens. A base that reads one way has shorter rows padded on the left;
one that reads both ways, and a decoder's input beside an encoder, at the end, so that each token has the place it
has when its row is alone. What the base gives is put back in line: a row's own positions are the last ones.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache

from peft_dist import inject
from peft_dist.adapted import AdapterModule
from peft_dist.base_layer import EmbeddingLayer, door
from peft_dist.config import PeftConfig
from peft_dist.contract import BaseLayer, BaseSizes, PastMethod, PromptMethod
from peft_dist.errors import AdapterError, ConfigError, RowsError, TaskError
from peft_dist.loss import weighted_loss
from peft_dist.pool import PooledModule
from peft_dist.sharding import is_partitioned, reach

PROMPTS = "prompt_encoder"
# Bases that know a token's place by its distance to others alone: padding before it changes nothing.
_BY_DISTANCE = frozenset({"bloom", "mpt", "t5", "mt5", "umt5", "longt5", "switch_transformers"})
# Which part of a method's tokens a stack of the base gets.
Pick = Callable[[PromptMethod, Tensor], "Tensor | None"]


@dataclass(frozen=True)
class _Block:
    """The virtual tokens of a batch in one stack of the base.

    Args:
        tokens: (B, longest, width), rows with fewer padded on the left; None where no row has any.
        counts: (B,) how many each row has. longest: the largest of them.
    """

    tokens: Tensor | None
    counts: Tensor
    longest: int

    @property
    def shown(self) -> Tensor:
        """(B, longest) which of them are some."""
        places = torch.arange(self.longest, device=self.counts.device)
        return places >= self.longest - self.counts[:, None]

    @property
    def is_uneven(self) -> bool:
        """Whether rows differ in number."""
        return bool((self.counts < self.longest).any())


class PromptedModel(PooledModule):
    """A model with a base before whose input virtual tokens may stand. `PeftModel` is the one that there is.

    Attributes:
        peft_config: name -> config. active_adapters: names. disabled: whether the bare base serves.
        methods: name -> the prompt method of an adapter as its tensors are here.
    """

    task_type: str | None = None
    base_model: Any

    def __init__(self, shared: inject.Adapters) -> None:
        super().__init__(shared.pool, PROMPTS)
        self._adapters = shared
        self.peft_config: dict[str, PeftConfig] = {}
        self.disabled = False
        self.methods: dict[str, PromptMethod] = {}
        # Rows of each sequence in a step of a beam search; positions of each row that are padding in a decoder.
        self._rows_of_each = 1
        self._not_counted: Tensor | None = None
        # Whether the base reads one way; asked once.
        self._one_way: bool | None = None

    def get_base_model(self) -> Any:
        """The base itself, with its wrapped layers in it."""
        raise NotImplementedError

    # --- adapters

    @property
    def base(self) -> EmbeddingLayer:
        """The door to the input embeddings, which virtual tokens stand before."""
        return self._embedding()[1]

    @property
    def word_embeddings(self) -> nn.Module:
        """The base's input embeddings."""
        return self._embedding()[0]

    @property
    def prompt_tokens(self) -> dict[str, Tensor]:
        """Name -> numbers of all virtual tokens of an adapter, those of a decoder counted."""
        return {name: torch.arange(method.total_tokens) for name, method in self.methods.items()}  # type: ignore[attr-defined]

    def get_prompt(
        self, batch_size: int, task_ids: Tensor | None = None, max_cache_len: int | None = None
    ) -> Any:
        """What the active prompt adapter puts before `batch_size` rows: (B, tokens, width), or a cache of keys
        and values. `max_cache_len` is HF PEFT's, and not needed."""
        name = self._prompt_of(None)
        if name is None:
            raise AdapterError("get_prompt: no prompt adapter is active. Call set_adapter.")
        names: list[str | None] = [name] * batch_size
        with self.base_model.reading({} if task_ids is None else {"task_ids": task_ids}):
            _, layers = self._past(names, self.base.device)
            if layers:
                return self._cache(None, layers)
            tokens = self.methods[name].embeds(self._given(name, names), self.training)
        return tokens if tokens.ndim == 3 else tokens.repeat(batch_size, 1, 1)

    def get_prompt_embedding_to_save(self, adapter_name: str) -> Tensor:
        """An adapter's tokens as a checkpoint holds them."""
        (name,) = self.base_model.known(adapter_name)
        p = {key: t.detach() for key, t in self.tensors(name).items()}
        with torch.no_grad():
            saved = self.methods[name].export(p, self.base.site)
        return (next(iter(p.values())) if saved is None else saved["prompt_embeddings"]).cpu()

    def complete(self, adapter: str, names: Sequence[str], base: BaseLayer) -> None:
        """Fills tensors that a checkpoint lacked from the method's start."""
        method, own = self.methods[adapter], self.tensors(adapter)
        with torch.no_grad():
            made = {name: t.detach().clone() for name, t in own.items()}
            for name in names:
                self.wanted(adapter)[name].start(made[name])
            method.start_from_base(made, base)
            for name in names:
                own[name].copy_(made[name])
            method.resume(own)

    def take_saved_form(self, adapter: str) -> None:
        """Lets go of what made an adapter's tokens and is not saved with them, before a checkpoint is read."""
        method = self.methods[adapter].saved_form()
        wanted = method.params(self.base.site)
        if wanted.keys() == self.wanted(adapter).keys():
            return
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
            self._refuse_recomputation(type(config).__name__)
            if "past_key_values" not in _arguments(_backbone(self.get_base_model())):
                raise ConfigError(
                    f"{type(config).__name__}: {type(self.get_base_model()).__name__} takes no past keys and "
                    "values. Use another prompt method, or LoRA."
                )
        config.fit(base_sizes(self.get_base_model(), embedding.site.out))

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
        method = config if start else config.saved_form()
        # Always fp32, as HF PEFT makes it, unless the base is more exact.
        dtype = torch.promote_types(embedding.dtype, torch.float32)
        device = "meta" if low_cpu_mem_usage else embedding.device
        self.hold(name, type(config).__name__, method.params(embedding.site), dtype, device)
        self.methods[name] = method
        if start and not low_cpu_mem_usage:
            try:
                self.fill(name)
                p = {key: t.detach() for key, t in self.tensors(name).items()}
                with torch.no_grad():
                    config.start_from_base(p, embedding)
            except BaseException:
                self.drop(name)
                raise

    def _refuse_recomputation(self, what: str) -> None:
        base: Any = self.get_base_model()
        modules: Any = base.modules()
        if any(getattr(m, "gradient_checkpointing", False) for m in modules):
            raise ConfigError(
                f"{what}: does not work with gradient checkpointing, under which layers keep no keys and "
                "values. Call gradient_checkpointing_disable() on the base, or use another prompt method."
            )

    # --- which rows have which

    def _prompt_of(self, choice: str | None) -> str | None:
        names: Any = self.active_adapters if choice is None else [choice]
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

    def _rows_choose(self) -> bool:
        rows = self._adapters.current.rows
        return rows is not None and rows.adapters is not None

    def _names(self, num_rows: int) -> list[str | None]:
        """The prompt adapter of each row."""
        rows = self._adapters.current.rows
        choices = [None] * num_rows if rows is None or rows.adapters is None else list(rows.adapters)
        if len(choices) != num_rows:
            raise AdapterError(
                f"{len(choices)} adapters are named for {num_rows} sequences. Name one for each."
            )
        if self.disabled:
            return [None] * num_rows
        return [self._prompt_of(choice) for choice in choices]

    def _given(self, name: str, names: Sequence[str | None]) -> dict[str, Tensor]:
        """All that the adapter's method finds in `p`: its tensors, and what it reads of its rows."""
        p: dict[str, Tensor] = dict(self.tensors(name))
        reach(self, p.values())
        mine = [row for row, other in enumerate(names) if other == name]
        for key in self.methods[name].reads:
            value = self._adapters.current.batch.get(key)
            if value is None:
                continue
            # Under beam search each sequence has several rows.
            if len(names) not in (len(value), len(value) * self._rows_of_each):
                raise RowsError(f"{key}: {len(value)} entries for {len(names)} sequences. Give one for each.")
            p[key] = value.repeat_interleave(len(names) // len(value), 0)[mine]
        return p

    def _block(self, names: Sequence[str | None], pick: Pick, like: Tensor) -> _Block:
        """The virtual tokens of each row that `pick` takes, in the dtype of `like` (B, T, width)."""
        made: dict[str | None, Tensor] = {}
        # In one order on every rank, since a user's own engine may have partitioned them.
        for name in _distinct(names):
            method = self.methods[name]
            if isinstance(method, PastMethod):
                continue
            tokens = pick(method, method.embeds(self._given(name, names), self.training))
            if tokens is not None:
                made[name] = tokens.to(like.dtype)
        counts = [made[name].shape[-2] if name in made else 0 for name in names]
        longest = max(counts, default=0)
        on_device = torch.tensor(counts, device=like.device)
        if not longest:
            return _Block(None, on_device, 0)
        if all(name == names[0] for name in names):
            tokens = made[names[0]]
            return _Block(
                tokens if tokens.ndim == 3 else tokens.expand(len(names), -1, -1), on_device, longest
            )
        used: dict[str | None, int] = {}
        rows = []
        for adapter, count in zip(names, counts, strict=True):
            row = like.new_zeros(longest - count, like.shape[2])
            if count:
                tokens = made[adapter]
                row = torch.cat([row, tokens[used.get(adapter, 0)] if tokens.ndim == 3 else tokens])
                used[adapter] = used.get(adapter, 0) + 1
            rows.append(row)
        return _Block(torch.stack(rows), on_device, longest)

    def _counts(
        self, names: Sequence[str | None], device: Any, decoder: bool = False
    ) -> tuple[_Block, _Block]:
        """How many virtual tokens rows have before their own, and how many in the past; in the decoder if
        asked."""
        before, behind = [0] * len(names), [0] * len(names)
        for row, name in enumerate(names):
            method = self.methods[name] if name is not None else None
            if isinstance(method, PastMethod):
                behind[row] = method.num_tokens
            elif method is not None and (not decoder or _is_in_decoder(method)):
                before[row] = method.num_tokens
        made = [_Block(None, torch.tensor(n, device=device), max(n, default=0)) for n in (before, behind)]
        return made[0], made[1]

    def _past(self, names: Sequence[str | None], device: torch.device) -> tuple[_Block, list]:
        """(how many virtual tokens the rows have in the past, for each layer keys and values (B, heads,
        longest, width))."""
        made: dict[str | None, Sequence[tuple[Tensor, Tensor]]] = {}
        for name in _distinct(names):
            method = self.methods[name]
            if isinstance(method, PastMethod):
                made[name] = method.past(self._given(name, names), self.training)
        counts = [made[name][0][0].shape[1] if name in made else 0 for name in names]
        block = _Block(None, torch.tensor(counts, device=device), max(counts, default=0))
        if not made:
            return block, []
        first = next(iter(made.values()))
        empty = first[0][0].new_zeros(first[0][0].shape[0], 0, first[0][0].shape[2])
        dtype = self.base.dtype

        def stacked(layer: int, which: int) -> Tensor:
            parts = [made[name][layer][which] if name in made else empty for name in names]
            if all(name == names[0] for name in names):
                return parts[0].to(dtype).expand(len(names), -1, -1, -1)
            padded = [F.pad(part, (0, 0, block.longest - part.shape[1], 0)) for part in parts]
            return torch.stack(padded).to(dtype)

        return block, [(stacked(layer, 0), stacked(layer, 1)) for layer in range(len(first))]

    # --- what the base gets

    def _forward_prompted(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The base's forward behind virtual tokens, and the loss as the rows' methods count it."""
        with self.base_model.reading(kwargs):
            inputs = self._bound(args, kwargs)
            if self.training:
                self._constrain()
            counted = self._counted(inputs)
            items = inputs.pop("num_items_in_batch", None) if counted else None
            if counted:
                inputs.pop("labels")
            _, given, back = self._prompted(inputs)
            with self._places_counted() if self._not_counted is not None else contextlib.nullcontext():
                outputs = self.base_model(**given)
            outputs = outputs if back is None else _in_line(outputs, *back)
            return outputs if counted is None else _with_loss(outputs, *counted, items)

    def _constrain(self) -> None:
        for name in self.adapters:
            tensors = self.tensors(name)
            if any(t.requires_grad for t in tensors.values()):
                with torch.no_grad():
                    self.methods[name].constrain(tensors)

    def _bound(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        names = _arguments(self.get_base_model())
        return {**dict(zip(names, args, strict=False)), **kwargs}

    def _prompted(self, inputs: dict[str, Any]) -> tuple[list[str | None], dict[str, Any], Any]:
        """(each row's prompt adapter, the base's arguments, how to put its outputs back in line)."""
        if self._has_decoder():
            return self._prompted_pair(inputs)
        inputs = dict(inputs)
        ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
        like: Any = ids if embeds is None else embeds
        names = self._names(like.shape[0])
        layer, _ = self._embedding()
        past = inputs.get("past_key_values")
        if past is not None and past.get_seq_length():
            return names, self._continued(names, inputs), None
        if self._others_may_prompt() or any(
            name is not None and not isinstance(self.methods[name], PastMethod) for name in names
        ):
            inputs.pop("input_ids", None)
            inputs["inputs_embeds"] = layer(ids) if embeds is None else embeds
            block = self._block(names, lambda _, tokens: tokens, inputs["inputs_embeds"])
        else:
            block = _Block(None, torch.zeros(len(names), dtype=torch.long, device=like.device), 0)
        behind, cache = self._past(names, like.device)
        if cache:
            self._check_past(names, behind)
            inputs["past_key_values"] = self._cache(inputs.get("past_key_values"), cache)
        if not block.longest and not behind.longest:
            return names, inputs, None
        self._place(inputs, ids, block, behind, like.shape[1])
        back = self._moved(inputs, block, behind)
        current = self._adapters.current
        current.length = block.longest + like.shape[1]
        current.padding = block.longest - block.counts if block.is_uneven and back is None else None
        return names, inputs, back

    def _place(
        self, inputs: dict[str, Any], ids: Tensor | None, block: _Block, behind: _Block, own: int
    ) -> None:
        """Puts virtual tokens before a batch's own, and all that has an entry for each position with them."""
        num_rows, longest = len(block.counts), block.longest
        device = block.counts.device
        uneven = block.is_uneven or behind.is_uneven
        mask = _plain_mask(inputs, "attention_mask")
        if mask is None and uneven:
            mask = torch.ones(num_rows, own, dtype=torch.long, device=device)
        if mask is not None:
            inputs["attention_mask"] = torch.cat([block.shown.to(mask), mask], dim=1)
        given = inputs.get("position_ids")
        if given is None and uneven:
            given = _positions_by_padding(self.get_base_model(), ids, block, behind, own)
        if given is not None or (uneven and self._needs_positions(behind)):
            first = torch.arange(own, device=device)[None] if given is None else given
            counts = (block.counts + behind.counts)[:, None]
            places = torch.arange(longest, device=device) - (longest - block.counts[:, None])
            virtual = places.clamp(min=0) + behind.counts[:, None] + first[:, :1]
            inputs["position_ids"] = torch.cat([virtual, (first + counts).expand(num_rows, own)], dim=1)
        if block.tokens is None:
            return
        embeds = inputs["inputs_embeds"]
        inputs["inputs_embeds"] = torch.cat([block.tokens, embeds], dim=1)
        if inputs.get("token_type_ids") is not None:
            inputs["token_type_ids"] = F.pad(inputs["token_type_ids"], (longest, 0))
        if self._has_token_labels(inputs.get("labels"), (num_rows, own)):
            inputs["labels"] = self._labelled(inputs["labels"], block)
        for name in ("start_positions", "end_positions"):
            if inputs.get(name) is not None:
                inputs[name] = inputs[name] + longest

    def _labelled(self, labels: Tensor, block: _Block) -> Tensor:
        """Labels with those of virtual tokens, of which there are none; (B, longest + T)."""
        labels = F.pad(labels, (block.longest, 0), value=-100)
        if self.task_type == "CAUSAL_LM":
            # Nothing stands before a row's first token where it has no virtual ones, so nothing predicts it.
            first = torch.arange(labels.shape[1], device=labels.device) == block.longest
            labels = labels.masked_fill((block.counts.to(labels.device) == 0)[:, None] & first, -100)
        return labels

    def _moved(self, inputs: dict[str, Any], block: _Block, behind: _Block) -> tuple[Tensor, int] | None:
        """Moves rows along their positions to where the base wants them, and puts the mask of the past before;
        (how far to the left (B,), positions in all), or None."""
        mask, left = inputs.get("attention_mask"), None
        if block.tokens is not None and not self._reads_one_way():
            left = block.longest - block.counts if block.is_uneven else None
        elif block.tokens is not None and mask is not None and self.task_type == "SEQ_CLS":
            # Such a base takes the last position for the row's last token where it is given no ids.
            behind_text = (mask.flip(1).cumsum(1) == 0).sum(1)
            if behind_text.any():
                left = -behind_text
                if "position_ids" not in inputs:
                    inputs["position_ids"] = torch.arange(mask.shape[1], device=mask.device).expand(
                        mask.shape
                    )
        if left is not None:
            for name in ("inputs_embeds", "attention_mask", "position_ids", "token_type_ids"):
                if inputs.get(name) is not None:
                    inputs[name] = _rolled(inputs[name], left)
            if self._has_token_labels(inputs.get("labels"), tuple(inputs["inputs_embeds"].shape[:2])):
                inputs["labels"] = _rolled(inputs["labels"], left)
            for name in ("start_positions", "end_positions"):
                if inputs.get(name) is not None:
                    inputs[name] = inputs[name] - left
        if mask is not None and behind.longest:
            inputs["attention_mask"] = torch.cat([behind.shown.to(mask), inputs["attention_mask"]], dim=1)
        return None if left is None else (left, inputs["inputs_embeds"].shape[1])

    def _continued(self, names: list[str | None], inputs: dict[str, Any]) -> dict[str, Any]:
        """Arguments of a step whose cache holds the rows' virtual tokens already."""
        like = inputs.get("inputs_embeds")
        like = inputs["input_ids"] if like is None else like
        block, behind = self._counts(names, like.device)
        mask = _plain_mask(inputs, "attention_mask")
        uneven = block.is_uneven or behind.is_uneven
        own = inputs["past_key_values"].get_seq_length() - block.longest - behind.longest + like.shape[1]
        if mask is None and uneven:
            mask = torch.ones(len(names), own, dtype=torch.long, device=like.device)
        if mask is not None:
            inputs["attention_mask"] = torch.cat([behind.shown.to(mask), block.shown.to(mask), mask], dim=1)
        given = inputs.get("position_ids")
        if given is not None or (uneven and self._needs_positions(behind)):
            first = (
                torch.arange(own - like.shape[1], own, device=like.device)[None] if given is None else given
            )
            inputs["position_ids"] = first + (block.counts + behind.counts)[:, None]
        return inputs

    def _check_past(self, names: Sequence[str | None], behind: _Block) -> None:
        if self.training:
            self._refuse_recomputation("a prefix")

    def _cache(self, given: Any, layers: list[tuple[Tensor, Tensor]]) -> Any:
        if getattr(given, "is_compileable", False):
            raise ConfigError("a prefix adapter needs a cache that grows. Leave cache_implementation out.")
        base = self.get_base_model()
        # A decoder may have another number of layers than the base's config says.
        facts = base.get_decoder().config if self._has_decoder() else base.config
        if given is None and self._has_decoder():
            given = EncoderDecoderCache(DynamicCache(config=facts), DynamicCache(config=facts))
        elif given is None:
            given = DynamicCache(config=facts)
        own = given.self_attention_cache if isinstance(given, EncoderDecoderCache) else given
        for number, (keys, values) in enumerate(layers):
            own.update(keys, values, number)
        return given

    def _needs_positions(self, behind: _Block) -> bool:
        """Whether rows of different numbers need their positions said.

        Raises:
            RowsError: they do, and the base cannot be told.
        """
        base = self.get_base_model()
        if not self._reads_one_way() and not behind.longest:
            return False
        if "position_ids" in _arguments(base) or "position_ids" in _arguments(_backbone(base)):
            return True
        if getattr(base.config, "model_type", None) in _BY_DISTANCE:
            return False
        raise RowsError(
            f"{type(base).__name__} takes no position_ids, so rows of one batch cannot have different numbers of "
            "virtual tokens. Run one prompt adapter at a time."
        )

    def _reads_one_way(self) -> bool:
        if self._one_way is None:
            base = self.get_base_model()
            flags = [m.is_causal for m in base.modules() if isinstance(getattr(m, "is_causal", None), bool)]
            self._one_way = any(flags) if flags else "past_key_values" in _arguments(_backbone(base))
        return self._one_way

    def _has_decoder(self) -> bool:
        return _num_stacks(self.get_base_model()) == 2

    def _has_token_labels(self, labels: Any, shape: tuple[int, ...]) -> bool:
        return (
            isinstance(labels, Tensor)
            and self.task_type != "SEQ_CLS"
            and tuple(labels.shape) == shape
            and not labels.is_floating_point()
        )

    def _counted(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
        """(labels, weights of their losses), each (B, virtual + T), where a row's method has a loss of its own;
        else None."""
        labels = inputs.get("labels")
        if not isinstance(labels, Tensor) or self._has_decoder():
            return None
        names = self._names(len(labels))
        own = {}
        for name in _distinct(names):
            mine = [row for row, other in enumerate(names) if other == name]
            counted = self.methods[name].targets(labels[mine], self._given(name, names))
            if counted is not None:
                own[name] = counted, mine
        if not own:
            return None
        whole = self._labelled(labels, self._counts(names, labels.device)[0])
        longest = whole.shape[1] - labels.shape[1]
        weights = torch.ones(whole.shape, device=labels.device)
        for (theirs, weight), mine in own.values():
            fewer = longest + labels.shape[1] - theirs.shape[1]
            whole[mine] = F.pad(theirs, (fewer, 0), value=-100)
            weights[mine] = F.pad(weight, (fewer, 0))
        return whole, weights

    # --- an encoder and a decoder

    def _prompted_pair(self, inputs: dict[str, Any]) -> tuple[list[str | None], dict[str, Any], Any]:
        inputs = dict(inputs)
        begun = inputs.get("past_key_values")
        names = self._names(_num_rows(inputs))
        if begun is not None and begun.get_seq_length():
            return names, self._decoder_continued(names, inputs), None
        self._prompt_encoder(names, inputs)
        return names, *self._prompt_decoder(names, inputs)

    def _prompt_encoder(self, names: list[str | None], inputs: dict[str, Any]) -> None:
        """Puts the encoder's virtual tokens before its input, rows with fewer padded at the end."""
        takes = any(name is not None and not isinstance(self.methods[name], PastMethod) for name in names)
        if inputs.get("encoder_outputs") is not None:
            if takes:
                raise ConfigError(
                    "encoder_outputs: virtual tokens stand before the encoder's input. Give input_ids instead."
                )
            return
        if not takes and not self._others_may_prompt():
            return
        layer, _ = self._embedding()
        ids, embeds = inputs.pop("input_ids", None), inputs.get("inputs_embeds")
        embeds = layer(ids) if embeds is None else embeds
        inputs["inputs_embeds"] = embeds
        block = self._block(names, _encoders_part, embeds)
        if block.tokens is None:
            return
        inputs["inputs_embeds"] = torch.cat([block.tokens, embeds], dim=1)
        mask = _plain_mask(inputs, "attention_mask")
        if mask is None and block.is_uneven:
            mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
        if mask is not None:
            inputs["attention_mask"] = torch.cat([block.shown.to(mask), mask], dim=1)
        if block.is_uneven:
            for name in ("inputs_embeds", "attention_mask"):
                inputs[name] = _rolled(inputs[name], block.longest - block.counts)

    def _prompt_decoder(
        self, names: list[str | None], inputs: dict[str, Any], steps: bool = False
    ) -> tuple[dict[str, Any], tuple[Tensor, int] | None]:
        """Puts the decoder's virtual tokens before its input, and keys and values before its own.

        Args:
            steps: more tokens will follow one by one.
        """
        device = self.base.device
        behind, cache = self._past(names, device)
        if cache:
            self._check_past(names, behind)
            inputs["past_key_values"] = self._cache(inputs.get("past_key_values"), cache)
        block = _Block(None, torch.zeros(len(names), dtype=torch.long, device=device), 0)
        if any(name is not None and self.methods[name].in_decoder for name in names):
            block = self._block(names, _decoders_part, self._decoders_own(inputs))
        uneven = behind.is_uneven or (steps and block.is_uneven)
        self._count_places(behind, block if steps else None)
        if not behind.longest and not block.longest:
            return inputs, None
        mask = _plain_mask(inputs, "decoder_attention_mask")
        if mask is None and uneven:
            own = self._decoders_length(inputs)
            mask = torch.ones(len(names), own, dtype=torch.long, device=device)
        left = None
        if block.tokens is not None:
            inputs["decoder_inputs_embeds"] = torch.cat(
                [block.tokens, inputs["decoder_inputs_embeds"]], dim=1
            )
            labels = inputs.get("labels")
            if isinstance(labels, Tensor):
                inputs["labels"] = labels = F.pad(labels, (block.longest, 0), value=-100)
            mask = None if mask is None else torch.cat([block.shown.to(mask), mask], dim=1)
            if block.is_uneven and not steps:
                left = block.longest - block.counts
                for name in ("decoder_inputs_embeds", "labels"):
                    if inputs.get(name) is not None:
                        inputs[name] = _rolled(inputs[name], left)
                mask = None if mask is None else _rolled(mask, left)
        if mask is not None:
            inputs["decoder_attention_mask"] = torch.cat([behind.shown.to(mask), mask], dim=1)
        return inputs, None if left is None else (left, inputs["decoder_inputs_embeds"].shape[1])

    def _decoders_own(self, inputs: dict[str, Any]) -> Tensor:
        """The embeddings of the decoder's own input, which then stand in `inputs`."""
        embeds = inputs.get("decoder_inputs_embeds")
        if embeds is None:
            ids = inputs.pop("decoder_input_ids", None)
            if ids is None:
                labels = inputs.get("labels")
                if labels is None:
                    raise ConfigError("the decoder has no input. Give labels, or decoder_input_ids.")
                ids = _shifted(labels, self.get_base_model().config)
            embeds = inputs["decoder_inputs_embeds"] = self._embedding()[0](ids)
        return embeds

    def _decoders_length(self, inputs: dict[str, Any]) -> int:
        for name in ("decoder_inputs_embeds", "decoder_input_ids", "labels"):
            if inputs.get(name) is not None:
                return inputs[name].shape[1]
        raise ConfigError("the decoder has no input. Give labels, or decoder_input_ids.")

    def _decoder_continued(self, names: list[str | None], inputs: dict[str, Any]) -> dict[str, Any]:
        block, behind = self._counts(names, self.base.device, decoder=True)
        self._count_places(behind, block)
        mask = _plain_mask(inputs, "decoder_attention_mask")
        if mask is None and (block.is_uneven or behind.is_uneven):
            virtual = block.longest + behind.longest
            own = inputs["past_key_values"].get_seq_length() - virtual + self._decoders_length(inputs)
            mask = torch.ones(len(names), own, dtype=torch.long, device=block.counts.device)
        if mask is not None:
            parts = [behind.shown.to(mask), block.shown.to(mask), mask]
            inputs["decoder_attention_mask"] = torch.cat(parts, dim=1)
        return inputs

    def _count_places(self, behind: _Block, block: _Block | None) -> None:
        """Lets padding before a row's decoder tokens not count as positions.

        Raises:
            RowsError: rows have different numbers of virtual tokens, and the decoder cannot be told.
        """
        base = self.get_base_model()
        blocks = [each for each in (behind, block) if each is not None and each.is_uneven]
        self._not_counted = None
        if not blocks or getattr(base.config, "model_type", None) in _BY_DISTANCE:
            return
        if _positions_of(base) is None:
            raise RowsError(
                f"{type(base).__name__} counts its decoder's positions by itself, so rows of one batch cannot have "
                "different numbers of virtual tokens there. Run one such adapter at a time."
            )
        self._not_counted = torch.stack([each.longest - each.counts for each in blocks]).sum(0)

    @contextlib.contextmanager
    def _places_counted(self) -> Iterator[None]:
        """Within the context a decoder's positions are those that `_count_places` has said."""

        def places(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            if self._not_counted is None:
                return args, kwargs
            own = kwargs["position_ids"] - self._not_counted[:, None].to(kwargs["position_ids"].device)
            return args, {**kwargs, "position_ids": own.clamp(min=0).flatten()}

        def by_rows(module: nn.Module, args: tuple, kwargs: dict[str, Any], made: Tensor) -> Tensor:
            # Of one row of positions a decoder makes one row of embeddings.
            rows = self._not_counted
            return made.view(len(rows), -1, made.shape[-1]) if rows is not None else made

        embedding = _positions_of(self.get_base_model())
        hooks = []
        if embedding is not None:
            hooks.append(embedding.register_forward_pre_hook(places, with_kwargs=True))
            hooks.append(embedding.register_forward_hook(by_rows, with_kwargs=True))
        try:
            yield
        finally:
            self._not_counted = None
            for hook in hooks:
                hook.remove()

    # --- generation

    def _generate_prompted(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The base's generate behind virtual tokens: each step's arguments are changed on their way."""
        base, rows = self.get_base_model(), self._adapters.current.rows
        expansion = self._rows_each(kwargs)
        if self._has_decoder():
            if args:
                kwargs = {"input_ids": args[0], **kwargs}
                args = ()
            if expansion > 1 and self._rows_choose():
                raise ConfigError(
                    "generate: num_beams and num_return_sequences above 1 cannot be used with adapter_names on an "
                    "encoder-decoder base. Name one adapter at a time."
                )
            kwargs = self._encoders_inputs(kwargs)
        with contextlib.ExitStack() as within:
            if rows is not None and rows.adapters is not None and expansion > 1:
                expanded = tuple(name for name in rows.adapters for _ in range(expansion))
                within.enter_context(self.using(dataclasses.replace(rows, adapters=expanded)))  # type: ignore[operator]
            within.enter_context(self._steps_changed(base, expansion))
            if self._has_decoder():
                within.enter_context(self._places_counted())
            return base.generate(*args, **kwargs)

    def _rows_each(self, kwargs: dict[str, Any]) -> int:
        settings = kwargs.get("generation_config") or self.get_base_model().generation_config
        wanted = [
            kwargs.get(n) or getattr(settings, n, None) or 1 for n in ("num_beams", "num_return_sequences")
        ]
        return max(wanted)

    def _encoders_inputs(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of generate with the encoder's virtual tokens."""
        kwargs = dict(kwargs)
        if kwargs.get("inputs") is not None:
            kwargs["input_ids"] = kwargs.pop("inputs")
        names = self._names(_num_rows(kwargs))
        ids = kwargs.get("input_ids")
        if kwargs.get("attention_mask") is None and ids is not None:
            kwargs["attention_mask"] = self._shown(ids, kwargs)
        self._prompt_encoder(names, kwargs)
        return kwargs

    def _shown(self, input_ids: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """The attention mask that generate infers where none is given: padding is hidden unless it ends
        texts too."""
        settings = kwargs.get("generation_config") or self.get_base_model().generation_config
        pad = kwargs.get("pad_token_id", settings.pad_token_id)
        ends = kwargs.get("eos_token_id", settings.eos_token_id)
        if pad is None or pad in (ends if isinstance(ends, (list, tuple)) else [ends]):
            return torch.ones_like(input_ids)
        return input_ids.ne(pad).long()

    @contextlib.contextmanager
    def _steps_changed(self, base: Any, rows_of_each: int) -> Iterator[None]:
        """Within the context each step of the base's generate gets its virtual tokens."""
        original = base.prepare_inputs_for_generation

        @functools.wraps(original)
        def prepare(*args: Any, **kwargs: Any) -> dict[str, Any]:
            inputs = original(*args, **kwargs)
            past = inputs.get("past_key_values")
            # Without a cache every step is a first one; what a prefix filled would be taken for its past.
            if inputs.get("use_cache") is False:
                inputs.pop("past_key_values", None)
                past = None
            if getattr(past, "is_compileable", False):
                raise ConfigError(
                    "generate: a prompt adapter needs a cache that grows. Leave cache_implementation out."
                )
            if not self._has_decoder():
                return self._prompted(inputs)[1]
            names = self._names(_num_rows(inputs))
            if past is not None and past.get_seq_length():
                return self._decoder_continued(names, inputs)
            return self._prompt_decoder(names, inputs, steps=True)[0]

        base.prepare_inputs_for_generation = prepare
        self._rows_of_each = rows_of_each
        try:
            yield
        finally:
            self._rows_of_each = 1
            del base.prepare_inputs_for_generation


def _distinct(names: Sequence[str | None]) -> list[str]:
    """The adapters among `names`, in one order on every rank."""
    return list(dict.fromkeys(name for name in names if name is not None))


def base_sizes(base: Any, width: int) -> BaseSizes:
    """What prompt methods know of a base whose input embeddings are `width` wide; 0 for what it does not say."""
    facts = getattr(base, "config", None)
    if not isinstance(facts, transformers.PretrainedConfig):
        return BaseSizes(width, 0, 0, 0, 0, 0)
    whole, keeps = facts.get_text_config(), facts.get_text_config(decoder=True)
    heads = getattr(keeps, "num_attention_heads", None) or 0
    kv_heads = getattr(keeps, "num_key_value_heads", None)
    if kv_heads is None and getattr(keeps, "multi_query", False):
        # Falcon: its newer decoders keep what each head reads.
        kv_heads = None if getattr(keeps, "new_decoder_architecture", False) else 1
    return BaseSizes(
        width=width,
        num_layers=getattr(whole, "num_hidden_layers", None) or 0,
        num_heads=getattr(whole, "num_attention_heads", None) or 0,
        num_kv_layers=getattr(facts, "num_decoder_layers", None)
        or getattr(keeps, "num_hidden_layers", None)
        or 0,
        num_kv_heads=kv_heads or heads,
        kv_width=getattr(keeps, "head_dim", None) or getattr(keeps, "hidden_size", 0) // max(heads, 1),
        num_stacks=_num_stacks(base),
    )


def _num_stacks(base: Any) -> int:
    has = getattr(getattr(base, "config", None), "is_encoder_decoder", False)
    return 2 if has and "decoder_input_ids" in _arguments(base) else 1


def _positions_of(base: Any) -> nn.Module | None:
    """The module that makes a decoder's position embeddings of positions that it counts by itself, where it can
    be told others."""
    module = getattr(base.get_decoder(), "embed_positions", None)
    return module if module is not None and "position_ids" in _arguments(module) else None


def _backbone(base: Any) -> Any:
    return getattr(base, "base_model", base)


def _arguments(module: Any) -> tuple[str, ...]:
    """The names of what a module's forward takes, in order."""
    kind: Any = type(module)
    return _arguments_of(kind)


@functools.cache
def _arguments_of(kind: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(kind.forward).parameters)[1:]


def _positions_by_padding(
    base: Any, ids: Tensor | None, block: _Block, behind: _Block, own: int
) -> Tensor | None:
    """(B, own) the positions that RoBERTa and its like give each row by itself, less its virtual tokens: counted
    from the padding's number, and over tokens alone where it sees ids; None for other bases."""
    module = getattr(_backbone(base), "embeddings", None)
    if not hasattr(module, "create_position_ids_from_inputs_embeds"):
        return None
    padding: Any = module.padding_idx  # type: ignore[union-attr]
    places = padding + 1 + torch.arange(own, device=block.counts.device)
    if ids is None:
        return places.expand(len(block.counts), own)
    is_token = (ids != padding).long()
    past = behind.counts[:, None]
    by_tokens = padding + (is_token.cumsum(1) + past) * is_token - past
    return torch.where((block.counts > 0)[:, None], places, by_tokens)


def _is_in_decoder(method: Any) -> bool:
    return method.in_decoder and method.num_transformer_submodules == 2


def _encoders_part(method: PromptMethod, tokens: Tensor) -> Tensor:
    return tokens[..., : method.num_tokens, :]


def _decoders_part(method: PromptMethod, tokens: Tensor) -> Tensor | None:
    return tokens[..., method.num_tokens :, :] if _is_in_decoder(method) else None


def _num_rows(inputs: dict[str, Any]) -> int:
    for name in ("decoder_input_ids", "decoder_inputs_embeds", "input_ids", "inputs_embeds", "labels"):
        if inputs.get(name) is not None:
            return inputs[name].shape[0]
    if inputs.get("encoder_outputs") is not None:
        return inputs["encoder_outputs"][0].shape[0]
    raise ConfigError("there is no input. Give input_ids.")


def _shifted(labels: Tensor, facts: Any) -> Tensor:
    """The decoder's input for `labels`: its start, and all labels but the last."""
    start = torch.full_like(labels[:, :1], facts.decoder_start_token_id)
    return torch.cat([start, labels[:, :-1]], dim=1).masked_fill(
        torch.cat([start, labels[:, :-1]], dim=1) == -100, facts.pad_token_id
    )


def _plain_mask(inputs: dict[str, Any], name: str) -> Tensor | None:
    mask = inputs.get(name)
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
        raise ConfigError(
            f"{name}: virtual tokens need a mask of (sequences, positions). Give one, or leave it out."
        )
    return mask


def _rolled(t: Tensor, left: Tensor) -> Tensor:
    """t (B, positions, ...) with each row moved by `left` (B,) positions, around the end."""
    places = torch.arange(t.shape[1], device=t.device)
    index = (places + left[:, None].to(t.device)) % t.shape[1]
    t = t.expand(len(left), *t.shape[1:])
    return t[torch.arange(len(left), device=t.device)[:, None], index]


def _in_line(outputs: Any, left: Tensor, length: int) -> Any:
    """A base's outputs with the positions of rows that were moved by `left` where they were before."""

    def back(value: Any) -> Any:
        if isinstance(value, Tensor) and value.ndim > 1 and value.shape[:2] == (len(left), length):
            return _rolled(value, -left)
        return tuple(map(back, value)) if isinstance(value, tuple) else value

    if isinstance(outputs, tuple):
        return back(outputs)
    for key, value in list(outputs.items()):
        is_of_a_row = key == "logits" and value.ndim == 2
        if not is_of_a_row and not key.startswith("encoder_") and "attentions" not in key:
            outputs[key] = back(value)
    return outputs


def _with_loss(outputs: Any, labels: Tensor, weights: Tensor, items: Any) -> Any:
    """`outputs` with the mean of the next tokens' losses, each times its weight."""
    logits = outputs.logits if hasattr(outputs, "logits") else outputs[0]
    loss = weighted_loss(logits, labels, weights, items)
    if not hasattr(outputs, "logits"):
        return (loss, *outputs)
    outputs.loss = loss
    return outputs
