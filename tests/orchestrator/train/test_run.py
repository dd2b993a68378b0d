"""A whole run in this process, without Ray: against transformers and torch's own AdamW, twice, resumed, spoilt."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft import get_peft_model as hf_get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from orchestrator.errors import DataError, ModelError, SpecError, TrainingError
from orchestrator.train.group import Group
from orchestrator.train.rows.batches import collate, steps
from orchestrator.train.tasks import causal
from orchestrator.train.worker.checkpoint import damage_of, steps_in
from orchestrator.train.worker.data import load_examples
from orchestrator.train.worker.evaluate import Evaluation, evaluate_adapter
from orchestrator.train.worker.model import silence_dropout
from orchestrator.train.worker.run import train
from orchestrator.train.worker.schedule import learning_rate
from peft_dist.loading import load_base

from .ends import adapter_of
from .tiny import job, plan, request, save_base

pytestmark = pytest.mark.usefixtures("one_thread")


class Recorder:
    """A reporter that keeps events, and asks to stop after `stop_after` steps."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.events: list[dict] = []
        self.stop_after = stop_after

    @property
    def stop_requested(self) -> bool:
        return self.stop_after is not None and len(self.of("progress")) >= self.stop_after

    def emit(self, kind: str, **fields) -> None:
        self.events.append({"event": kind, **fields})

    def of(self, kind: str) -> list[dict]:
        return [event for event in self.events if event["event"] == kind]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_losses_are_those_of_a_plain_loop(tmp_path):
    """The oracle: HF PEFT, transformers' own loss over each row, torch's AdamW and clipping."""
    spec = job(
        tmp_path, training={"num_epochs": 2, "warmup_ratio": 0.2, "max_grad_norm": 0.3, "weight_decay": 0.1}
    )
    asked = request(tmp_path, spec, plan(micro=2, accumulation=3))
    recorder = Recorder()
    end = train(asked, reporter=recorder)
    progress = recorder.of("progress")

    base = AutoModelForCausalLM.from_pretrained(spec.model.base_model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(spec.model.base_model)
    examples = load_examples(spec, tokenizer, max_len=128).train
    theirs = hf_get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    _start_like_ours(theirs, asked)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.1)
    order = steps(
        len(examples), epochs=2, max_steps=None, global_batch_size=6, micro_batch_size=2, world_size=1, rank=0,
        seed=spec.training.seed,
    )  # fmt: skip
    for batch, told in zip(order, progress, strict=True):
        rows = [examples[i] for micro in batch.micro for i in micro]
        count = sum(row.num_targets for row in rows)
        optimizer.zero_grad()
        total = 0.0
        for row in rows:
            loss = theirs(**collate([row], 0)).loss * row.num_targets / count
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(trained, 0.3)
        optimizer.param_groups[0]["lr"] = learning_rate(batch.step + 1, len(progress), spec.training)
        optimizer.step()
        # rows one by one instead of padded together: float32 sums in another order, over six steps at 1e-2
        assert told["loss"] == pytest.approx(total, rel=1e-4)
        assert told["grad_norm"] == pytest.approx(float(norm), rel=1e-3)
    assert end.steps == 6


def _start_like_ours(theirs, asked) -> None:
    """Gives HF's model the values with which our run begins: those that a step of learning rate zero leaves."""
    still = {"max_steps": 1, "warmup_ratio": 1.0, "weight_decay": 0.0}
    spec = asked.spec.model_copy(update={"training": asked.spec.training.model_copy(update=still)})
    started = train(replace(asked, spec=spec, run_dir=f"{asked.run_dir}-start"))
    own = theirs.state_dict()
    for name, tensor in adapter_of(started).items():
        own[name.replace(".weight", ".default.weight")].copy_(tensor)


def test_two_runs_are_equal_bit_for_bit(tmp_path):
    spec = job(tmp_path, adapter={"lora_dropout": 0.3}, training={"num_epochs": 2, "base_dropout": True})
    save_base(tmp_path / "base", dropout=0.2)
    one, two = (train(request(tmp_path, spec, run=run)) for run in ("one", "two"))
    assert same(adapter_of(one), adapter_of(two)) and one.metrics == two.metrics
    other = spec.model_copy(update={"training": spec.training.model_copy(update={"seed": 1})})
    assert not same(adapter_of(one), adapter_of(train(request(tmp_path, other, run="three"))))


