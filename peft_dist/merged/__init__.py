"""Merged checkpoints, tensor by tensor: a base with its adapters' changes as an ordinary Hugging Face folder.

`gathered` takes the base's tensors from a model, of whose pieces each rank has its own; `offline` reads them from
the base's files. What is written, and where, both know before the first byte is: `plan`.
"""
