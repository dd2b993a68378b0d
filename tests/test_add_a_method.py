"""`docs/add-a-method.md` is true: the method that it adds, taken from the page, obeys the laws and reads and writes
HF PEFT's checkpoints."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import sys
from pathlib import Path

import peft
import pytest
import torch

import peft_dist
from peft_dist import catalog, inject
from tests.contract import bases, cases

PAGE = (Path(__file__).parent.parent / "docs" / "add-a-method.md").read_text()
BLOCKS = dict(re.findall(r"```python\n# (\S+)\n(.*?)```", PAGE, flags=re.S))


@pytest.fixture(scope="module")
def hira(tmp_path_factory):
    """The page's file as a module, its row in the catalog; (the module, its cases)."""
    folder = tmp_path_factory.mktemp("page")
    made = []
    for name, path in (
        ("peft_dist.methods.weight.hira", "peft_dist/methods/weight/hira.py"),
        ("page_cases", "tests/contract/methods/hira.py"),
    ):
        file = folder / Path(path).name.replace("hira", name.replace(".", "_"))
        file.write_text(BLOCKS[path])
        spec = importlib.util.spec_from_file_location(name, file)
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        made.append(module)
    row = eval("{" + BLOCKS["peft_dist/catalog.py"] + "}", vars(catalog).copy())
    catalog.METHODS.update(row)
    yield made
    del catalog.METHODS["HIRA"], sys.modules["peft_dist.methods.weight.hira"], sys.modules["page_cases"]


def test_the_laws_hold(hira) -> None:
    """float64: equalities hold to rounding."""
    for case in hira[1].CASES:
        for kind in case.kinds:
            base, _ = cases.adapted(case, kind)
            x = cases.sample(kind)
            bare = cases.target(base).base_layer(x)
            assert torch.allclose(base(x), bare, rtol=1e-12, atol=1e-12) == case.is_fresh
            cases.disturb(base)
            wanted = cases.run_with(cases.target(base), ["a"], x)
            torch.testing.assert_close(base(x), wanted, rtol=1e-12, atol=1e-12)
            assert (wanted - bare).abs().max() > 1e-3
            wrapper = cases.target(base)
            base(x).square().sum().backward()
            assert all(p.grad.abs().sum() > 0 for p in wrapper.tensors("a").values())
            assert all(p.grad is None for p in wrapper.base_layer.parameters())
            inject.delete(base, "a")


def test_hf_peft_reads_what_it_writes_and_the_reverse(hira, tmp_path) -> None:
    (parity,) = hira[1].PARITY.values()
    ids = torch.arange(1, 9).view(1, 8)
    ours = peft_dist.get_peft_model(bases.llama(), hira[0].HiraConfig(**parity.values))
    with torch.no_grad():
        for p in ours.adapter_tensors().values():
            p.add_(torch.randn_like(p))
    ours.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(bases.llama(), tmp_path / "ours").eval()
    logits = ours.eval()(ids).logits
    # fp32, two layers: the same terms in another order.
    torch.testing.assert_close(theirs(ids).logits, logits, rtol=1e-5, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    again = peft_dist.PeftModel.from_pretrained(bases.llama(), tmp_path / "theirs").eval()
    torch.testing.assert_close(again(ids).logits, logits, rtol=1e-5, atol=1e-5)
    fields = [f.name for f in dataclasses.fields(hira[0].HiraConfig)]
    assert fields == [f.name for f in dataclasses.fields(peft.HiraConfig)]
    assert set(hira[1].FIELDS) <= set(fields)
