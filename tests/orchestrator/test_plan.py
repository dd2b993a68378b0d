import io
import json

import pytest
from rich.console import Console

from orchestrator.cluster import ClusterFacts, NodeFacts
from orchestrator.errors import PlacementError, SpecError
from orchestrator.plan import make_plan
from orchestrator.plan.memory import LEFT_OVER
from orchestrator.plan.model_sizes import sizes_of
from orchestrator.plan.sweep import make_sweep_plan
from orchestrator.plan.view import plan_dict, plan_view

from .spec.jobs import spec_of

GIB = 2**30


def llama(
    hidden=64, layers=2, heads=4, kv_heads=2, intermediate=128, vocab=1000, architecture="LlamaForCausalLM"
):
    """The sizes of a Llama, from a config and tensors as its files name them."""
    tensors = {"model.embed_tokens.weight": (vocab, hidden), "lm_head.weight": (vocab, hidden)}
    for layer in range(layers):
        block = f"model.layers.{layer}"
        kv = hidden // heads * kv_heads
        tensors |= {
            f"{block}.self_attn.q_proj.weight": (hidden, hidden),
            f"{block}.self_attn.k_proj.weight": (kv, hidden),
            f"{block}.self_attn.v_proj.weight": (kv, hidden),
            f"{block}.self_attn.o_proj.weight": (hidden, hidden),
            f"{block}.mlp.gate_proj.weight": (intermediate, hidden),
            f"{block}.mlp.up_proj.weight": (intermediate, hidden),
            f"{block}.mlp.down_proj.weight": (hidden, intermediate),
            f"{block}.input_layernorm.weight": (hidden,),
        }
    config = {
        "architectures": [architecture], "model_type": "llama", "hidden_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "intermediate_size": intermediate,
        "vocab_size": vocab, "max_position_embeddings": 512,
    }  # fmt: skip
    return sizes_of(config, {name: ("F32", shape) for name, shape in tensors.items()})


def cluster(*nodes, **most):
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    return ClusterFacts(
        nodes, most.get("cpus", cpus), most.get("gpus", gpus), most.get("nodes", len(nodes)), source="it"
    )


def shown(plan, *name):
    """What is printed of a plan."""
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(plan_view(plan, *name))
    return console.export_text()


ONE = cluster(NodeFacts(2, 0, 24 * GIB))


def test_the_batch_adds_up():
    text = "training: {micro_batch_size: 4, global_batch_size: 24}\nresources: {num_workers: 2}\n"
    plan = make_plan(spec_of(text), ONE, llama())
    assert (plan.num_workers, plan.micro_batch_size, plan.gradient_accumulation_steps) == (2, 4, 3)
    assert plan.global_batch_size == 24 == plan.deepspeed["train_batch_size"]
    assert plan.bundle == {"CPU": 1} and not plan.use_gpu and plan.fits is True


@pytest.mark.parametrize(("gpus", "workers", "each"), [(0, 2, 0), (1, 2, 0), (2, 2, 1), (8, 2, 1), (1, 1, 1)])
def test_gpus_are_used_where_there_is_one_for_each_worker(gpus, workers, each):
    plan = make_plan(
        spec_of(f"resources: {{num_workers: {workers}}}\n"), cluster(NodeFacts(8, gpus)), llama()
    )
    assert plan.bundle.get("GPU", 0) == each
    assert any("planned on CPU" in note for note in plan.notes) == (0 < gpus < workers)


def test_gpus_that_the_autoscaler_can_bring_count():
    facts = cluster(NodeFacts(4), cpus=36, gpus=8, nodes=5)
    assert make_plan(spec_of("resources: {num_workers: 8}\n"), facts, llama()).bundle["GPU"] == 1


