"""A model under `torch.compile`, as one graph, beside the same adapter in HF PEFT, which runs as it is: the first case
of each method on a Llama."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import peft
import pytest
import torch

import peft_dist
from tests.contract import bases, methods
from tests.contract.case import Parity
from tests.contract.cases import disturb

IDS = torch.randint(5, 64, (2, 8), generator=torch.Generator().manual_seed(0))
IN_PIECES = ("multitask_prompt_tuning", "poly", "waveft")
"""Two look at the numbers of a batch's tasks, to refuse those that there are none of, which no graph can; the third
asks a library for its wavelet's filters."""


def chosen() -> dict[str, Parity]:
    found = {}
    for module in sorted(pkgutil.iter_modules(methods.__path__), key=lambda module: module.name):
        parity = importlib.import_module(f"{methods.__name__}.{module.name}").PARITY
        fit = [each for each in parity.values() if each.base == "llama" and not each.wrong_gradients]
        found |= {module.name: fit[0]} if fit else {}
    return found


PARITY = chosen()


def loss_and_gradients(model: Any, run: Any, parity: Parity) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    given = {key: torch.tensor(value)[: len(IDS)] for key, value in (parity.forward or {}).items()}
    loss = run(input_ids=IDS, labels=IDS, **given).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(autouse=True)
def _forgotten():
    """What was compiled, with its limit on how often, is this test's own."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow  # two minutes: compiles a model for each
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("label", PARITY)
def test_a_compiled_model_gives_what_theirs_gives(label, tmp_path) -> None:
    parity = PARITY[label]
    theirs = peft.get_peft_model(bases.llama(), getattr(peft, parity.config)(**parity.values)).eval()
    disturb(theirs)
    theirs.save_pretrained(tmp_path)
    ours = peft_dist.PeftModel.from_pretrained(bases.llama(), tmp_path, is_trainable=True).eval()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=label not in IN_PIECES)
    loss, gradients = loss_and_gradients(ours, compiled, parity)
    torch.testing.assert_close(loss, loss_and_gradients(theirs, theirs, parity)[0])
    # As it is uncompiled, which is compared with theirs elsewhere, tensor by tensor.
    torch.testing.assert_close(gradients, loss_and_gradients(ours, ours, parity)[1], rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_another_adapter_serves_the_compiled_model_once_it_is_set(tmp_path) -> None:
    theirs = peft.get_peft_model(bases.llama(), peft.LoraConfig(target_modules=["q_proj", "down_proj"]), "a")
    theirs.add_adapter("b", peft.LoraConfig(r=2, target_modules=["v_proj"], use_dora=True))
    theirs.eval()
    disturb(theirs)
    theirs.save_pretrained(tmp_path)
    ours = peft_dist.PeftModel.from_pretrained(bases.llama(), tmp_path / "a", "a").eval()
    ours.load_adapter(tmp_path / "b", "b")
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    with torch.no_grad():
        for name in ("a", "b", "a"):
            ours.set_adapter(name), theirs.set_adapter(name)
            torch.testing.assert_close(compiled(IDS).logits, theirs(IDS).logits)
        with ours.disable_adapter(), theirs.disable_adapter():
            torch.testing.assert_close(compiled(IDS).logits, theirs(IDS).logits)
        ours.merge_adapter(), theirs.merge_adapter()
        torch.testing.assert_close(compiled(IDS).logits, theirs(IDS).logits)
