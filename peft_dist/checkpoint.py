"""Adapters on disk, in HF PEFT's layout: adapter_model.safetensors, adapter_config.json and README.md.

A tensor's name in the file follows from where it hangs in the model and from what its method asked for:
nothing here knows a method. Under ZeRO-3 only the adapter is gathered, never the base, and one rank writes.
Only safetensors are read or written.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import fsspec
import safetensors
import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter

from peft_dist.adapted import AdapterModule
from peft_dist.config import CONFIG_NAME, PeftConfig
from peft_dist.contract import Method, PromptMethod, Site
from peft_dist.errors import AdapterError, CheckpointError, suggest
from peft_dist.folder import FolderError, check_safetensors, is_hub_id, is_url, local_folder
from peft_dist.methods.replace.trainable_tokens import TokenRows
from peft_dist.pool import PooledModule, outer_modules
from peft_dist.sharding import set_whole, whole, whole_shape
from peft_dist.tuner_layer import BaseTunerLayer, HookedTensors

WEIGHTS_NAME = "adapter_model.safetensors"
PICKLED_NAME = "adapter_model.bin"
CARD_NAME = "README.md"
DEFAULT_ADAPTER = "default"

_EMBEDDING_NAMES = ("embed_tokens", "lm_head")


class LoadResult(NamedTuple):
    """What did not meet: names that the model has and the file has not, and the other way round."""

    missing_keys: list[str]
    unexpected_keys: list[str]


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter as read from its directory: its config, and its tensors on the CPU by their names in the
    file."""

    config: PeftConfig
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class _Holder:
    """A module that holds tensors of an adapter.

    Args:
        path: its name in the model. layer: what its tensors' names in a checkpoint begin with.
        method: whose tensors they are.
    """

    module: PooledModule
    path: str
    layer: str
    method: Any
    adapter: str

    @property
    def saved(self) -> dict[str, str]:
        """Name in a checkpoint, relative to the layer -> the method's own name of the tensor."""
        return {
            param.key if param.saved is None else param.saved: name
            for name, param in self.module.wanted(self.adapter).items()
            if param.persistent
        }

    def hung(self, name: str) -> str:
        """The tensor's own name in the model."""
        first, _, rest = self.module.wanted(self.adapter)[name].key.partition(".")
        return _join(self.path, first, self.adapter, rest)


# Names


def holders(model: nn.Module, adapter_name: str) -> list[_Holder]:
    """The modules of `model` that hold tensors of the adapter, in the model's order."""
    config = getattr(model, "peft_config", {}).get(adapter_name)
    adds_tokens = isinstance(config, PromptMethod)
    found: list[_Holder] = []
    unchanged: list[str] = []
    for path, module in outer_modules(model):
        if isinstance(module, BaseTunerLayer) and not isinstance(module, PooledModule):
            tensors: Any = HookedTensors(module)
            if adapter_name in tensors.adapters:
                found.append(_Holder(tensors, path, path, None, adapter_name))
            continue
        if not isinstance(module, PooledModule) or adapter_name not in module.adapters:
            continue
        # A wrapper inside another counts as the layer it adapts.
        layer = path.replace(".original_module", "")
        # One that changes nothing is there for the sake of those inside it: HF PEFT has none.
        for outer in (each for each in unchanged if layer.startswith(f"{each}.base_layer.")):
            layer = outer + layer.removeprefix(f"{outer}.base_layer")
        if not module.wanted(adapter_name):
            unchanged.append(layer)
        if adds_tokens:
            # HF PEFT wraps no layer of such a model, so its base hangs one part higher.
            layer = layer.replace("base_model.model", "base_model", 1)
        method = getattr(module, "methods", {}).get(adapter_name, config)
        found.append(_Holder(module, path, layer, method, adapter_name))
    return found


