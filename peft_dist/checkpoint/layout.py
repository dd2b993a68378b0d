"""What the files of an adapter are called, as in HF PEFT."""

WEIGHTS_NAME = "adapter_model.safetensors"
PICKLED_NAME = "adapter_model.bin"
CARD_NAME = "README.md"
DEFAULT_ADAPTER = "default"
# What names of a base's layers start with in a file.
BASE_PREFIX = "base_model.model."
