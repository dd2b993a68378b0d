"""The README's commands and programs, typed in its order in a clone, with a home of their own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(900)]  # the quickstart, whole, twice

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.S | re.M)


COMMANDS = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("raypeft ")]


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    """Where the commands run: this environment's programs, a home of their own."""
    with tempfile.TemporaryDirectory(prefix="rph-") as home:
        found = {
            **os.environ,
            "RAYPEFT_HOME": home,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        yield found
        subprocess.run(["raypeft", "down"], env=found, cwd=ROOT, check=True)


def typed(command: str, environment: dict[str, str]) -> str:
    done = subprocess.run(
        ["bash", "-c", command], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_make_quickstart_runs_the_job_that_the_readme_shows():
    dry = subprocess.run(
        ["make", "-n", "quickstart"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert "raypeft run jobs/quickstart.yaml" in dry
    shown = next(block for block in blocks("yaml") if "name: quickstart" in block)
    written = (ROOT / "jobs" / "quickstart.yaml").read_text()
    assert (
        shown.strip() == "\n".join(line for line in written.splitlines() if not line.startswith("#")).strip()
    )


def test_the_quickstart_teaches_serves_and_answers(environment):
    said = typed("raypeft run jobs/quickstart.yaml", environment)
    better = re.search(r"held-out loss [\d.]+, the bare base's [\d.]+: ([\d.]+) % lower", said)
    assert better and float(better[1]) >= 10, said
    curl = next(line for line in said.splitlines() if line.startswith("curl "))
    answer = json.loads(typed(curl, environment))
    assert answer["model"] == "python-docs@1" and answer["choices"][0]["message"]["content"].strip()
    again = typed("raypeft run jobs/quickstart.yaml", environment)
    assert "the adapter python-docs@1" in again, "a second time with its endpoint still up asks again"


def test_each_command_of_the_readme_works(environment):
    assert len(COMMANDS) >= 9 and COMMANDS[-1].startswith("raypeft down")
    for command in COMMANDS[:-1]:
        assert typed(command, environment).strip(), command


def test_each_program_of_the_readme_works(environment):
    for number, program in enumerate(blocks("python")):
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0 and done.stdout.strip(), f"program {number}\n{done.stdout}\n{done.stderr}"


def test_down_ends_it(environment):
    assert typed(COMMANDS[-1], environment).strip() == "stopped"
