import json
import subprocess
import sys
import time

import pytest

from orchestrator.errors import SpecError
from orchestrator.spec.load import load_job, load_job_mapping, load_job_text
from orchestrator.spec.places import SpecErrors

from .jobs import MINIMAL, refused, refused_after_minimal, spec_of


def test_a_minimal_job_has_every_default():
    spec = spec_of()
    assert spec.name == "x"
    assert (
        spec.deepspeed == "zero2" and spec.training.learning_rate == 2e-4 and spec.retry.start_timeout == 600
    )
    assert spec.adapter.type == "lora" and spec.deploy is None


def test_places_give_line_and_column():
    job = load_job_text(MINIMAL + "training:\n  seed: 3\n", "jobs/x.yaml")
    assert job.places["training.seed"][:2] == (4, 3)
    assert job.where("training.seed") == "jobs/x.yaml:4 training.seed"
    assert job.where("training.learning_rate") == "jobs/x.yaml:3 training.learning_rate"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trainin: {seed: 2}", "jobs/x.yaml:3 trainin: no such key. Closest: 'training'."),
        ("training: {micro_batch: 2}",
         "jobs/x.yaml:3 training.micro_batch: no such key. Closest: 'training.micro_batch_size'."),
        ("training: {r: 2}", "jobs/x.yaml:3 training.r: no such key here. Write it as adapter.r."),
        ("training: {lora_r: 2}", "jobs/x.yaml:3 training.lora_r: no such key here. Write it as adapter.r."),
        ("resources: {learning_rate: 2}",
         "jobs/x.yaml:3 resources.learning_rate: no such key here. Write it as training.learning_rate."),
        ("training: {lr: 1}", "jobs/x.yaml:3 training.lr: no such key. Write training.learning_rate."),
        ("gpus: 1", "jobs/x.yaml:3 gpus: no such key. Write resources.gpus_per_worker."),
        ("seeed: 3", "jobs/x.yaml:3 seeed: no such key. Closest: 'seed'."),
        ("training: {num_epochs: x}", "jobs/x.yaml:3 training.num_epochs: 'x' is not a whole number above 0."),
        ("training: {num_epochs: true}", "jobs/x.yaml:3 training.num_epochs: true is not a whole number above 0."),
        ("training: {num_epochs: 1.5}", "jobs/x.yaml:3 training.num_epochs: 1.5 is not a whole number above 0."),
        ("training: {num_epochs: 0}", "jobs/x.yaml:3 training.num_epochs: 0 is not a whole number above 0."),
        ("training: {num_epochs: [1]}", "jobs/x.yaml:3 training.num_epochs: a list is not a whole number above 0."),
        ("training: {num_epochs: }",
         "jobs/x.yaml:3 training.num_epochs: is empty. Write a value, or remove the key for its default."),
        ("training: {learning_rate: '1e-3'}",
         "jobs/x.yaml:3 training.learning_rate: '1e-3' is not a number above 0. Remove the quotes: 1e-3."),
        ("training: {warmup_ratio: 2}", "jobs/x.yaml:3 training.warmup_ratio: 2 is not a number from 0 to 1."),
        ("training: {lr_scheduler: cosin}",
         "jobs/x.yaml:3 training.lr_scheduler: 'cosin' is not one of constant, linear, cosine. Closest: 'cosine'."),
        ("training: {gradient_checkpointing: yes}",
         "jobs/x.yaml:3 training.gradient_checkpointing: 'yes' is not true or false or auto. Write true."),
        ("training: {save_steps: 3, saves_per_epoch: 2}",
         "jobs/x.yaml:3 training.saves_per_epoch: given beside training.save_steps. Keep one of the two."),
        ("training: 3",
         "jobs/x.yaml:3 training: 3 is not a mapping. Its keys: num_epochs, max_steps, micro_batch_size, "
         "global_batch_size, ..."),
        ("resources: {labels: {a: 1}}", "jobs/x.yaml:3 resources.labels.a: 1 is not text. Put it in quotes: '1'."),
        ("resources: {gpus_per_worker: 1.5}",
         "jobs/x.yaml:3 resources.gpus_per_worker: 1.5 GPUs cannot be given. "
         "Write a share up to 1, or a whole number."),
        ("name: a b",
         "jobs/x.yaml:3 name: 'a b' is not a name. A name is 1 to 100 letters, digits, '.', '_' or '-', and starts "
         "with a letter or a digit."),
        ("register: {alias: '3'}",
         "jobs/x.yaml:3 register.alias: '3' is not an alias: NAME@3 means a version. Begin with a letter."),
        ("register: {alias: 1st}",
         "jobs/x.yaml:3 register.alias: '1st' cannot be an alias. Use letters, digits, '.', '_' and '-', at most 63, "
         "beginning with a letter."),
        (f"register: {{name: {'a' * 64}}}",
         f"jobs/x.yaml:3 register.name: '{'a' * 64}' cannot be an adapter's name. Use letters, digits, '.', '_' and "
         "'-', at most 63, beginning with a letter or digit."),
        (f"name: {'a' * 64}",
         "jobs/x.yaml:3 name: has 64 letters, and the adapter, which takes the job's name, may have 63. Shorten it, or "
         "write register: {name: ...}."),
        ("retry: {start_timeout: soon}",
         "jobs/x.yaml:3 retry.start_timeout: 'soon' is not a duration. Write seconds, or 90s, 10m, 2h, 1h30m, 1d."),
        ("eval: {metrics: [f1]}", "jobs/x.yaml:3 eval.metrics.0: 'f1' is not measured of rows of type 'chat'. "
                                   "Of those: exact_match, contains."),
        ("format: 2", "jobs/x.yaml:3 format: format 2 was written by a newer raypeft; this one reads up to format 1. "
                      "Upgrade: pip install -U raypeft"),
    ],
)  # fmt: skip
def test_each_error_says_where_what_and_what_next(text, message):
    assert refused_after_minimal(text + "\n") == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training: {seed: 1}\n",
         "jobs/x.yaml:1 model: is required and not given. Write model: {base_model: DIRECTORY or HUB_ID}.\n"
         "jobs/x.yaml:1 data: is required and not given. Write data: {datasets: [{path: FILE.jsonl, type: chat}]}."),
        ("model: {base_model: 3}\ndata: {datasets: []}\n",
         "jobs/x.yaml:1 model.base_model: 3 is not text. Put it in quotes: '3'.\n"
         "jobs/x.yaml:2 data.datasets: is an empty list; it needs at least one entry. "
         "Write data: {datasets: [{path: FILE.jsonl, type: chat}]}."),
        ("model: {base_model: b}\ndata:\n  datasets:\n  - path: a\n    type: chats\n  - b.jsonl\n",
         "jobs/x.yaml:5 data.datasets.0.type: 'chats' is not one of chat, prompt_completion, alpaca, text, "
         "classification, token-classification, qa, seq2seq, embedding. "
         "Closest: 'chat'.\n"
         "jobs/x.yaml:6 data.datasets.1: 'b.jsonl' is not a mapping. Write {path: b.jsonl}."),
        ("model: {base_model: b}\ndata: {datasets: [{path: a, type: chat, field_text: t}], val_set_size: 1.5}\n",
         "jobs/x.yaml:2 data.datasets.0.field_text: a dataset of type chat has no such column. "
         "It has: field_messages.\n"
         "jobs/x.yaml:2 data.val_set_size: 1.5 is neither a share below 1 nor a whole number of rows."),
        ("model: {base_model: ''}\ndata: {datasets: [{path: a}], val_set_size: -1}\n",
         "jobs/x.yaml:1 model.base_model: is empty text. Write model: {base_model: DIRECTORY or HUB_ID}.\n"
         "jobs/x.yaml:2 data.val_set_size: -1 is not a number of at least 0."),
    ],
)  # fmt: skip
def test_errors_are_told_together_one_a_line(text, message):
    assert refused(text) == message


