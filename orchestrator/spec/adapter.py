"""The `adapter` section against the method's own config: its fields, their types, its defaults and its rules.

A method's config is a dataclass of `peft_dist`, which imports no torch: it is the only list of its fields.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import json
import re
import typing
import warnings
from enum import Enum
from typing import Any

from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError

from peft_dist.catalog import METHODS, config_class
from peft_dist.contract import Method

from ..errors import SpecError, closest
from .job import AdapterSpec
from .places import MISSING, Path, Problem, Tree
from .words import in_words, show

OURS = ("type", "init_from")
"""Keys of the section that are not fields of a config."""

FILLED_IN = (
    "task_type",
    "peft_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "token_dim",
    "num_transformer_submodules",
    "num_attention_heads",
    "num_layers",
)
"""Fields that a checkpoint records or that follow from the base: nobody writes them."""


@dataclasses.dataclass(frozen=True)
class MethodField:
    """A field of a method's config, as a user writes it."""

    name: str
    annotation: Any
    default: Any
    """MISSING where it must be given."""
    help: str
    aliases: tuple[str, ...] = ()


def method_fields(kind: str) -> dict[str, MethodField]:
    """The fields of a method (lower case), by name, in the config's order."""
    config = config_class(kind.upper())
    hints, described = _hints(config), _described(config)
    names = [each.name for each in dataclasses.fields(config) if each.init and each.name not in FILLED_IN]
    aliases = _aliases(kind, names)
    found = {}
    for each in dataclasses.fields(config):
        if each.name in names:
            said = (
                each.metadata.get("help") or described.get(each.name) or f"as in HF PEFT's {config.__name__}"
            )
            help_ = str(said).strip()
            own = tuple(alias for alias, name in aliases.items() if name == each.name)
            default = _default(each, config)
            found[each.name] = MethodField(each.name, hints.get(each.name, Any), default, help_, own)
    return found


_NAMES = r"[A-Za-z_0-9]+(?:, [A-Za-z_0-9]+)*"
_ARGUMENTS = re.compile(rf"^ {{4}}({_NAMES}): (.*?)(?=^ {{4}}\w|\Z)", re.M | re.S)
_BESIDE = re.compile(rf"(?<=[.]) (?=({_NAMES}): )")
"""Several on one line: `init_r: rank of every layer. tinit: steps before ...`."""


@functools.cache
def _described(config: type) -> dict[str, str]:
    """What the docstrings of a config and of its parents say of each field, under `Args:`."""
    found: dict[str, str] = {}
    for each in config.__mro__:
        _, _, arguments = inspect.cleandoc(each.__doc__ or "").partition("Args:\n")
        for names, text in _ARGUMENTS.findall(arguments):
            for part in _separate(f"{names}: {' '.join(text.split())}"):
                names, _, text = part.partition(": ")
                for name in names.split(", "):
                    found.setdefault(name, text)
    return found


def _separate(text: str) -> list[str]:
    cuts = [0, *(match.end() for match in _BESIDE.finditer(text)), len(text)]
    return [text[start:end].strip() for start, end in itertools.pairwise(cuts)]


@functools.cache
def _hints(config: type) -> dict[str, Any]:
    try:
        return typing.get_type_hints(config)
    except (NameError, TypeError):  # an annotation that names a torch type: such a field is not checked
        return {}


def _default(each: dataclasses.Field, config: type) -> Any:
    if each.name == "target_modules" and (not issubclass(config, Method) or "linear" in config.layers):
        return "all-linear"
    if each.default is not dataclasses.MISSING:
        return each.default.value if isinstance(each.default, Enum) else each.default
    if each.default_factory is not dataclasses.MISSING:
        value = each.default_factory()
        return (
            dataclasses.asdict(value)
            if dataclasses.is_dataclass(value) and not isinstance(value, type)
            else value
        )
    return MISSING


def _aliases(kind: str, names: list[str]) -> dict[str, str]:
    """`alpha` and `dropout` for `lora_alpha`, `lora_dropout` and their like."""
    found = {}
    for short in ("alpha", "dropout"):
        ends = [name for name in names if name.endswith(f"_{short}")]
        own = [name for name in ends if name == f"{kind}_{short}"] or ends
        if short not in names and len(own) == 1:
            found[short] = own[0]
    return found


def method_names() -> list[str]:
    """All methods, as the spec writes them."""
    return [name.lower() for name in METHODS]


