"""The modules around a base's layers: they pick the adapters that serve, cast at the border, drop out, and run
batches in which rows name different adapters. Storage, mathematics and layer kinds are elsewhere.
"""

from peft_dist.adapted.block import AdaptedBlock
from peft_dist.adapted.layer import Adapted
from peft_dist.adapted.levels import Adjusted, Level
from peft_dist.adapted.module import AdapterModule, bare
from peft_dist.adapted.replaced import Replaced

__all__ = ["Adapted", "AdaptedBlock", "AdapterModule", "Adjusted", "Level", "Replaced", "bare"]
