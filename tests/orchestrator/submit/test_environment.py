"""What an environment lacks, by the metadata of what is installed in it."""

from importlib import metadata

from orchestrator.submit import jobs
from orchestrator.submit.environment import MARK, lacking
from orchestrator.submit.wheel import requirements


def test_both_ends_say_the_same_mark():
    assert jobs.MARK == MARK


def test_this_environment_lacks_only_what_it_has_not():
    absent = {str(each["requirement"]) for each in lacking(requirements())}
    for line in requirements():
        name = line.partition("[")[0].split("<")[0].split(">")[0].split("=")[0]
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            assert line in absent


def test_absent_and_old_are_told_apart():
    installed = metadata.version("pydantic")
    assert lacking(["no-such-thing>=1", "pydantic>=999", "pydantic>=1"]) == [
        {"requirement": "no-such-thing>=1", "installed": None},
        {"requirement": "pydantic>=999", "installed": installed},
    ]


def test_a_marker_of_another_platform_is_passed_over():
    assert lacking(['no-such-thing; sys_platform == "win32"']) == []


def test_an_extra_is_followed(monkeypatch):
    needs = {
        "thing": [
            'fine>=1; extra == "serve"',
            'gone>=2; extra == "serve"',
            'other; extra == "train"',
            "always",
        ]
    }
    have = {"thing": "3.0", "fine": "1.5"}

    def version(name):
        if name not in have:
            raise metadata.PackageNotFoundError(name)
        return have[name]

    monkeypatch.setattr("orchestrator.submit.environment.metadata.version", version)
    monkeypatch.setattr("orchestrator.submit.environment.metadata.requires", lambda name: needs.get(name))
    assert lacking(["thing[serve]>=3"]) == [{"requirement": "gone>=2", "installed": None}]
    assert lacking(["thing>=3"]) == []
