"""Adapters into a base: chooses the layers, wraps them in place, makes room, fills, freezes the rest."""

from peft_dist.inject.making import Adapters, adapter_dtype, beside_others, check_name, forget, freeze, inject
from peft_dist.inject.places import adapter_modules, asked, facts_of, places, remove_wrappers
from peft_dist.inject.serving import activate, check_together, delete, set_requires_grad
from peft_dist.inject.waiting import check_started, leaves_meta, start_waiting, start_when_partitioned

__all__ = [
    "Adapters",
    "activate",
    "adapter_dtype",
    "adapter_modules",
    "asked",
    "beside_others",
    "check_name",
    "check_started",
    "check_together",
    "delete",
    "facts_of",
    "forget",
    "freeze",
    "inject",
    "leaves_meta",
    "places",
    "remove_wrappers",
    "set_requires_grad",
    "start_waiting",
    "start_when_partitioned",
]