def test_whole_floats_are_whole_numbers():
    assert spec_of("training: {max_steps: 1e4, num_epochs: 2.0}\n").training.max_steps == 10_000


def test_val_set_size_is_a_share_or_rows():
    assert spec_of(overrides=["data.val_set_size=200"]).data.val_set_size == 200
    assert spec_of(overrides=["data.val_set_size=0.2"]).data.val_set_size == 0.2
    assert spec_of(overrides=["data.val_set_size=0"]).data.val_set_size == 0


def test_overrides():
    spec = spec_of(
        overrides=[
            "training.learning_rate=1e-4",
            "lora_r=4",
            "data.datasets.0.path=s3://b/*.jsonl",
            "data.datasets.1={path: z, type: completion, field: body}",
            "deploy.gate.all=[eval_loss < 3]",
            "name=other",
        ]
    )
    assert spec.training.learning_rate == 1e-4 and spec.adapter.fields == {"r": 4} and spec.name == "other"
    assert [each.path for each in spec.data.datasets] == ["s3://b/*.jsonl", "z"]
    assert spec.data.datasets[1].field_text == "body"
    assert spec.deploy.gate.all == ("eval_loss < 3",)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("x", "--set: 'x' is not KEY=VALUE. Write --set KEY=VALUE, such as --set training.learning_rate=1e-4."),
        ("training.learning_rat=1", "--set training.learning_rat: no such key. Closest: 'training.learning_rate'."),
        ("training.learning_rate=abc", "--set training.learning_rate: 'abc' is not a number above 0."),
        ("data.datasets.3.path=x", "--set data.datasets.3.path: there is no entry 3: data.datasets has 1. "
                                   "The next is data.datasets.1."),
        ("data.datasets.x=1", "--set data.datasets.x: data.datasets is a list of 1; 'x' is no index. "
                              "Write --set data.datasets.0=..."),
        ("data.datasets.0.type=foo",
         "--set data.datasets.0.type: 'foo' is not one of chat, prompt_completion, alpaca, text, classification, "
         "token-classification, qa, seq2seq, embedding."),
        ("data={}", "--set data: an empty mapping changes nothing: what is written is merged key by key. "
                    "Name the key below it, or remove it whole: --set data=null."),
        ("extends=x", "--set extends: a file extends; an override cannot. Write it in the file."),
    ],
)  # fmt: skip
def test_errors_of_overrides(override, message):
    assert refused(MINIMAL, overrides=[override]) == message


