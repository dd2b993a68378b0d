"""The table at the head of a safetensors file: its tensors' names, dtypes, shapes and places."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from typing import Any

from .errors import ModelError


def read_table(read: Callable[[int, int], bytes], size_bytes: int, what: str) -> tuple[dict[str, Any], int]:
    """(tensor name -> `{"dtype", "shape", "data_offsets"}`, where the data begins in the file).

    Args:
        read: gives the bytes from a start to an end.
        what: the file as a sentence names it.

    Raises:
        ModelError: truncated, or no safetensors file.
    """
    length = struct.unpack("<Q", read(0, 8))[0] if size_bytes >= 8 else 0
    begins = 8 + length
    if size_bytes < 8 or begins > size_bytes:
        raise ModelError(f"{what} is truncated: it has {size_bytes:,} bytes.", hint="Save or fetch it again.")
    try:
        table = json.loads(read(8, begins))
        table.pop("__metadata__", None)
        expected = begins + max((tensor["data_offsets"][1] for tensor in table.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ModelError(f"{what} is not a safetensors file.", hint="Save or fetch it again.") from error
    if expected != size_bytes:
        raise ModelError(
            f"{what} is truncated: it has {size_bytes:,} bytes of {expected:,}.",
            hint="Save or fetch it again.",
        )
    return table, begins
