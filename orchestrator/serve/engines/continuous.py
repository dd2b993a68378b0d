"""transformers' continuous batching, as much of it as an engine needs: its paged cache, its scheduler and its
packed inputs. All that is read of its insides is read here; `tests/orchestrator/serve/test_continuous.py`
holds them to it.

What is not taken over: its thread, its sampling, and its dense mask, (positions x cached positions) for each step,
in whose place every sequence attends to its own keys alone. Blocks are shared between sequences of one salt only:
transformers hashes their tokens and knows of nothing else that made their contents.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import ContinuousBatchingConfig, PreTrainedModel
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.continuous_batching.distributed import DistributedHelper
from transformers.generation.continuous_batching.initialization import resolve_continuous_batching_config
from transformers.generation.continuous_batching.input_outputs import ContinuousBatchingIOs
from transformers.generation.continuous_batching.offloading_manager import OffloadingManager
from transformers.generation.continuous_batching.requests import RequestState, RequestStatus
from transformers.generation.continuous_batching.scheduler import FIFOScheduler
from transformers.generation.logits_process import LogitsProcessorList
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from peft_dist.prompts.packed import Past

ATTENTION = "raypeft_packed"


class UnfitBase(Exception):
    """A base that cannot be run in packed rows."""


@dataclass(frozen=True)
class Sizes:
    """How large the batches and the cache are.

    Args:
        num_blocks: blocks of the cache. page_size: tokens in one.
        max_batch_tokens: tokens of one step, of all sequences. max_sequences: sequences of one step.
    """

    num_blocks: int
    page_size: int = 16
    max_batch_tokens: int = 256
    max_sequences: int = 64


@dataclass(frozen=True)
class Part:
    """What one sequence has in a step: `length` tokens from position `start` on; `is_last` where a new token
    follows."""

    sequence: str
    start: int
    length: int
    is_last: bool


@dataclass(frozen=True)
class Step:
    """One forward of a packed row: its parts in their order, and the model's arguments."""

    parts: tuple[Part, ...]
    inputs: dict[str, Any]
    _scheduled: Any


