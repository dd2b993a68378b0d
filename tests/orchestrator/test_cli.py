"""The command line: what it prints, its exit codes, and that no user sees a traceback."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from orchestrator import local_ray
from orchestrator.cli import app
from orchestrator.registry import Registry
from orchestrator.serve.desired import Desired, Served
from orchestrator.serve.rollout import Rollout
from orchestrator.spec.methods import method_rows

from .adapters import lineage, make_adapter, make_base


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("RAYPEFT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


@pytest.fixture
def registry(home) -> Registry:
    return Registry(home / "registry")


COMMANDS = [
    "init", "validate", "inspect", "plan", "schema", "methods", "run", "submit", "jobs", "status", "logs",
    "cancel", "adapters", "show", "alias", "register", "pull", "merge", "delete", "eval", "deploy", "endpoints",
    "undeploy", "ask", "up", "down", "promote", "rollback", "top",
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(raypeft, command):
    code, out, _ = raypeft(command, "--help")
    assert code == 0 and f"raypeft {command}" in out


def test_help_lists_exactly_these_commands():
    assert sorted(command.name or command.callback.__name__ for command in app.registered_commands) == sorted(
        COMMANDS
    )


def test_no_arguments_shows_help(raypeft):
    _, out, err = raypeft()
    assert "Usage" in out + err


def test_validate_prints_each_problem_with_its_place_and_exits_2(raypeft, tmp_path):
    (tmp_path / "bad.yaml").write_text(
        "model: {base_model: x}\ndata: {datasets: [{path: a.jsonl}]}\nadpter: {}\n"
    )
    code, out, err = raypeft("validate", "bad.yaml")
    assert (code, out) == (2, "")
    assert err.strip() == "bad.yaml:3 adpter: no such key. Closest: 'adapter'."


def test_validate_json_says_it_for_scripts(raypeft, tmp_path):
    (tmp_path / "good.yaml").write_text("model: {base_model: x}\ndata: {datasets: [{path: a.jsonl}]}\n")
    (tmp_path / "bad.yaml").write_text("model: 3\n")
    code, out, _ = raypeft("validate", "good.yaml", "bad.yaml", "--json")
    good, bad = json.loads(out)
    assert code == 2 and good["valid"] and good["name"] == "good"
    assert not bad["valid"] and bad["error"]["code"] == "spec"


def test_validate_resolved_prints_a_job_that_validates_to_itself(raypeft, tmp_path):
    (tmp_path / "job.yaml").write_text("model: {base_model: x}\ndata: {datasets: [{path: a.jsonl}]}\n")
    code, out, _ = raypeft("validate", "job.yaml", "--resolved", "--set", "training.learning_rate=1e-4")
    assert code == 0 and "learning_rate: 0.0001" in out
    (tmp_path / "again.yaml").write_text(out)
    assert raypeft("validate", "again.yaml", "--resolved")[1] == out


def test_schema_is_json(raypeft):
    code, out, _ = raypeft("schema")
    assert code == 0 and json.loads(out)["properties"]["training"]


def test_methods_lists_the_catalog(raypeft):
    _, out, _ = raypeft("methods")
    rows = json.loads(raypeft("methods", "--json")[1])
    assert [row["name"] for row in rows] == [row.name for row in method_rows()]
    assert all(row["name"] in out and (row["paper"] or "HF PEFT") in out for row in rows)
    lines = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert " all " in lines["lora"] and "CAUSAL_LM" in lines["cpt"] and " no " in lines["prompt_tuning"]


def test_methods_shows_the_fields_of_one(raypeft):
    code, out, _ = raypeft("methods", "AdaLoRA")
    assert code == 0 and out.startswith("adalora: LoRA in SVD form")
    (line,) = [line for line in out.splitlines() if line.startswith("target_r ")]
    assert line.split() == ["target_r", "a", "whole", "number", "8", "mean", "rank", "at", "the", "end."]
    assert {field["name"] for field in json.loads(raypeft("methods", "ia3", "--json")[1])["fields"]} >= {
        "target_modules"
    }
    code, _, err = raypeft("methods", "loar")
    assert code != 0 and "raypeft methods: 'loar' is not a method. Closest: 'lora'." in err


def test_init_writes_a_job_that_validates_and_overwrites_nothing(raypeft, tmp_path):
    _, listed, _ = raypeft("init")
    code, out, _ = raypeft("init", "minimal")
    path = tmp_path / "minimal.yaml"
    assert code == 0 and "minimal" in listed and "minimal.yaml" in out
    assert raypeft("validate", str(path))[0] == 0
    path.write_text("mine")
    code, _, err = raypeft("init", "minimal")
    assert code != 0 and "--force" in err and path.read_text() == "mine"


def test_an_unknown_template_lists_those_there_are(raypeft):
    code, _, err = raypeft("init", "swep")
    assert code != 0 and "'swep'" in err and "sweep" in err and "quickstart" in err


def test_the_registry_from_the_command_line(raypeft, registry, tmp_path):
    base = make_base(tmp_path / "base")
    make_adapter(tmp_path / "mine", base_model_name_or_path=str(base))
    assert raypeft("register", "mine", "--name", "docs")[1] == "registered docs@1\n"
    assert raypeft("alias", "docs@1", "production")[1] == "docs@production is docs@1\n"
    _, out, _ = raypeft("adapters")
    assert "docs" in out and "production -> 1" in out and str(registry.url).removeprefix("file://") in out
    assert "docs@1" in raypeft("adapters", "docs")[1]
    shown = json.loads(raypeft("show", "docs", "--json")[1])
    assert shown["ref"] == "docs@1" and shown["lineage"]["origin"] == "registered from mine"
    assert "lineage.origin" in raypeft("show", "docs@1")[1]
    assert raypeft("pull", "docs@production", "copy")[0] == 0
    assert (tmp_path / "copy" / "adapter_model.safetensors").is_file()
    code, _, err = raypeft("delete", "docs@1")
    assert code == 1 and "docs@production is this version" in err
    registry.remove_alias("docs", "production")
    assert raypeft("delete", "docs@1")[1] == "deleted docs@1\n"


def test_without_a_terminal_each_row_is_one_line(raypeft, registry, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    registry.register(
        "docs", make_adapter(tmp_path / "a"), lineage(metrics={f"metric_{i}": 0.5 for i in range(9)})
    )
    registry.hold("docs@1", "tiny", forced=True, reasons=["eval_loss < 1"])
    title, header, row = raypeft("adapters", "docs")[1].splitlines()
    assert title.startswith("Registry ") and header.startswith("version")
    assert row.startswith("docs@1") and "metric_8 0.5000" in row
    shown = raypeft("show", "docs@1")[1]
    assert re.search(r"^forced +endpoint tiny  at \d{4}-\d\d-\d\d .*  reasons eval_loss < 1 *$", shown, re.M)


def test_registering_needs_a_base(raypeft, tmp_path):
    make_adapter(tmp_path / "mine", base_model_name_or_path=None)
    code, _, err = raypeft("register", "mine", "--name", "docs")
    assert code == 1 and "--base MODEL" in err


def test_an_unknown_version_lists_those_there_are(raypeft, registry, tmp_path):
    registry.register("docs", make_adapter(tmp_path / "a"), lineage())
    code, _, err = raypeft("show", "docs@7")
    assert code == 1 and "docs@7 does not exist" in err and "docs@1" in err


def test_a_failed_command_prints_json_where_asked(raypeft):
    code, out, err = raypeft("status", "nothing", "--json")
    assert code == 1 and json.loads(out)["error"]["code"] == "run" and "there is no run 'nothing'" in err


def test_submit_needs_a_cluster(raypeft, tmp_path):
    (tmp_path / "job.yaml").write_text("model: {base_model: x}\ndata: {datasets: [{path: a.jsonl}]}\n")
    code, _, err = raypeft("submit", "job.yaml")
    assert code == 1 and "--address http://HOST:8265" in err


def test_run_on_a_remote_cluster_says_submit(raypeft, tmp_path):
    (tmp_path / "job.yaml").write_text("model: {base_model: x}\ndata: {datasets: [{path: a.jsonl}]}\n")
    code, _, err = raypeft("run", "job.yaml", "--cluster", "http://127.0.0.1:9")
    assert code == 1 and "Traceback" not in err


def test_ask_with_nothing_up_says_how_to_start_one(raypeft):
    code, _, err = raypeft("ask", "docs", "Why?")
    assert code == 1 and "no endpoint is up" in err and "raypeft deploy" in err


def test_deploy_checks_names_as_a_job_does(raypeft, registry, tmp_path):
    registry.register("docs", make_adapter(tmp_path / "a"), lineage())
    code, _, err = raypeft("deploy", "docs@1", "--endpoint", "a b")
    assert code == 2 and err.startswith(
        "error: deploy.endpoint: 'a b' is not a name. A name is 1 to 100 letters"
    )
    assert local_ray.current() is None


def test_undeploy_with_ray_down_changes_the_registry_and_starts_nothing(raypeft, registry, tmp_path):
    version = registry.register("docs", make_adapter(tmp_path / "a"), lineage())
    state = Desired("tiny", version.lineage.base, adapters=(Served("docs", 1),))
    registry.hold("docs@1", "tiny")
    registry.update_endpoint("tiny", lambda stored: state.to_dict())
    assert raypeft("undeploy", "docs@1")[1] == "undeployed docs@1\n" and registry.holders("docs@1") == []
    assert raypeft("undeploy", "tiny")[1] == "undeployed tiny\n" and registry.endpoint_names() == []
    code, _, err = raypeft("undeploy", "tiny")
    assert code == 1 and err == "error: there is no endpoint 'tiny'. List them: raypeft endpoints.\n"
    assert local_ray.current() is None


def test_endpoints_and_down_with_nothing_up(raypeft):
    assert json.loads(raypeft("endpoints", "--json")[1]) == []
    assert raypeft("down")[1] == "no Ray of ours was up\n"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("jobs --address foo", "--address: 'foo' is not an address. Write the dashboard's address, http://HOST:8265."),
        ("logs x --address foo", "--address: 'foo' is not an address. Write the dashboard's address, http://HOST:8265."),
        ("adapters a@1", "'a@1' names one version. See it: raypeft show a@1"),
        ("adapters a/b", "'a/b' cannot be an adapter's name. Use letters, digits, '.', '_' and '-', at most 63, "
         "beginning with a letter or digit."),
        ("show docs@1@2", "'docs@1@2' is not an adapter's id. Write NAME@VERSION or NAME@ALIAS."),
        ("rollback dox", "has no adapter 'dox'. Did you mean 'docs'?"),
        ("pull docs@1 /proc/x", "/proc/x: nothing can be written here. Name another folder."),
        ("ask docs hello --url 127.0.0.1", "127.0.0.1: this is not a URL. Write http://HOST:PORT/ENDPOINT/v1."),
        ("deploy docs@1 --set x", "--set: 'x' is not KEY=VALUE. Write --set KEY=VALUE, such as --set "
         "rollout.canary_percent=10."),
        ("eval docs@1 rows.jsonl --type chta", "--type: 'chta' is none of chat, prompt_completion,"),
        ("eval docs@1 rows.jsonl --metric f1", "--metric: 'f1' is not measured of rows of type 'chat'. Of those: "
         "exact_match, contains."),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_told_with_the_next_step(raypeft, registry, tmp_path, command, said):
    registry.register("docs", make_adapter(tmp_path / "adapter"), lineage())
    code, out, err = raypeft(*command.split())
    assert code and not out and err.startswith("error: ") and said in err


@pytest.mark.parametrize(
    ("command", "file"),
    [
        ("endpoints", "registry/endpoints/tiny.json"),
        ("rollout status", "registry/endpoints/tiny.json"),
        ("show docs@1", "registry/adapters/docs/1/raypeft.json"),
        ("status docs", "runs/docs/run.json"),
    ],
)
@pytest.mark.parametrize(("content", "said"), [("{", "Expecting property name"), ('{"a": 1}', "it lacks '")])
def test_a_damaged_document_is_named(raypeft, home, command, file, content, said):
    (home / file).parent.mkdir(parents=True)
    (home / file).write_text(content)
    code, _, err = raypeft(*command.split())
    assert code == 1 and err.startswith(f"error: {home / file}: this file is damaged: {said}")
    assert err.rstrip().endswith("Restore it from a backup, or move it away.")


def test_a_plan_says_which_data_is_not_here(raypeft, tmp_path):
    base = Path(__file__).parents[2] / "jobs" / "assets" / "tiny-llama"
    job = f"model: {{base_model: {base}}}\ndata: {{datasets: [{{path: rows.jsonl}}]}}\n"
    (tmp_path / "job.yaml").write_text(job)
    code, out, _ = raypeft("plan", "job.yaml")
    assert code == 0 and "There is no 'rows.jsonl' here: with this data the job does not run." in out
    (tmp_path / "rows.jsonl").write_text('{"messages": []}\n')
    assert "There is no" not in raypeft("plan", "job.yaml")[1]


def test_usage_errors_exit_2(raypeft):
    code, _, err = raypeft("adaptrs")
    assert code == 2 and "Did you mean" in err


def test_the_module_runs_as_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator", "methods", "--json"], capture_output=True, text=True
    )
    assert done.returncode == 0 and json.loads(done.stdout)


def test_completion_offers_adapters_and_runs(home, registry, tmp_path):
    from orchestrator.cli.app import complete_adapters, complete_runs

    registry.register("docs", make_adapter(tmp_path / "a"), lineage())
    assert complete_adapters("do") == ["docs", "docs@1"] and complete_adapters("x") == []
    assert complete_runs("") == []


@pytest.fixture
def rolling(registry, tmp_path) -> Registry:
    """`docs`, with its first version in production and its second on its way there."""
    for number in (1, 2):
        registry.register("docs", make_adapter(tmp_path / str(number), value=number), lineage())
        registry.hold(f"docs@{number}", "tiny")
    registry.set_alias("docs", 1, "production")
    rollout = Rollout(
        "id", "docs", "production", 2, canary_percent=10, bake_s=600, state="baking", began=time.time()
    )
    served = (Served("docs", 1), Served("docs", 2))
    state = Desired("tiny", lineage().base, adapters=served, rollouts=(rollout,))
    registry.update_endpoint("tiny", lambda now: state.to_dict())
    return registry


def test_a_rollout_is_shown_promoted_and_taken_back(raypeft, rolling):
    code, out, _ = raypeft("rollout", "status", "docs", "--json")
    (row,) = json.loads(out)["rollouts"]
    assert code == 0 and (row["candidate"], row["stable"], row["state"]) == ("docs@2", "docs@1", "baking")
    out = raypeft("rollout", "status")[1]
    assert "docs@2 to docs@production on tiny" in out and "10 % by 'user', 0 % in shadow" in out
    assert raypeft("promote", "docs@2")[1] == "promoted docs@2 at endpoint tiny\n"
    assert rolling.alias("docs", "production") == 2
    code, out, _ = raypeft("rollback", "docs", "--json")
    assert json.loads(out) == {
        "event": "result", "alias": "docs@production", "is": "docs@1", "endpoint": "tiny",
    }  # fmt: skip
    out = raypeft("rollout", "status", "docs")[1]
    assert "nothing is being rolled out" in out and "rolled back" in out and "user" in out
    code, _, err = raypeft("rollback", "docs")
    assert code == 1 and "no version before docs@production is known" in err


def test_top_shows_each_version_once_for_scripts(raypeft, rolling):
    code, out, _ = raypeft("top", "--once", "--json", "--interval", "0.2")
    rows = {row["model"]: row for row in json.loads(out)}
    assert code == 0 and list(rows) == ["docs@1", "docs@2", "tiny"]
    assert rows["docs@1"]["aliases"] == ["production"] and rows["docs@2"]["state"] == "canary"
    assert rows["docs@1"]["requests_per_s"] == 0.0
    assert "docs@2" in raypeft("top", "--once", "--interval", "0.2")[1]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("rollout.bake=soon", "error: deploy.rollout.bake: 'soon' is not a duration."),
        ("rollout.bak=1m", "error: deploy.rollout.bak: no such key. Closest: "),
        ("scale.max_replicas=0", "error: deploy.scale.max_replicas: "),
        ("rollout.rollback={any: [error_rate > 1]}", "error: deploy.rollout.rollback: is never looked at"),
        ("deploy.rollout", "error: --set: 'deploy.rollout' is not KEY=VALUE."),
        ("gate={all: [eval_loss < 3]}", "error: deploy.gate: a gate is asked when a version is registered"),
    ],
)
def test_deploy_takes_the_keys_of_a_job(raypeft, rolling, setting, message):
    code, _, err = raypeft("deploy", "docs@2", "--set", setting)
    assert code == 2 and err.startswith(message), err
