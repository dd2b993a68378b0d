"""The folder of a merged checkpoint: made aside, and there under its name once it is whole."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import fsspec
import huggingface_hub
import torch
from transformers.dynamic_module_utils import custom_object_save

from peft_dist.aside import aside
from peft_dist.errors import MergeError
from peft_dist.folder import is_hub_id, is_url
from peft_dist.loading.weight_files import INDEX, SINGLE
from peft_dist.merged.shards import Entry, Shard, index_of

CONFIG, ORIGIN = "config.json", "merged_from.json"
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja",
    "preprocessor_config.json", "processor_config.json",
)  # fmt: skip


@contextlib.contextmanager
def filled(target: str) -> Iterator[Path]:
    """An empty folder to fill; what is in it stands at `target` when the body ends without an error.

    Over an empty directory it goes by one rename. In one that has files, the files of a checkpoint that was there are
    replaced, the config last; others stay.

    Args:
        target: a directory, or an fsspec URL to which files are copied, the config last.

    Raises:
        MergeError: it cannot be written.
    """
    try:
        here = None if is_url(target) else Path(target).expanduser()
        if here is not None and here.exists() and not here.is_dir():
            raise MergeError(f"{target!r} is a file. Name a directory.")
        with aside(here, ".merged-") as folder:
            yield folder
            put(folder, target)
    except OSError as error:
        raise MergeError(f"{target}: the merged model cannot be written: {error}") from error


def put(folder: Path, target: str) -> None:
    """Puts a finished folder in its place."""
    names = sorted((path.name for path in folder.iterdir()), key=_order)
    if is_url(target):
        filesystem, root = fsspec.url_to_fs(target)
        filesystem.makedirs(root, exist_ok=True)
        for name in names:
            filesystem.put_file(str(folder / name), f"{root}/{name}")
        return
    here = Path(target).expanduser().absolute()
    if not here.exists() or not any(here.iterdir()):
        os.replace(folder, here)
        return
    # A folder without its config is no model: nobody opens a mixture of two.
    (here / CONFIG).unlink(missing_ok=True)
    for old in [INDEX, SINGLE, *(path.name for path in here.glob("model-*-of-*.safetensors"))]:
        (here / old).unlink(missing_ok=True)
    for name in names:
        os.replace(folder / name, here / name)


def _order(name: str) -> tuple[int, str]:
    return (2 if name == CONFIG else 1 if name == INDEX else 0), name


def check_room(folder: Path, entries: Sequence[Entry]) -> None:
    """Raises MergeError where the disk has not enough room for what will be written."""
    needed, free = sum(entry.num_bytes for entry in entries), shutil.disk_usage(folder).free
    if needed > free:
        raise MergeError(
            f"{folder.parent}: the merged model takes {needed / 1e9:.1f} GB, and the disk has {free / 1e9:.1f} GB. "
            "Make room, or name another place."
        )


def write_description(
    folder: Path,
    base: Any,
    config: Any,
    shards: Sequence[Shard],
    dtype: torch.dtype | None,
    origin: Mapping[str, Any] | None,
) -> None:
    """What says how the weights are opened, and of what they were made where that is known: the config and the index,
    the code of a base that brings its own, `merged_from.json`.

    Args:
        dtype: as `write_config`'s.
    """
    _write_code(folder, base, config)
    write_config(folder, config, type(base).__name__, shards, dtype)
    if origin is not None:
        _write_origin(folder, origin)


def write_config(
    folder: Path, config: Any, model_class: str, shards: Sequence[Shard], dtype: torch.dtype | None = None
) -> None:
    """config.json, and the index where there are several files.

    Args:
        model_class: the name of the class that opens it.
        dtype: that it is opened in unless told otherwise; None: that of most of its numbers.
    """
    sizes: Counter[torch.dtype] = Counter()
    for entry in (entry for shard in shards for entry in shard.entries):
        if entry.dtype.is_floating_point:
            sizes[entry.dtype] += entry.num_bytes // entry.dtype.itemsize
    if sizes:
        config.dtype = dtype or sizes.most_common(1)[0][0]
    config.architectures = [model_class]
    config.save_pretrained(folder)
    index = index_of(shards)
    if index is not None:
        (folder / INDEX).write_text(index, encoding="utf-8")


def _write_code(folder: Path, base: Any, config: Any) -> None:
    """The Python files of a base that brings its own."""
    if hasattr(base, "is_custom_code") and base.is_custom_code() and getattr(config, "auto_map", None):
        custom_object_save(base, folder, config=config)


def write_generation_config(folder: Path, base: Any) -> None:
    """How the base generates, where it does."""
    made = getattr(base, "generation_config", None)
    if made is not None and hasattr(base, "can_generate") and base.can_generate():
        made.save_pretrained(folder)


def copy_generation_config(folder: Path, source: Path) -> None:
    """That of the base, where it has one."""
    if (source / "generation_config.json").is_file():
        shutil.copyfile(source / "generation_config.json", folder / "generation_config.json")


def copy_tokenizer(folder: Path, sources: Sequence[str | None], tokenizer: Any = None) -> None:
    """A tokenizer's files: of `tokenizer`, or of the first source that has any. Nothing where none has.

    Args:
        sources: directories, or hub ids whose files are cached.
    """
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
        return
    for source in sources:
        found = _tokenizer_files(source) if source else {}
        if "tokenizer_config.json" in found or "tokenizer.json" in found:
            for name, path in found.items():
                shutil.copyfile(path, folder / name)
            return


def _tokenizer_files(source: str) -> dict[str, Path]:
    if Path(source).is_dir():
        return {name: Path(source) / name for name in _TOKENIZER_FILES if (Path(source) / name).is_file()}
    if not is_hub_id(source):
        return {}
    cached = ((name, huggingface_hub.try_to_load_from_cache(source, name)) for name in _TOKENIZER_FILES)
    return {name: Path(path) for name, path in cached if isinstance(path, str)}


def _write_origin(folder: Path, origin: Mapping[str, Any]) -> None:
    """`merged_from.json`: of what base and which adapters it was made."""
    (folder / ORIGIN).write_text(json.dumps(dict(origin), indent=2) + "\n", encoding="utf-8")
