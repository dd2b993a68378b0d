"""Checkpoints of a run: `checkpoints/step-N/` with the adapter, the optimizer's states and the run's
position.

A checkpoint is written aside and appears with its manifest, which holds the sha256 sum of every file and is
written last; one that is partial or damaged fails its sums and is never chosen. Everything in it is whole and
free of the world size: a run goes on with more or fewer workers. safetensors and JSON, never pickle.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from orchestrator import objects

FORMAT = 1
MANIFEST = "manifest.json"
ADAPTER_DIR = "adapter"
OPTIMIZER_FILE = "optimizer.safetensors"
TRAINER_FILE = "trainer.json"
_NAME = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class Position:
    """Where a run stands after `step` optimizer steps: all that the next step depends on, beside the tensors.

    Every random number of a step is a function of (seed, step, rank or sample), and the order of the rows one
    of (seed, epoch): so the step and the seed are the state of the data and of the random generators.
    """

    step: int
    epoch: int
    seed: int
    loss_scale: float = 1.0
    scale_good_steps: int = 0
    loss_sum: float = 0.0
    """Sum of the loss over all target tokens so far, for `train_loss`."""
    target_tokens: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    """The last evaluation at or before this step."""
    evaluated_at: int = 0
    """The step of that evaluation; 0 before the first."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint, in a local directory."""

    path: Path
    position: Position

    @property
    def adapter_dir(self) -> Path:
        """The adapter in HF PEFT's layout."""
        return self.path / ADAPTER_DIR

    def optimizer_state(self) -> dict[str, Tensor]:
        """What `AdapterOptimizer.whole_state` gave."""
        return load_file(self.path / OPTIMIZER_FILE)


def write_checkpoint(
    run_dir: str, position: Position, save_adapter: Callable[[str], None], state: Mapping[str, Tensor] | None
) -> str:
    """Commits the checkpoint of `position.step`; returns its URL. All ranks call it; rank 0 writes.

    Args:
        save_adapter: writes the adapter into a directory; a collective, so that every rank calls it.
        state: the optimizer's whole state on rank 0, None on the others.

    Raises:
        StorageError: the storage is full or read-only. Earlier checkpoints stay as they are.
    """
    url = step_url(run_dir, position.step)
    with tempfile.TemporaryDirectory(prefix="raypeft-") as scratch:
        folder = Path(scratch) / "step"
        save_adapter(str(folder / ADAPTER_DIR))
        if state is None:
            return url
        folder.mkdir(exist_ok=True)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        save_file(tensors, folder / OPTIMIZER_FILE)
        (folder / TRAINER_FILE).write_text(json.dumps(asdict(position) | {"format": FORMAT}, indent=1))
        seal(folder, step=position.step)
        objects.delete_tree(url)  # a damaged one of the same step
        objects.put_tree(folder, url, manifest=MANIFEST)
    return url


def seal(folder: Path, **facts: Any) -> None:
    """Writes the manifest of a folder: the sha256 sum and size of each file in it."""
    files = {
        str(path.relative_to(folder)): {"sha256": _sha256(path), "size": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    (folder / MANIFEST).write_text(json.dumps({"format": FORMAT, **facts, "files": files}, indent=1))


def damage_of(folder: Path) -> str | None:
    """Why a folder does not agree with its manifest, in a few words; None where it does."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files = manifest["files"]
    except FileNotFoundError:
        return "it has no manifest: it was not finished"
    except (ValueError, KeyError, TypeError):
        return "its manifest is not readable"
    if manifest.get("format", 0) > FORMAT:
        return f"it was written in format {manifest['format']}, this version reads up to {FORMAT}"
    for name, facts in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != facts["size"]:
            return f"{name} has {path.stat().st_size} bytes instead of {facts['size']}"
        if _sha256(path) != facts["sha256"]:
            return f"{name} does not match its sha256 sum"
    return None


def steps_in(run_dir: str) -> list[int]:
    """The steps that a folder is there for, newest first; good or not."""
    names = objects.list_(_root(run_dir))
    return sorted((int(match[1]) for name in names if (match := _NAME.fullmatch(name))), reverse=True)


def newest_good(
    run_dir: str, scratch: Path, warn: Callable[[str], None] = lambda text: None
) -> Checkpoint | None:
    """The newest checkpoint whose files all match their sums; None where there is none.

    Args:
        scratch: a local directory for copies; checkpoints on this machine are read where they are.
        warn: told of each newer one that was left out, and why.
    """
    for step in steps_in(run_dir):
        url = step_url(run_dir, step)
        folder = local_copy(url, scratch / f"step-{step}")
        damage = damage_of(folder)
        if damage is None:
            try:
                return Checkpoint(folder, _read_position(folder))
            except (ValueError, TypeError, KeyError) as error:
                damage = f"{TRAINER_FILE} is not readable: {error}"
        warn(f"checkpoint {url} is left out: {damage}")
    return None


def at_step(run_dir: str, step: int, scratch: Path) -> Checkpoint:
    """The checkpoint of one step, which rank 0 has verified."""
    folder = local_copy(step_url(run_dir, step), scratch / f"step-{step}")
    return Checkpoint(folder, _read_position(folder))


def prune(run_dir: str, keep_best: int, keep_latest: int) -> list[int]:
    """Deletes checkpoints that are neither among the `keep_latest` newest nor among the `keep_best` of the
    least `eval_loss`; returns the steps that were deleted. Damaged ones do not count, and go.

    The newest good one always stays: only those that match their sums are counted.
    """
    losses = {
        step: position.metrics.get("eval_loss", math.inf)
        for step in steps_in(run_dir)
        if (position := _stored_position(step_url(run_dir, step))) is not None
    }
    latest = sorted(losses, reverse=True)[:keep_latest]
    best = sorted((loss, -step) for step, loss in losses.items() if loss < math.inf)[:keep_best]
    kept = {*latest, *(-step for _, step in best)}
    gone = [step for step in steps_in(run_dir) if step not in kept] if losses else []
    for step in gone:
        objects.delete_tree(step_url(run_dir, step))
    objects.clean(_root(run_dir))
    return gone


def _stored_position(url: str) -> Position | None:
    """The position of a good checkpoint, None of a damaged one. On this machine every sum is checked; an
    object store checks what it holds itself, and there the manifest, which was written last, stands for the
    rest."""
    try:
        if objects.is_local(url):
            folder = objects.local_path(url)
            return None if damage_of(folder) else _read_position(folder)
        files = json.loads(objects.read(f"{url}/{MANIFEST}")[0])["files"]
        stored = objects.read(f"{url}/{TRAINER_FILE}")[0]
        is_whole = hashlib.sha256(stored).hexdigest() == files[TRAINER_FILE]["sha256"]
        return _position(json.loads(stored)) if is_whole else None
    except (objects.NotFound, OSError, ValueError, KeyError, TypeError):
        return None


def step_url(run_dir: str, step: int) -> str:
    """Where the checkpoint of a step is."""
    return f"{_root(run_dir)}/step-{step}"


def local_copy(url: str, target: Path) -> Path:
    """The folder behind `url` as a local directory: itself where it is local, else a copy at `target`."""
    if objects.is_local(url):
        return objects.local_path(url)
    return target if target.exists() else objects.get_tree(url, target)


def _root(run_dir: str) -> str:
    return objects.join(run_dir, "checkpoints")


def _read_position(folder: Path) -> Position:
    return _position(json.loads((folder / TRAINER_FILE).read_text()))


def _position(stored: dict[str, Any]) -> Position:
    return Position(**{key: value for key, value in stored.items() if key in Position.__dataclass_fields__})


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
