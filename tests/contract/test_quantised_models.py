"""Every method in a whole quantised Llama: it trains, rows name it, it is saved and loaded, merged and unmerged."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import LlamaForCausalLM

import peft_dist
from peft_dist.catalog import METHODS
from peft_dist.errors import MergeError
from peft_dist.rows import BASE
from tests.contract import bases
from tests.contract.test_peft_parity import PARITY

FIRST = {
    peft_dist.PeftConfig.from_dict(vars(getattr(peft_dist, parity.config)(**parity.values))).peft_type: parity
    for parity in reversed([each for each in PARITY.values() if each.base == "llama"])
}
STORAGES = {"8-bit": bases.eight_bit, "4-bit": bases.four_bit}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    bases.llama().save_pretrained(path)
    return path


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("method", sorted(FIRST))
def test_a_method_in_a_quantised_model(folder, tmp_path, method, storage) -> None:
    parity = FIRST[method]

    def base() -> LlamaForCausalLM:
        made = LlamaForCausalLM.from_pretrained(
            folder, quantization_config=STORAGES[storage](), device_map={"": "cpu"}
        )
        # Else bitsandbytes repacks the bare base's 4-bit weights on some CPUs, which fails at these sizes.
        return peft_dist.prepare_model_for_kbit_training(made, use_gradient_checkpointing=False)

    torch.manual_seed(0)
    ids = torch.randint(1, 64, (3, 9))
    more = {key: torch.tensor(value) for key, value in (parity.forward or {}).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft_dist.get_peft_model(base(), getattr(peft_dist, parity.config)(**parity.values))
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in trained:
            p.add_(torch.randn_like(p) * 0.1)
    model.train()(input_ids=ids, labels=ids, **more).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    assert any(p.grad.abs().sum() > 0 for p in trained)
    model.eval()
    with torch.no_grad():
        plain = base().eval()(input_ids=ids).logits
        alone = model(input_ids=ids, **more).logits
        mixed = model(input_ids=ids, adapter_names=["default", BASE, "default"], **more).logits
    # Tokens that a prompt puts in front are not the rows' own. The 8-bit kernel rounds what it is given to 127
    # steps, where a difference in the last bit may jump: a step is 1/127 of the largest.
    own, tolerance = ids.shape[1], {"8-bit": 3 / 127, "4-bit": 1e-5}[storage]
    assert (mixed[[0, 2], -own:] - alone[[0, 2], -own:]).abs().max() <= tolerance * alone.abs().max()
    assert (mixed[1, -own:] - plain[1]).abs().max() <= tolerance * plain.abs().max()
    model.save_pretrained(tmp_path)
    loaded = peft_dist.PeftModel.from_pretrained(base(), tmp_path).eval()
    with torch.no_grad():
        again = loaded(input_ids=ids, **more).logits
        torch.testing.assert_close(again[:, -own:], model(input_ids=ids, **more).logits[:, -own:])
        if not METHODS[method].merges:
            with pytest.raises(MergeError):
                model.merge_adapter()
            return
        model.merge_adapter()
        assert model(input_ids=ids, **more).logits.isfinite().all()
        model.unmerge_adapter()
        assert torch.equal(model(input_ids=ids, **more).logits, alone)