def check_adapter(tree: Tree) -> list[Problem]:
    """Resolves the section's aliases in place; returns what breaks a rule of the method."""
    section = tree.get(("adapter",))
    if not isinstance(section, dict):
        return []
    kind = section.get("type", "lora")
    if not isinstance(kind, str):
        section["type"] = "lora"  # told once is enough
        return [Problem(("adapter", "type"), f"{show(kind)} is not a method.", "List them: raypeft methods")]
    kind = kind.lower().replace("-", "_")
    if kind not in method_names():
        near = closest(kind, method_names())
        hint = f"Closest: '{near[0]}'. List them: raypeft methods" if near else "List them: raypeft methods"
        return [Problem(("adapter", "type"), f"'{section['type']}' is not a method.", hint)]
    if "type" in section:
        section["type"] = kind
    known = method_fields(kind)
    problems = _resolve(tree, section, kind, known)
    if not problems:
        problems = _ask_the_method(tree, section, kind, known)
    return problems


def _resolve(tree: Tree, section: dict[str, Any], kind: str, known: dict[str, MethodField]) -> list[Problem]:
    problems = []
    targets = {alias: each.name for each in known.values() for alias in each.aliases}
    for name in [name for name in section if name not in OURS]:
        path: Path = ("adapter", name)
        if name in targets:
            problems += _rename(tree, path, ("adapter", targets[name]))
            path = ("adapter", targets[name])
        if path[1] not in known:
            problems.append(_unknown(path, kind, known))
        elif path[1] in section:
            problems += _check_type(tree, path, known[str(path[1])])
    return problems


def _rename(tree: Tree, path: Path, target: Path) -> list[Problem]:
    value, places = tree.take(path)
    place = places.get(()) or tree.nearest(path)
    present = tree.get(target)
    if present is MISSING:
        tree.put(target, value, places or {(): place})
    elif present != value:
        other = tree.nearest(target)
        beside = f"{other.key} (line {other.line})" if other.line else other.key
        tree.places[path] = place
        problem = (
            f"{show(value)} contradicts {beside}: {show(present)}; both mean {'.'.join(map(str, target))}."
        )
        return [Problem(path, problem, "Keep one of them.")]
    return []


def _unknown(path: Path, kind: str, known: dict[str, MethodField]) -> Problem:
    name = str(path[1])
    if name in FILLED_IN:
        return Problem(path, "is filled in by itself.", "Remove it.")
    choices = [*known, *(alias for each in known.values() for alias in each.aliases), *OURS]
    near = closest(name, choices)
    hint = f"Closest: 'adapter.{near[0]}'." if near else f"Fields of {kind}: {', '.join(known)}."
    return Problem(path, f"{kind} has no such field.", hint)


def _check_type(tree: Tree, path: Path, known: MethodField) -> list[Problem]:
    section, value = tree.values["adapter"], tree.get(path)
    if value is None and known.default is not None:
        return [Problem(path, "is empty.", "Write a value, or remove the key for its default.")]
    if accepts(known.annotation, value):
        return []
    if isinstance(value, float) and value == int(value) and accepts(known.annotation, int(value)):
        section[path[1]] = int(value)
        return []
    hint = None
    if isinstance(value, str) and (near := closest(value, _choices(known.annotation))):
        hint = f"Closest: '{near[0]}'."
    elif known.help:
        hint = f"It is {known.help[0].lower()}{known.help[1:].rstrip('.')}."
    return [Problem(path, f"{show(value)} is not {in_words(known.annotation)}.", hint)]


def _choices(annotation: Any) -> list[str]:
    if typing.get_origin(annotation) is typing.Literal:
        return [str(each) for each in typing.get_args(annotation)]
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return [str(each.value) for each in annotation]
    return [choice for each in typing.get_args(annotation) for choice in _choices(each)]


def accepts(annotation: Any, value: Any) -> bool:
    """Whether a value, as YAML gives it, is of this type. A type that pydantic does not know takes anything."""
    try:
        adapter = TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True))
    except PydanticUserError:
        try:
            adapter = TypeAdapter(annotation)
        except (PydanticUserError, PydanticSchemaGenerationError):
            return True
    except PydanticSchemaGenerationError:
        return True
    try:
        adapter.validate_json(json.dumps(value), strict=True)
    except ValidationError:
        return False
    return True


