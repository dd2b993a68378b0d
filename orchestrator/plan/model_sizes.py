"""A base's sizes from its config.json and the tables at the head of its safetensors files: no weight is read."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import ModelError
from ..model_folder import ModelFolder, model_folder
from ..spec.quantization import Quantization
from ..spec.sharing import mixes_rows
from ..weights_table import read_table
from .stored_codes import Tensors, dequantised, quantization_in

_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U8": 8, "BOOL": 8,
}  # fmt: skip
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_LABELS = {name: label for label, name in _DTYPES.items()}

_NAMES = {
    "hidden": ("hidden_size", "n_embd", "d_model", "dim"),
    "layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "heads": ("num_attention_heads", "n_head", "num_heads", "n_heads"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads"),
    "intermediate": ("intermediate_size", "n_inner", "ffn_dim", "d_ff"),
    "vocab": ("vocab_size",),
    "max_positions": ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"),
    "decoder_layers": ("num_decoder_layers", "decoder_layers"),
    "kv_width": ("head_dim", "d_kv"),
}
"""Our word -> the words of configs."""

_EMBEDDINGS = ("embed", "wte", "wpe", "shared", "token_type", "relative_attention_bias")
_OUTPUTS = ("lm_head", "embed_out", "output_projection", "score", "classifier", "qa_outputs", "cls")


@dataclass(frozen=True)
class ModelSizes:
    """What the plan knows of a base. A size that the config does not give is 0."""

    parameters: int
    """Elements of all stored tensors; tied weights count once."""
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    max_positions: int
    dtype: str
    """The dtype of most elements: `float32`, `bfloat16`, ..."""
    architecture: str
    """`LlamaForCausalLM`; the model type where the config names no architecture."""
    linear_shapes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Module name -> the stored shape of its 2-D weight, embeddings and output heads left out."""
    tied: bool = False
    """Whether the output head is the input embedding."""
    stored_bytes: int = 0
    """Size of all tensors as they are stored."""
    model_type: str = ""
    """The config's, by which a method's usual targets are found."""
    tensors: Mapping[str, tuple[int, ...]] = field(default_factory=dict, repr=False)
    """Name -> shape of every stored tensor."""
    is_encoder_decoder: bool = False
    decoder_layers: int = 0
    """Where the config counts them apart."""
    kv_width: int = 0
    """Elements of one head of keys, where the config says so."""
    quantization: Quantization | None = None
    """How its files are quantised already; all else here is of the weights that their codes stand for."""
    mixes_rows: str | None = None
    """Why rows of a batch reach each other in it, in a few words; None where they do not."""

    @property
    def head_dim(self) -> int:
        """Elements of one attention head; from the query projection where there is one, as heads x dim may differ
        from the hidden size."""
        if not self.heads:
            return 0
        wide = [shape[0] for name, shape in self.linear_shapes.items() if name.endswith("q_proj")]
        return (wide[0] if wide else self.hidden) // self.heads

    @property
    def module_kinds(self) -> dict[str, str]:
        """Module name -> `linear`, `embedding`, `conv2d` and its like or `module`, for all modules that the stored
        tensors imply."""
        kinds: dict[str, str] = {}
        for name, shape in self.tensors.items():
            module, _, last = name.rpartition(".")
            parts = module.split(".")
            for size in range(1, len(parts)):
                kinds.setdefault(".".join(parts[:size]), "module")
            if last == "weight" and len(shape) == 2:
                kinds[module] = "embedding" if _is_embedding(module) else "linear"
            elif last == "weight" and len(shape) in (3, 4, 5):
                kinds[module] = f"conv{len(shape) - 2}d"
            else:
                kinds.setdefault(module, "module")
        if self.tied and "lm_head" not in kinds:
            kinds["lm_head"] = "linear"
        return kinds

    @property
    def heads_of_output(self) -> frozenset[str]:
        """Modules that turn hidden states into logits: `all-linear` leaves them out."""
        return frozenset(name for name in self.module_kinds if name.rsplit(".", 1)[-1] in _OUTPUTS)


