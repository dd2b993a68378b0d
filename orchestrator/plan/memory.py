"""Memory of a training step on one worker, by part, from shapes: what autograd keeps, counted tensor by tensor.

The activations are those of a Llama-like block under torch's scaled-dot-product attention, whose kernels keep
queries, keys, values and the output, never the matrix of scores. T tokens a forward, H hidden, I intermediate,
V vocabulary; every number below is elements for each token of one layer:

    norms            2 H     their input, in float32 whatever the precision where they are root mean squares; more where
                     queries and keys have norms of their own
    attention        Q + 2 K + Q       queries, keys, values, output (Q = heads x head size, K = kv heads x head size;
                     where several rows are padded to one length, keys and values are repeated for every head)
    mlp              3 I     the gate before and after its nonlinearity, and up; I where there is no gate
    adapted layers   each layer's input once, where sites share it; each site's own copy and what was left of it where
                     it is dropped out or cast; the ranks between the adapter's tensors; of IA3 and DoRA the output
    loss             12 bytes for each of T V: in its forward the logits, those of the targets and log-probabilities, in
                     its backward log-probabilities and two gradients; nothing worth counting where a task's head tells
                     a few labels apart
    whole weights    those as large as W that a method keeps until the backward (`full_size`), once a layer

With gradient checkpointing a layer keeps its input alone, and one layer at a time keeps everything. Over a base that
is sharded, a method's whole weights are made again in the backward, one layer's at a time, and two of the base's
layers are whole at once (`sharding.partition_base` has DeepSpeed fetch no further ahead), or its largest tensor.

A quantised base stores, for each element of its linear layers (embeddings and the head stay as they are):

    8-bit   1 byte, and 4 for each row
    4-bit   1/2 byte, and for each block of 64 a scale of 4 bytes, or of 1 byte and 4 / 256

and has one layer's weight whole while it is used.

On a CPU a process holds more than is alive (`LEFT_OVER`).
"""

from __future__ import annotations

from dataclasses import dataclass

from ..spec.quantization import Quantization
from .adapter_sizes import AdapterSizes, SiteSizes
from .model_sizes import ModelSizes

LLAMA_LIKE = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "GemmaForCausalLM",
    "GraniteForCausalLM",
    "SmolLM3ForCausalLM",
    "Olmo2ForCausalLM",
    "StableLmForCausalLM",
    "Starcoder2ForCausalLM",
)
"""Architectures whose blocks are counted here."""

SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
"""Layers that take one and the same tensor."""

FP32 = 4
FOR_LOSS = 12
"""Bytes for each token and entry of the vocabulary while the loss is computed, in float32 as in bfloat16."""
LEFT_OVER = (16 + 12) * 2**20
"""Bytes that a CPU worker holds at its peak beyond what is alive in it, each measured on its own: MKL's packed copies
of what it multiplies, 16 MiB a thread at most (`benchmarks/memory_plan.py --left-over` asks for them back), and holes
in glibc's heap, among the blocks too small to be mapped by themselves (the peak of RssAnon less MKL's copies and less
what torch's profiler counts at that moment)."""
WHOLE_IN_BACKWARD = 4
"""Tensors as large as a weight while the backward of a layer that keeps whole ones runs."""
BLOCK, BLOCKS = 64, 256
"""Elements of one scale in 4 bits, and scales of one scale where they are quantised too."""


@dataclass(frozen=True)
class Step:
    """One forward and backward on one worker."""

    rows: int
    length: int
    """Tokens of a row, the longest allowed."""
    compute_bytes: int
    """Bytes of an element of the base and of activations."""
    recomputes: bool
    """Whether gradient checkpointing is on."""
    on_gpu: bool = False
    texts: int = 1
    """Sequences of a row."""
    has_vocabulary: bool = True
    """Whether the head gives a value for each token of the vocabulary."""
    quantization: Quantization | None = None
    """Of the base's linear layers; None: they are of `compute_bytes`."""
    is_sharded: bool = False
    """Whether the base rests in pieces on several workers."""

    @property
    def tokens(self) -> int:
        """Tokens of a forward."""
        return self.rows * self.texts * self.length


@dataclass(frozen=True)
class Memory:
    """Estimated bytes at the peak of a step on one worker, by part."""

    base: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    framework: int

    @property
    def total(self) -> int:
        """The sum of all parts, bytes."""
        return self.base + self.adapter + self.gradients + self.optimizer + self.activations + self.framework