@pytest.mark.parametrize(
    ("resources", "facts", "message"),
    [
        ("{num_workers: 5}", ONE,
         "resources.num_workers: 5 workers of {CPU: 1} can never be placed (PACK): it has 2 CPU on 1 node, room for 2. "
         "Write resources.num_workers: 2, or name a larger cluster."),
        ("{num_workers: 9, gpus_per_worker: 1}", cluster(NodeFacts(8), cpus=40, gpus=8, nodes=2),
         "resources.num_workers: 9 workers of {CPU: 1, GPU: 1} can never be placed (PACK): it has 40 CPU and 8 GPU on "
         "1 node at most, room for 8. Write resources.num_workers: 8, or name a larger cluster."),
        ("{num_workers: 1, gpus_per_worker: 1}", ONE,
         "resources.num_workers: 1 worker of {CPU: 1, GPU: 1} can never be placed (PACK): it has 2 CPU and 0 GPU on "
         "1 node, room for 0. Write resources.gpus_per_worker: auto, or name a cluster with GPUs."),
        ("{num_workers: 1, cpus_per_worker: 8}", cluster(NodeFacts(4), NodeFacts(4)),
         "resources.num_workers: 1 worker of {CPU: 8} can never be placed (PACK): it has 8 CPU on 2 nodes, room for 0. "
         "Lower resources.cpus_per_worker or gpus_per_worker, or name a larger cluster."),
        ("{num_workers: 3, placement: STRICT_PACK}", cluster(NodeFacts(2), NodeFacts(2)),
         "resources.num_workers: 3 workers of {CPU: 1} can never be placed (STRICT_PACK): it has 4 CPU on 2 nodes, "
         "room for 2. Write resources.num_workers: 2, or name a larger cluster."),
        ("{num_workers: 3, placement: STRICT_SPREAD}", cluster(NodeFacts(2), NodeFacts(2)),
         "resources.num_workers: 3 workers of {CPU: 1} can never be placed (STRICT_SPREAD): it has 4 CPU on 2 nodes, "
         "room for 2. Write resources.num_workers: 2, or name a larger cluster."),
        ("{labels: {zone: a}}", ONE,
         "resources.labels: no node of it has the labels zone=a. Remove the labels, or name another cluster."),
    ],
)  # fmt: skip
def test_what_can_never_be_placed(resources, facts, message):
    with pytest.raises(PlacementError) as raised:
        make_plan(spec_of(f"resources: {resources}\n"), facts, llama())
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("labels", "ok"), [("a", True), ("!b", True), ("'in(a, b)'", True), ("'!in(a, b)'", False), ("b", False)]
)
def test_label_selectors(labels, ok):
    facts = cluster(NodeFacts(2, labels={"zone": "a"}))
    spec = spec_of(f"resources: {{labels: {{zone: {labels if labels[0] != '!' else repr(labels)}}}}}\n")
    if ok:
        assert make_plan(spec, facts, llama()).labels
    else:
        with pytest.raises(PlacementError):
            make_plan(spec, facts, llama())


def test_what_is_not_known_is_said():
    plan = make_plan(spec_of(), None, None)
    assert plan.memory is None and plan.fits is None and plan.cluster == ""
    text = " ".join(plan.notes)
    for words in ("GPUs are not known", "The cluster is not known", "The base's sizes are not known"):
        assert words in text
    for architecture in ("MambaForCausalLM", "T5ForConditionalGeneration"):
        unknown = make_plan(spec_of(), ONE, llama(architecture=architecture))
        assert unknown.memory is None and unknown.fits is None
        assert f"Memory is not estimated: the activations of {architecture} are not known." in unknown.notes
        assert unknown.adapter_parameters


def test_memory_that_does_not_fit_is_said():
    small = cluster(NodeFacts(2, 0, GIB))
    plan = make_plan(spec_of("resources: {num_workers: 2}\n"), small, llama())
    assert plan.fits is False and plan.notes[-1].startswith("2 workers need 1.")
    assert "of a node's 1.0 GiB. Lower training.micro_batch_size" in plan.notes[-1]
    gpu = cluster(NodeFacts(8, 1, gpu_type="T4"))
    text = "training: {micro_batch_size: 512}\n"
    assert make_plan(spec_of(text), gpu, llama(2048, 16, 16, 8, 8192, 32000)).fits is False
    assert make_plan(spec_of(), gpu, llama()).fits is True
    assert make_plan(spec_of(), cluster(NodeFacts(8, 1, gpu_type="X9")), llama()).fits is None


def test_the_trial_of_a_sweep_that_does_not_fit_is_named():
    space = "sweep: {space: {training.micro_batch_size: {choice: [1, 1000000]}}}\n"
    with pytest.raises(
        PlacementError, match=r"the trial with training.micro_batch_size 1000000 does not fit: A worker needs"
    ):
        make_sweep_plan(spec_of(space), ONE, llama())


def test_parts_of_memory():
    """LoRA r on a layer (out, in) trains r (out + in) elements; AdamW keeps two states of each."""
    sizes = llama()
    plan = make_plan(spec_of("adapter: {r: 4}\ndeepspeed: zero0\n"), ONE, sizes)
    trained = sum(4 * (out + in_) for out, in_ in sizes.linear_shapes.values())
    memory = plan.memory
    assert plan.adapter_parameters == trained and plan.base_parameters == sizes.parameters
    assert (memory.base, memory.adapter, memory.gradients) == (4 * sizes.parameters, 4 * trained, 4 * trained)
    assert memory.optimizer == 8 * trained and plan.memory.total > sum((memory.base, memory.activations))