def adapter_parameters(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """The adapter's own tensors in `model`, by their names in a checkpoint, the method's saved form aside."""
    return {
        _join(holder.layer, saved): holder.module.tensors(adapter_name)[name]
        for holder in holders(model, adapter_name)
        for saved, name in holder.saved.items()
    }


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


# The state dictionary


def state_dict(
    model: nn.Module,
    adapter_name: str = DEFAULT_ADAPTER,
    whole_model: Mapping[str, Tensor] | None = None,
    save_embedding_layers: bool | Literal["auto"] = "auto",
) -> dict[str, Tensor]:
    """The adapter's tensors, whole, by their names in a checkpoint; a collective where some are sharded.

    Args:
        whole_model: the model's state dictionary, where another library has gathered it; else the model's own
            tensors are taken.
        save_embedding_layers: add the base's embeddings; "auto" where the adapter sits on them, or where the
            vocabulary was resized.

    Raises:
        AdapterError: there is no such adapter.
        CheckpointError: a tensor is empty or on the meta device, so its values are not known here.
    """
    _known_adapter(model, adapter_name)
    tensors: dict[str, Tensor] = {}
    empty = []
    for holder in holders(model, adapter_name):
        made, wanted = _whole_tensors(holder, whole_model), holder.module.wanted(adapter_name)
        # A layer that was left without any rank has tensors without elements by right.
        empty += [holder.hung(n) for n, t in made.items() if not t.numel() and 0 not in wanted[n].shape]
        tensors |= _saved_form(holder, made)
    for key, parameter in _embeddings(model, adapter_name, save_embedding_layers).items():
        tensors[key] = _values(key, parameter)
        empty += [] if tensors[key].numel() else [key]
    if empty:
        raise CheckpointError(
            f"{empty[0]!r} and {len(empty) - 1} more tensors of adapter {adapter_name!r} are empty: "
            "they rest sharded elsewhere. Gather them before saving."
        )
    return tensors


def load_state_dict(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    adapter_name: str = DEFAULT_ADAPTER,
    ignore_mismatched_sizes: bool = False,
) -> LoadResult:
    """Fills the adapter's tensors, which must be in the model, by their names in a checkpoint; none on an
    error.

    A collective where tensors are sharded. Tensors on meta get memory first. Under a user's own DeepSpeed
    engine its fp32 masters are set too, so that its next step does not undo what was loaded.

    Returns:
        The names without a counterpart. Names in the file that the model does not know are no error.

    Raises:
        AdapterError: there is no such adapter.
        CheckpointError: a shape differs, and `ignore_mismatched_sizes` is false; or no name at all is known.
    """
    _known_adapter(model, adapter_name)
    held = holders(model, adapter_name)
    config: Any = getattr(model, "peft_config", {}).get(adapter_name)
    if _defines(config, "fitted"):
        tensors = config.fitted(tensors, adapter_parameters(model, adapter_name))
    embeddings = {key: p for key, p in _all_embeddings(model).items() if key in tensors}
    used = set(embeddings)
    given: list[tuple[_Holder, dict[str, Tensor]]] = []
    for holder in held:
        restored, names = _restored(holder, tensors)
        given.append((holder, restored))
        used |= names
    if held and not any(restored for _, restored in given):
        first = next(iter(adapter_parameters(model, adapter_name)), None)
        raise CheckpointError(
            f"none of the {len(tensors)} tensors belongs to adapter {adapter_name!r}, whose first is {first!r}. "
            "Was it trained on another base, or with other target_modules?"
        )
    _check_shapes(adapter_name, given, tensors, embeddings, ignore_mismatched_sizes)
    _check_finite(adapter_name, tensors, used)
    for holder in held:
        if isinstance(holder.method, PromptMethod):
            holder.module.take_saved_form(adapter_name)  # type: ignore[attr-defined, operator]
    missing = []
    for holder, restored in given:
        device = _device(holder.module)
        holder.module.materialise(adapter_name, device)
        holder.module.part(adapter_name)
        own = holder.module.tensors(adapter_name)
        for name, value in restored.items():
            set_whole(own[name], value)
        holder.module.unite(adapter_name)
        wanted = holder.module.wanted(adapter_name)
        absent = [name for name in holder.saved.values() if name not in restored]
        # What is not trained follows from the config and the base.
        derived = [name for name in absent if not wanted[name].trainable]
        if derived:
            _derive(holder, derived)
        missing += [holder.hung(name) for name in absent if name not in derived]
        if isinstance(holder.module, AdapterModule) and hasattr(holder.module, "base"):
            holder.module.replace_base(adapter_name, holder.module.base)
    for key, parameter in embeddings.items():
        set_whole(parameter, tensors[key])
    return LoadResult(missing, [key for key in tensors if key not in used and not _is_again(key, used)])


def _is_again(key: str, used: set[str]) -> bool:
    """Whether it is a bias that HF PEFT writes a second and third time: with `bias: all`, of a module that is
    trained whole."""
    return any(
        key.endswith(".bias") and key.replace(f".{part}.", ".") in used and f".{part}." in key
        for part in ("modules_to_save", "original_module")
    )


def _whole_tensors(holder: _Holder, whole_model: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """The holder's saved tensors by the method's names, whole."""
    own, made = holder.module.tensors(holder.adapter), {}
    for saved, name in holder.saved.items():
        hung = holder.hung(name)
        if whole_model is None:
            made[name] = _values(_join(holder.layer, saved), own[name])
        elif hung in whole_model:
            made[name] = whole_model[hung]
        else:
            raise CheckpointError(
                f"the whole model lacks {hung!r} of adapter {holder.adapter!r}. Pass the whole one."
            )
    return made


def _saved_form(holder: _Holder, whole_tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    exported = None
    if _defines(holder.method, "export"):
        with torch.no_grad():
            exported = holder.method.export({**_shared(holder), **whole_tensors}, _site(holder))
    if exported is None:
        exported = {saved: whole_tensors[name] for saved, name in holder.saved.items()}
    return {_join(holder.layer, saved): value for saved, value in exported.items()}


def _shared(holder: _Holder) -> dict[str, Tensor]:
    """What the layers of the adapter share, for a layer of it."""
    if not isinstance(holder.module, AdapterModule):
        return {}
    return {name: whole(t) for name, t in holder.module.shared(holder.adapter).items()}


def _restored(holder: _Holder, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], set[str]]:
    """(the holder's tensors by the method's names, the names in the file that they came from)."""
    saved = holder.saved
    if not _defines(holder.method, "restore"):
        keys = {_join(holder.layer, key): name for key, name in saved.items()}
        return {name: tensors[key] for key, name in keys.items() if key in tensors}, set(keys)
    start = f"{holder.layer}." if holder.layer else ""
    known = [param.saved or param.key for param in holder.module.wanted(holder.adapter).values()]
    # HF PEFT wraps a layer that shares another's weight twice where both are targets.
    names = (holder.method.prefix, f"base_layer.{holder.method.prefix}", *known)
    mine = {
        key: value
        for key, value in tensors.items()
        if key.startswith(start) and key[len(start) :].startswith(names)
    }
    there = holder.method.restore({key[len(start) :]: v for key, v in mine.items()}, _site(holder))
    # What it hands on as it was and nothing takes is as unknown as any other name.
    left = {f"{start}{key}" for key in there if key not in saved}
    return {saved[key]: value for key, value in there.items() if key in saved}, set(mine) - left


def _defines(method: Any, function: str) -> bool:
    return isinstance(method, Method) and getattr(type(method), function) is not getattr(Method, function)


def _site(holder: _Holder) -> Site:
    base = getattr(holder.module, "base", None)
    return base.site if base is not None else Site(holder.path, 0, 0, "module")


def _derive(holder: _Holder, names: Sequence[str]) -> None:
    if hasattr(type(holder.module), "complete"):
        holder.module.complete(holder.adapter, names, holder.module.base)  # type: ignore[attr-defined, operator]
        return
    with torch.no_grad():
        for name in names:
            holder.module.wanted(holder.adapter)[name].start(holder.module.tensors(holder.adapter)[name])


def _check_finite(adapter_name: str, tensors: Mapping[str, Tensor], names: Iterable[str]) -> None:
    for key in names:
        value = tensors.get(key)
        if value is not None and value.is_floating_point() and not _is_finite(value):
            raise CheckpointError(
                f"adapter {adapter_name!r}: {key!r} has NaN or infinite values. Its training failed; take an "
                "earlier checkpoint."
            )


def _is_finite(value: Tensor) -> bool:
    # One pass; only a sum that is not finite needs a look at each.
    return math.isfinite(value.sum(dtype=torch.float64)) or bool(value.isfinite().all())


def _check_shapes(
    adapter_name: str,
    given: list[tuple[_Holder, dict[str, Tensor]]],
    tensors: Mapping[str, Tensor],
    embeddings: dict[str, Parameter],
    ignore: bool,
) -> None:
    """Raises for tensors of another shape, or takes them out of what is to be filled, with a warning."""
    wrong = []
    num = sum(len(restored) for _, restored in given) + len(embeddings)
    for holder, restored in given:
        own = _filled(holder)
        keys = {name: _join(holder.layer, saved) for saved, name in holder.saved.items()}
        for name, value in list(restored.items()):
            here = tuple(whole_shape(own[name]))
            if tuple(value.shape) != here:
                wrong.append(f"{keys[name]!r} is {tuple(value.shape)} there and {here} here")
                del restored[name]
    for key, parameter in list(embeddings.items()):
        there, here = tuple(tensors[key].shape), tuple(whole_shape(parameter))
        if there != here:
            wrong.append(f"{key!r} is {there} there and {here} here")
            del embeddings[key]
    if wrong:
        message = (
            f"{len(wrong)} of {num} tensors of adapter {adapter_name!r} have another shape: "
            f"{', '.join(wrong[:3])}."
        )
        if not ignore:
            raise CheckpointError(f"{message} Its rank, targets or base differ from this model's.")
        warnings.warn(f"{message} They keep their values.", stacklevel=3)


def _filled(holder: _Holder) -> dict[str, Tensor]:
    """What a checkpoint is to fill, by the method's names: of a prompt method what it keeps."""
    if not isinstance(holder.method, PromptMethod):
        return holder.module.tensors(holder.adapter)
    wanted = holder.method.saved_form().params(_site(holder))
    return {name: torch.empty(param.shape, device="meta") for name, param in wanted.items()}


def _device(module: nn.Module) -> torch.device:
    return getattr(getattr(module, "base", None), "device", torch.device("cpu"))


def _values(key: str, parameter: Tensor) -> Tensor:
    if parameter.is_meta:
        raise CheckpointError(
            f"{key!r} is on the meta device and has no values. Load or start the adapter first."
        )
    return whole(parameter)


def _known_adapter(model: nn.Module, adapter_name: str) -> None:
    known = _names(model)
    if adapter_name not in known:
        raise AdapterError(
            f"there is no adapter {adapter_name!r}; there are: {', '.join(known) or 'none'}."
            f"{suggest(adapter_name, known)}"
        )


def _names(model: Any) -> list[str]:
    """The adapters of a PeftModel, or of a base into which adapters were injected."""
    if hasattr(model, "peft_config"):
        return list(model.peft_config)
    modules = (module for _, module in outer_modules(model) if isinstance(module, PooledModule))
    return list(dict.fromkeys(name for module in modules for name in module.adapters))


# Embeddings of the base that travel with an adapter


def _all_embeddings(model: Any) -> dict[str, Parameter]:
    """The weights of the base's input and output embeddings, by their names in a checkpoint."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    found = {}
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        layer = _asked(base, getter)
        layer = getattr(layer, "base_layer", layer)
        weight = getattr(layer, "weight", None)
        if isinstance(weight, Parameter):
            path = next((path for path, module in outer_modules(model) if module is layer), None)
            if path is not None:
                found[f"{path}.weight"] = weight
    return found


def _asked(base: nn.Module, getter: str) -> nn.Module | None:
    try:
        return getattr(base, getter)() if hasattr(base, getter) else None
    except NotImplementedError:
        return None


def _embeddings(model: nn.Module, adapter_name: str, wish: bool | Literal["auto"]) -> dict[str, Parameter]:
    if wish is False:
        return {}
    embeddings = _all_embeddings(model)
    adapted = {
        f"{path}.base_layer.weight"
        for path, module in outer_modules(model)
        if isinstance(module, PooledModule)
        and adapter_name in module.adapters
        and path.rpartition(".")[2] in _EMBEDDING_NAMES
        and not _trains_rows(module, adapter_name)
        and not _is_made_elsewhere(module, adapter_name)
    }
    targeted = {key: parameter for key, parameter in embeddings.items() if key in adapted}
    if targeted:
        return targeted
    if wish is True or _is_resized(model, adapter_name):
        return embeddings
    return {}


def _trains_rows(module: Any, adapter_name: str) -> bool:
    """Whether all that the adapter has on an embedding is rows of it, so that a file need not hold the rest."""
    return isinstance(getattr(module, "methods", {}).get(adapter_name), TokenRows)


def _is_made_elsewhere(module: PooledModule, adapter_name: str) -> bool:
    """Whether nothing that the adapter has there is in its file."""
    wanted = module.wanted(adapter_name).values()
    return bool(wanted) and not any(param.persistent for param in wanted)


def _is_resized(model: nn.Module, adapter_name: str) -> bool:
    """Whether the base's vocabulary differs from the one in its directory; false where that cannot be
    seen."""
    config = getattr(model, "peft_config", {}).get(adapter_name)
    base_path = getattr(config, "base_model_name_or_path", None)
    here = getattr(getattr(model, "config", None), "vocab_size", None)
    if not base_path or here is None or not (Path(base_path) / "config.json").is_file():
        return False
    stored = json.loads((Path(base_path) / "config.json").read_text(encoding="utf-8")).get("vocab_size")
    return stored is not None and stored != here


# Writing


def save(
    model: Any,
    directory: str | os.PathLike[str],
    names: Iterable[str] | None = None,
    *,
    save_embedding_layers: bool | Literal["auto"] = "auto",
    is_main_process: bool | None = None,
    whole_model: Mapping[str, Tensor] | None = None,
    convert: Callable[[PeftConfig, dict[str, Tensor]], tuple[PeftConfig, dict[str, Tensor]]] | None = None,
) -> None:
    """Writes adapters to a directory or fsspec URL, from which HF PEFT and `read` load them.

    The adapter named "default" goes into the directory itself, each other one into a subdirectory of its
    name. To be called on every rank, since sharded tensors are gathered; one rank writes. Files are written
    aside and renamed, the config last: whoever finds one finds the whole adapter.

    Args:
        is_main_process: whether this process writes; by default rank 0 of the default group does.
        convert: makes of a config and its tensors what is written in their place.

    Raises:
        AdapterError: an adapter that is not there.
        CheckpointError: values are not known here, or the directory cannot be written.
    """
    names = list(model.peft_config if names is None else names)
    for name in names:
        _known_adapter(model, name)
    writes = (
        is_main_process if is_main_process is not None else not dist.is_initialized() or dist.get_rank() == 0
    )
    for name in names:
        tensors = state_dict(model, name, whole_model, save_embedding_layers)
        parts = _parts(model, name)
        if writes:
            target = os.fspath(directory) if name == DEFAULT_ADAPTER else f"{os.fspath(directory)}/{name}"
            config = copy.copy(model.peft_config[name])
            if convert is not None:
                config, tensors = convert(config, tensors)
            if parts:
                config = copy.copy(config.saved_at(target))
            config.inference_mode = True
            _write(target, config, tensors)
            for part, (part_config, part_tensors) in parts.items():
                part_config.inference_mode = True
                _write(f"{target}/{part}", part_config, part_tensors)


def _parts(model: Any, adapter_name: str) -> dict[str, tuple[Any, dict[str, Tensor]]]:
    """The adapters that are saved beside it, their tensors whole."""
    config = model.peft_config[adapter_name]
    if not _defines(config, "parts"):
        return {}
    parts = config.parts(model.base_model.sites(adapter_name))
    return {
        part: (part_config, {key: _values(key, tensor) for key, tensor in tensors.items()})
        for part, (part_config, tensors) in parts.items()
    }


def _write(target: str, config: PeftConfig, tensors: Mapping[str, Tensor]) -> None:
    tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    try:
        with _aside(target) as folder:
            safetensors.torch.save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
            (folder / CARD_NAME).write_text(_card(config), encoding="utf-8")
            config.save_pretrained(folder)
            if is_url(target):
                _upload(folder, target)
            else:
                _move(folder, Path(target))
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{target}: the adapter cannot be written: {error}") from error


@contextlib.contextmanager
def _aside(target: str) -> Iterator[Path]:
    """An empty directory, beside the target where that is local, so that a rename will do; removed at the
    end."""
    parent = None
    made: list[Path] = []
    if not is_url(target):
        parent = Path(target).absolute().parent
        made = [path for path in (parent, *parent.parents) if not path.exists()]
        parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".adapter-", dir=parent))
    # mkdtemp lets only its owner in; what is saved is for whoever may read the directory around it.
    mask = os.umask(0)
    os.umask(mask)
    folder.chmod(0o777 & ~mask)
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _move(folder: Path, target: Path) -> None:
    if not target.exists():
        folder.rename(target)
        return
    for name in (WEIGHTS_NAME, CARD_NAME, CONFIG_NAME):
        if name != CARD_NAME or not (target / name).exists():
            os.replace(folder / name, target / name)
    # A pickled adapter of before would be another one.
    (target / PICKLED_NAME).unlink(missing_ok=True)


def _upload(folder: Path, target: str) -> None:
    filesystem, root = fsspec.url_to_fs(target)
    filesystem.makedirs(root, exist_ok=True)
    for name in (WEIGHTS_NAME, CARD_NAME, CONFIG_NAME):
        filesystem.put_file(str(folder / name), f"{root}/{name}")


def _card(config: PeftConfig) -> str:
    base = config.base_model_name_or_path or ""
    head = ["---", *([f"base_model: {json.dumps(base)}"] if base else []), "library_name: peft"]
    method = str(getattr(config.peft_type, "value", config.peft_type))
    tags = ["tags:", f"- {method.lower()}", "---"]
    task = f" for {config.task_type}" if config.task_type else ""
    body = [
        "",
        f"# {method} adapter",
        "",
        f"Trained{task} on the base `{base or 'given by its user'}`.",
        "Load it with this library or with HF PEFT:",
        "",
        "```python",
        "model = PeftModel.from_pretrained(base_model, THIS_DIRECTORY)",
        "```",
        "",
    ]
    return "\n".join(head + tags + body)


def write_card(folder: Path, config: PeftConfig) -> None:
    """Writes the card of an adapter's directory. Text that is there stays, under the facts that hubs look for."""
    folder.mkdir(parents=True, exist_ok=True)
    path, card = folder / CARD_NAME, _card(config)
    if path.is_file():
        text = path.read_text(encoding="utf-8")
        card = text if text.startswith("---") else card[: card.index("---", 3) + 4] + text
    path.write_text(card, encoding="utf-8")


# Reading


def read_config(
    path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: Any = None,
) -> PeftConfig:
    """The config of a saved adapter: a directory, an fsspec URL or a hub id.

    Raises:
        CheckpointError: it is not there. ConfigError: it breaks a rule.
    """
    return _read_config(_found(path, (CONFIG_NAME,), revision, subfolder, token), path)


def read(
    path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: Any = None,
    key_mapping: Mapping[str, str] | None = None,
) -> SavedAdapter:
    """A saved adapter: a directory, an fsspec URL or a hub id.

    Args:
        subfolder: where in it; adapters that are not "default" lie in a folder of their name.
        key_mapping: regular expressions on names in the file, without `base_model.model.`, and what to put
        there.

    Raises:
        CheckpointError: it is not there, is damaged, or its weights are pickled.
        ConfigError: its config breaks a rule.
    """
    folder = _found(path, (CONFIG_NAME, WEIGHTS_NAME, PICKLED_NAME), revision, subfolder, token)
    config = _read_config(folder, path)
    file = folder / WEIGHTS_NAME
    if not file.is_file():
        if (folder / PICKLED_NAME).is_file():
            raise CheckpointError(
                f"{os.fspath(path)!r} has its weights in {PICKLED_NAME}, which runs code when it is read; "
                f"only {WEIGHTS_NAME} is loaded. Convert it where you trust it: safetensors.torch.save_file("
                f"torch.load({PICKLED_NAME!r}, weights_only=True), {WEIGHTS_NAME!r})."
            )
        raise CheckpointError(f"{os.fspath(path)!r} has no {WEIGHTS_NAME}.")
    try:
        check_safetensors(file)
        tensors = safetensors.torch.load_file(file, device="cpu")
    except (FolderError, OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"adapter {os.fspath(path)!r}: {error}") from error
    # Where a method may look for the parts that it was saved with.
    config.__dict__["home"] = os.fspath(path)
    return SavedAdapter(config, _renamed(tensors, key_mapping))


def _found(
    path: str | os.PathLike[str],
    names: tuple[str, ...],
    revision: str | None,
    subfolder: str | None,
    token: Any,
) -> Path:
    text = os.fspath(path)
    on_hub = is_hub_id(text)
    if subfolder and not on_hub:
        text = f"{text.rstrip('/')}/{subfolder}"
    patterns = tuple(f"{subfolder}/{name}" for name in names) if subfolder and on_hub else names
    try:
        folder = local_folder(text, patterns, revision=revision, token=token)
    except FolderError as error:
        raise CheckpointError(f"adapter: {error}") from error
    return folder / subfolder if subfolder and on_hub else folder


def _read_config(folder: Path, path: str | os.PathLike[str]) -> PeftConfig:
    if not (folder / CONFIG_NAME).is_file():
        raise CheckpointError(f"{os.fspath(path)!r} has no {CONFIG_NAME}; it is not an adapter's directory.")
    return PeftConfig.from_pretrained(folder)


def _renamed(tensors: dict[str, Tensor], mapping: Mapping[str, str] | None) -> dict[str, Tensor]:
    if not mapping:
        return tensors
    prefix = "base_model.model."
    renamed = {}
    for key, value in tensors.items():
        name = key.removeprefix(prefix)
        for pattern, replacement in mapping.items():
            name, count = re.subn(pattern, replacement, name)
            if count:
                break
        renamed[prefix + name if key.startswith(prefix) else name] = value
    return renamed
