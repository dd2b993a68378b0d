"""`data.sample_packing`: rows that share a sequence have the losses, gradients and masks that each has in a row of its
own, for every method, at every stage, on any number of ranks, and after a run has stopped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Lfm2Config,
    Lfm2ForCausalLM,
)

import peft_dist
from orchestrator.errors import ModelError, SpecError
from orchestrator.plan import make_plan
from orchestrator.plan.model_sizes import read_sizes
from orchestrator.plan.row_lengths import RowFacts
from orchestrator.spec.adapter import method_names, peft_config
from orchestrator.spec.job import AdapterSpec
from orchestrator.train.group import Group
from orchestrator.train.rows.batches import steps
from orchestrator.train.rows.bins import balanced, in_order
from orchestrator.train.tasks import Step
from orchestrator.train.tasks.causal import CausalLM
from orchestrator.train.worker.data import load_examples
from orchestrator.train.worker.run import train
from orchestrator.train.worker.sequences import check_apart
from peft_dist.bins import bins_of
from peft_dist.catalog import METHODS, config_class
from peft_dist.errors import RowsError
from peft_dist.rows import Rows
from tests.ranks import run_on_ranks

from .packs import alone, apart, packed
from .test_methods import OWN_ROWS, SMALL
from .test_run import Recorder
from .tiny import job, plan, request

pytestmark = pytest.mark.usefixtures("one_thread")


# --- which rows share a sequence


@settings(max_examples=200)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=40),
    capacity=st.integers(40, 90),
    world_size=st.integers(1, 5),
)
def test_every_row_has_its_place_in_bins_that_are_dealt_evenly(lengths, capacity, world_size):
    bins = balanced(lengths, capacity, world_size)
    assert sorted(row for rows in bins for row in rows) == list(range(len(lengths)))
    assert len(bins) % world_size == 0
    assert all(sum(lengths[row] for row in rows) <= capacity for rows in bins)
    assert bins == balanced(lengths, capacity, world_size)
    # twice as many as there must be, rounded to the ranks, are never needed
    assert len(bins) <= world_size * (2 * sum(lengths) // (capacity * world_size) + 2)


@given(lengths=st.lists(st.integers(1, 40), max_size=40), capacity=st.integers(20, 90))
def test_neighbours_stay_together(lengths, capacity):
    bins = list(in_order(lengths, capacity))
    assert [row for rows in bins for row in rows] == list(range(len(lengths)))
    assert all(sum(lengths[row] for row in rows) <= capacity or len(rows) == 1 for rows in bins)


@settings(max_examples=100)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=50),
    batch=st.integers(1, 20),
    micro=st.integers(1, 3),
    world_size=st.integers(1, 4),
    start=st.integers(0, 6),
)
def test_a_step_has_the_rows_that_it_has_unpacked(lengths, batch, micro, world_size, start):
    job = {"epochs": 2, "max_steps": None, "global_batch_size": batch, "seed": 3}
    apart = steps(len(lengths), **job, micro_batch_size=1, world_size=1, rank=0)
    wanted = [
        {place: row for rows, places in zip(one.micro, one.samples, strict=True)
         for row, place in zip(rows, places, strict=True)}
        for one in apart
    ]  # fmt: skip
    ranks = [
        list(steps(len(lengths), **job, micro_batch_size=micro, world_size=world_size, rank=rank,
                   lengths=lengths, capacity=30))
        for rank in range(world_size)
    ]  # fmt: skip
    for number, parts in enumerate(zip(*ranks, strict=True)):
        found: dict[int, int] = {}
        for part in parts:
            for rows, places, counts in zip(part.micro, part.samples, part.bins, strict=True):
                assert len(rows) == len(places) == sum(counts) and len(counts) <= micro
                found |= dict(zip(places, rows, strict=True))
        assert found == wanted[number]
        assert len({len(part.micro) for part in parts}) == 1, "each rank takes part in each forward"
    resumed = steps(len(lengths), **job, micro_batch_size=micro, world_size=world_size, rank=0,
                    lengths=lengths, capacity=30, start_step=start)  # fmt: skip
    assert list(resumed) == ranks[0][start:]


def test_the_way_to_sequences_and_back():
    bins = bins_of([[2, 3], [1], [4, 1, 1]])
    x = torch.arange(18.0).view(3, 6)
    apart = bins.apart(x)
    assert apart.shape == (6, 4)
    assert [apart[i, : (2, 3, 1, 4, 1, 1)[i]].tolist() for i in range(6)] == [
        [0, 1], [2, 3, 4], [6], [12, 13, 14, 15], [16], [17]
    ]  # fmt: skip
    together = bins.together(apart)
    kept = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 0, 0, 0, 0, 0], [1] * 6]).bool()
    assert torch.equal(together[kept], x[kept])
    assert bins.positions().tolist() == [[0, 1, 0, 1, 2, 0], [0, 0, 1, 2, 3, 4], [0, 1, 2, 3, 0, 0]]
    assert bins.starts().int().tolist() == [[1, 0, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0], [1, 0, 0, 0, 1, 1]]


# --- one step, for every method


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    """A base's folder, its tokenizer and rows of different lengths."""
    folder = tmp_path_factory.mktemp("packing")
    spec = job(folder)
    tokenizer = AutoTokenizer.from_pretrained(spec.model.base_model)
    return spec.model.base_model, tokenizer, load_examples(spec, tokenizer, max_len=100).train[:7]


