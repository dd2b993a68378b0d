"""What a cell's reports come to: for each check "yes", "refused", or what was wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tests.matrix.axes import CHECKS, NOT_MERGED, Cell
from tests.matrix.cell import TINY, Report

# In which part of its life a cell is asked what; a part that raised leaves those after it unanswered.
PARTS = ("injects", "trains", "mixed", "saves", "loads", "merges", "engine")


@dataclass(frozen=True)
class Bounds:
    """How far two runs may be apart: losses relatively, gradients by their largest entry or the cosine between
    them, logits by their largest."""

    loss: float
    gradient: float
    cosine: float
    logits: float


# fp32 (and what is computed in it, a quantised base's codes included): sums in another order, over three steps of
# AdamW, which makes a difference in a gradient's sign one of a whole step. int8: its layers round what they take to
# 8 bits, so that a last bit may move an input by a 127th of its row. bf16: what the issue says of it.
EXACT = Bounds(loss=2e-4, gradient=1e-4, cosine=0.999999, logits=1e-3)
BOUNDS = dict.fromkeys(("fp32", "nf4", "nf4 in floats"), EXACT) | {
    "int8": replace(EXACT, logits=1 / 127),
    "bf16": Bounds(loss=2e-2, gradient=math.inf, cosine=0.999, logits=5e-2),
}


def verdict(cell: Cell, ranks: Sequence[Report], one: Report) -> dict[str, str]:
    """Check -> "yes", "refused" (merging alone), or what was wrong; `one` is one process's report."""
    found = {}
    failed = next((report["error"] for report in ranks if "error" in report), None)
    for check in CHECKS:
        part = check if check in PARTS else "trains"
        if failed is not None and PARTS.index(part) >= PARTS.index(failed[0]):
            found[check] = f"no: {failed[0]}: {failed[1]}"
            continue
        if "error" in one and PARTS.index(part) >= PARTS.index(one["error"][0]):
            found[check] = f"no: one process: {one['error'][1]}"
            continue
        wrong = _ASKS[check](cell, ranks, one)
        found[check] = wrong or ("refused" if check == "merges" and "merge refused" in ranks[0] else "yes")
    return found


