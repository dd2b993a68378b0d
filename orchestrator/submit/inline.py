"""A job whose files come in environment variables: `python -m orchestrator.submit.inline ARGUMENT...`.

A Kubernetes manifest can carry a job's spec, but no file. This writes spec and cluster file aside and goes on
as `python -m orchestrator run SPEC ARGUMENT...`, in the same working directory.
"""

from __future__ import annotations

import os
import runpy
import sys
import tempfile
from pathlib import Path

SPEC_VARIABLE, CLUSTER_VARIABLE = "RAYPEFT_JOB", "RAYPEFT_CLUSTER_FILE"


def write_files(folder: Path) -> tuple[Path, Path]:
    """Spec and cluster file, from the environment."""
    written = []
    for name, variable in (("job.yaml", SPEC_VARIABLE), ("cluster.yaml", CLUSTER_VARIABLE)):
        (folder / name).write_text(os.environ[variable], encoding="utf-8")
        written.append(folder / name)
    return written[0], written[1]


def main(arguments: list[str]) -> None:
    """Writes the files and becomes the command."""
    with tempfile.TemporaryDirectory(prefix="raypeft-job-") as folder:
        spec, cluster = write_files(Path(folder))
        os.environ["RAYPEFT_CLUSTER"] = str(cluster)
        sys.argv = ["raypeft", "run", str(spec), *arguments]
        runpy.run_module("orchestrator", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