class ContinuousBatches:
    """Sequences that come and go while others run; one thread uses it.

    Args:
        model: of a decoder; its attention is switched to the packed one for good.
    """

    def __init__(self, model: PreTrainedModel, sizes: Sizes, *, one_by_one: bool = False) -> None:
        self.sizes, self._one_by_one = sizes, one_by_one
        config = model.config.get_text_config()
        if not getattr(model, "_supports_attention_backend", False):
            raise UnfitBase(f"{type(model).__name__} does not let its attention be replaced")
        ALL_ATTENTION_FUNCTIONS.register(ATTENTION, packed_attention)
        model.config._attn_implementation = ATTENTION
        config._attn_implementation = ATTENTION
        processors = ContinuousBatchingLogitsProcessorList(LogitsProcessorList())
        settings = resolve_continuous_batching_config(
            config=config,
            cb_config=ContinuousBatchingConfig(
                page_size=sizes.page_size,
                num_blocks=sizes.num_blocks,
                max_batch_tokens=sizes.max_batch_tokens,
                max_requests_per_batch=min(sizes.max_sequences, sizes.max_batch_tokens),
                max_blocks_per_request=0,
                max_memory_percent=0.95,
                use_async_batching=False,
                use_cuda_graph=False,
                auto_switch_to_flash=False,
            ),
            workload_hints=None,
            has_logit_processors=False,
            device=model.device,
        )
        alone = DistributedHelper(device_mesh=None, cpu_group_timeout=None, tp_plan={})
        try:
            self._cache = _SaltedCache(
                config=config,
                continuous_batching_config=settings,
                device=model.device,
                distributed_helper=alone,
                dtype=model.dtype,
                model_supports_logits_to_keep=True,
            )
        except ValueError as error:
            raise UnfitBase(str(error)) from error
        self._scheduler = _Scheduler(
            cache=self._cache,
            safety_margin=0.05,
            max_requests_per_batch=min(sizes.max_sequences, sizes.max_batch_tokens),
        )
        self._inputs = ContinuousBatchingIOs(
            cache=self._cache,
            config=config,
            continuous_batching_config=settings,
            device=model.device,
            model_dtype=model.dtype,
            logit_processor=processors,
        )
        self._processors = processors
        self._overflow = OffloadingManager(
            cache=self._cache,
            scheduler=self._scheduler,
            cpu_offload_space_gib=0.0,
            safety_threshold=0.8,
            compute_stream=None,
            distributed_helper=alone,
        )

    @property
    def max_length(self) -> int:
        """Tokens that one sequence can have in the cache."""
        return self.sizes.num_blocks * self.sizes.page_size

    @property
    def num_sequences(self) -> int:
        """Sequences that were added and are not finished."""
        return len(self._scheduler.active_requests) + len(self._scheduler.waiting_requests)

    @property
    def shared_tokens(self) -> int:
        """Tokens of prompts that were found in the cache so far."""
        return self._cache.shared_tokens

    @property
    def free_share(self) -> float:
        """The share of the cache that no running sequence holds."""
        return float(self._cache.compute_free_capacity())

    def add(self, sequence: str, tokens: Sequence[int], salt: str) -> None:
        """A sequence that begins with these tokens. It shares cached blocks with those of the same salt."""
        self._cache.salts[sequence] = salt
        self._scheduler.add_waiting_request(
            RequestState(request_id=sequence, initial_tokens=list(tokens), max_new_tokens=None)
        )

    def finish(self, sequence: str) -> None:
        """Frees a sequence, whether it ran or waited."""
        self._scheduler.set_request_cancellation(sequence)
        self._scheduler.clear_cancelled_requests()
        # A full cache keeps newcomers out until somebody goes.
        self._scheduler.block_new_requests = False
        self._cache.salts.pop(sequence, None)

    def next_step(
        self, order: Callable[[str], Any], late: Callable[[str], bool] = lambda _: False, spare: int = 0
    ) -> Step | None:
        """The next forward, sequences sorted by `order`; None where there is nothing to run.

        Args:
            late: of a sequence, whether its prompt is read behind those of others.
            spare: tokens that late sequences have together in a step, at least one of them of a prompt.
        """
        if not self._scheduler.has_pending_requests():
            return None
        self._scheduler.late, self._scheduler.spare = late, spare
        scheduled, num_tokens, num_read = self._schedule()
        if not scheduled:
            return None
        scheduled.sort(key=lambda each: order(each.state.request_id))
        parts = tuple(
            Part(each.state.request_id, each.state.position_offset, each.query_length, each.has_new_token)
            for each in scheduled
        )
        self._inputs.prepare_batch_tensors(
            requests_in_batch=scheduled,
            logits_processors=self._processors,
            use_decode_fast_path=False,
            num_q_tokens=num_tokens,
            max_kv_read=num_read,
            use_padding=False,
        )
        given: dict[str, Any] = dict(self._inputs.get_model_kwargs())
        indices = given["logits_indices"][: sum(part.is_last for part in parts)]
        for name in ("logits_indices", "logits_processor_args", "block_table", "attention_mask", "is_causal"):
            given.pop(name, None)
        given["logits_to_keep"] = indices.long()
        given["packed"] = Packed(parts, self._one_by_one)
        return Step(parts, given, scheduled)

    def take(self, step: Step, tokens: Mapping[str, int]) -> None:
        """What a step's forward wrote is in the cache, and these tokens come next."""
        for each in step._scheduled:
            state: Any = each.state
            # Cancelled, or put back to the queue, since the step was made.
            if self._scheduler.active_requests.get(state.request_id) is not each.state:
                continue
            if each.has_new_token:
                state.status = RequestStatus.DECODING
                token = tokens[state.request_id]
                state.generated_tokens.append(token)
                state.tokens_to_process = [token]
            self._cache.mark_complete_blocks(state, each.complete_blocks)

    def _schedule(self) -> tuple[list[Any], int, int]:
        """(sequences of the next step, their tokens, tokens read of the cache)."""
        while True:
            scheduled, _, num_tokens, num_read = self._scheduler.schedule_batch(
                self._cache.max_batch_tokens, self._cache.max_tokens_read
            )
            if scheduled is not None:
                break
            # The cache is full: the newest go back to the queue with what they have said so far.
            if not self._overflow.offload_requests():
                raise RuntimeError("the cache holds no sequence that runs, and has no room for one")
        if self._scheduler.starved_requests:
            self._overflow.offload_requests()
        return scheduled, num_tokens, num_read


class _Scheduler(FIFOScheduler):
    """transformers' order, but for late sequences: their prompts come last, and a few tokens of them a step.

    Attributes:
        late, spare: see `ContinuousBatches.next_step`.
    """

    late: Callable[[str], bool]
    spare: int

    def _process_candidates(self, candidates: list[Any], token_budget: int, *more: Any) -> Any:
        last = [s for s in candidates if s.status != RequestStatus.DECODING and self.late(s.request_id)]
        if last:
            first = [s for s in candidates if s not in last]
            decoding = [s for s in first if s.status == RequestStatus.DECODING]
            taken = len(decoding) + sum(len(s.remaining_prefill_tokens) for s in first if s not in decoding)
            spare = self.spare - sum(self.late(s.request_id) for s in decoding)
            token_budget, candidates = min(token_budget, taken + max(1, spare)), first + last
        return super()._process_candidates(candidates, token_budget, *more)


