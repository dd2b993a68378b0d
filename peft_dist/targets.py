"""Which layers of a base a config means, by HF PEFT's rules; says what matched and what did not. Imports no
torch."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from peft_dist.errors import AdapterWarning, TargetError, closest

ALL_LINEAR = "all-linear"

_Q_V = ("q_proj", "v_proj")
_QUERY_VALUE = ("query", "value")
Usual = Mapping[str, Sequence[str] | str]

_LORA: Usual = {
    **dict.fromkeys(("t5", "mt5"), ("q", "v")),
    **dict.fromkeys(
        [
            "bart",
            "opt",
            "gptj",
            "gpt_neo",
            "llama",
            "llama4",
            "mistral",
            "mixtral",
            "stablelm",
            "gemma",
            "gemma2",
            "gemma3_text",
            "qwen2",
            "qwen3",
        ],
        _Q_V,
    ),
    **dict.fromkeys(["bert", "roberta", "xlm-roberta", "electra", "layoutlm"], _QUERY_VALUE),
    **dict.fromkeys(
        ["bloom", "gpt_neox", "chatglm", "RefinedWebModel", "RefinedWeb", "falcon"], ("query_key_value",)
    ),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), ("c_attn",)),
    "blip-2": ("q", "v", "q_proj", "v_proj"),
    "deberta-v2": ("query_proj", "value_proj"),
    "deberta": ("in_proj",),
    "mpt": ("Wqkv",),
    "btlm": ("c_proj", "c_attn"),
    "codegen": ("qkv_proj",),
    "phi": ("q_proj", "v_proj", "fc1", "fc2"),
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
    "nemotron_h": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "rwkv": ("key", "value", "receptance", "output"),
    "rwkv7": ("r_proj", "k_proj", "v_proj", "o_proj", "key", "value"),
}
_IA3: Usual = {
    "t5": ("k", "v", "wo"),
    "mt5": ("k", "v", "wi_1"),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), ("c_attn", "mlp.c_proj")),
    "bloom": ("query_key_value", "mlp.dense_4h_to_h"),
    **dict.fromkeys(("roberta", "bert"), ("key", "value", "output.dense")),
    "opt": ("q_proj", "k_proj", "fc2"),
    "gptj": ("q_proj", "v_proj", "fc_out"),
    **dict.fromkeys(
        ("gpt_neox", "RefinedWebModel", "RefinedWeb", "falcon"), ("query_key_value", "dense_4h_to_h")
    ),
    "gpt_neo": ("q_proj", "v_proj", "c_proj"),
    "bart": ("q_proj", "v_proj", "fc2"),
    **dict.fromkeys(("llama", "mistral"), ("k_proj", "v_proj", "down_proj")),
    **dict.fromkeys(
        ["llama4", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"], ("q_proj", "v_proj", "down_proj")
    ),
    "mixtral": ("k_proj", "v_proj", "w2"),
    "deberta-v2": ("key_proj", "value_proj", "output.dense"),
    "deberta": ("in_proj", "output.dense"),
    "phi": ("q_proj", "v_proj", "fc2"),
}


def _without(table: Usual, *architectures: str) -> dict[str, Sequence[str] | str]:
    return {name: targets for name, targets in table.items() if name not in architectures}


_BART_ALL = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
_LLAMA_ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj")
_NORMS = ("input_layernorm", "post_attention_layernorm", "norm")
_MORE_NORMS = (*_NORMS[:2], "pre_feedforward_layernorm", "post_feedforward_layernorm", "norm")
_VBLORA: Usual = {
    **_without(
        _LORA, "blip-2", "btlm", "chatglm", "codegen", "electra", "falcon", "layoutlm", "mistral", "mixtral",
        "mpt", "phi", "RefinedWeb", "RefinedWebModel", "rwkv", "rwkv7", "stablelm", "xlm-roberta",
    ),
    "t5": ("q", "k", "v", "o", "wi", "wo"),
    "mt5": ("q", "k", "v", "o", "wi_0", "wi_1", "wo"),
    **dict.fromkeys(("bart", "opt"), _BART_ALL),
    "deberta-v2": ("query_proj", "key_proj", "value_proj", "dense"),
}  # fmt: skip
_FOURIERFT: Usual = {**_LORA, **dict.fromkeys(("gpt2", "gpt_bigcode"), ("mlp.c_proj",))}
_VERA: Usual = {**_LORA, "phi": _Q_V}
# The targets of an architecture (`config.model_type`) where a config names none: HF PEFT's tables. A method
# that is not here has LoRA's.
DEFAULT_TARGETS: dict[str, Usual] = {
    "LORA": _LORA,
    "IA3": _IA3,
    "ADALORA": {**_VBLORA, "roberta": ("query", "key", "value", "dense")},
    "VBLORA": _VBLORA,
    "FOURIERFT": _FOURIERFT,
    "C3A": _FOURIERFT,
    "WAVEFT": _without(_FOURIERFT, "btlm", "rwkv", "rwkv7"),
    "VERA": _VERA,
    "SHIRA": _VERA,
    "OSF": {
        **dict.fromkeys(
            (
                "llama",
                "llama4",
                "mistral",
                "mixtral",
                "gemma",
                "gemma2",
                "gemma3_text",
                "qwen2",
                "qwen3",
                "phi",
            ),
            _LLAMA_ALL,
        ),
        **dict.fromkeys(("gpt2", "gpt_bigcode"), ("c_attn", "c_proj")),
        **dict.fromkeys(("bloom", "gpt_neox", "falcon"), ("query_key_value", "dense_4h_to_h")),
        "opt": _BART_ALL,
        "gptj": ("q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out"),
    },
    "LN_TUNING": {
        **dict.fromkeys(("llama", "mistral", "gemma"), _NORMS),
        **dict.fromkeys(("gemma2", "gemma3_text"), _MORE_NORMS),
        **dict.fromkeys(("qwen2", "qwen3"), ("post_attention_layernorm",)),
        **dict.fromkeys(("bloom", "falcon"), (*_NORMS[:2], "ln_f")),
        **dict.fromkeys(("t5", "mt5"), ("layer_norm", "final_layer_norm")),
        "bart": ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"),
        "gpt2": ("ln_1", "ln_2", "ln_f"),
        "gptj": ("ln_1", "ln_f"),
        "phi": ("input_layernorm", "final_layernorm"),
        "blip-2": ("layernorm", "LayerNorm", "final_layer_norm", "self_attn_layer_norm"),
        "llava": ("multi_modal_projector", *_NORMS, "embed_tokens", "lm_head"),
    },
}


def usual_targets(peft_type: str) -> dict[str, list[str] | str]:
    """The targets of each architecture for a method whose config names none. What a program adds to them, for an
    architecture of its own, counts from then on."""
    if peft_type not in _KEPT:
        table = DEFAULT_TARGETS.get(peft_type, _LORA)
        _KEPT[peft_type] = {name: t if isinstance(t, str) else list(t) for name, t in table.items()}
    return _KEPT[peft_type]


_KEPT: dict[str, dict[str, list[str] | str]] = {}


# Of those, the ones that IA3 scales at their input.
DEFAULT_FEEDFORWARD: dict[str, Sequence[str]] = {
    "t5": ("wo",),
    "mt5": (),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), ("mlp.c_proj",)),
    "bloom": ("mlp.dense_4h_to_h",),
    **dict.fromkeys(("roberta", "bert", "deberta-v2", "deberta"), ("output.dense",)),
    **dict.fromkeys(("opt", "bart", "phi"), ("fc2",)),
    "gptj": ("fc_out",),
    **dict.fromkeys(("gpt_neox", "RefinedWebModel", "RefinedWeb", "falcon"), ("dense_4h_to_h",)),
    "gpt_neo": ("c_proj",),
    **dict.fromkeys(
        ["llama", "llama4", "mistral", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"], ("down_proj",)
    ),
    "mixtral": ("w2",),
}


class UnmatchedWarning(AdapterWarning, RuntimeWarning):
    """`FIELD: NAMES matched no layer`: some targets or patterns match, these do not."""


@dataclass(frozen=True)
class BaseFacts:
    """What targets are chosen from.

    Args:
        name: the base's class.
        layers: every module's dotted name -> what it is: `linear`, `embedding`, `conv1d`, ... or `module`.
        heads: names of output embeddings, which `all-linear` leaves out.
        architecture: `config.model_type`, or None.
        parameters: dotted names of the raw parameters that `target_parameters` may mean.
        embedding: name of the input embedding, or None.
    """

    name: str
    layers: Mapping[str, str]
    heads: frozenset[str] = field(default_factory=frozenset)
    architecture: str | None = None
    parameters: Sequence[str] = ()
    embedding: str | None = None


# What a layer is whose weight the module around it reads without calling it: an adapter on it alone would do
# nothing.
READ_BY_PARENT = "read by its parent"
# The same of a state-space mixer's layers, which its kernels take.
READ_BY_KERNELS = "read by kernels"


def resolve(config: Any, facts: BaseFacts) -> list[str]:
    """Names of the layers that `config` means, in the base's order.

    Sets `config.target_modules` where it was None or `all-linear`, to what it came to.

    Raises:
        TargetError: they match nothing, or a module that has no weight matrix.
    """
    _fill_defaults(config, facts)
    excluded = getattr(config, "exclude_modules", None)
    if excluded and not any(name and ends_in(excluded, name) for name in facts.layers):
        warnings.warn(
            f"exclude_modules: {excluded!r} leaves out nothing: {facts.name} has no such layer.",
            UnmatchedWarning,
            stacklevel=4,
        )
    if not config.target_modules and getattr(config, "target_parameters", None):
        return []
    if is_all_linear(config.target_modules):
        chosen = [name for name in all_linear(config, facts) if not _is_left_out(config, name)]
        if not chosen:
            raise TargetError(
                f"targets: 'all-linear' matched none: {facts.name} has no linear layer that is left in."
            )
        config.target_modules = _shortest(chosen, set(facts.layers) - {"", *chosen})
        return chosen
    matched = [name for name in facts.layers if name and is_target(config, name)]
    if not matched and not getattr(config, "target_parameters", None):
        raise TargetError(_nothing_matched(config, facts))
    read = [name for name in matched if facts.layers[name] == READ_BY_KERNELS]
    if read:
        raise TargetError(
            f"targets: {facts.name} reads the weight of {read[0]!r} past its forward, in training at least where its "
            "kernels are installed, so that an adapter would do nothing there. Leave it out; in_proj is called."
        )
    inner = [name for name in matched if facts.layers[name] == READ_BY_PARENT]
    for name in inner:
        _refuse_inner("targets", name, matched)
    matched = [name for name in matched if name not in inner]
    for name in matched:
        if facts.layers[name] == "module" and "module" not in config.layers:
            raise TargetError(
                f"targets: {name!r} of {facts.name} is a container or a layer without a weight matrix, so "
                "no adapter "
                "fits on it. Name the linear, embedding or convolution layers in it."
            )
    if not matched or not isinstance(config.target_modules, str):
        asked = (
            [config.target_modules]
            if isinstance(config.target_modules, str)
            else sorted(config.target_modules)
        )
        layers = [n for n, kind in facts.layers.items() if kind != "module" or "module" in config.layers]
        absent = [t for t in asked if not any(ends_in([t], n) for n in layers)]
        _warn_of_unmatched(absent, f"layer of {facts.name}", layers, "target_modules")
    # A value that is a list is what training found for a tensor, no setting for layers.
    patterns = {
        n: [key for key, value in v.items() if not isinstance(value, list)]
        for n, v in vars(config).items()
        if n.endswith("_pattern") and isinstance(v, dict)
    }
    raw = [
        name for name in facts.parameters if ends_in(getattr(config, "target_parameters", None) or [], name)
    ]
    for field_name, pattern in patterns.items():
        absent = [key for key in pattern if not any(by_pattern({key: True}, n, False) for n in matched + raw)]
        _warn_of_unmatched(absent, f"adapted layer of {facts.name}", matched, field_name)
    _shorten(config, facts)
    return matched


def resolve_parameters(config: Any, facts: BaseFacts, has_layers: bool) -> list[str]:
    """Names of the raw parameters that `target_parameters` means, whole or suffixes, in the base's order.

    Args:
        has_layers: whether the config has found layers too.

    Raises:
        TargetError: they match nothing, and no layer is adapted either.
    """
    wanted = config.target_parameters
    matched = [name for name in facts.parameters if ends_in(wanted, name)]
    absent = [target for target in wanted if not any(ends_in([target], name) for name in matched)]
    if not matched and not has_layers:
        near = closest(absent[0].rpartition(".")[2], {n.rpartition(".")[2] for n in facts.parameters})
        raise TargetError(
            f"target_parameters: {', '.join(map(repr, absent))} matched no parameter of {facts.name}."
            + (f" Similar: {near[0]!r}." if near else "")
        )
    _warn_of_unmatched(absent, f"parameter of {facts.name}", facts.parameters, "target_parameters")
    return matched


def _refuse_inner(field_name: str, name: str, chosen: Sequence[str]) -> None:
    """Raises for a layer that does nothing by itself, unless the module around it is chosen too."""
    parent = name.rpartition(".")[0]
    if parent not in chosen:
        raise TargetError(
            f"{field_name}: {name!r} is a part of the MultiheadAttention {parent!r}, which reads its weight "
            f"without calling it, so an adapter on it would do nothing. Name {parent!r}; that adapts both."
        )


def resolve_saved(names: Sequence[str] | None, facts: BaseFacts) -> list[str]:
    """Names of the modules that `modules_to_save` means: whole names or suffixes, none inside another.

    Warns of a name that matches nothing beside others that match.

    Raises:
        TargetError: none of the names matches.
    """
    chosen: list[str] = []
    absent: list[str] = []
    for wanted in names or ():
        found = [name for name in facts.layers if ends_in([wanted], name)]
        absent += [] if found or wanted_of_a_head(wanted) else [wanted]
        chosen += [name for name in found if name not in chosen]
    if absent and not chosen:
        near = closest(absent[0], {name.rpartition(".")[2] for name in facts.layers if name})
        raise TargetError(
            f"modules_to_save: {absent[0]!r} matched no module of {facts.name}."
            + (f" Similar: {near[0]!r}." if near else "")
        )
    _warn_of_unmatched(absent, f"module of {facts.name}", list(facts.layers), "modules_to_save")
    for name in chosen:
        if facts.layers[name] == READ_BY_PARENT:
            _refuse_inner("modules_to_save", name, chosen)
    return [name for name in chosen if not any(name.startswith(f"{outer}.") for outer in chosen)]


def wanted_of_a_head(name: str) -> bool:
    """Whether it is one of the names that task classes add for whichever head the base has."""
    return name in HEAD_NAMES


def all_linear(config: Any, facts: BaseFacts) -> list[str]:
    """Names of the linear layers but for heads: output embeddings, or of a task's base its classifier's.

    Without a task nothing else would train a classifier's head, so it is a linear layer as any.
    """
    heads = facts.heads or (HEAD_NAMES if config.task_type is not None else ())
    return [name for name, kind in facts.layers.items() if kind == "linear" and name not in heads]


# The names that classifier heads go by; the task classes train them whole.
HEAD_NAMES = ("classifier", "score", "qa_outputs")


def is_all_linear(targets: Sequence[str] | str | None) -> bool:
    """Whether targets are the shorthand for every linear layer."""
    return isinstance(targets, str) and targets.lower() == ALL_LINEAR


def ends_in(targets: Sequence[str] | str, name: str) -> bool:
    """Whether `name` is one of `targets` or ends in `.` and one; a str is a regular expression over all of
    it."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return name in targets or any(name.endswith(f".{target}") for target in targets)