def _ask_the_method(
    tree: Tree, section: dict[str, Any], kind: str, known: dict[str, MethodField]
) -> list[Problem]:
    """Makes the config, whose own rules (`__post_init__`) raise ValueError."""
    fields = {name: value for name, value in section.items() if name not in OURS}
    needed = [name for name, each in known.items() if each.default is MISSING or _is_needed(kind, name)]
    missing = [name for name in needed if name not in fields]
    if missing:
        return [
            Problem(("adapter", name), f"is required by {kind} and not given.", f"It is {known[name].help}")
            for name in missing
        ]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # told when the adapter is made
            config_class(kind.upper())(**_with_defaults(fields, known, ENDLESS), task_type="CAUSAL_LM")
    except (ValueError, TypeError) as error:
        return [_rule_of_the_method(_sentence(str(error)), fields)]
    return []


def _is_needed(kind: str, name: str) -> bool:
    """Of a prompt method, the number of its tokens; CPT's are those of its text. Of a mixture, what it mixes."""
    if (kind, name) == ("xlora", "adapters"):
        return True
    config: Any = config_class(kind.upper())
    return name == "num_virtual_tokens" and config.is_prompt_learning and "cpt_token_ids" not in _fields(kind)


def _fields(kind: str) -> set[str]:
    return {each.name for each in dataclasses.fields(config_class(kind.upper()))}


_OWN_PLACE = re.compile(r"^\w+Config\.(\w+)[^:]*: ")
"""Where the method's own message says it is: the job's key says it better."""


def _rule_of_the_method(message: str, fields: dict[str, Any]) -> Problem:
    hint = None
    if "target_modules" in message and "target_modules" not in fields:
        hint = "The default is all-linear: write target_modules as a list, such as [q_proj, v_proj]."
    if place := _OWN_PLACE.match(message):
        rest = message[place.end() :]
        return Problem(("adapter", place[1]), rest.replace("None;", "is not given;", 1), hint)
    return Problem(_named_in(message, fields), message, hint)


def _named_in(message: str, fields: dict[str, Any]) -> Path:
    """The key that the method's message is about: the first written field that it names."""
    found = ((re.search(rf"\b{re.escape(name)}\b", message), name) for name in fields)
    named = sorted((match.start(), name) for match, name in found if match)
    return ("adapter", named[0][1]) if named else ("adapter",)


def _sentence(message: str) -> str:
    return message if message.endswith((".", "?", ")")) else f"{message}."


ENDLESS = 2**31
"""The steps of a run whose number is not known yet."""


def _with_defaults(fields: dict[str, Any], known: dict[str, MethodField], total_steps: int) -> dict[str, Any]:
    """The fields as given, over what a job fills in by itself: the targets, and the number of its steps."""
    found: dict[str, Any] = {"target_modules": "all-linear"} if _targets_by_default(known) else {}
    if "total_step" in known and fields.get("total_step") is None:
        fields = {**fields, "total_step": total_steps}
    return {**found, **fields}


def _targets_by_default(known: dict[str, MethodField]) -> bool:
    return "target_modules" in known and known["target_modules"].default == "all-linear"


def peft_config(
    spec: AdapterSpec, task_type: str = "CAUSAL_LM", *, total_steps: int = ENDLESS
) -> dict[str, Any]:
    """Arguments of `config_class(spec.type)`: the fields as given, our default targets, and the task.

    Args:
        total_steps: of the run, for methods that plan over all of them (AdaLoRA's `total_step`).

    Raises:
        SpecError: the method or a field does not exist, a value is of another type, a rule of the method is broken.
    """
    known = method_fields(_kind(spec))
    return {**_with_defaults(_checked(spec), known, total_steps), "task_type": task_type}


def resolved_fields(spec: AdapterSpec) -> dict[str, Any]:
    """Every field of the method, defaults filled in, as plain values."""
    given = _checked(spec)
    return {name: given.get(name, each.default) for name, each in method_fields(_kind(spec)).items()}


def _kind(spec: AdapterSpec) -> str:
    return spec.type.lower().replace("-", "_")


def _checked(spec: AdapterSpec) -> dict[str, Any]:
    """The fields as given, under the config's own names."""
    tree = Tree("adapter", {"adapter": {"type": _kind(spec), **spec.fields}})
    if problems := check_adapter(tree):
        problem = problems[0]
        raise SpecError(problem.problem, where=".".join(map(str, problem.path)), hint=problem.hint)
    return {name: value for name, value in tree.values["adapter"].items() if name != "type"}