def step_of(base, tokenizer, rows, config, bins, seed=1):
    """(summed loss, gradients) of seven rows, each for itself or as `bins` say; the adapter disturbed."""
    torch.manual_seed(0)
    # in float64, so that what is compared are sums and not their rounding
    bare = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    model = peft_dist.get_peft_model(bare, config, autocast_adapter_dtype=False)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.train()
    task = CausalLM(tokenizer, takes_task_ids="task_ids" in getattr(config, "reads", ()), method=config)
    places = list(range(len(rows)))
    if bins is None:
        batches = [task.collate(rows, places)]
    else:
        order = [place for forward in bins for one in forward for place in one]
        assert sorted(order) == places
        batches = [
            task.binned([rows[p] for one in forward for p in one], [p for one in forward for p in one],
                        [len(one) for one in forward])
            for forward in bins
        ]  # fmt: skip
    targets = sum(batch.targets for batch in batches)
    loss = task.backward(Step(model, Group("cpu"), seed, 3, targets, 1.0), batches)
    return loss / targets, {name: p.grad for name, p in trained.items() if p.grad is not None}


SHARED = [[[3, 0, 5], [1, 6]], [[2], [4]]]
"""Two forwards of two sequences: three rows, two, one and one."""

CAUSAL = [kind for kind in method_names() if "CAUSAL_LM" in METHODS[kind.upper()].task_types]
REFUSED = {
    "prefix_tuning": "keeps its tokens in the base's cache",
    "cpt": "counts the loss of its own context",
}
TOGETHER = [kind for kind in CAUSAL if kind not in REFUSED and kind not in OWN_ROWS]


def own(kind: str, **fields):
    """The method's config, as a job's adapter comes to it."""
    adapter = AdapterSpec(type=kind, **{**SMALL.get(kind, {}), **fields})
    return config_class(kind.upper())(**peft_config(adapter, "CAUSAL_LM", total_steps=20))


def equal(one, other) -> None:
    """Losses to 1e-5, gradients to 1e-5 of their largest entry: they are sums in another order."""
    assert one[0] == pytest.approx(other[0], abs=1e-5)
    assert one[1].keys() == other[1].keys() and one[1]
    largest = max(float(grad.abs().max()) for grad in other[1].values())
    for name, grad in other[1].items():
        assert float((one[1][name] - grad).abs().max()) <= 1e-5 * largest, name


@pytest.mark.parametrize("kind", TOGETHER)
def test_a_method_learns_from_rows_that_share_what_it_learns_from_each(kind, ground):
    equal(step_of(*ground, own(kind), SHARED), step_of(*ground, own(kind), None))


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("lora", {"lora_dropout": 0.4}),
        ("lora", {"lora_dropout": 0.4, "use_dora": True}),
        ("lora", {"lora_dropout": 0.4, "modules_to_save": ["lm_head"]}),
        ("lora", {"trainable_token_indices": [70, 71]}),
        ("hra", {}),
        ("loha", {"rank_dropout": 0.4, "module_dropout": 0.1}),
        ("vera", {"vera_dropout": 0.4}),
        ("poly", {"n_tasks": 1, "n_skills": 3}),
        ("oft", {"module_dropout": 0.4}),
        ("adaption_prompt", {"adapter_len": 3, "adapter_layers": 1}),
    ],
)
def test_masks_go_by_the_sample_and_its_positions(kind, fields, ground):
    shared, apart = step_of(*ground, own(kind, **fields), SHARED), step_of(*ground, own(kind, **fields), None)
    equal(shared, apart)


