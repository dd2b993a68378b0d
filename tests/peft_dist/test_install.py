"""Serving as `peft`: programs that import it, transformers' Trainer and accelerate, with HF PEFT installed and
without.

Each runs in a process of its own: what `peft` is, is decided once a process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Makes `peft` unfindable, as where it is not installed.
WITHOUT = """
import importlib.machinery, importlib.metadata, importlib.util, sys
class Hiding(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] == "peft" else super().find_spec(name, path, target)
    @classmethod
    def find_distributions(cls, context=importlib.metadata.DistributionFinder.Context()):
        return () if context.name == "peft" else super().find_distributions(context)
sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Hiding
assert importlib.util.find_spec("peft") is None
try:
    importlib.metadata.version("peft")
    raise SystemExit("peft is there")
except importlib.metadata.PackageNotFoundError:
    pass
"""


def run(code: str, folder: Path, *, installed: bool) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WANDB_DISABLED": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ("" if installed else WITHOUT) + code],
        env=environment, cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


either = pytest.mark.parametrize("installed", [True, False], ids=["peft installed", "without peft"])

IMPORTS = """
import peft_dist
peft_dist.install()
peft_dist.install()
import peft
import peft.tuners.lora.layer
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import PeftType
import importlib.metadata, importlib.util
assert peft is peft_dist and LoraConfig is peft_dist.LoraConfig and PeftModel is peft_dist.PeftModel
assert peft.tuners.lora.layer is peft_dist.tuners.lora.layer and peft.tuners.lora.LoraLayer is LoraLayer
assert importlib.util.find_spec("peft") is not None
assert importlib.metadata.version("peft") == "0.21.2" == peft.__version__
from transformers.utils import is_peft_available
assert is_peft_available()
from accelerate.utils import is_peft_model
from tests.contract import bases
model = get_peft_model(bases.llama(), LoraConfig(task_type=TaskType.CAUSAL_LM))
assert isinstance(model, peft.PeftModel) and is_peft_model(model)
assert isinstance(model.base_model.model.model.layers[0].self_attn.q_proj, LoraLayer)
import pickle
assert type(pickle.loads(pickle.dumps(LoraConfig()))) is LoraConfig
print("well")
"""

TRAINER = """
import json, sys
TASK, BITS = sys.argv[1:] if len(sys.argv) > 1 else (TASK, BITS)
import transformers.trainer, transformers.trainer_utils  # before: they look for peft when they are imported
import peft_dist
peft_dist.install()
import torch
from pathlib import Path
from peft import LoraConfig, PeftModel, TaskType, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig, Trainer, TrainingArguments,
)
from tests.contract import bases

AUTO = {"CAUSAL_LM": AutoModelForCausalLM, "SEQ_CLS": AutoModelForSequenceClassification}[TASK]
made = {"CAUSAL_LM": bases.llama, "SEQ_CLS": bases.classifier}[TASK]()
made.save_pretrained("base")

def base():
    how = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)} if BITS == "8" else {}
    loaded = AUTO.from_pretrained("base", **how)
    return prepare_model_for_kbit_training(loaded, use_gradient_checkpointing=False) if BITS == "8" else loaded

generator = torch.Generator().manual_seed(0)
def row():
    ids = torch.randint(1, 64, (8,), generator=generator)
    label = ids.clone() if TASK == "CAUSAL_LM" else ids[0] % 3
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": label}
rows = [row() for _ in range(16)]

def trainer(epochs, model):
    arguments = TrainingArguments(
        "out", num_train_epochs=epochs, per_device_train_batch_size=4, learning_rate=1e-2, save_strategy="epoch",
        eval_strategy="epoch", load_best_model_at_end=True, logging_steps=1, report_to=[], use_cpu=True, seed=1,
        disable_tqdm=True, metric_for_best_model="eval_loss",
    )
    return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:8])

def adapted():
    torch.manual_seed(0)
    return get_peft_model(base(), LoraConfig(task_type=TASK, r=4, target_modules=["q_proj", "v_proj"]))

