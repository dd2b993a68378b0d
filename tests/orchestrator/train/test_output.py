import subprocess
import sys

from orchestrator.train.output import without_secrets

PROGRAM = """
import os, subprocess, sys
from orchestrator.train.output import captured
got = []
with captured(got.append, ["hunter2"]):
    print("from python", flush=True)
    os.write(2, b"from C: hunter2\\n")
    subprocess.run([sys.executable, "-c", "print('from a child')"], check=True)
    os.write(1, b"unfinished")
print("after")
open(sys.argv[1], "w").write("".join(got))
"""


def test_everything_that_the_process_prints(tmp_path):
    log = tmp_path / "log"
    ran = subprocess.run([sys.executable, "-c", PROGRAM, log], capture_output=True, text=True, check=True)
    lines = log.read_text().splitlines()
    assert lines == ["from python", "from C: ***", "from a child", "unfinished"]
    # it goes on to where it went before, freed of secrets there too
    assert ran.stdout.splitlines() == [*lines, "after"] and ran.stderr == ""


def test_secrets_become_stars():
    assert without_secrets("a=xyz b=xyz", ["xyz", ""]) == "a=*** b=***"