def furthest(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """The largest difference as a share of the other's largest entry, tensor by tensor."""
    differences = [
        float((ours[k].double() - theirs[k].double()).abs().max() / theirs[k].abs().max().clamp(min=1e-12))
        for k in ours
        if ours[k].numel()
    ]
    return max(differences, default=0.0)


def cosine(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """Between all gradients of two runs, end to end."""
    a, b = (torch.cat([each[k].flatten().double() for k in sorted(ours)]) for each in (ours, theirs))
    return float(a @ b / (a.norm() * b.norm()).clamp(min=1e-300))


def _injects(cell: Cell, ranks: Sequence[Report], one: Report) -> str:
    for report in ranks:
        start = report["start"]
        if start.keys() != one["start"].keys():
            return f"no: other tensors: {sorted(start.keys() ^ one['start'].keys())[:2]}"
        for key, value in start.items():
            if not torch.allclose(value.float(), one["start"][key].float(), rtol=1e-5, atol=1e-6):
                return f"no: {key} starts elsewhere"
    return ""


def _gradients(cell: Cell, ranks: Sequence[Report], one: Report, step: int, losses: slice) -> str:
    bounds = BOUNDS[cell.storage]
    wanted = {key: value for key, value in one["gradients"].items() if key.startswith(f"{step}/")}
    kept: dict[str, Tensor] = {}
    for report in ranks:
        for got, want in zip(report["losses"][losses], one["losses"][losses], strict=True):
            if not math.isclose(got, want, rel_tol=bounds.loss):
                return f"no: losses {report['losses'][losses]}, not {one['losses'][losses]}"
        kept |= {key: value for key, value in report["gradients"].items() if key.startswith(f"{step}/")}
    if kept.keys() != wanted.keys():
        return f"no: gradients of other tensors: {sorted(kept.keys() ^ wanted.keys())[:2]}"
    if not any(bool(value.any()) for value in kept.values()):
        return "no: no gradient at all"
    if (far := furthest(kept, wanted)) > bounds.gradient:
        return f"no: gradients off by {far:.1e}"
    if (near := cosine(kept, wanted)) < bounds.cosine:
        return f"no: cosine of gradients {near:.6f}"
    return ""


def _trains(cell: Cell, ranks: Sequence[Report], one: Report) -> str:
    return _gradients(cell, ranks, one, 0, slice(0, 2))


def _mixed(cell: Cell, ranks: Sequence[Report], one: Report) -> str:
    for report in ranks:
        if not report["idle has state"]:
            return "no: an adapter that was trained has no state"
        if not report["untouched"]:
            return "no: an adapter that no rank used was changed"
    return _gradients(cell, ranks, one, 2, slice(2, 3))


def _saves(cell: Cell, ranks: Sequence[Report], one: Report) -> str:
    bounds = BOUNDS[cell.storage]
    for report in ranks:
        if report["files"] != one["files"]:
            return "no: other tensors in the files"
        if far := _apart(report["logits"], one["logits"], bounds):
            return f"no: logits {far}"
        if report["gathered"] > 2 * sum(sum(sizes.values()) for sizes in report["files"].values()):
            return f"no: {report['gathered']} elements gathered"
        for name, sizes in report["files"].items():
            if not sizes or min(sizes.values()) == 0:
                return f"no: an empty tensor in {name or 'default'}"
    if far := _apart(ranks[0]["loaded logits"], ranks[0]["logits"], bounds):
        return f"no: logits of what is loaded {far}"
    return ""


def _apart(ours: Tensor, theirs: Tensor, bounds: Bounds) -> str:
    scale = float(theirs.float().abs().max())
    far = float((ours.float() - theirs.float()).abs().max())
    return "" if far <= bounds.logits * max(scale, 1e-3) else f"off by {far:.1e} of {scale:.1e}"


def _loads(cell: Cell, ranks: Sequence[Report], one: Report) -> str:
    for report in ranks:
        for what, far in report["moved"].items():
            # A step of AdamW at this rate, and of its weight decay.
            if not 0 < far < 20 * TINY:
                return f"no: what was {what} moved by {far:.1e} in a step of {TINY}"
        got, want = report["losses"][3], one["losses"][3]
        if not math.isclose(got, want, rel_tol=BOUNDS[cell.storage].loss):
            return f"no: loss {got}, not {want}"
    return ""


def _merges(cell: Cell, ranks: Sequence[Report], one: Report) -> str:
    bounds = BOUNDS[cell.storage]
    for report in ranks:
        if "merge refused" in report:
            if cell.method not in NOT_MERGED:
                return f"no: {report['merge refused']}"
            continue
        if cell.method in NOT_MERGED:
            return "no: merged, though it changes no weight"
        first, second = report["merged"]
        if not torch.equal(first, second):
            return "no: lost after a forward"
        if far := _apart(first, one["merged"][0], bounds):
            return f"no: merged logits {far}"
        if cell.storage == "fp32" and (far := _apart(first, report["before"], bounds)):
            return f"no: merged and unmerged logits {far}"
        if _apart(report["before"], one["before"], bounds):
            return "no: logits before the merge"
        if not torch.equal(report["after"], report["before"]):
            return "no: unmerged logits differ"
    return ""


def _engine(cell: Cell, ranks: Sequence[Report], one: Report) -> str:
    wanted = one["engine"]["losses"]
    for report in ranks:
        if not report["engine"]["moved"] > 0:
            return "no: nothing was learned"
        for got, want in zip(report["engine"]["losses"], wanted, strict=True):
            if not math.isclose(got, want, rel_tol=BOUNDS[cell.storage].loss):
                return f"no: losses {report['engine']['losses']}, not {wanted}"
    return ""


def _holds(cell: Cell, ranks: Sequence[Report], one: Report) -> str:
    for report in ranks:
        if max(report["held"]) > report["share"]:
            return f"no: {report['held']} bytes held, the share is {report['share']}"
    return ""


def _truth(cell: Cell, ranks: Sequence[Report], one: Report) -> str:
    for report in ranks:
        for what, told in report["truth"].items():
            if told != one["truth"][what]:
                return f"no: {what}: {told[:120]}, not {one['truth'][what][:120]}"
    return ""


_ASKS: dict[str, Callable[[Cell, Sequence[Report], Report], str]] = {
    "injects": _injects,
    "trains": _trains,
    "mixed": _mixed,
    "saves": _saves,
    "loads": _loads,
    "merges": _merges,
    "engine": _engine,
    "holds": _holds,
    "truth": _truth,
}