@pytest.mark.parametrize(
    "adapter",
    [{"lora_dropout": 0.3}, {"type": "ia3"}, {"type": "prompt_tuning", "num_virtual_tokens": 3}],
)
def test_a_stopped_run_goes_on_as_if_nothing_had_been(tmp_path, adapter):
    spec = job(tmp_path, adapter=adapter, training={"num_epochs": 2, "base_dropout": True})
    save_base(tmp_path / "base", dropout=0.2)
    whole = train(request(tmp_path, spec, run="whole"))
    stopped = train(request(tmp_path, spec, run="parts"), reporter=Recorder(stop_after=7))
    assert stopped.is_stopped and stopped.steps == 7
    rest = Recorder()
    end = train(request(tmp_path, spec, run="parts"), reporter=rest)
    assert [event["step"] for event in rest.of("progress")] == list(range(8, 19))
    assert same(adapter_of(whole), adapter_of(end)) and whole.metrics == end.metrics
    # once more: nothing is left to train, the same adapter
    again = Recorder()
    assert same(adapter_of(train(request(tmp_path, spec, run="parts"), reporter=again)), adapter_of(end))
    assert again.of("progress") == []


def test_what_a_run_leaves(tmp_path):
    spec = job(
        tmp_path,
        training={"num_epochs": 3, "save_steps": 4, "eval_steps": 2},
        eval={"metrics": ["exact_match", "contains"], "max_new_tokens": 4},
        storage={"keep_best": 1, "keep_latest": 2},
    )
    recorder = Recorder()
    end = train(request(tmp_path, spec), reporter=recorder)
    run = tmp_path / "run"
    assert {path.name for path in run.iterdir()} == {
        "checkpoints",
        "final",
        "train_rows.txt",
        "eval_rows.txt",
    }
    assert damage_of(run / "final") is None
    assert [event["step"] for event in recorder.of("checkpoint")] == [4, 8, 12, 16, 20, 24, 27]
    assert [event["step"] for event in recorder.of("eval")][:-1] == [*range(2, 27, 2), 27]
    assert steps_in(str(run))[:2] == [27, 24] and len(steps_in(str(run))) <= 3
    assert {"eval_loss", "perplexity", "exact_match", "contains", "train_loss", "base.eval_loss"} <= set(
        end.metrics
    )
    assert end.metrics["perplexity"] == pytest.approx(math.exp(end.metrics["eval_loss"]))
    assert json.loads((run / "final/adapter_config.json").read_text())["peft_type"] == "LORA"
    # HF PEFT loads it as it is, and measures the same loss
    base = AutoModelForCausalLM.from_pretrained(spec.model.base_model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(spec.model.base_model)
    rows = load_examples(spec, tokenizer, max_len=128).evaluation
    theirs = PeftModel.from_pretrained(base, run / "final").eval()
    with torch.no_grad():
        total = sum(theirs(**collate([row], 0)).loss.item() * row.num_targets for row in rows)
    count = sum(row.num_targets for row in rows)
    assert end.metrics["eval_loss"] == pytest.approx(total / count, rel=1e-5)  # float32, other padding


def test_production_is_measured_with_the_same_code(tmp_path):
    spec = job(tmp_path)
    first = train(request(tmp_path, spec, run="first"))
    asked = request(tmp_path, spec, run="second", compare={"production": first.adapter_dir})
    end = train(asked)
    assert end.metrics["production.eval_loss"] == first.metrics["eval_loss"]
    assert end.metrics["base.eval_loss"] == first.metrics["base.eval_loss"]


def test_training_on_from_an_adapter(tmp_path):
    first = train(request(tmp_path, job(tmp_path, training={"num_epochs": 2}), run="first"))
    spec = job(tmp_path, training={"max_steps": 1, "warmup_ratio": 1.0})  # one step of rate zero
    second = train(request(tmp_path, spec, run="second", init_from=first.adapter_dir))
    assert same(adapter_of(first), adapter_of(second))
    other = job(tmp_path, adapter={"type": "ia3"})
    with pytest.raises(ModelError, match=r"the adapter is of type 'lora', adapter.type says 'ia3'"):
        train(request(tmp_path, other, run="third", init_from=first.adapter_dir))


def test_a_loss_that_is_not_a_number_stops_the_run(tmp_path, monkeypatch):
    spec = job(tmp_path, training={"save_steps": 3})
    real = causal.target_loss

    def spoilt(logits, labels, weights):
        spoilt.calls += torch.is_grad_enabled()
        return real(logits, labels, weights) * (float("nan") if spoilt.calls > 4 else 1.0)

    spoilt.calls = 0
    monkeypatch.setattr(causal, "target_loss", spoilt)
    with pytest.raises(TrainingError) as stopped:
        train(request(tmp_path, spec))
    assert str(stopped.value) == (
        "run run: the loss of step 5 is nan: training stopped, and the last good checkpoint is at step 3. "
        "Lower training.learning_rate or look at the rows of this step."
    )
    assert steps_in(str(tmp_path / "run")) == [3]
    assert damage_of(tmp_path / "run/checkpoints/step-3") is None


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_keeps_the_adapter_in_fp32(tmp_path, precision):
    spec = job(tmp_path, training={"num_epochs": 2})
    full = train(request(tmp_path, spec, run="full"))
    half = train(request(tmp_path, spec, run=precision), precision=precision)
    assert {tensor.dtype for tensor in adapter_of(half).values()} == {torch.float32}
    # eight bits of mantissa in the base and the activations
    assert half.metrics["eval_loss"] == pytest.approx(full.metrics["eval_loss"], rel=2e-2)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    spec = job(tmp_path, adapter={"lora_dropout": 0.3})
    on = spec.model_copy(
        update={"training": spec.training.model_copy(update={"gradient_checkpointing": True})}
    )
    one, two = train(request(tmp_path, spec, run="off")), train(request(tmp_path, on, run="on"))
    assert same(adapter_of(one), adapter_of(two))


def test_the_bases_own_dropout_is_silent(tmp_path):
    base = load_base(str(save_base(tmp_path / "base", dropout=0.5))).train()
    ids = torch.arange(20)[None]
    assert not torch.equal(base(input_ids=ids).logits, base(input_ids=ids).logits)
    silence_dropout(base)
    assert torch.equal(base(input_ids=ids).logits, base(input_ids=ids).logits)


def test_an_adapter_that_does_not_fit_the_base(tmp_path):
    with pytest.raises(SpecError, match=r"adapter: .*q_prj"):
        train(request(tmp_path, job(tmp_path, adapter={"target_modules": ["q_prj"]})))


def test_evaluating_a_stored_adapter(tmp_path):
    spec = job(tmp_path)
    end = train(request(tmp_path, spec))
    base = load_base(spec.model.base_model)
    tokenizer = AutoTokenizer.from_pretrained(spec.model.base_model)
    rows = load_examples(spec, tokenizer, max_len=128).evaluation
    task = causal.CausalLM(tokenizer)
    found = evaluate_adapter(base, task, end.adapter_dir, rows, spec.eval, batch_size=2)
    bare = evaluate_adapter(base, task, None, rows, spec.eval, batch_size=2)
    assert found["eval_loss"] == end.metrics["eval_loss"]
    assert bare["eval_loss"] == end.metrics["base.eval_loss"]


def test_generated_metrics_need_answers(tmp_path):
    data = tmp_path / "plain.jsonl"
    data.write_text("".join(json.dumps({"text": f"line {n}"}) + "\n" for n in range(9)))
    spec = job(
        tmp_path,
        data={"datasets": [{"path": str(data), "type": "text"}], "val_set_size": 3},
        eval={"metrics": ["exact_match"]},
    )
    with pytest.raises(
        DataError, match="exact_match: none of the 3 evaluation rows has a prompt and an answer"
    ):
        train(request(tmp_path, spec))


def test_generated_answers_are_those_of_one_row_alone(tmp_path):
    """Left padding is invisible: batches of five and of one give the same greedy answers."""
    spec = job(tmp_path, eval={"metrics": ["exact_match"], "max_new_tokens": 6})
    base = load_base(spec.model.base_model).eval()
    tokenizer = AutoTokenizer.from_pretrained(spec.model.base_model)
    rows = load_examples(spec, tokenizer, max_len=128).evaluation
    task = causal.CausalLM(tokenizer)
    many = Evaluation(rows, task, 5, Group(), spec.eval).answers(base, rows)
    assert many == Evaluation(rows, task, 1, Group(), spec.eval).answers(base, rows)
