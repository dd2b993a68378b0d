import pytest

from orchestrator.errors import SpecError
from orchestrator.spec.canonical import changed_keys
from orchestrator.spec.load import load_job
from orchestrator.spec.templates import asset_folder, list_templates, write_template

NAMES = [name for name, _ in list_templates()]


def test_each_has_one_line():
    assert NAMES[0] == "quickstart" and len(NAMES) >= 6
    assert all(20 < len(line) < 130 and line.endswith(".") for _, line in list_templates())


@pytest.mark.parametrize("name", NAMES)
def test_each_is_a_commented_job_that_loads(name, tmp_path):
    paths = write_template(name, tmp_path)
    assert paths[0] == tmp_path / f"{name}.yaml" and all(path.exists() for path in paths)
    assert paths[0].read_text().count("#") >= 3
    assert load_job(paths[0]).spec.data.datasets
    assert not list(tmp_path.rglob(".*"))


def test_the_quickstart_is_the_repository_s_and_brings_its_assets(tmp_path):
    write_template("quickstart", tmp_path)
    ours, theirs = load_job("jobs/quickstart.yaml").spec, load_job(tmp_path / "quickstart.yaml").spec
    assert changed_keys(ours, theirs) == ["data.datasets", "model.base_model"]
    for name in (theirs.model.base_model, theirs.data.datasets[0].path):
        assert (tmp_path / name).exists()
    brought = tmp_path / "assets" / "python-docs.jsonl"
    assert brought.read_bytes() == (asset_folder() / "python-docs.jsonl").read_bytes()


def test_nothing_is_overwritten_without_force(tmp_path):
    (tmp_path / "minimal.yaml").write_text("mine")
    with pytest.raises(SpecError) as raised:
        write_template("minimal", tmp_path)
    assert str(raised.value) == (
        f"{tmp_path}/minimal.yaml: is there already. Write elsewhere with --dir, or add --force."
    )
    assert (tmp_path / "minimal.yaml").read_text() == "mine"
    write_template("minimal", tmp_path, force=True)
    assert (tmp_path / "minimal.yaml").read_text() != "mine"


def test_a_name_that_does_not_exist_lists_those_that_do(tmp_path):
    with pytest.raises(SpecError) as raised:
        write_template("quikstart", tmp_path)
    message = str(raised.value)
    assert message.startswith(
        "raypeft init: 'quikstart' is not a template. Closest: 'quickstart'. There are:\n"
    )
    assert len(message.splitlines()) == 1 + len(NAMES) and not list(tmp_path.iterdir())


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SpecError, match=r"file/x: cannot be written: Not a directory."):
        write_template("minimal", tmp_path / "file" / "x")