def by_pattern(pattern: Mapping[str, Any], name: str, default: Any) -> Any:
    """The value of the first key that matches the end of `name` as a regular expression, from a dot on."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def _fill_defaults(config: Any, facts: BaseFacts) -> None:
    if config.target_modules is not None:
        return
    if config.peft_type == "TRAINABLE_TOKENS" and facts.embedding is not None:
        config.target_modules = facts.embedding
        return
    known = usual_targets(config.peft_type)
    if config.peft_type == "OSF" and facts.architecture not in known:
        config.target_modules = ALL_LINEAR
        return
    if facts.architecture is None or facts.architecture not in known:
        if getattr(config, "target_parameters", None):
            return
        raise TargetError(
            f"targets: target_modules is not given, and {facts.architecture or facts.name!r} has no usual "
            "ones. Name "
            "the layers, or say 'all-linear'."
        )
    usual = known[facts.architecture]
    config.target_modules = usual if isinstance(usual, str) else set(usual)
    if config.peft_type == "IA3" and config.feedforward_modules is None:
        if facts.architecture not in DEFAULT_FEEDFORWARD:
            raise TargetError(
                f"targets: feedforward_modules is not given, and {facts.architecture!r} has no usual ones. Name those "
                "that are scaled at their input, or [] for none."
            )
        config.feedforward_modules = set(DEFAULT_FEEDFORWARD[facts.architecture])


def _is_left_out(config: Any, name: str) -> bool:
    excluded = getattr(config, "exclude_modules", None)
    if excluded and ends_in(excluded, name):
        return True
    # What is trained whole is not adapted too.
    whole = getattr(config, "modules_to_save", None) or ()
    return any(re.match(rf"(^|.*\.){saved}($|\..*)", name) for saved in whole)


def is_target(config: Any, name: str) -> bool:
    """Whether a config whose targets are given means the layer called `name`."""
    if _is_left_out(config, name) or not ends_in(config.target_modules, name):
        return False
    wanted = getattr(config, "layers_to_transform", None)
    if (
        isinstance(config.target_modules, str)
        or name in config.target_modules
        or wanted is None
        or wanted == []
    ):
        return True
    index = _layer_index(name, getattr(config, "layers_pattern", None))
    return index is not None and index in ([wanted] if isinstance(wanted, int) else wanted)


def _layer_index(name: str, patterns: Sequence[str] | str | None) -> int | None:
    patterns = [patterns] if patterns and isinstance(patterns, str) else list(patterns or ())
    # The first numbered part is the layer's; an expert's number comes later.
    wholes = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in patterns] or [r".*?\.[^.]*\.(\d+)\."]
    for whole in wholes:
        found = re.match(whole, name)
        if found:
            return int(found[1])
    return None


# From so many names on a list of targets is shortened, as in HF PEFT.
MANY = 20


def _shorten(config: Any, facts: BaseFacts) -> None:
    """Says a long list of targets by fewer names that mean the same layers. IA3's are as they are: its
    `feedforward_modules` are some of them."""
    targets = config.target_modules
    if not targets or isinstance(targets, str) or len(targets) < MANY or config.peft_type == "IA3":
        return
    short = _shortest(targets, [name for name in facts.layers if name and not ends_in(targets, name)])
    if len(short) < len(targets):
        config.target_modules = short


def _shortest(names: Iterable[str], others: Iterable[str]) -> set[str]:
    """The shortest ends of the names that are no ends of the others."""
    taken = {end for name in others for end in _ends(name)}
    kept: set[str] = set()
    for ends in sorted(_ends(name) for name in names):
        if kept.isdisjoint(ends):
            kept.add(next((end for end in ends if end not in taken), ends[-1]))
    return kept


def _ends(name: str) -> list[str]:
    """`a.b.c`: c, b.c, a.b.c."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]