def test_negative_control_masks_differ_between_seeds(ground):
    config = own("lora", lora_dropout=0.4)
    one, other = step_of(*ground, config, SHARED), step_of(*ground, config, SHARED, seed=2)
    assert abs(one[0] - other[0]) > 1e-4


def test_negative_control_positions_that_go_on_let_rows_see_each_other(ground, monkeypatch):
    from peft_dist.bins import Bins

    def going_on(self):
        return torch.arange(self.width).expand(self.shape)

    apart = step_of(*ground, own("lora"), None)
    monkeypatch.setattr(Bins, "positions", going_on)
    assert abs(step_of(*ground, own("lora"), SHARED)[0] - apart[0]) > 1e-3


def test_adapters_that_differ_by_row_share_a_sequence_too(ground):
    base, tokenizer, rows = ground
    torch.manual_seed(0)
    model = peft_dist.get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), own("lora", lora_dropout=0.3)
    )
    model.add_adapter("other", own("vera", vera_dropout=0.3))
    model.set_requires_grad(["default", "other"], True)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.train()
    task, names = (
        CausalLM(tokenizer),
        ["default", "other", "__base__", "other", "default", "other", "default"],
    )
    plain = task.collate(rows, range(7))
    packed = task.binned(rows, range(7), [3, 2, 2])
    with model.using(Rows(names, torch.arange(7), seed=1, step=2)):
        apart = task.loss(model, plain)
    with model.using(Rows(names, torch.arange(7), seed=1, step=2, bins=packed.bins)):
        shared = task.loss(model, packed)
    assert float(shared) == pytest.approx(float(apart), rel=1e-6)
    everything = [["default"] * 7, names]
    losses = []
    for given_names in everything:
        with model.using(Rows(given_names, torch.arange(7), seed=1, step=2, bins=packed.bins)):
            losses.append(float(task.loss(model, packed)))
    assert abs(losses[0] - losses[1]) > 1e-3, "the names count"


def test_rows_say_how_many_they_are():
    with pytest.raises(RowsError, match="bins of 3 sequences"):
        Rows(samples=torch.arange(2), bins=bins_of([[1, 2], [3]]))


# --- whole runs


def sharing(spec, capacity: int = 64):
    data = spec.data.model_copy(update={"sample_packing": True, "sequence_len": capacity})
    return spec.model_copy(update={"data": data})


def told_losses(told: Recorder) -> list[float]:
    return [event["loss"] for event in told.of("progress")]


def test_a_run_and_its_evaluations_are_those_of_rows_apart(tmp_path):
    spec = job(tmp_path, adapter={"lora_dropout": 0.2}, training={"num_epochs": 2, "learning_rate": 1e-3})
    apart, shared = Recorder(), Recorder()
    one = train(request(tmp_path, spec, plan(micro=6), run="apart"), reporter=apart)
    both = train(
        request(tmp_path, sharing(spec), plan(micro=1, accumulation=6), run="shared"), reporter=shared
    )
    assert len(told_losses(apart)) == 6
    assert told_losses(shared) == pytest.approx(told_losses(apart), abs=1e-5)
    assert both.metrics == pytest.approx(one.metrics, rel=1e-5)
    assert one.metrics["eval_loss"] != pytest.approx(one.metrics["base.eval_loss"], rel=1e-3)


def test_it_takes_fewer_forwards(tmp_path, monkeypatch):
    counted = []
    loss = CausalLM.loss

    def counting(self, model, batch):
        counted.append(tuple(batch.inputs["input_ids"].shape))
        return loss(self, model, batch)

    monkeypatch.setattr(CausalLM, "loss", counting)
    spec = sharing(job(tmp_path, training={"max_steps": 1}, eval={"max_rows": 1}), 120)
    train(request(tmp_path, spec, plan(micro=1, accumulation=8)))
    # the rehearsal, the step in two sequences (eight rows of about 13 tokens), the row that is evaluated, by
    # adapter and base
    assert 4 <= len(counted) <= 5 and sum(width > 40 for _, width in counted) >= 1


def test_a_stopped_run_goes_on_to_the_same(tmp_path):
    spec = sharing(job(tmp_path, adapter={"lora_dropout": 0.2}, training={"num_epochs": 2, "save_steps": 1}))
    made = plan(micro=1, accumulation=6)
    whole = train(request(tmp_path, spec, made, run="whole"), reporter=Recorder())
    first = train(request(tmp_path, spec, made, run="parts"), reporter=Recorder(stop_after=2))
    assert first.is_stopped
    second = train(request(tmp_path, spec, made, run="parts"))
    assert second.metrics["eval_loss"] == whole.metrics["eval_loss"]


