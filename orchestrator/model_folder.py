"""Where a base model's files are: a directory, a URL or a commit of the hub, read in place."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import huggingface_hub
from huggingface_hub import constants

from .errors import HubError, ModelError, closest
from .objects import is_local, local_path

HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")
_COMMIT = re.compile(r"^[0-9a-f]{40}$")
_INDEX = "model.safetensors.index.json"
_TIMEOUT_S = 20


@dataclass(frozen=True)
class ModelFolder:
    """Files to read by name. `revision` is the hub's commit, None elsewhere."""

    given: str
    url: str
    revision: str | None

    def files(self) -> dict[str, int]:
        """Name -> size in bytes of each file directly in the folder."""
        filesystem, root = fsspec.url_to_fs(self.url)
        try:
            entries = filesystem.ls(root, detail=True)
        except Exception as error:
            raise ModelError(f"the base '{self.given}' cannot be read: {error}.") from error
        return {
            entry["name"].rpartition("/")[2]: int(entry["size"] or 0)
            for entry in entries
            if entry["type"] != "directory"
        }

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """Bytes `start` to `end` of a file, all of them without."""
        filesystem, root = fsspec.url_to_fs(self.url)
        try:
            return filesystem.cat_file(f"{root.rstrip('/')}/{name}", start=start, end=end)
        except Exception as error:
            raise ModelError(f"{name} of the base '{self.given}' cannot be read: {error}.") from error

    def config(self) -> dict[str, Any]:
        """config.json.

        Raises:
            ModelError: there is none (an adapter's folder says so), or it is not JSON.
        """
        files = self.files()
        if "config.json" not in files:
            if "adapter_config.json" in files:
                base = json.loads(self.read("adapter_config.json")).get("base_model_name_or_path")
                raise ModelError(
                    f"'{self.given}' is an adapter, not a base model.",
                    hint=f"Name its base ({base}) here, and the adapter as adapter.init_from.",
                )
            raise ModelError(
                f"'{self.given}' has no config.json, so it is not a base model's folder.",
                hint="Name a folder that transformers' save_pretrained wrote.",
            )
        try:
            return json.loads(self.read("config.json"))
        except ValueError as error:
            raise ModelError(f"config.json of the base '{self.given}' is damaged: {error}.") from error

    def weight_files(self) -> dict[str, int]:
        """Name -> size in bytes of the safetensors files that hold the weights.

        Raises:
            ModelError: one is missing, or there are only pickled weights.
        """
        files = self.files()
        if _INDEX in files:
            wanted = sorted(set(json.loads(self.read(_INDEX))["weight_map"].values()))
        elif "model.safetensors" in files:
            wanted = ["model.safetensors"]
        else:
            wanted = sorted(name for name in files if name.endswith(".safetensors"))
        missing = [name for name in wanted if name not in files]
        if missing:
            raise ModelError(
                f"the base '{self.given}' lacks {missing[0]}, which {_INDEX} names.", hint="Fetch it again."
            )
        if not wanted:
            pickled = [name for name in files if name.endswith((".bin", ".pt", ".pth"))]
            if pickled:
                raise ModelError(
                    f"the base '{self.given}' has only pickled weights ({pickled[0]}): reading runs code.",
                    hint="Save it as safetensors: model.save_pretrained(DIR, safe_serialization=True).",
                )
            raise ModelError(
                f"the base '{self.given}' has no weights: no *.safetensors.", hint="Fetch it again."
            )
        return {name: files[name] for name in wanted}


def model_folder(base_model: str, revision: str = "main") -> ModelFolder:
    """Finds a base by directory, fsspec URL or hub id; a hub's branch or tag becomes a commit.

    Raises:
        ModelError: it is nowhere, it may not be read, or the hub does not answer and nothing is cached.
    """
    if not is_local(base_model):
        return ModelFolder(base_model, base_model.rstrip("/"), None)
    path = local_path(base_model)
    if path.is_dir():
        return ModelFolder(base_model, str(path.resolve()), None)
    if path.exists():
        raise ModelError(
            f"the base '{base_model}' is a file, not a folder.", hint="Name the folder that it is in."
        )
    if not HUB_ID.match(base_model):
        raise ModelError(f"the base '{base_model}' does not exist{looked_at(base_model)}.", hint=_hint(path))
    return _on_hub(base_model, revision, path)


def looked_at(given: str) -> str:
    """`: there is no /whole/path`, for a relative path; what was asked for need not be said again."""
    is_whole = given.startswith(("/", "file://"))
    return "" if is_whole else f": there is no {local_path(given)}"


def _hint(path: Path) -> str:
    folder = path.parent
    near = closest(path.name, [entry.name for entry in folder.iterdir()]) if folder.is_dir() else []
    if near:
        return f"Did you mean '{folder / near[0]}'?"
    return "Name a directory, an fsspec URL (s3://...) or a hub id (ORGANISATION/MODEL)."


def _on_hub(base_model: str, revision: str, path: Path) -> ModelFolder:
    if _COMMIT.match(revision) and (cached := _cached(base_model, revision)):
        return ModelFolder(base_model, str(cached), revision)
    try:
        commit = huggingface_hub.HfApi().model_info(base_model, revision=revision, timeout=_TIMEOUT_S).sha
    except Exception as error:
        if cached := _cached(base_model, revision):
            return ModelFolder(base_model, str(cached), cached.name)
        raise _hub_error(base_model, revision, error, path) from error
    assert commit is not None  # the hub names one unless told to leave it out
    cached = _cached(base_model, commit)
    return ModelFolder(base_model, str(cached) if cached else f"hf://{base_model}@{commit}", commit)


def _cached(base_model: str, revision: str) -> Path | None:
    """The snapshot in the hub's cache, if it holds weights too."""
    found = huggingface_hub.try_to_load_from_cache(base_model, "config.json", revision=revision)
    if not isinstance(found, str) or not any(Path(found).parent.glob("*.safetensors")):
        return None
    return Path(found).parent


def _hub_error(base_model: str, revision: str, error: Exception, path: Path) -> ModelError:
    names = {cls.__name__ for cls in type(error).__mro__}
    if "GatedRepoError" in names:
        return ModelError(
            f"the hub does not give '{base_model}' to you: it is gated.",
            hint="Accept its terms on the hub and set HF_TOKEN (in the job: secrets: {HF_TOKEN: env}).",
        )
    if "RevisionNotFoundError" in names:
        return ModelError(
            f"'{base_model}' has no revision '{revision}' on the hub.", hint="Check model.revision."
        )
    if "RepositoryNotFoundError" in names:
        return ModelError(
            f"the base '{base_model}' is neither a directory nor a model on the hub.", hint=_hint(path)
        )
    why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub does not answer"
    return HubError(
        f"the base '{base_model}' is no directory here, {why}, and no copy of it is cached.", hint=_hint(path)
    )