torch.manual_seed(3)
first = trainer(2, adapted())
first.train()
losses = [e["loss"] for e in first.state.log_history if "loss" in e]
assert losses[-1] < losses[0], losses
saved = sorted(Path("out").glob("checkpoint-*"))
assert len(saved) == 2
for folder in saved:
    names = {path.name for path in folder.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json"} <= names, names
    assert not names & {"model.safetensors", "pytorch_model.bin"}, names
assert first.state.best_model_checkpoint
# What is loaded at the end is the best checkpoint's adapter.
best = PeftModel.from_pretrained(base(), first.state.best_model_checkpoint)
batch = {key: torch.stack([r[key] for r in rows[:4]]) for key in rows[0]}
first.model.eval(), best.eval()
torch.testing.assert_close(first.model(**batch).logits, best(**batch).logits)

resumed = trainer(3, adapted())
resumed.train(resume_from_checkpoint=True)
assert resumed.state.global_step == 12 and len(resumed.state.log_history) > len(first.state.log_history)
straight = json.loads((Path("out") / "checkpoint-12" / "trainer_state.json").read_text())
assert straight["global_step"] == 12
resumed.save_model("final")
final = PeftModel.from_pretrained(base(), "final", is_trainable=True)
resumed.model.eval()
torch.testing.assert_close(final.eval()(**batch).logits, resumed.model(**batch).logits)
# Not trained in vain: the adapter changes the base.
with final.disable_adapter():
    assert not torch.allclose(final(**batch).logits, resumed.model(**batch).logits, atol=1e-3)
print("well")
"""

IN_TRANSFORMERS = """
import peft_dist
peft_dist.install()
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from tests.contract import bases

ids = torch.arange(1, 8).view(1, 7)
model = bases.llama().eval()
bare = model(ids).logits
model.add_adapter(LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False), adapter_name="x")
changed = model(ids).logits
assert not torch.allclose(changed, bare) and model.active_adapters() == ["x"]
model.disable_adapters()
torch.testing.assert_close(model(ids).logits, bare)
model.enable_adapters()
model.add_adapter(LoraConfig(r=4, target_modules=["v_proj"]), adapter_name="y")
model.set_adapter("x")
torch.testing.assert_close(model(ids).logits, changed)
assert len(model.get_adapter_state_dict("x")) == 4
model.save_pretrained("saved")
again = bases.llama().eval()
again.load_adapter("saved")
torch.testing.assert_close(again(ids).logits, changed)
model.delete_adapter("x")
bases.llama().save_pretrained("base")
whole = get_peft_model(
    AutoModelForCausalLM.from_pretrained("base"), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)
)
whole.save_pretrained("adapter")
auto = AutoModelForCausalLM.from_pretrained("adapter").eval()
torch.testing.assert_close(auto(ids).logits, whole.eval()(ids).logits)
print("well")
"""

ACCELERATE = """
import peft_dist
peft_dist.install()
import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model
from tests.contract import bases

accelerator = Accelerator(cpu=True)
torch.manual_seed(0)
model = get_peft_model(bases.llama(), LoraConfig(task_type="CAUSAL_LM", r=4))
ids = torch.randint(1, 64, (8, 6), generator=torch.Generator().manual_seed(0))
loader = torch.utils.data.DataLoader([{"input_ids": i, "labels": i} for i in ids], batch_size=4)
model, optimizer, loader = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), 1e-2), loader)
losses = []
for _ in range(5):
    for batch in loader:
        loss = model(**batch).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
assert losses[-1] < losses[0]
accelerator.save_state("state")
bare = accelerator.unwrap_model(model)
assert isinstance(bare, PeftModel)
bare.save_pretrained("out", state_dict=accelerator.get_state_dict(model))
again = PeftModel.from_pretrained(bases.llama(), "out").eval()
want = bare.eval()(ids).logits
torch.testing.assert_close(again(ids).logits, want)
with torch.no_grad():
    for p in bare.parameters():
        if p.requires_grad:
            p.zero_()
accelerator.load_state("state")
torch.testing.assert_close(bare(ids).logits, want)
print("well")
"""


@pytest.mark.slow  # 10 s: a process of its own that imports torch and transformers
@either
def test_imports_need_no_edit(installed, tmp_path) -> None:
    assert run(IMPORTS, tmp_path, installed=installed) == "well\n"


@pytest.mark.slow  # 20 s: a process of its own that trains
@either
@pytest.mark.parametrize("bits", ["32", "8"])
@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS"])
def test_the_trainer_trains_saves_resumes_and_loads_the_best(task, bits, installed, tmp_path) -> None:
    code = f"TASK, BITS = {task!r}, {bits!r}\n{TRAINER}"
    assert run(code, tmp_path, installed=installed).endswith("well\n")


@pytest.mark.slow  # 15 s: a process of its own that trains
@either
def test_a_bare_loop_under_accelerate(installed, tmp_path) -> None:
    assert run(ACCELERATE, tmp_path, installed=installed).endswith("well\n")


@pytest.mark.slow  # 15 s: a process of its own that imports torch and transformers
@either
def test_transformers_own_adapters(installed, tmp_path) -> None:
    """`PreTrainedModel.add_adapter`, `load_adapter` and the like, and auto classes of an adapter's directory."""
    assert run(IN_TRANSFORMERS, tmp_path, installed=installed).endswith("well\n")
