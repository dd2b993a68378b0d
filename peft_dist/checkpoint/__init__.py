"""Adapters on disk, in HF PEFT's layout: adapter_model.safetensors, adapter_config.json and README.md.

Nothing here knows a method. Only safetensors are read or written.
"""

from peft_dist.checkpoint.card import write_card
from peft_dist.checkpoint.filling import LoadResult, load_state_dict, parts_of
from peft_dist.checkpoint.layout import CARD_NAME, DEFAULT_ADAPTER, PICKLED_NAME, WEIGHTS_NAME
from peft_dist.checkpoint.names import adapter_parameters
from peft_dist.checkpoint.reading import SavedAdapter, read, read_config
from peft_dist.checkpoint.state import state_dict
from peft_dist.checkpoint.writing import save
from peft_dist.config import CONFIG_NAME

__all__ = [
    "CARD_NAME",
    "CONFIG_NAME",
    "DEFAULT_ADAPTER",
    "PICKLED_NAME",
    "WEIGHTS_NAME",
    "LoadResult",
    "SavedAdapter",
    "adapter_parameters",
    "load_state_dict",
    "parts_of",
    "read",
    "read_config",
    "save",
    "state_dict",
    "write_card",
]
