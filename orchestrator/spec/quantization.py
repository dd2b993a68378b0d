"""How a job's base is quantised: `model.load_in_8bit`, `load_in_4bit` and `bnb_4bit_*`, with `auto` filled in."""

from __future__ import annotations

from dataclasses import dataclass

from .job import ModelSpec

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""A precision's dtype, as torch names it."""


@dataclass(frozen=True)
class Quantization:
    """bitsandbytes' terms. Only 4 bits have a type, a second quantisation, a compute dtype and a storage."""

    bits: int
    quant_type: str = "int8"
    """`int8`, `nf4` or `fp4`."""
    double: bool = False
    """Whether the scales of the blocks are quantised as well."""
    compute_dtype: str = "float16"
    """What a weight is multiplied in, as torch names it."""
    storage: str = "int8"
    """The dtype that codes are packed into."""

    @property
    def name(self) -> str:
        """Short, as versions record it: `int8`, `nf4`, `nf4+double`."""
        return f"{self.quant_type}{'+double' * self.double}"


def quantization_of(model: ModelSpec, precision: str = "fp32", stage: int = 0) -> Quantization | None:
    """None for a base in its own precision.

    Args:
        precision: of the run: fp32, bf16 or fp16.
        stage: ZeRO's. At stage 3 codes are packed into the base's own dtype, so that what is partitioned together
            is of one dtype.
    """
    if model.load_in_8bit:
        return Quantization(8)
    if not model.load_in_4bit:
        return None
    own = DTYPES[precision]
    compute, storage = model.bnb_4bit_compute_dtype, model.bnb_4bit_quant_storage
    return Quantization(
        4,
        model.bnb_4bit_quant_type,
        model.bnb_4bit_use_double_quant,
        own if compute == "auto" else compute,
        (own if stage == 3 else "uint8") if storage == "auto" else storage,
    )