def on_rank(folder: Path, spec, made_plan, run: str):
    torch.set_num_threads(1)
    told = Recorder()
    end = train(request(folder, spec, made_plan, run=run), reporter=told)
    return end, told_losses(told)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_train_what_one_does_with_rows_apart(tmp_path, stage):
    spec = job(
        tmp_path,
        adapter={"lora_dropout": 0.2},
        training={"max_steps": 4, "learning_rate": 1e-3, "num_epochs": 2},
    )
    ((alone, losses),) = run_on_ranks(on_rank, 1, tmp_path, spec, plan(micro=8), "alone")
    (both, shared), _ = run_on_ranks(
        on_rank, 2, tmp_path, sharing(spec), plan(workers=2, micro=1, accumulation=4, stage=stage), "both"
    )
    assert shared == pytest.approx(losses, abs=1e-5) and len(losses) == 4
    assert both.metrics["eval_loss"] == pytest.approx(alone.metrics["eval_loss"], abs=1e-5)


def test_a_run_goes_on_with_another_number_of_ranks(tmp_path):
    training = {"num_epochs": 2, "learning_rate": 1e-3, "lr_scheduler": "constant"}
    spec = sharing(job(tmp_path, adapter={"lora_dropout": 0.2}, training=training))
    first = spec.model_copy(update={"training": spec.training.model_copy(update={"num_epochs": 1})})
    ((whole, losses),) = run_on_ranks(on_rank, 1, tmp_path, spec, plan(micro=1, accumulation=6), "whole")
    halves = plan(workers=2, micro=1, accumulation=3)
    (_, before), _ = run_on_ranks(on_rank, 2, tmp_path, first, halves, "parts")
    ((end, after),) = run_on_ranks(on_rank, 1, tmp_path, spec, plan(micro=1, accumulation=6), "parts")
    assert [*before, *after] == pytest.approx(losses, abs=1e-5) and before
    assert end.metrics["eval_loss"] == pytest.approx(whole.metrics["eval_loss"], abs=1e-5)


# --- what cannot


@pytest.mark.parametrize(("kind", "why"), REFUSED.items())
def test_methods_whose_tokens_or_loss_are_of_a_whole_row_are_refused_by_the_plan(kind, why, tmp_path):
    spec = sharing(job(tmp_path, adapter={"type": kind, **SMALL.get(kind, {})}))
    with pytest.raises(SpecError, match=rf"data\.sample_packing: true: {kind} {why}"):
        make_plan(spec, None, None)


def test_tasks_that_read_a_row_as_a_whole_are_refused(tmp_path):
    spec = sharing(job(tmp_path))
    rows = spec.data.datasets[0].model_copy(update={"type": "classification"})
    spec = spec.model_copy(update={"data": spec.data.model_copy(update={"datasets": (rows,)})})
    with pytest.raises(SpecError, match="rows of type 'classification' train SEQ_CLS"):
        make_plan(spec, None, None)


@pytest.fixture
def bloom(tmp_path) -> Path:
    """A base that knows tokens by their distance."""
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=300, hidden_size=32, n_layer=2, n_head=4)
    BloomForCausalLM(config).save_pretrained(tmp_path / "bloom")
    return tmp_path / "bloom"


def test_a_base_without_positions_is_refused_by_the_plan(tmp_path, bloom):
    spec = sharing(job(tmp_path))
    sizes = read_sizes(str(bloom))
    with pytest.raises(SpecError, match=r"data\.sample_packing: true: bloom knows a token by its distance"):
        make_plan(spec, None, sizes)


def test_a_base_that_the_plan_does_not_know_is_tried(ground, bloom):
    base, _, rows = ground
    ids = [row.input_ids for row in rows]
    check_apart(AutoModelForCausalLM.from_pretrained(base), ids, "cpu")
    with pytest.raises(ModelError, match="BloomForCausalLM lets sequences that share a row see each other"):
        check_apart(AutoModelForCausalLM.from_pretrained(bloom), ids, "cpu")


def test_virtual_tokens_beside_shared_sequences_are_an_error_and_never_wrong(ground):
    base, tokenizer, rows = ground
    model = peft_dist.get_peft_model(AutoModelForCausalLM.from_pretrained(base), own("prefix_tuning"))
    batch = CausalLM(tokenizer).binned(rows, range(7), [4, 3])
    with (
        model.using(Rows(samples=torch.arange(7), bins=batch.bins)),
        pytest.raises(RowsError, match="several"),
    ):
        model(**batch.inputs, use_cache=False)


