"""HF PEFT's module paths and names resolve here, and its classes answer `isinstance` for this package's layers."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import peft
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer as TheirLayer

import peft_dist
from peft_dist.adapted import AdapterModule
from peft_dist.catalog import METHODS, config_class
from peft_dist.errors import ConfigError
from tests.contract import bases
from tests.contract.test_fields import base_values

LINES = [
    line.split()
    for line in (Path(__file__).parent / "hf_names.txt").read_text().splitlines()
    if not line.startswith("#")
]


def module_of(path: str):
    return importlib.import_module("peft_dist" if path == "." else f"peft_dist.{path}")


@pytest.mark.parametrize("path", sorted({line[0] for line in LINES}))
def test_the_names_of_their_module_resolve(path) -> None:
    module = module_of(path)
    names = [line[1] for line in LINES if line[0] == path and len(line) == 2]
    missing = [name for name in names if not hasattr(module, name)]
    assert not missing


def test_the_list_holds_all_that_they_make_public() -> None:
    """But for the methods that come later, and what `hf_names.txt` says it leaves out."""
    later = "adamss beft cartridge deft frod glora hira lily peanut psoft pvera shadow supertuning tinylora unilora"
    folders = later.split()
    foreign = {n for f in folders for n in importlib.import_module(f"peft.tuners.{f}").__all__}
    listed = {(line[0], line[1]) for line in LINES if len(line) == 2}
    for path in (".", "tuners", "tuners.lora", "functional"):
        theirs = importlib.import_module("peft" if path == "." else f"peft.{path}")
        for name in theirs.__all__:
            mapped = name.startswith("TRANSFORMERS_MODELS_TO_") and name.split("_")[3].lower() in folders
            if name not in foreign and not mapped and name != "compose_cartridge_adapters":
                assert (path, name) in listed
