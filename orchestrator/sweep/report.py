"""What is left to look at after a sweep: three plots, and one page that holds them and the table and needs nothing
else."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from typing import Any

from orchestrator import objects, stored
from orchestrator.objects import join
from orchestrator.spec.sweep import SweepSpec

from . import plots, table
from .importance import importances
from .result import IMPORTANCE, PAGE
from .trials import RUNNING, Trial, best

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1000px; padding: 0 1em; color: #1c2733; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3em .7em; border-bottom: 1px solid #dde3ea; }
th { cursor: pointer; background: #f4f6f9; } tr.best { background: #fdecee; font-weight: 600; }
img { max-width: 100%; } h2 { margin-top: 2em; }
"""
_SORT = """
const both = (a, b) => a !== "" && b !== "" && !isNaN(a) && !isNaN(b);
for (const head of document.querySelectorAll("th")) head.onclick = () => {
  const at = head.cellIndex, body = document.querySelector("tbody");
  const sign = head.dataset.up === "1" ? -1 : 1;
  head.dataset.up = sign === 1 ? "1" : "0";
  const rows = [...body.rows], key = row => row.cells[at].textContent;
  rows.sort((x, y) => {
    const a = key(x), b = key(y);
    return (both(a, b) ? a - b : a.localeCompare(b)) * sign;
  });
  body.append(...rows);
};
"""


def write_report(run_dir: str, name: str, sweep: SweepSpec, trials: Sequence[Trial]) -> dict[str, Any]:
    """Writes `report.html`, `learning-curves.png`, `parallel-coordinates.png` and `importance.png` into the run's
    folder; returns where: `{"html": URL, "png": [URL, ...], "importance": {parameter: share}}`."""
    shares = importances(sweep, trials)
    images = {
        "learning-curves": plots.learning_curves(sweep, trials),
        "parallel-coordinates": plots.parallel_coordinates(sweep, trials),
        "importance": plots.importance(shares),
    }
    urls = []
    for title, image in images.items():
        url = join(run_dir, f"{title}.png")
        objects.write(url, image)
        urls.append(url)
    objects.write(join(run_dir, IMPORTANCE), stored.dump({"shares": shares}))
    page = join(run_dir, PAGE)
    objects.write(page, _page(name, sweep, trials, images).encode())
    return {"html": page, "png": urls, "importance": shares}


def _page(name: str, sweep: SweepSpec, trials: Sequence[Trial], images: dict[str, bytes]) -> str:
    chosen = best(list(trials), sweep)
    head = "".join(f"<th>{html.escape(each)}</th>" for each in table.columns(sweep, trials))
    body = "".join(_row(cells, chosen) for cells in table.rows(sweep, trials))
    pictures = "".join(
        f"<h2>{title.replace('-', ' ').capitalize()}</h2>"
        f'<img alt="{title}" src="data:image/png;base64,{base64.b64encode(image).decode()}">'
        for title, image in images.items()
    )
    failed = "".join(f"<p>{html.escape(each)}</p>" for each in table.failures(trials))
    said = f"{len(trials)} trials by {html.escape(sweep.metric)} ({sweep.direction})"
    if chosen is not None:
        said += f"; the best is trial {chosen.number}: {chosen.value(sweep.metric):.4f}"
    if going := sum(each.state == RUNNING for each in trials):
        said += f"; {going} have not ended"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(name)}</title>'
        f"<style>{_STYLE}</style><h1>{html.escape(name)}</h1><p>{said}.</p>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{failed}{pictures}"
        f"<script>{_SORT}</script></html>\n"
    )


def _row(cells: Sequence[str], chosen: Trial | None) -> str:
    mark = ' class="best"' if chosen is not None and cells[0] == str(chosen.number) else ""
    return f"<tr{mark}>{''.join(f'<td>{html.escape(each)}</td>' for each in cells)}</tr>"