@pytest.mark.parametrize("kind", ["prompt_tuning", "prefix_tuning"])
def test_a_prompt_adapter_in_production_is_compared_too(kind, tmp_path):
    prompt = job(tmp_path, adapter={"type": kind, "num_virtual_tokens": 3})
    old = train(request(tmp_path, prompt, plan(micro=4), run="old"))
    spec = sharing(job(tmp_path))
    new = train(request(tmp_path, spec, plan(micro=1, accumulation=4), run="new",
                        compare={"production": old.adapter_dir}))  # fmt: skip
    assert new.metrics["production.eval_loss"] == pytest.approx(old.metrics["eval_loss"], rel=1e-6)


def test_the_plan_counts_the_sequence_that_rows_share(tmp_path):
    spec = job(tmp_path, training={"micro_batch_size": 1, "gradient_accumulation_steps": 4})
    sizes = read_sizes(spec.model.base_model)
    apart, shared = (make_plan(each, None, sizes, RowFacts(longest=20)) for each in (spec, sharing(spec)))
    assert apart.sequence_len == 20 and shared.sequence_len == 64
    assert shared.memory.activations > apart.memory.activations
    assert any("share sequences of up to 64 tokens" in note for note in shared.notes)


def test_a_mixture_of_adapters_weighs_them_by_each_rows_own_tokens(tmp_path):
    one = train(request(tmp_path, job(tmp_path, adapter={"r": 2}), run="one"))
    two = train(request(tmp_path, job(tmp_path, adapter={"r": 2}, training={"seed": 1}), run="two"))
    mixed = {"type": "xlora", "adapters": {"a": one.adapter_dir, "b": two.adapter_dir}, "xlora_size": 8,
             "xlora_dropout_p": 0.3}  # fmt: skip
    spec = job(tmp_path, adapter=mixed, training={"learning_rate": 1e-3})
    apart, shared = Recorder(), Recorder()
    train(request(tmp_path, spec, plan(micro=6), run="apart"), reporter=apart)
    train(request(tmp_path, sharing(spec), plan(micro=1, accumulation=6), run="shared"), reporter=shared)
    assert told_losses(shared) == pytest.approx(told_losses(apart), abs=1e-5)


SMALLEST = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 300,
            "intermediate_size": 64}  # fmt: skip
BASES = {
    "absolute positions": lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=300)),
    "a window": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SMALLEST, num_key_value_heads=2, head_dim=8, sliding_window=4)
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", BASES)
def test_bases_that_keep_sequences_apart(kind, dtype):
    torch.manual_seed(0)
    check_apart(BASES[kind]().to(dtype), [list(range(3, 15)), list(range(40, 52))], "cpu")


def test_negative_control_a_convolution_reaches_two_tokens_back():
    torch.manual_seed(0)
    base = Lfm2ForCausalLM(
        Lfm2Config(**SMALLEST, num_key_value_heads=2, layer_types=["conv", "full_attention"])
    )
    with pytest.raises(ModelError, match="see each other"):
        check_apart(base, [list(range(3, 15)), list(range(40, 52))], "cpu")


@pytest.mark.parametrize("way", ["turns", "together"])
def test_runs_in_a_pack_share_their_sequences_too(way, tmp_path):
    adapters = {
        "a": {"r": 2, "lora_dropout": 0.3},
        "b": {"r": 4},
        "c": {"type": "vera", "r": 4},
        "d": {
            "type": "prompt_tuning",
            "num_virtual_tokens": 3,
        },  # whose rows are no wider than others' without
    }
    training = {"max_steps": 2, "learning_rate": 1e-3}
    requests, lone = {}, {}
    for name, adapter in adapters.items():
        made = plan(micro=1, accumulation=2 if name == "d" else 6)
        spec = sharing(job(tmp_path, adapter=adapter, training={**training, "seed": ord(name)}))
        requests[name] = request(tmp_path, spec, made, run=f"pack-{name}")
        lone[name] = alone(request(tmp_path, spec, made, run=f"alone-{name}"))
    heard = packed(requests, way)
    for name in adapters:
        assert [loss for _, loss, _ in heard[name].steps] == pytest.approx(
            [loss for _, loss, _ in lone[name].steps], abs=1e-5
        )
        assert apart(heard[name], lone[name]) < 1e-3
