"""Steps of AdamW from the same start, beside HF PEFT: what a method does between steps is as there too.

fp32, eight steps at a learning rate of 1e-2: the libraries add the same terms in another order, and AdamW
amplifies that where a gradient is small; losses of some 4 agree to 1e-4.
"""

from __future__ import annotations

import importlib
import pkgutil

import peft
import pytest
import torch

import peft_dist
from tests.contract import bases, methods
from tests.contract.case import Parity

BATCH = torch.randint(1, 64, (4, 8), generator=torch.Generator().manual_seed(0))
# Beside the first of each method: what is projected at every use, and what changes W by itself.
ALSO = ("oft constrained", "miss bat", "hra of orthogonal directions", "road_4")


def chosen() -> dict[str, Parity]:
    found = {}
    for module in sorted(pkgutil.iter_modules(methods.__path__), key=lambda module: module.name):
        parity = importlib.import_module(f"{methods.__name__}.{module.name}").PARITY
        fit = [
            label
            for label, each in parity.items()
            if each.base == "llama" and not each.wrong_gradients and not each.forward and not is_prompt(each)
        ]
        found |= {label: parity[label] for label in fit if label == fit[0] or label in ALSO}
    return found


def is_prompt(parity: Parity) -> bool:
    return getattr(peft_dist, parity.config).is_prompt_learning


PARITY = chosen()


def losses(model: torch.nn.Module, steps: int = 8) -> list[float]:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    found = []
    for _ in range(steps):
        loss = model(input_ids=BATCH, labels=BATCH).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("label", PARITY)
def test_losses_are_theirs(label, tmp_path) -> None:
    parity = PARITY[label]
    theirs = peft.get_peft_model(bases.llama(), getattr(peft, parity.config)(**parity.values))
    theirs.save_pretrained(tmp_path)
    ours = peft_dist.PeftModel.from_pretrained(bases.llama(), tmp_path, is_trainable=True)
    mine, wanted = losses(ours), losses(theirs)
    assert mine == pytest.approx(wanted, abs=1e-4)
    assert mine[0] - mine[-1] > 1e-3
