"""How large a file may be, as people write it. Imports no torch."""

from __future__ import annotations

import re

from peft_dist.errors import MergeError

_SIZE = re.compile(r"(?P<number>\d+(\.\d+)?)\s*(?P<unit>([KMGT]i?)?B?)", re.IGNORECASE)


def size_in_bytes(size: int | str) -> int:
    """`5GB`, `500MB`, `2GiB` or a number of bytes.

    Raises:
        MergeError: it is none of these, or not positive.
    """
    found = int(size) if not isinstance(size, str) else 0
    if isinstance(size, str) and (match := _SIZE.fullmatch(size.strip())):
        unit = match["unit"].upper()
        found = int(
            float(match["number"]) * (1024 if "I" in unit else 1000) ** "BKMGT".index((unit or "B")[0])
        )
    if found <= 0:
        raise MergeError(
            f"max_shard_size: {size!r} is no size of a file. Write a number with its unit, such as '5GB' or "
            "'500MB'."
        )
    return found