def _nothing_matched(config: Any, facts: BaseFacts) -> str:
    targets = config.target_modules
    targets = targets if isinstance(targets, str) else sorted(targets)
    linear = [name for name, kind in facts.layers.items() if kind == "linear"]
    of_what = f"{len(linear)} linear layers of {facts.name}"
    if not isinstance(targets, str) and not targets:
        return f"targets: target_modules is empty; {facts.name} has {len(linear)} linear layers. Name some."
    named = ", ".join(repr(target) for target in ([targets] if isinstance(targets, str) else targets))
    message = f"targets: {named} matched none of {of_what}."
    if any(name and ends_in(targets, name) for name in facts.layers):
        return f"{message} exclude_modules, modules_to_save or layers_to_transform leave out all they match."
    ends = Counter(name.rpartition(".")[2] for name, kind in facts.layers.items() if kind != "module")
    near = closest(targets if isinstance(targets, str) else targets[0].rpartition(".")[2], ends)
    return (
        f"{message} Similar: {near[0]!r} ({ends[near[0]]} layers)"
        if near
        else f"{message} There are: {_some(ends)}."
    )


def _some(ends: Counter[str]) -> str:
    return ", ".join(repr(end) for end, _ in ends.most_common(8))


def _warn_of_unmatched(absent: list[str], of_what: str, layers: Sequence[str], field_name: str) -> None:
    if absent:
        message = f"{field_name}: {', '.join(map(repr, absent))} matched no {of_what}."
        near = closest(absent[0].rpartition(".")[2], {name.rpartition(".")[2] for name in layers})
        hint = f" Similar: {near[0]!r}." if near else ""
        warnings.warn(message + hint, UnmatchedWarning, stacklevel=4)