def test_an_override_does_not_go_through_a_stage():
    message = refused_after_minimal("deepspeed: zero3\n", overrides=["deepspeed.zero_optimization.stage=2"])
    assert message == (
        "--set deepspeed.zero_optimization.stage: deepspeed is 'zero3', not a mapping. Set deepspeed whole."
    )


def test_extends_merges_mappings_and_replaces_lists(tmp_path):
    (tmp_path / "base.yaml").write_text(
        "name: base\nmodel: {base_model: b}\nlora_r: 4\n"
        "data: {datasets: [{path: a}, {path: b}], val_set_size: 7}\ntraining: {seed: 1, num_epochs: 3}\n"
    )
    (tmp_path / "middle.yaml").write_text("extends: base.yaml\nadapter: {alpha: 8}\ntraining: {seed: 2}\n")
    child = tmp_path / "child.yaml"
    child.write_text("extends: middle.yaml\ndata: {datasets: [{path: c}]}\nadapter: {r: 16}\n")
    job = load_job(child)
    assert [each.path for each in job.spec.data.datasets] == ["c"]
    assert (
        job.spec.data.val_set_size == 7 and job.spec.training.seed == 2 and job.spec.training.num_epochs == 3
    )
    assert job.spec.adapter.fields == {"r": 16, "lora_alpha": 8}
    assert job.spec.name == "child"  # two jobs of one name would be one run
    assert job.where("training.num_epochs") == f"{tmp_path}/base.yaml:5 training.num_epochs"
    assert job.where("training.seed") == f"{tmp_path}/middle.yaml:3 training.seed"


