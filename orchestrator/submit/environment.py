"""What a cluster's environment has and lacks; run there before a job, from a copy of this file.

Nothing of ours need be there yet, so it uses the standard library, Ray, and `packaging`, which Ray needs too.
Prints one line: RAYPEFT-ENVIRONMENT and a JSON object.
"""

from __future__ import annotations

import json
import platform
import sys
from importlib import metadata

import ray
from packaging.requirements import Requirement
from ray._private.state import state

MARK = "RAYPEFT-ENVIRONMENT"


def lacking(requirements: list[str]) -> list[dict[str, str | None]]:
    """Requirements that are not met: `{"requirement": "deepspeed>=0.19", "installed": version or None}`.
    Those of an extra (`ray[serve]`) are looked up in the metadata of the distribution that is installed."""
    missing = []
    for text in requirements:
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate():
            continue
        try:
            installed = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            missing.append({"requirement": text, "installed": None})
            continue
        if not wanted.specifier.contains(installed, prereleases=True):
            missing.append({"requirement": text, "installed": installed})
        elif wanted.extras:
            missing += lacking(_of_extras(wanted))
    unique = {str(each["requirement"]): each for each in missing}
    return list(unique.values())


def _of_extras(wanted: Requirement) -> list[str]:
    """What the extras of an installed distribution need, as plain requirements."""
    found = []
    for line in metadata.requires(wanted.name) or []:
        needed = Requirement(line)
        if needed.marker is None or needed.marker.evaluate({"extra": ""}):
            continue  # not an extra's
        if any(needed.marker.evaluate({"extra": extra}) for extra in wanted.extras):
            needed.marker = None
            found.append(str(needed))
    return found


def main(requirements: list[str]) -> None:
    """Prints what this environment is."""
    ray.init(address="auto", log_to_driver=False, configure_logging=False)
    nodes = [node for node in ray.nodes() if node["Alive"]]
    found = {
        "python": platform.python_version(),
        "ray": ray.__version__,
        "executable": sys.executable,
        "missing": lacking(requirements),
        "nodes": len(nodes),
        "max": state.get_max_resources_from_cluster_config(),
    }
    print(MARK, json.dumps(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
