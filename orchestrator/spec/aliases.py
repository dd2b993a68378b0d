"""Other projects' keys put where ours are, as `alias_table` says.

None is dropped. An empty value (`lora_model_dir:`) asks for nothing and is passed over.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import alias_changes as to
from .alias_changes import Change
from .alias_table import BY_NAME, DATASET_REFUSED, DATASET_TYPES, SECTION_ALIASES, Alias
from .places import MISSING, Path, Place, Problem, Tree, dotted
from .words import show


def resolve_aliases(tree: Tree) -> list[Problem]:
    """Moves every alias to its key, in place; returns what breaks a rule."""
    problems: list[Problem] = []
    _adapter_in_one_word(tree, problems)
    for name in [name for name in tree.values if name in BY_NAME]:
        _resolve(tree, BY_NAME[name], problems)
    for key, (target, change) in SECTION_ALIASES.items():
        path = tuple(key.split("."))
        if tree.get(path) is not MISSING:
            _move(tree, path, tuple(target.split(".")), change, problems)
    for section in ("data", "eval"):
        datasets = tree.get((section, "datasets"))
        for index in range(len(datasets) if isinstance(datasets, list) else 0):
            _resolve_dataset(tree, (section, "datasets", index), problems)
    return problems


def _adapter_in_one_word(tree: Tree, problems: list[Problem]) -> None:
    """`adapter: lora` is `adapter: {type: lora}`."""
    value = tree.get(("adapter",))
    if isinstance(value, dict) and value.get("type") == "qlora":
        _qlora(tree, tree.places[("adapter", "type")], problems)
        value["type"] = "lora"
        return
    if value is MISSING or isinstance(value, dict) or value is None:
        return
    place = tree.places[("adapter",)]
    if value == "qlora":
        _qlora(tree, place, problems)
        value = "lora"
    try:
        kind = to.adapter_type(value)
    except ValueError as error:
        _drop(tree, ("adapter",), Problem(("adapter",), str(error)), problems)
        return
    tree.put(("adapter",), {"type": kind}, {(): place, ("type",): place})


def _qlora(tree: Tree, place: Place, problems: list[Problem]) -> None:
    """Axolotl's word for LoRA on a 4-bit base."""
    tree.put(("adapter: qlora",), True, {(): place})
    _move(tree, ("adapter: qlora",), ("model", "load_in_4bit"), None, problems)


def _drop(tree: Tree, path: Path, problem: Problem | None, problems: list[Problem]) -> None:
    """Takes a key out, keeping its place where a problem points to it."""
    place = tree.places[path]
    tree.take(path)
    if problem:
        tree.places[path] = place
        problems.append(problem)


def _resolve(tree: Tree, row: Alias, problems: list[Problem]) -> None:
    path, value = (row.name,), tree.values[row.name]
    if value is None:
        _drop(tree, path, None, problems)
    elif row.target is None:
        accepted = any(value == one and type(value) is type(one) for one in row.accepts)
        refusal = Problem(
            path, f"{show(value)}: not a key of a job." if row.accepts else "not a key of a job.", row.instead
        )
        _drop(tree, path, None if accepted else refusal, problems)
    elif row.name in _SEVERAL:
        _SEVERAL[row.name](tree, problems)
    else:
        _move(tree, path, tuple(row.target.split(".")), row.change, problems)


def _resources_per_worker(tree: Tree, problems: list[Problem]) -> None:
    """Ray's own words: `{GPU: 1, CPU: 4}`."""
    path: Path = ("resources_per_worker",)
    value = tree.get(path)
    names = {"GPU": "gpus_per_worker", "CPU": "cpus_per_worker"}
    if not isinstance(value, dict) or set(value) - set(names):
        problem = Problem(path, "holds GPU and CPU, nothing else.", "Write resources: {gpus_per_worker: 1}.")
        _drop(tree, path, problem, problems)
        return
    for name in list(value):
        _move(tree, (*path, name), ("resources", names[name]), None, problems)
    _drop(tree, path, None, problems)