class _SaltedCache(PagedAttentionCache):
    """A paged cache that shares blocks between sequences of one salt only.

    transformers chains the hash of each block to the one before, so a salt in the first tokens is in all.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.salts: dict[str, str] = {}
        self.shared_tokens = 0

    def search_prefix_match(self, request_id: str, prompt_ids: list[int]) -> int:
        found = super().search_prefix_match(request_id, salted(prompt_ids, self.salts[request_id]))
        self.shared_tokens += found
        return found

    def mark_complete_blocks(self, state: RequestState, complete_blocks: dict[str, int]) -> None:
        if not complete_blocks or state.request_id not in self.salts:
            return
        own, state.initial_tokens = (
            state.initial_tokens,
            salted(state.initial_tokens, self.salts[state.request_id]),
        )
        try:
            super().mark_complete_blocks(state, complete_blocks)
        finally:
            state.initial_tokens = own


def salted(tokens: list[int], salt: str) -> list[int]:
    """The tokens as the cache hashes them: four of the first block carry 128 bits of the salt's hash."""
    words = struct.unpack("<4i", hashlib.blake2b(salt.encode(), digest_size=16).digest())
    return [token ^ word for token, word in zip(tokens, words, strict=False)] + tokens[4:]


class Packed:
    """How the sequences of a packed row attend: each to its own keys.

    Attributes:
        parts: the sequences' parts of the row. past: keys and values that stand in place of the row's own.
    """

    def __init__(self, parts: tuple[Part, ...], one_by_one: bool = False) -> None:
        self.parts, self.one_by_one = parts, one_by_one
        self.past: list[Past] = []

    def attend(self, query: Tensor, key: Tensor, value: Tensor, window: int | None, **options: Any) -> Tensor:
        """(1, T, heads, width) from query (1, heads, T, width) and all keys and values (1, kv heads, R, width)
        that the sequences read, one after the other."""
        pieces, at, read = [], 0, 0
        for part in self.parts:
            kept = part.start + part.length if window is None else min(part.start, window - 1) + part.length
            pieces.append(
                self._one(
                    query[:, :, at : at + part.length],
                    key[:, :, read : read + kept],
                    value[:, :, read : read + kept],
                    window,
                    options,
                )
            )
            at, read = at + part.length, read + kept
        return torch.cat(pieces, 2).transpose(1, 2).contiguous()

    def _one(self, q: Tensor, k: Tensor, v: Tensor, window: int | None, options: dict[str, Any]) -> Tensor:
        if self.one_by_one:
            # Each position by itself: its numbers then depend on nothing but its own sequence.
            first = k.shape[2] - q.shape[2]
            rows = []
            for i in range(q.shape[2]):
                low = 0 if window is None else max(0, first + i + 1 - window)
                keys, values = (t[:, :, low : first + i + 1].contiguous() for t in (k, v))
                at = q[:, :, i : i + 1].contiguous()
                rows.append(_attention(at, keys, values, None, False, **options))
            return torch.cat(rows, 2)
        num, seen = q.shape[2], k.shape[2]
        if num == 1:
            return _attention(q, k, v, None, False, **options)
        if num == seen and (window is None or seen <= window):
            return _attention(q, k, v, None, True, **options)
        places = torch.arange(seen, device=q.device)
        own = places[seen - num :, None]
        mask = places <= own
        if window is not None:
            mask &= places > own - window
        return _attention(q, k, v, mask, False, **options)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    if softcap is None:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = (q @ k.mT) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = torch.tanh(scores / softcap) * softcap
    if causal:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v


def packed_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' attention interface: query (1, heads, T, width), key and value (1, kv heads, T, width)."""
    packed: Packed | None = kwargs.pop("packed", None)
    if packed is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    layer = module.layer_idx
    if packed.past:
        key, value = key.clone(), value.clone()
        for past in packed.past:
            own_keys, own_values = past.layers[layer]
            key[0, :, past.start : past.stop] = own_keys
            value[0, :, past.start : past.stop] = own_values
    window = kwargs.get("sliding_window")
    if (cache := kwargs.get("cache")) is not None:
        window = getattr(cache.layer_to_allocator[layer], "sliding_window", None)
        key, value = cache.update(key, value, layer, kwargs)
    out = packed.attend(
        query, key, value, window, scaling=kwargs.get("scaling"), softcap=kwargs.get("softcap")
    )
    return out, None