def test_what_sharding_and_recomputing_save():
    def memory(text):
        return make_plan(spec_of(text), cluster(NodeFacts(8, 0, 99 * GIB)), llama(256, 24, vocab=100)).memory

    four = "resources: {num_workers: 4}\n"
    whole, states, base = (memory(f"{four}deepspeed: zero{stage}\n") for stage in (0, 1, 3))
    assert states.optimizer * 3 < whole.optimizer and states.base == whole.base
    assert base.base < 0.4 * whole.base and base.gradients == whole.gradients
    kept, recomputed = memory(""), memory("training: {gradient_checkpointing: true}\n")
    assert recomputed.activations - LEFT_OVER < 0.3 * (kept.activations - LEFT_OVER)
    assert memory("training: {optimizer: sgd}\n").optimizer == 0
    assert memory("adapter: {dropout: 0.1}\n").activations > kept.activations
    assert memory("training: {precision: bf16}\n").base == kept.base // 2
    assert memory("adapter: {type: prompt_tuning, num_virtual_tokens: 4}\n").adapter == 4 * 256 * 4


def base_bytes(keys, deepspeed="zero2", workers=1, facts=ONE, more=()):
    overrides = [f"model.{key}" for key in keys] + [f"resources.num_workers={workers}", *more]
    return make_plan(spec_of(f"deepspeed: {deepspeed}\n", overrides=overrides), facts, llama()).memory.base


def test_a_quantised_base_is_counted_as_it_is_stored():
    """8 bits: a byte an element and 4 a row; 4 bits: half a byte and the scales of blocks of 64; the rest in fp32."""
    sizes = llama()
    linear = sum(out * in_ for out, in_ in sizes.linear_shapes.values())
    rows, rest = sum(out for out, _ in sizes.linear_shapes.values()), 4 * (sizes.parameters - linear)
    assert base_bytes(["load_in_8bit=true"]) == rest + linear + 4 * rows
    plain = base_bytes(["load_in_4bit=true", "bnb_4bit_use_double_quant=false"])
    assert plain == rest + linear // 2 + linear // 64 * 4
    assert base_bytes(["load_in_4bit=true"]) == rest + linear // 2 + linear // 64 + linear // 64 * 4 // 256
    assert base_bytes([]) == 4 * sizes.parameters


def test_pieces_of_a_base_are_counted_where_they_rest():
    gpus = cluster(NodeFacts(8, 2, 24 * GIB))
    whole, sharded = base_bytes([], "zero2", 2, gpus), base_bytes([], "zero3", 2, gpus)
    offloaded = base_bytes([], "zero3-offload", 2, gpus)
    assert sharded - offloaded == whole // 2 and 0 < offloaded < sharded < whole
    assert base_bytes([], "zero3-offload", 2) == base_bytes([], "zero3", 2), "a CPU's memory is the node's"
    assert base_bytes(["load_in_4bit=true"], "zero3", 2) < base_bytes([], "zero3", 2)


def test_a_plan_says_how_the_base_is_kept():
    spec = spec_of("deepspeed: zero3-offload\nload_in_4bit: true\nresources: {num_workers: 2}\n")
    plan = make_plan(spec, ONE, llama())
    text = shown(plan)
    assert "nf4+double" in text and "the base is sharded too, its pieces rest in the nodes' memory" in text
    assert plan_dict(plan)["quantization"] == "nf4+double"


def test_targets_that_match_nothing_are_found_without_the_weights():
    with pytest.raises(SpecError, match=r"^adapter.target_modules: 'v_prj' matched none of .* 'v_proj'"):
        make_plan(spec_of("adapter: {target_modules: [v_prj]}\n"), ONE, llama())


def test_one_target_of_several_that_matches_nothing_is_refused_too():
    with pytest.raises(SpecError) as raised:
        make_plan(spec_of("adapter: {target_modules: [q_proj, v_prj]}\n"), ONE, llama())
    assert str(raised.value) == (
        "adapter.target_modules: 'v_prj' matched no layer of LlamaForCausalLM. Similar: 'v_proj'."
    )
    with pytest.raises(SpecError, match=r"^adapter.rank_pattern: 'k_proj' matched no adapted layer"):
        make_plan(spec_of("adapter: {target_modules: [q_proj], rank_pattern: {k_proj: 4}}\n"), ONE, llama())


