"""Checkpoints of a run: `checkpoints/step-N.F/` with the adapter, the optimizer's states and the run's position.

A checkpoint is written aside and appears with its manifest, which holds the sha256 sum of every file and is
written last; one that is partial or damaged fails its sums and is never chosen. F is the number of the fence under
which it was written (`lease.Fence`): no two writers share a folder, and one is there once the run's document lists it,
which only the holder of the fence can have it do. Without a fence it is `step-N`, and there with its manifest.
Everything in it is whole and free of the world size: a run goes on with more or fewer workers. safetensors and JSON,
never pickle.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
import tempfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from orchestrator import objects, stored
from orchestrator.errors import ModelError, RaypeftError
from orchestrator.lease import Fence

FORMAT = 1
MANIFEST = "manifest.json"
ADAPTER_DIR = "adapter"
OPTIMIZER_FILE = "optimizer.safetensors"
TRAINER_FILE = "trainer.json"
_NAME = re.compile(r"step-(\d+)(?:\.(\d+))?")


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
    run_dir: str,
    position: Position,
    save_adapter: Callable[[str], None],
    state: Mapping[str, Tensor] | None,
    fence: Fence | None = None,
) -> str:
    """Commits the checkpoint of `position.step`; returns its URL. All ranks call it; rank 0 writes.

    Args:
        save_adapter: writes the adapter into a directory; a collective, so that every rank calls it.
        state: the optimizer's whole state on rank 0, None on the others.
        fence: the right to commit to the run; None where nobody else can.

    Raises:
        StorageError: the storage is full or read-only. Earlier checkpoints stay as they are.
        LeaseError: another driver has the run: nothing was committed.
    """
    url = step_url(run_dir, position.step, fence)
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
        put_sealed(folder, url)
        if fence is not None:
            _commit(fence, run_dir, url, position.step)
    return url


def put_sealed(folder: Path, url: str) -> None:
    """Copies a sealed folder to `url`, in place of what is there (a damaged one, or half of it); tries again
    where the storage fails.

    Raises:
        StorageError: it kept failing.
    """

    def put() -> None:
        objects.delete_tree(url)
        objects.put_tree(folder, url, manifest=MANIFEST)

    objects.persistently(put)


def _commit(fence: Fence, run_dir: str, url: str, step: int) -> None:
    """From here on the checkpoint is there, unless another has the run; then what was put there goes again."""
    name = url.rpartition("/")[2]

    def listing(document: dict[str, Any]) -> None:
        if "checkpoints" in document:
            before = document["checkpoints"]
        else:  # an earlier version's run: what is there counts
            names = objects.list_(_root(run_dir))
            before = {each: {"step": int(match[1])} for each in names if (match := _NAME.fullmatch(each))}
        document["checkpoints"] = {each: facts for each, facts in before.items() if facts["step"] != step}
        document["checkpoints"][name] = {"step": step}

    try:
        objects.persistently(lambda: fence.commit(listing))
    except RaypeftError:
        with contextlib.suppress(objects.StorageError):
            if name not in (_listed(run_dir) or ()):  # it may have been taken, and the answer lost
                objects.delete_tree(url)
        raise


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
        if manifest.get("format", 0) > FORMAT:
            return f"it was written in format {manifest['format']}, this version reads up to {FORMAT}"
        files = [(str(name), facts["size"], facts["sha256"]) for name, facts in manifest["files"].items()]
    except FileNotFoundError:
        return "it has no manifest: it was not finished"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "its manifest is not readable"
    try:
        return next((damage for each in files if (damage := _damage_of_file(folder, *each))), None)
    except OSError as error:
        return f"it cannot be read: {error}"


def _damage_of_file(folder: Path, name: str, size: int, sha256: str) -> str | None:
    path = folder / name
    if not path.is_file():
        return f"{name} is missing"
    if path.stat().st_size != size:
        return f"{name} has {path.stat().st_size} bytes instead of {size}"
    return None if _sha256(path) == sha256 else f"{name} does not match its sha256 sum"


def steps_in(run_dir: str) -> list[int]:
    """The steps that a checkpoint is there for, newest first; good or damaged."""
    return list(_folders(run_dir))


def _folders(run_dir: str) -> dict[int, str]:
    """The URL of the checkpoint of each step, newest first: where the run's document lists them, only those."""
    root, listed = _root(run_dir), _listed(run_dir)
    found = []
    for name in objects.list_(root):
        if (match := _NAME.fullmatch(name)) and (listed is None or name in listed):
            found.append((int(match[1]), int(match[2] or 0), objects.join(root, name)))
    return {step: url for step, _, url in sorted(found, key=lambda each: (-each[0], each[1]))}


