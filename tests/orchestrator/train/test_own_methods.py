"""A method of another package, found by its entry point, as `adapter.type` of a job."""

from __future__ import annotations

import pytest

from tests.peft_dist.test_registry import CONTRACT, HOOKS, package, run

PROGRAM = """
import json
from pathlib import Path
import torch
from orchestrator.spec.load import load_job_text
from orchestrator.spec.methods import method_rows
from orchestrator.train.worker.run import train
from tests.orchestrator.train.tiny import job, plan, request

torch.set_num_threads(1)
row = next(row for row in method_rows() if row.name == NAME)
assert row.what and row.what != "a method of another package", row.what
folder = Path(OUT)
spec = job(folder, adapter={"type": NAME}, training={"max_steps": 3})
end = train(request(folder, spec, plan()))
assert end.metrics["eval_loss"] != end.metrics["base.eval_loss"]
config = json.loads((Path(end.adapter_dir) / "adapter_config.json").read_text())
assert config["peft_type"] == NAME.upper()
print("trained")
"""


@pytest.mark.slow  # 10 s: a process of its own that imports torch and transformers
@pytest.mark.parametrize(
    ("text", "point"),
    [(CONTRACT, "outer = own_method:OuterConfig"), (HOOKS, "gain = own_method:register")],
    ids=["contract", "hooks"],
)
def test_it_is_listed_and_trains(text, point, tmp_path):
    environment = package(tmp_path, "own_method", text, point)
    (tmp_path / "out").mkdir()
    code = f"NAME, OUT = {point.split()[0]!r}, {str(tmp_path / 'out')!r}\n{PROGRAM}"
    assert run(code, environment, tmp_path).endswith("trained\n")
