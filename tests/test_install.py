"""The wheel in a clean environment outside the clone: `raypeft init quickstart` and what follows.

The environment has a raypeft of its own and nothing of the clone; the packages that it depends on are seen, not
installed a second time: a `.pth` file names their folder, in which an editable raypeft does not count.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(600)]  # builds a wheel, trains on a Ray


@pytest.fixture(scope="module")
def outside(repository: Path) -> Iterator[Path]:
    """A folder with `env`, an environment that has the wheel."""
    with tempfile.TemporaryDirectory(prefix="rpi-") as folder:
        place = Path(folder)
        # from a copy: setuptools builds in the folder that it is given
        ignored = shutil.ignore_patterns(".git", ".venv", "build", "*.egg-info", "__pycache__")
        source = shutil.copytree(repository, place / "source", ignore=ignored)
        build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(place), str(source)]
        subprocess.run(build, check=True, cwd=place)
        venv.create(place / "env", with_pip=False)
        site = next((place / "env" / "lib").glob("python*/site-packages"))
        (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
        wheel = next(place.glob("raypeft-*.whl"))
        install = [sys.executable, "-m", "pip", "--python", str(place / "env"), "install", "-q", "--no-deps"]
        subprocess.run([*install, "--force-reinstall", str(wheel)], check=True, cwd=place)
        yield place


def command(outside: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "RAYPEFT_HOME": str(outside / "home"), "PYTHONPATH": ""}
    return subprocess.run(
        [outside / "env" / "bin" / "raypeft", *arguments],
        cwd=outside, env=environment, capture_output=True, text=True, timeout=500,
    )  # fmt: skip


def test_the_wheel_brings_the_quickstart_and_runs_it(outside, repository):
    where = "import orchestrator, peft_dist; print(orchestrator.__file__, peft_dist.__file__)"
    imported = subprocess.run(
        [outside / "env" / "bin" / "python", "-c", where],
        capture_output=True,
        text=True,
        check=True,
        cwd=outside,
    )
    assert str(repository) not in imported.stdout and str(outside) in imported.stdout
    assert command(outside, "init", "quickstart").returncode == 0
    try:
        done = command(outside, "run", "quickstart.yaml", "--json", "--set", "training.max_steps=12")
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout.splitlines()[-1])
        assert result["event"] == "result" and result["state"] == "done" and result["adapter"].endswith("@1")
        asked = command(
            outside, "ask", result["adapter"], "What does shutil.copytree do?", "--max-tokens", "4"
        )
        assert asked.returncode == 0 and asked.stdout.strip()
    finally:
        assert command(outside, "down").stdout.strip() == "stopped"
