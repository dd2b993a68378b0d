"""All methods at one stage and one storage: in one pair of forked processes, or in this one."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence

from tests.distributed import one_process as run
from tests.matrix import storages
from tests.matrix.axes import ALONE, METHODS, STAGES, Cell
from tests.matrix.cell import Report, live
from tests.matrix.verdict import verdict
from tests.ranks import RankFailed, run_on_ranks

# Of a pair over all methods on two quiet cores a tenth.
PATIENCE_S = 1200.0


def judged(stage: str, storage: str, methods: Sequence[str] = METHODS) -> dict[str, dict[str, str]]:
    """Method -> check -> what came of it."""
    run.experts()
    storages.prepared(storage)
    one = alone(storage)
    ranks = [lives(ALONE, storage, methods)] if stage == ALONE else reports(stage, storage, methods)
    return {
        method: verdict(Cell(method, stage, storage), [each[method] for each in ranks], one[method])
        for method in methods
    }


@functools.cache
def alone(storage: str) -> dict[str, Report]:
    """One process's report of every method, the oracle of all stages."""
    return lives(ALONE, storage, METHODS, oracle=True)


def reports(stage: str, storage: str, methods: Sequence[str]) -> list[dict[str, Report]]:
    """Each rank's report of every method. Where ranks fall out of step, so that nothing after it can be believed,
    each method gets processes of its own."""
    num = STAGES[stage][1]
    try:
        return run_on_ranks(lives, num, stage, storage, tuple(methods), timeout_s=PATIENCE_S)
    except RankFailed as error:
        if len(methods) == 1:
            return [{methods[0]: {"error": ("injects", str(error).strip().splitlines()[-1][:300])}}] * num
        parted = [reports(stage, storage, [method]) for method in methods]
        return [{m: r for each in parted for m, r in each[rank].items()} for rank in range(num)]


def lives(stage: str, storage: str, methods: Sequence[str], oracle: bool = False) -> dict[str, Report]:
    """This rank's report of every method."""
    with tempfile.TemporaryDirectory(prefix="matrix-") as own:
        folder = run.of_rank_0(own)
        found = {method: live(Cell(method, stage, storage), folder, oracle) for method in methods}
        run.together()
    return found
