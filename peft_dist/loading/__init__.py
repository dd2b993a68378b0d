"""Base models: found, read part by part, quantised while they are read, whole or in a rank's pieces.

`base` is what programs call; `weight_files` finds files, `stored` reads parts of them, `pending` follows them
through conversions, `keys` maps names, `skeleton` builds the empty model, `filling` and `pieces` give it values,
`quantising` makes codes.
"""

from peft_dist.loading.base import AUTO_CLASSES, load_base, load_config, meta_base

__all__ = ["AUTO_CLASSES", "load_base", "load_config", "meta_base"]
