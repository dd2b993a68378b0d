"""Writes docs/methods.md from what methods do when they are run: `python -m tests.contract.methods_table`."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import peft_dist
from peft_dist.catalog import METHODS, config_class, mixes
from peft_dist.contract import BlockMethod
from peft_dist.errors import PeftDistError
from peft_dist.mixed import check_mixes
from tests.contract import bases, pairs
from tests.contract.cases import CASES, SITES, adapted, disturb, sample
from tests.matrix import result

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"
COLUMNS = ("layers", "merges", "mixed batch")
IDS = torch.arange(1, 15).view(2, 7)
# Names for groups of kinds of layers that a method sits on one and all.
_GROUPS = {
    "linear": ("linear", "linear without bias", "Conv1D"),
    "conv1d": ("conv1d",),
    "conv2d": ("conv2d",),
    "conv3d": ("conv3d",),
    "grouped conv1d": ("conv1d with groups",),
    "grouped conv2d": ("conv2d with groups",),
    "grouped conv3d": ("conv3d with groups",),
    "embedding": ("embedding",),
}


def model_of(name: str, base: nn.Module | None = None, adapters: Sequence[str] = ("default",)) -> Any:
    """The small Llama with adapters of the method, each with values of its own."""
    base = bases.llama() if base is None else base
    torch.manual_seed(0)
    config = pairs.config(name, task_type="CAUSAL_LM")
    # XLora asks for it: each token's weights come from a run over all.
    base.config.use_cache = False
    model = peft_dist.get_peft_model(base, config, adapters[0])
    for other in adapters[1:]:
        model.add_adapter(other, pairs.config(name, task_type="CAUSAL_LM"))
    for number, each in enumerate(adapters):
        generator = torch.Generator().manual_seed(number + 1)
        with torch.no_grad():
            for tensor in model.adapter_tensors(each).values():
                if isinstance(tensor, nn.Parameter) and tensor.is_floating_point():
                    tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
    model.set_adapter(adapters[0])
    return model.eval()


def inputs(name: str) -> dict[str, Any]:
    """What its forward needs beside ids."""
    known = {"task_ids": torch.tensor([0, 1]), "input_type_mask": torch.ones_like(IDS)}
    return {key: known[key] for key in getattr(pairs.config(name), "reads", ()) if key in known}


def layers(name: str) -> str:
    """The kinds of layers on which a case of the method injects and runs."""
    cases = [case for case in CASES if case.method == name]
    found = []
    for title, kinds in _GROUPS.items():
        if all(any(_runs(case, kind) for case in cases) for kind in kinds):
            found.append(title)
    kinds = config_class(name).layers if hasattr(config_class(name), "layers") else ()
    found += [kind for kind in ("mha", "experts") if kind in kinds]
    if "module" in kinds and not issubclass(config_class(name), BlockMethod):
        return "any module"
    if issubclass(config_class(name), BlockMethod):
        return "attention modules"
    of_adapters = "those of its adapters" if hasattr(config_class(name), "assemble") else "the input"
    return ", ".join(found) or of_adapters


def _runs(case: Any, kind: str) -> bool:
    if (case, kind) not in SITES:
        return False
    try:
        base, _ = adapted(case, kind)
        disturb(base)
        return bool(torch.isfinite(base(sample(kind))).all())
    except (PeftDistError, NotImplementedError, AssertionError):
        return False


def merges(name: str) -> str:
    """Whether a merged model gives what the adapted one gave."""
    model = model_of(name)
    with torch.no_grad():
        want = model(IDS, **inputs(name)).logits
        try:
            merged = model.merge_and_unload()
        except PeftDistError:
            return "no"
        got = merged(IDS).logits
    return "yes" if torch.allclose(got, want, rtol=1e-4, atol=1e-4) else "wrong"


def mixed_batch(name: str) -> str:
    """Whether rows that name adapters get what each gives alone."""
    model = model_of(name, adapters=("a", "b"))
    more = inputs(name)
    with torch.no_grad():
        alone = []
        for row, adapter in enumerate(("b", "__base__")):
            one = {key: value[row : row + 1] for key, value in more.items()}
            alone.append(model(IDS[row : row + 1], adapter_names=[adapter], **one).logits[:, -1])
        both = model(IDS, adapter_names=["b", "__base__"], **more).logits[:, -1]
    return "yes" if torch.allclose(torch.cat(alone), both, rtol=1e-4, atol=1e-4) else "wrong"


RUN: dict[str, Callable[[str], str]] = {
    "layers": layers,
    "merges": merges,
    "mixed batch": mixed_batch,
}


def row(name: str) -> dict[str, str]:
    """The columns of one method, by running."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {column: run(name) for column, run in RUN.items()}


def reason(name: str) -> str | None:
    """Why a method is not mixed with others; None where it is."""
    try:
        check_mixes(pairs.config(name))
    except PeftDistError as error:
        return str(error).partition(": ")[2].rstrip(".")
    return None


def page(
    rows: dict[str, dict[str, str]], outcomes: dict[tuple[str, str], str], sharded: Sequence[str]
) -> str:
    """The text of docs/methods.md; `sharded` are the lines of the matrix."""
    names = list(rows)
    mixing = [name for name in names if mixes(name)]
    lines = [
        "# Methods",
        "",
        "Written by `python -m tests.contract.methods_table`, which runs every method, and takes what needs processes "
        "of its own from the newest result of `make matrix`; tests compare.",
        "",
        "- layers: the kinds on which an adapter was injected and run; linear includes HF's Conv1D.",
        "- merges: the merged base gives what the adapted one gave.",
        "- mixed batch: rows that name different adapters, or `__base__`, get what each gives alone.",
        "",
        "| method | " + " | ".join(COLUMNS) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
        *(f"| {name} | " + " | ".join(rows[name][column] for column in COLUMNS) + " |" for name in names),
        "",
        *sharded,
        "",
        "## Pairs in a PeftMixedModel",
        "",
        "`+`: the changes of both add; `>`: the second acts on the layer as the first left it. Each was found equal to "
        "the dense composition, merged, and saved and loaded.",
        "",
        "| | " + " | ".join(mixing) + " |",
        "|---" * (len(mixing) + 1) + "|",
    ]
    signs = {"sum": "+", "chain": ">"}
    notes: list[str] = []
    for one in mixing:
        cells = []
        for other in mixing:
            found = outcomes.get((one, other)) or outcomes.get((other, one), "")
            if found not in signs and found not in notes:
                notes.append(found)
            cells.append(signs.get(found) or str(notes.index(found) + 1))
        lines.append(f"| {one} | " + " | ".join(cells) + " |")
    lines += ["", *(f"{number}. {note}" for number, note in enumerate(notes, 1))]
    lines += [
        "",
        "LN_TUNING beside another method on the same module is refused when both are made active: it stands in the "
        "module's place.",
        "",
        "Not mixed with other methods:",
        "",
        *(f"- {why}." for name in names if (why := reason(name))),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs everything and writes the page."""
    names = list(METHODS)
    sharded = result.table(result.latest())
    rows = {}
    for name in names:
        rows[name] = row(name)
        print(name, rows[name], file=sys.stderr, flush=True)
    mixing = [name for name in names if mixes(name)]
    outcomes = {(a, b): pairs.outcome(a, b) for a, b in pairs.PAIRS if a in mixing and b in mixing}
    PAGE.write_text(page(rows, outcomes, sharded), encoding="utf-8")


if __name__ == "__main__":
    main()
