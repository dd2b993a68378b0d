"""Runs the matrix and keeps its dated result: `python -m tests.matrix [--stage NAME] [--storage NAME] [--resume]`."""

from __future__ import annotations

import argparse
import sys
import time

import torch

from tests.matrix.axes import STAGES, STORAGES, groups
from tests.matrix.group import judged
from tests.matrix.result import begun, read, short, wrong_cells


def main() -> int:
    """0 where every cell that was asked for holds."""
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description=__doc__)
    parser.add_argument(
        "--stage", action="append", choices=list(STAGES), help="only this one; may be repeated"
    )
    parser.add_argument("--storage", action="append", choices=STORAGES, help="only this one; may be repeated")
    parser.add_argument("--resume", action="store_true", help="keep what was found today, and run the rest")
    parser.add_argument(
        "--keep", action="store_true", help="keep what was found today, but run what is asked for"
    )
    asked = parser.parse_args()
    torch.set_num_threads(1)
    result = begun()
    if (asked.resume or asked.keep) and result.path.exists():
        result = read(result.path)
    todo = [
        (stage, storage)
        for stage, storage in groups()
        if (not asked.stage or stage in asked.stage) and (not asked.storage or storage in asked.storage)
        if not (asked.resume and stage in result.cells.get(storage, {}))
    ]
    started, failed = time.monotonic(), 0
    for number, (stage, storage) in enumerate(todo):
        print(f"[{number + 1}/{len(todo)}] {stage}, {storage} ...", end=" ", flush=True)
        before = time.monotonic()
        found = judged(stage, storage)
        result.add(stage, storage, found, time.monotonic() - before)
        wrong = {m: came for m, came in found.items() if not short(came, m).startswith("yes")}
        failed += len(wrong)
        left = (time.monotonic() - started) / (number + 1) * (len(todo) - number - 1)
        print(f"{len(found) - len(wrong)} of {len(found)} hold, {time.monotonic() - before:.0f} s; ", end="")
        print(f"{failed} do not so far; about {left / 60:.0f} min to go", flush=True)
        for method, came in wrong.items():
            print(f"    {method}: { {k: v for k, v in came.items() if v not in ('yes', 'refused')} }")
    untested = sum("untested" in line for line in wrong_cells(result))
    print(f"{result.path}: {failed} cells failed, {untested} untested", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