def read_sizes(base_model: str, revision: str = "main") -> ModelSizes:
    """The sizes of a base in a directory, at an fsspec URL or on the hub, from headers alone.

    Raises:
        ModelError: it does not exist, it is truncated or damaged, or the hub does not answer.
    """
    folder = model_folder(base_model, revision)
    config = folder.config()
    tensors: Tensors = {}
    places: dict[str, tuple[str, int, int]] = {}
    for name, size in folder.weight_files().items():
        tensors |= _tensors(folder, name, size, places)
    quantization = quantization_in(config)
    if quantization is None:
        return sizes_of(config, tensors)
    own = _LABELS.get(str(config.get("dtype") or config.get("torch_dtype")), "F16")
    try:
        whole = dequantised(tensors, own, lambda key: folder.read(*places[key]))
    except (KeyError, ValueError, TypeError) as error:
        raise ModelError(
            f"the codes of the base '{folder.given}' do not say what they stand for: {error}.",
            hint="Save or fetch it again.",
        ) from error
    return replace(sizes_of(config, whole), quantization=quantization)


def _tensors(folder: ModelFolder, name: str, size: int, places: dict[str, tuple[str, int, int]]) -> Tensors:
    """What a file holds; where each tensor is comes into `places`: file, first byte, the one after the last."""
    what = f"{name} of the base '{folder.given}'"
    table, begins = read_table(lambda start, end: folder.read(name, start, end), size, what)
    try:
        for key, each in table.items():
            start, end = each["data_offsets"]
            places[key] = name, begins + start, begins + end
        return {
            key: (str(each["dtype"]), tuple(int(n) for n in each["shape"])) for key, each in table.items()
        }
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{what} is not a safetensors file.", hint="Save or fetch it again.") from error


def sizes_of(config: Mapping[str, Any], tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> ModelSizes:
    """Sizes from a config and from tensors by name: (safetensors dtype, shape)."""
    text = config.get("text_config")
    config = {**config, **text} if isinstance(text, Mapping) else config
    elements = {name: math.prod(shape) for name, (_, shape) in tensors.items()}
    by_dtype: Counter[str] = Counter()
    for name, (dtype, _) in tensors.items():
        by_dtype[dtype] += elements[name]
    most = by_dtype.most_common(1)[0][0] if by_dtype else "F32"
    found = {name: _first(config, words) for name, words in _NAMES.items()}
    architectures = config.get("architectures") or [config.get("model_type", "unknown")]
    return ModelSizes(
        parameters=sum(elements.values()),
        hidden=found["hidden"],
        layers=found["layers"],
        heads=found["heads"],
        kv_heads=found["kv_heads"] or found["heads"],
        intermediate=found["intermediate"] or 4 * found["hidden"],
        vocab=found["vocab"],
        max_positions=found["max_positions"],
        dtype=_DTYPES.get(most, most.lower()),
        architecture=str(architectures[0]),
        linear_shapes=_linear_shapes(tensors),
        tied=bool(config.get("tie_word_embeddings", False)) or not _has_output(tensors),
        stored_bytes=sum(elements[name] * _BITS.get(dtype, 32) // 8 for name, (dtype, _) in tensors.items()),
        model_type=str(config.get("model_type", "")),
        tensors={name: shape for name, (_, shape) in tensors.items()},
        is_encoder_decoder=bool(config.get("is_encoder_decoder", False)),
        decoder_layers=found["decoder_layers"],
        kv_width=found["kv_width"],
        mixes_rows=mixes_rows(config, tensors),
    )


def _first(config: Mapping[str, Any], words: tuple[str, ...]) -> int:
    return next((int(config[word]) for word in words if isinstance(config.get(word), (int, float))), 0)


def _linear_shapes(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, tuple[int, int]]:
    shapes = {}
    for name, (_, shape) in tensors.items():
        module, _, last = name.rpartition(".")
        is_other = _is_embedding(module) or module.rsplit(".", 1)[-1] in _OUTPUTS
        if last == "weight" and len(shape) == 2 and not is_other:
            shapes[module] = (shape[0], shape[1])
    return shapes


def _is_embedding(module: str) -> bool:
    return any(word in module.rsplit(".", 1)[-1] for word in _EMBEDDINGS)


def _has_output(tensors: Mapping[str, Any]) -> bool:
    return any(name.rsplit(".", 2)[-2:][0] in _OUTPUTS for name in tensors)