def _listed(run_dir: str) -> set[str] | None:
    """The folders that were committed; None where no document says so: all count."""
    url = objects.join(run_dir, "run.json")
    try:
        document = stored.load(objects.read(url)[0], url)
    except objects.NotFound:
        return None
    return set(document["checkpoints"]) if "checkpoints" in document else None


def newest_good(
    run_dir: str, scratch: Path, warn: Callable[[str], None] = lambda text: None
) -> Checkpoint | None:
    """The newest checkpoint whose files all match their sums; None where there is none.

    Args:
        scratch: a local directory for copies; checkpoints on this machine are read where they are.
        warn: told of each newer one that was left out, and why.
    """
    for step, url in _folders(run_dir).items():
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
    folder = local_copy(_folders(run_dir)[step], scratch / f"step-{step}")
    return Checkpoint(folder, _read_position(folder))


def at_url(url: str, scratch: Path) -> Checkpoint:
    """The checkpoint in one folder.

    Raises:
        ModelError: it is not whole.
    """
    folder = local_copy(url, scratch / "given")
    if damage := damage_of(folder):
        raise ModelError(f"the checkpoint cannot be gone on from: {damage}.", where=url)
    return Checkpoint(folder, _read_position(folder))


def prune(run_dir: str, keep_best: int, keep_latest: int, fence: Fence | None = None) -> list[int]:
    """Deletes checkpoints that are neither among the `keep_latest` newest nor among the `keep_best` of the
    least `eval_loss`; returns the steps that were deleted. Damaged ones do not count, and go, as does what earlier
    holders of the fence left without committing it.

    The newest good one always stays: only those that match their sums are counted.
    """
    folders = _folders(run_dir)
    losses = {
        step: position.metrics.get("eval_loss", math.inf)
        for step, url in folders.items()
        if (position := _stored_position(url)) is not None
    }
    latest = sorted(losses, reverse=True)[:keep_latest]
    best = sorted((loss, -step) for step, loss in losses.items() if loss < math.inf)[:keep_best]
    kept = {*latest, *(-step for _, step in best)}
    gone = {step: url for step, url in folders.items() if step not in kept} if losses else {}
    if fence is not None:
        names = {url.rpartition("/")[2] for url in gone.values()}
        if names:
            fence.commit(lambda document: [document["checkpoints"].pop(name, None) for name in names])
        clean_folders(_root(run_dir), "step-", fence, kept=_listed(run_dir) or ())
    for url in gone.values():
        objects.delete_tree(url)
    objects.clean(_root(run_dir))
    return list(gone)


def clean_folders(url: str, prefix: str, fence: Fence, kept: Collection[str] = ()) -> None:
    """Deletes the folders below `url` that earlier holders of the fence wrote, but those in `kept`."""
    for name in objects.list_(url):
        stem, _, number = name.rpartition(".")
        if not (stem and number.isdigit()):
            stem, number = name, "0"
        if stem.startswith(prefix) and name not in kept and int(number) < fence.number:
            objects.delete_tree(objects.join(url, name))


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


def step_url(run_dir: str, step: int, fence: Fence | None = None) -> str:
    """Where the checkpoint of a step is written."""
    return objects.join(_root(run_dir), named("step-", fence, step))


def named(name: str, fence: Fence | None, step: int | str = "") -> str:
    """A folder's name that no other holder of the fence writes."""
    return f"{name}{step}.{fence.number}" if fence else f"{name}{step}"


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