def is_known(sizes: ModelSizes) -> bool:
    """Whether the activations of this base can be counted."""
    return sizes.architecture in LLAMA_LIKE and min(sizes.hidden, sizes.layers, sizes.heads, sizes.vocab) > 0


def estimate(
    sizes: ModelSizes,
    adapter: AdapterSizes,
    step: Step,
    *,
    stage: int,
    num_workers: int,
    optimizer: str,
    framework: int,
    rests_elsewhere: bool = False,
) -> Memory:
    """Bytes by part at the peak of a step.

    Args:
        stage: ZeRO's: 1 shards the optimizer's states, 2 the gradients, 3 the base as well.
        num_workers: over which they are sharded, by whole tensors.
        optimizer: adamw keeps two states for each element, sgd none.
        framework: bytes of a worker that has loaded nothing yet.
        rests_elsewhere: whether the base's pieces are in the node's memory and the worker is on a GPU.
    """
    own, states = adapter.parameters * FP32, {"adamw": 2, "sgd": 0}[optimizer]
    sharded = max(adapter.largest * FP32, -(-own // num_workers))
    return Memory(
        base=_base(sizes, step, num_workers, rests_elsewhere),
        adapter=own + adapter.frozen * FP32,
        gradients=own,  # each rank computes all of them; stage 2 frees them after the reduction, past the peak
        optimizer=states * (sharded if stage >= 1 else own),
        activations=activations(sizes, adapter, step),
        framework=framework,
    )


def stored_bytes(sizes: ModelSizes, compute_bytes: int, quantization: Quantization | None) -> int:
    """Bytes of the whole base as it is kept: its linear layers quantised where they are, the rest as it computes."""
    shapes = sizes.linear_shapes.values()
    linear = sum(rows * columns for rows, columns in shapes)
    rest = (sizes.parameters - linear) * compute_bytes
    if quantization is None:
        return rest + linear * compute_bytes
    if quantization.bits == 8:
        return rest + linear + FP32 * sum(rows for rows, _ in shapes)
    scales = linear // BLOCK
    return rest + linear // 2 + (scales + FP32 * scales // BLOCKS if quantization.double else FP32 * scales)


def _base(sizes: ModelSizes, step: Step, num_workers: int, rests_elsewhere: bool) -> int:
    whole = stored_bytes(sizes, step.compute_bytes, step.quantization)
    if not step.is_sharded:
        return whole
    return (0 if rests_elsewhere else whole // num_workers) + _gathered(sizes, step, whole)


def _gathered(sizes: ModelSizes, step: Step, whole: int) -> int:
    """Bytes that are whole at once under stage 3: a layer and the one fetched ahead, or the embedding."""
    embedding = sizes.vocab * sizes.hidden * step.compute_bytes
    outside = (1 if sizes.tied else 2) * embedding
    return max(2 * max(0, whole - outside) // max(1, sizes.layers), embedding)


def activations(sizes: ModelSizes, adapter: AdapterSizes, step: Step) -> int:
    """Bytes that a forward keeps for its backward, those of the loss or of the backward at the peak, and on a CPU what
    is left over of what was freed."""
    tokens = step.rows * step.texts * (step.length + adapter.virtual_tokens)
    layer = _layer(sizes, adapter, step) * tokens
    residual = sizes.hidden * step.compute_bytes * tokens
    last = sizes.hidden * FP32 * tokens  # the last norm's input
    loss = FOR_LOSS * sizes.vocab * tokens if step.has_vocabulary else 0
    backward = _backward(sizes, step) * tokens + _dequantised(sizes, step)
    backward += WHOLE_IN_BACKWARD * adapter.full_size * _largest(sizes) * FP32
    whole = 0 if step.is_sharded else adapter.full_size * sum(s.in_ * s.out for s in adapter.sites) * FP32
    whole += sum(_between(site, step, tokens) for site in adapter.sites) * FP32
    left_over = 0 if step.on_gpu else LEFT_OVER
    if step.recomputes:
        kept = sizes.layers * residual + last
        return kept + max(loss, backward + layer + whole // max(1, sizes.layers)) + left_over
    return sizes.layers * layer + last + max(loss, backward) + whole + left_over


def _between(site: SiteSizes, step: Step, tokens: int) -> int:
    """Elements that a site computes from its own tensors, or from these and its weight, and keeps."""
    may_fold = site.is_folded and not (step.on_gpu or step.is_sharded or _is_called(step))
    folded = site.in_ * site.out if may_fold and tokens >= min(site.in_, site.out) else 0
    return site.between + folded


def _is_called(step: Step) -> bool:
    """Whether frozen layers are called by themselves, not as one with their adapter."""
    return step.quantization is not None or step.compute_bytes != FP32


def _largest(sizes: ModelSizes) -> int:
    return max((rows * columns for rows, columns in sizes.linear_shapes.values()), default=0)


def _dequantised(sizes: ModelSizes, step: Step) -> int:
    """Bytes of the one weight that is whole while a quantised layer runs."""
    if step.quantization is None:
        return 0
    return _largest(sizes) * (FP32 if step.quantization.bits == 8 else step.compute_bytes)


def _layer(sizes: ModelSizes, adapter: AdapterSizes, step: Step) -> int:
    """Bytes that one layer keeps for each token."""
    queries = sizes.heads * sizes.head_dim
    # A mask for padding lets torch's kernels take keys and values for every head alone.
    keys = queries if step.rows * step.texts > 1 else sizes.kv_heads * sizes.head_dim
    mlp = (3 if _is_gated(sizes) else 1) * sizes.intermediate
    plain = 2 * queries + 2 * keys + mlp
    return _norms(sizes, step) + plain * step.compute_bytes + _adapted(sizes, adapter, step)


def _norms(sizes: ModelSizes, step: Step) -> int:
    """Bytes of what one layer's norms take, for each token."""
    wide = {"q_norm": sizes.heads * sizes.head_dim, "k_norm": sizes.kv_heads * sizes.head_dim}
    total = 0
    for name in sizes.tensors:
        layer, _, kind = name.rpartition(".")
        if kind == "weight" and ".layers." in name and layer.endswith("norm"):
            bytes_ = step.compute_bytes if f"{layer}.bias" in sizes.tensors else FP32
            total += wide.get(layer.rpartition(".")[2], sizes.hidden) * bytes_
    return total // max(1, sizes.layers) or 2 * sizes.hidden * FP32


def _is_gated(sizes: ModelSizes) -> bool:
    return not any(name.endswith(".c_fc") for name in sizes.linear_shapes)


def _adapted(sizes: ModelSizes, adapter: AdapterSizes, step: Step) -> int:
    """Bytes that the adapted layers of one block keep for each token, on average over the blocks."""
    total, drops = 0, adapter.dropout > 0
    for shared in _by_input(adapter.sites):
        total += sum(2 * site.inner * FP32 for site in shared)
        outputs = [site.called_outputs if drops or _is_called(step) else site.outputs for site in shared]
        total += sum(site.out * each * FP32 for site, each in zip(shared, outputs, strict=True))
        taking = [site for site in shared if site.keeps_input]
        if drops:
            # Its own masked copy and the mask.
            total += sum(site.in_ * (FP32 + 1) for site in taking)
        elif step.compute_bytes != FP32:
            total += sum(site.in_ * FP32 for site in taking)
        elif taking and not _is_kept_anyway(taking):
            total += taking[0].in_ * FP32
    return total // max(1, sizes.layers)


def _by_input(sites: tuple[SiteSizes, ...]) -> list[list[SiteSizes]]:
    """Sites in groups that take the same tensor."""
    groups: dict[tuple[str, int], list[SiteSizes]] = {}
    for site in sites:
        block = site.name.rsplit(".", 1)[0]
        place = next((i for i, names in enumerate(SHARED_INPUTS) if site.leaf in names), -1)
        key = (block, place) if place >= 0 else (site.name, place)
        groups.setdefault(key, []).append(site)
    return list(groups.values())


def _is_kept_anyway(shared: list[SiteSizes]) -> bool:
    """The output projection takes the attention's output, which the attention keeps."""
    return shared[0].leaf == "o_proj"


def _backward(sizes: ModelSizes, step: Step) -> int:
    """Bytes of gradients that are whole at once in the backward of a block's mlp, for each token."""
    return (3 * sizes.intermediate + 2 * sizes.hidden) * step.compute_bytes
