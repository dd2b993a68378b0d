"""The base of an endpoint comes from wherever training read it."""

import json
import shutil
from dataclasses import replace

import pytest

from orchestrator.identity import BaseIdentity
from orchestrator.lineage import Lineage
from orchestrator.registry import AdapterVersion
from orchestrator.serve.desired import Desired
from orchestrator.serve.endpoints import _trusts_code
from orchestrator.serve.engines import base_model
from orchestrator.spec.canonical import resolved_yaml
from orchestrator.spec.job import ModelSpec
from orchestrator.spec.load import load_job_text
from peft_dist.errors import BaseModelError


def test_a_base_at_a_url_is_fetched_with_its_tokenizer(tiny_base, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    base = base_model.load(ModelSpec(base_model=f"file://{tiny_base}"), threads=1)
    here = base_model.load(ModelSpec(base_model=str(tiny_base)), threads=1)
    assert base.tokenizer("abc")["input_ids"] == here.tokenizer("abc")["input_ids"]
    assert sum(p.numel() for p in base.model.parameters()) == sum(p.numel() for p in here.model.parameters())


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OurConfig(LlamaConfig):
    model_type = "our-llama"


class OurLlama(LlamaForCausalLM):
    config_class = OurConfig
"""


def test_a_base_with_code_of_its_own_is_served_only_where_its_job_trusts_it(tiny_base, tmp_path):
    folder = shutil.copytree(tiny_base, tmp_path / "ours")
    (folder / "ours.py").write_text(CODE)
    config = json.loads((folder / "config.json").read_text()) | {
        "model_type": "our-llama",
        "architectures": ["OurLlama"],
        "auto_map": {"AutoConfig": "ours.OurConfig", "AutoModelForCausalLM": "ours.OurLlama"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    identity = BaseIdentity("ours", None, "0" * 64, str(folder))
    with pytest.raises(BaseModelError):
        base_model.load(Desired("e", identity).model, threads=1)
    trusted = Desired.from_dict(Desired("e", identity, trust_remote_code=True).to_dict())
    assert type(base_model.load(trusted.model, threads=1).model).__name__ == "OurLlama"


@pytest.mark.parametrize(("said", "trusts"), [("true", True), ("false", False)])
def test_what_a_job_says_of_its_base_goes_with_the_version(said, trusts):
    text = (
        f"name: a\nmodel: {{base_model: b, trust_remote_code: {said}}}\ndata: {{datasets: [{{path: c}}]}}\n"
    )
    lineage = Lineage(
        BaseIdentity("b", None, "0" * 64), resolved_spec=resolved_yaml(load_job_text(text).spec)
    )
    version = AdapterVersion("a", 1, "url", lineage, "0" * 64, 0.0)
    assert _trusts_code(version) is trusts
    assert _trusts_code(replace(version, lineage=replace(lineage, resolved_spec=None))) is False