def test_rows_are_as_long_as_the_base_allows():
    assert make_plan(spec_of(), ONE, llama()).sequence_len == 512
    assert make_plan(spec_of(), ONE, None).sequence_len == 2048
    assert make_plan(spec_of(overrides=["data.sequence_len=77"]), ONE, llama()).sequence_len == 77


def test_a_plan_is_printed_and_is_json():
    plan = make_plan(spec_of("resources: {num_workers: 2}\ndeepspeed: zero3\n"), ONE, llama())
    text = shown(plan, "job")
    for words in (
        "2 x {CPU: 1}, PACK",
        "ZeRO-3",
        "2 workers x 1 rows x 1 accumulated = 2 rows a step",
        "fits",
        "total",
    ):
        assert words in text
    values = json.loads(json.dumps(plan_dict(plan)))
    assert values["memory"]["total"] == plan.memory.total and values["zero_stage"] == 3
    assert plan_dict(make_plan(spec_of(), None, None))["memory"] is None


ELASTIC = "training: {global_batch_size: 8, micro_batch_size: 2}\nresources: {num_workers: [1, 4]}\n"


def test_an_elastic_plan_says_with_how_many_workers_it_steps():
    plan = make_plan(spec_of(ELASTIC), cluster(NodeFacts(2, 0, 24 * GIB), NodeFacts(2, 0, 24 * GIB)), llama())
    assert plan.counts == (1, 2, 4) and plan.num_workers == 4 and plan.global_batch_size == 8
    assert [size.gradient_accumulation_steps for size in plan.sizes] == [4, 2, 1]
    assert plan.notes[:2] == (
        "Elastic: it steps with 1, 2 or 4 workers; the rows of a step stay the same. It grows at most once in 5m.",
        "Not used: 3 workers, with which a step takes as many forwards as with fewer.",
    )
    text = shown(plan, "elastic")
    for words in (
        "1 to 4 x {CPU: 1}, PACK",
        "8 rows a step, whatever the number of workers",
        "1 worker x 2 rows x 4 accumulated",
        "4 workers x 2 rows x 1 accumulated",
    ):
        assert words in text
    assert json.loads(json.dumps(plan_dict(plan)))["sizes"][2] == {
        "num_workers": 4,
        "gradient_accumulation_steps": 1,
    }


def test_a_size_that_does_not_divide_the_batch_is_said_to_share_it_unevenly():
    text = "training: {global_batch_size: 8}\nresources: {num_workers: [2, 3]}\n"
    plan = make_plan(spec_of(text), ONE, llama())
    assert plan.counts == (2, 3) and not any(note.startswith("Not used") for note in plan.notes)
    assert "3 workers x at most 1 rows x 3 accumulated" in shown(plan)


def test_an_elastic_job_needs_room_for_its_least():
    two = cluster(NodeFacts(2, 2, 24 * GIB))
    plan = make_plan(spec_of("resources: {num_workers: [2, 64]}\n"), two, llama())
    assert plan.bundle["GPU"] == 1, "GPUs for the least number are there, more may come"
    with pytest.raises(
        PlacementError, match=r"^resources.num_workers: 3 workers of \{CPU: 1\} can never be placed"
    ):
        make_plan(spec_of("resources: {num_workers: [3, 64]}\n"), ONE, llama())


def test_memory_is_that_of_the_fewest_workers():
    sharded = "deepspeed: zero3\nresources: {num_workers: %s}\n"
    few, most, range_ = (
        make_plan(spec_of(sharded % text), cluster(NodeFacts(8)), llama()).memory.base
        for text in ("1", "4", "[1, 4]")
    )
    assert few == range_ > most


@pytest.mark.parametrize(("workers", "micro", "steps"), [(1, None, 4), (3, None, 2), (4, 1, 2)])
def test_an_attempt_has_its_own_share_of_the_same_batch(workers, micro, steps):
    plan = make_plan(spec_of(ELASTIC + "deepspeed: zero3\n"), cluster(NodeFacts(4)), llama()).at(
        workers, micro
    )
    assert (plan.num_workers, plan.gradient_accumulation_steps, plan.global_batch_size) == (workers, steps, 8)
    config = plan.deepspeed
    assert config["train_batch_size"] == (
        config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"] * workers
    ), "as DeepSpeed checks it"