def _quantization_bit(tree: Tree, problems: list[Problem]) -> None:
    """LLaMA-Factory's 8 or 4."""
    path: Path = ("quantization_bit",)
    keys = {8: "load_in_8bit", 4: "load_in_4bit"}
    key = keys.get(value) if isinstance(value := tree.get(path), int) else None
    if key is None:
        problem = Problem(
            path,
            f"{show(value)} bits have no counterpart.",
            "Write model.load_in_4bit or load_in_8bit: true.",
        )
        _drop(tree, path, problem, problems)
    else:
        _move(tree, path, ("model", key), lambda _: True, problems)


_BNB_KEYS = {
    "load_in_8bit": None,
    "load_in_4bit": None,
    "bnb_4bit_quant_type": None,
    "bnb_4bit_use_double_quant": None,
    "bnb_4bit_compute_dtype": to.dtype,
    "bnb_4bit_quant_storage": to.dtype,
}
"""Those of bitsandbytes' config that are ours too."""


def _bnb_config_kwargs(tree: Tree, problems: list[Problem]) -> None:
    """Axolotl's mapping of bitsandbytes' own keys."""
    path: Path = ("bnb_config_kwargs",)
    value = tree.get(path)
    if not isinstance(value, dict):
        _drop(tree, path, Problem(path, f"{show(value)} is not a mapping.", "Write model keys."), problems)
        return
    others = [str(name) for name in value if name not in _BNB_KEYS]
    if others:
        hint = f"Of bitsandbytes' there are: {', '.join(_BNB_KEYS)}."
        _drop(tree, path, Problem(path, f"'{others[0]}' is not a key of a job.", hint), problems)
        return
    for name in list(value):
        _move(tree, (*path, name), ("model", name), _BNB_KEYS[name], problems)
    _drop(tree, path, None, problems)


_SEVERAL: dict[str, Callable[[Tree, list[Problem]], None]] = {
    "resources_per_worker": _resources_per_worker,
    "quantization_bit": _quantization_bit,
    "bnb_config_kwargs": _bnb_config_kwargs,
}
"""Keys whose value says which of ours is meant."""


def _move(tree: Tree, path: Path, target: Path, change: Change | None, problems: list[Problem]) -> None:
    value, places = tree.take(path)
    place = places[()]
    try:
        value = change(value) if change else value
    except ValueError as error:
        tree.places[path] = place
        problems.append(Problem(path, str(error)))
        return
    if value is None:
        return
    parent = tree.get(target[:-1]) if len(target) > 1 else tree.values
    if parent is not MISSING and parent is not None and not isinstance(parent, dict):
        tree.places[path] = place
        problems.append(
            Problem(
                path,
                f"is {dotted(target)}, but {dotted(target[:-1])} is {show(parent)}.",
                "Write one mapping.",
            )
        )
        return
    present = tree.get(target)
    if present is MISSING or present is None:
        tree.put(target, value, places if not change else {(): place})
    elif present != value:
        problems.append(_conflict(tree, path, place, target, value, present))


def _conflict(tree: Tree, path: Path, place: Place, target: Path, value: Any, present: Any) -> Problem:
    other = tree.places[target]
    tree.places[path] = place
    beside = f"{other.key} (line {other.line})" if other.line else f"{other.source} {other.key}"
    return Problem(
        path,
        f"{show(value)} contradicts {beside}: {show(present)}; both mean {dotted(target)}.",
        f"Keep one of them, best {dotted(target)}.",
    )


def _resolve_dataset(tree: Tree, path: Path, problems: list[Problem]) -> None:
    dataset = tree.get(path)
    if not isinstance(dataset, dict):
        return
    kind = dataset.get("type")
    if isinstance(kind, str) and kind in DATASET_TYPES:
        is_pair = kind == "completion" and {"field_prompt", "field_completion"} & set(dataset)
        dataset["type"] = "prompt_completion" if is_pair else DATASET_TYPES[kind]
    if "field" in dataset and dataset.get("type") == "text":
        _move(tree, (*path, "field"), (*path, "field_text"), None, problems)
    for name in [name for name in dataset if name in DATASET_REFUSED]:
        where: Path = (*path, name)
        hint = DATASET_REFUSED[name]
        _drop(
            tree,
            where,
            None if dataset[name] is None else Problem(where, "not a key of a dataset.", hint),
            problems,
        )
