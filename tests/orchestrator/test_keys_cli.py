"""`raypeft keys`, and how `raypeft ask` comes by its own."""

from __future__ import annotations

import json

import pytest

from orchestrator.api import asked
from orchestrator.cli import app, run_guarded
from orchestrator.identity import BaseIdentity
from orchestrator.keys import KeyBook
from orchestrator.lineage import Lineage
from orchestrator.registry import Registry
from orchestrator.serve.desired import Desired

from .adapters import BASE, make_adapter


@pytest.fixture
def raypeft(tmp_path, monkeypatch, capsys):
    """Runs the command; returns its exit code, standard output and standard error."""
    monkeypatch.setenv("RAYPEFT_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAYPEFT_API_KEY", raising=False)

    def run(*arguments):
        code = run_guarded(app, arguments)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def test_a_key_is_made_shown_once_listed_and_revoked(raypeft, tmp_path):
    code, secret, told = raypeft(
        "keys", "create", "acme", "--requests-per-minute", "5", "--model", "docs", "--force"
    )
    assert code == 0 and "It is not shown again" in told and "5 requests/min, models docs" in told
    book = KeyBook(str(tmp_path / "registry"))
    key = book.read().find(secret.strip())
    assert key.tenant == "acme"
    _, listed, _ = raypeft("keys", "list")
    assert key.id in listed and "5 requests/min" in listed and secret.strip() not in listed
    _, rows, _ = raypeft("keys", "list", "--json")
    assert json.loads(rows)[0]["used"] == {"day": 0, "month": 0, "total": 0}
    assert raypeft("keys", "revoke", "acme") == (0, f"revoked {key.id}\n", "")
    assert json.loads(raypeft("keys", "list", "--json")[1])[0]["state"] == "revoked"


def test_scripts_read_the_secret_from_json(raypeft, tmp_path):
    made = json.loads(
        raypeft("keys", "create", "acme", "--token-budget", "9", "--expires", "1d", "--json")[1]
    )
    assert made["limits"]["token_budget"] == 9 and made["expires"] > 0
    assert KeyBook(str(tmp_path / "registry")).read().find(made["secret"]).id == made["id"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("create", "a b"), "cannot be a tenant's name"),
        (("create", "x", "--expires", "soon"), "--expires: 'soon' is not a duration"),
        (("create", "x", "--budget-period", "week"), "One of: day, month, total."),
        (
            ("create", "x", "--model", "docs"),
            "no adapter and no base is called 'docs'. The registry is empty.",
        ),
        (
            ("create", "x", "--model", "docs@3", "--force"),
            "is for a name with all its versions. Write 'docs'.",
        ),
        (("revoke", "nobody"), "there is no key or tenant 'nobody'"),
    ],
)
def test_mistakes_are_explained_and_change_nothing(raypeft, tmp_path, arguments, said):
    code, _, told = raypeft("keys", *arguments)
    assert code != 0 and said in told.replace("\n", " ")
    assert KeyBook(str(tmp_path / "registry")).read().is_empty


def test_a_key_is_for_models_that_are_there(raypeft, tmp_path):
    registry = Registry(tmp_path / "registry")
    registry.register("docs", make_adapter(tmp_path / "docs"), Lineage(BASE))
    state = Desired("up", BaseIdentity("other", None, "c" * 64)).to_dict()
    registry.update_endpoint("up", lambda now: state)
    for model, said in {"dcos": "Closest: 'docs'.", "x1": "There is docs, other, tiny."}.items():
        code, _, told = raypeft("keys", "create", "acme", "--model", "docs", "--model", model)
        assert code != 0 and f"no adapter and no base is called '{model}'. {said}" in told.replace("\n", " ")
    assert KeyBook(registry.url).read().is_empty
    code, _, told = raypeft(
        "keys", "create", "acme", "--model", "docs", "--model", "tiny", "--model", "other"
    )
    assert code == 0 and "models docs, tiny, other" in told


def test_asking_needs_no_key_where_none_is_asked_for_and_lends_itself_one_elsewhere(
    raypeft, tmp_path, monkeypatch
):
    registry = Registry(tmp_path / "registry")
    assert asked.key_of(registry) is None
    raypeft("keys", "create", "acme")
    lent = asked.key_of(registry)
    assert KeyBook(registry.url).read().find(lent).tenant == "raypeft"
    monkeypatch.setenv("RAYPEFT_API_KEY", "mine")
    assert asked.key_of(registry) == "mine"
    assert asked.place_to_ask("docs", "http://somewhere/v1", None) == ("http://somewhere/v1", "mine")