def test_errors_of_extends(tmp_path):
    (tmp_path / "base.yaml").write_text("training:\n  sed: 1\n")
    (tmp_path / "child.yaml").write_text("extends: base.yaml\n" + MINIMAL)
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    (tmp_path / "c.yaml").write_text("extends: bse.yaml\n")
    for name, message in {
        "child": f"{tmp_path}/base.yaml:2 training.sed: no such key. Closest: 'training.seed'.",
        "a": f"{tmp_path}/b.yaml:1 extends: a circle: a.yaml -> b.yaml -> a.yaml. Remove one of these lines.",
        "c": f"{tmp_path}/c.yaml:1 extends: {tmp_path}/bse.yaml: no such file. Closest: {tmp_path}/base.yaml.",
    }.items():
        with pytest.raises(SpecError) as raised:
            load_job(tmp_path / f"{name}.yaml")
        assert str(raised.value) == message


def test_files_that_are_not_there(tmp_path):
    (tmp_path / "quickstart.yaml").write_text(MINIMAL)
    with pytest.raises(SpecError) as raised:
        load_job(tmp_path / "quickstrat.yaml")
    assert str(raised.value) == (
        f"{tmp_path}/quickstrat.yaml: no such file. Closest: {tmp_path}/quickstart.yaml."
    )
    with pytest.raises(SpecError, match=r"is a directory, not a job. It holds: quickstart.yaml."):
        load_job(tmp_path)
    with pytest.raises(SpecError, match="There is no directory"):
        load_job(tmp_path / "no" / "x.yaml")


def test_a_stem_that_is_no_name(tmp_path):
    path = tmp_path / "my job.yaml"
    path.write_text(MINIMAL)
    with pytest.raises(SpecError) as raised:
        load_job(path)
    assert "name: the file's stem 'my job' is not a name." in str(raised.value)
    assert str(raised.value).endswith("Or write name: NAME in the file.")


def test_a_mapping_is_a_job_too():
    values = {"name": "n", "model": {"base_model": "b"}, "data": {"datasets": [{"path": "a"}]}, "lora_r": 3}
    assert load_job_mapping(values).spec.adapter.fields == {"r": 3}
    with pytest.raises(SpecError) as raised:
        load_job_mapping({**values, "trainin": {}})
    assert str(raised.value) == "<spec> trainin: no such key. Closest: 'training'."


def test_a_deepspeed_file_becomes_its_content(tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    (tmp_path / "bad.json").write_text("{")
    path = tmp_path / "job.yaml"
    path.write_text(MINIMAL + "deepspeed: ds.json\n")
    assert load_job(path).spec.deepspeed == {"zero_optimization": {"stage": 3}}
    path.write_text(MINIMAL + "deepspeed: bad.json\n")
    with pytest.raises(SpecError, match=r"deepspeed: 'bad\.json' is not JSON"):
        load_job(path)
    for value, message in {
        "none.json": "'none.json': no such file. Write a stage: zero0, zero1, zero2, zero3, zero3-offload.",
        "zero4": "'zero4' is neither a stage nor a path to a .json file. Closest: 'zero3'.",
    }.items():
        assert refused_after_minimal(f"deepspeed: {value}\n") == f"jobs/x.yaml:3 deepspeed: {message}"


def test_many_errors_have_a_machine_form():
    with pytest.raises(SpecErrors) as raised:
        load_job_text("training: {seed: 1}\n", "x.yaml")
    assert [each["where"] for each in raised.value.to_dict()["errors"]] == ["x.yaml:1 model", "x.yaml:1 data"]
    assert raised.value.exit_code == 2


def test_loading_leaves_torch_and_ray_out_and_is_quick(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text(MINIMAL)
    code = (
        "import sys; from orchestrator.spec.load import load_job; from orchestrator.spec.schema import json_schema;"
        "from orchestrator.plan import make_plan; import orchestrator.plan.view;"
        f"make_plan(load_job({str(path)!r}).spec, None, None); json_schema();"
        "print(*[name for name in ('torch', 'ray', 'transformers', 'deepspeed', 'datasets') if name in sys.modules])"
    )
    start = time.process_time()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
    assert time.process_time() - start < 5  # the parent's own time; the child's is bound by what it imports
