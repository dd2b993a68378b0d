"""The table of methods: from a PEFT type to its config class, without importing torch.

A package of a user's own adds a row by `peft_dist.register_peft_method`, or by an entry point in the group
`peft_dist.methods`, whose name is the method's and whose object is its config class, or a function that calls
`register_peft_method`. Only the entry points' names are read here; what they point to is imported when used.
"""

from __future__ import annotations

import enum
import importlib
import importlib.metadata
import re
from dataclasses import dataclass
from typing import Any

from peft_dist.errors import ConfigError, suggest


class PeftType(enum.StrEnum):
    """The methods, by HF PEFT's names. Members compare to strings and serialise as such."""

    PROMPT_TUNING = "PROMPT_TUNING"
    MULTITASK_PROMPT_TUNING = "MULTITASK_PROMPT_TUNING"
    P_TUNING = "P_TUNING"
    PREFIX_TUNING = "PREFIX_TUNING"
    ADAPTION_PROMPT = "ADAPTION_PROMPT"
    LORA = "LORA"
    ADALORA = "ADALORA"
    XLORA = "XLORA"
    VBLORA = "VBLORA"
    DELORA = "DELORA"
    GRALORA = "GRALORA"
    LOHA = "LOHA"
    LOKR = "LOKR"
    POLY = "POLY"
    OFT = "OFT"
    BOFT = "BOFT"
    IA3 = "IA3"
    LN_TUNING = "LN_TUNING"
    FOURIERFT = "FOURIERFT"
    WAVEFT = "WAVEFT"
    VERA = "VERA"
    SHIRA = "SHIRA"
    HRA = "HRA"
    BONE = "BONE"
    MISS = "MISS"
    RANDLORA = "RANDLORA"
    C3A = "C3A"
    ROAD = "ROAD"
    OSF = "OSF"
    CPT = "CPT"
    TRAINABLE_TOKENS = "TRAINABLE_TOKENS"

    @classmethod
    def extend(cls, name: str) -> PeftType:
        """Adds a member, for a method that is registered under this name; the one that is there, if it is.

        Raises:
            ConfigError: the name is not of capitals, digits and underscores.
        """
        if name in cls._member_map_:
            return cls[name]
        if not name.isidentifier() or not name.isupper() or not name.isascii() or name.endswith("_"):
            raise ConfigError(
                f"PeftType.extend: {name!r}; a member is of capitals, digits and underscores, and does not "
                f"end in one. Did you mean {re.sub('[^A-Z0-9]+', '_', name.upper()).strip('_')!r}?"
            )
        member = str.__new__(cls, name)
        member._name_, member._value_ = name, name
        member._sort_order_ = len(cls._member_names_)  # type: ignore[attr-defined]
        type.__setattr__(cls, name, member)
        cls._member_names_.append(name)
        cls._member_map_[name] = member
        cls._value2member_map_[name] = member
        return member


class TaskType(enum.StrEnum):
    """What the base is trained for, by HF PEFT's names."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


@dataclass(frozen=True)
class Entry:
    """One method.

    Args:
        config: `module:Class` of its config, which is the method; or the class.
        prefix: what its tensors' names in a checkpoint start with; None: its class says.
        task_types: the tasks that it serves.
        merges: whether it can be merged into the base.
        summary: one line for `raypeft methods`.
        tuner: the class that stands on the base; None: one is made that sits on layers.
        mixes: whether it can stand beside other methods in a `PeftMixedModel`.
    """

    config: str | type
    prefix: str | None
    task_types: tuple[str, ...]
    merges: bool
    summary: str
    tuner: type | None = None
    mixes: bool = True


ALL_TASKS = tuple(task.value for task in TaskType)

METHODS: dict[str, Entry] = {
    "LORA": Entry(
        "peft_dist.methods.weight.lora:LoraConfig",
        "lora_",
        ALL_TASKS,
        True,
        "low-rank update of each target's weight (arXiv:2106.09685)",
    ),
    "ADALORA": Entry(
        "peft_dist.methods.weight.adalora:AdaLoraConfig",
        "lora_",
        ALL_TASKS,
        True,
        "LoRA in SVD form, its ranks allotted over the layers while training (arXiv:2303.10512)",
    ),
    "XLORA": Entry(
        "peft_dist.methods.weight.xlora:XLoraConfig",
        "internal_xlora_classifier",
        ALL_TASKS,
        False,
        "a mixture of LoRA adapters, weighed for each token by a first run of the model (arXiv:2402.07148)",
    ),
    "IA3": Entry(
        "peft_dist.methods.activation.ia3:IA3Config",
        "ia3_",
        ALL_TASKS,
        True,
        "a learned scale per channel of each target (arXiv:2205.05638)",
    ),
    "FOURIERFT": Entry(
        "peft_dist.methods.weight.fourierft:FourierFTConfig",
        "fourierft_",
        ALL_TASKS,
        True,
        "n trained frequencies of each target's update (arXiv:2405.03003)",
    ),
    "WAVEFT": Entry(
        "peft_dist.methods.weight.waveft:WaveFTConfig",
        "waveft_",
        ALL_TASKS,
        True,
        "n trained wavelet coefficients of each target's update (arXiv:2505.12532)",
    ),
    "C3A": Entry(
        "peft_dist.methods.weight.c3a:C3AConfig",
        "c3a_",
        ALL_TASKS,
        True,
        "an update of circulant blocks (arXiv:2407.19342)",
    ),
    "MISS": Entry(
        "peft_dist.methods.weight.miss:MissConfig",
        "miss_",
        ALL_TASKS,
        True,
        "one block of rows, repeated over each target (arXiv:2409.15371)",
    ),
    "BONE": Entry(
        "peft_dist.methods.weight.bone:BoneConfig",
        "bone_",
        ALL_TASKS,
        True,
        "MISS under its former name (arXiv:2409.15371)",
    ),
    "SHIRA": Entry(
        "peft_dist.methods.weight.shira:ShiraConfig",
        "shira_",
        ALL_TASKS,
        True,
        "a sparse update at fixed places (arXiv:2406.13175)",
    ),
    "OSF": Entry(
        "peft_dist.methods.weight.osf:OSFConfig",
        "osf_",
        ALL_TASKS,
        True,
        "the small singular values' part of each target, trained beside the large ones (arXiv:2504.07097)",
    ),
    "OFT": Entry(
        "peft_dist.methods.activation.oft:OFTConfig",
        "oft_",
        ALL_TASKS,
        True,
        "an orthogonal turn of each target's input, in blocks (arXiv:2306.07280)",
    ),
    "BOFT": Entry(
        "peft_dist.methods.activation.boft:BOFTConfig",
        "boft_",
        ALL_TASKS,
        True,
        "an orthogonal turn of each target's input, in butterfly factors (arXiv:2311.06243)",
    ),
    "HRA": Entry(
        "peft_dist.methods.activation.hra:HRAConfig",
        "hra_",
        ALL_TASKS,
        True,
        "a chain of reflections of each target's input (arXiv:2405.17484)",
    ),
    "ROAD": Entry(
        "peft_dist.methods.activation.road:RoadConfig",
        "road_",
        ALL_TASKS,
        True,
        "pairs of each target's outputs, turned and scaled (arXiv:2409.00119)",
    ),
    "LN_TUNING": Entry(
        "peft_dist.methods.replace.ln_tuning:LNTuningConfig",
        "ln_tuning_",
        ALL_TASKS,
        True,
        "the norms' own weights (arXiv:2312.11420)",
    ),
    "TRAINABLE_TOKENS": Entry(
        "peft_dist.methods.replace.trainable_tokens:TrainableTokensConfig",
        "trainable_tokens_",
        ALL_TASKS,
        True,
        "chosen rows of the embedding; the others stay (HF PEFT)",
    ),
    "PROMPT_TUNING": Entry(
        "peft_dist.methods.prompt.prompt_tuning:PromptTuningConfig",
        "prompt_",
        ALL_TASKS,
        False,
        "learned embeddings before the input (arXiv:2104.08691)",
    ),
    "MULTITASK_PROMPT_TUNING": Entry(
        "peft_dist.methods.prompt.multitask_prompt_tuning:MultitaskPromptTuningConfig",
        "prompt_",
        ALL_TASKS,
        False,
        "a shared prompt times a low-rank matrix of each row's task (arXiv:2303.02861)",
    ),
    "P_TUNING": Entry(
        "peft_dist.methods.prompt.p_tuning:PromptEncoderConfig",
        "prompt_",
        ALL_TASKS,
        False,
        "virtual tokens made by an MLP or LSTM (arXiv:2103.10385)",
    ),
    "PREFIX_TUNING": Entry(
        "peft_dist.methods.prompt.prefix_tuning:PrefixTuningConfig",
        "prompt_",
        ALL_TASKS,
        False,
        "learned keys and values before each layer's own (arXiv:2101.00190)",
    ),
    "ADAPTION_PROMPT": Entry(
        "peft_dist.methods.block.adaption_prompt:AdaptionPromptConfig",
        "adaption_",
        ALL_TASKS,
        False,
        "learned tokens behind a gate in the last attention modules (arXiv:2303.16199)",
    ),
    "CPT": Entry(
        "peft_dist.methods.prompt.cpt:CPTConfig",
        "prompt_",
        ("CAUSAL_LM",),
        False,
        "a context's tokens, each moved within a ball (arXiv:2410.17222)",
    ),
    "LOHA": Entry(
        "peft_dist.methods.weight.loha:LoHaConfig",
        "hada_",
        ALL_TASKS,
        True,
        "an elementwise product of two low-rank updates (arXiv:2108.06098)",
    ),
    "LOKR": Entry(
        "peft_dist.methods.weight.lokr:LoKrConfig",
        "lokr_",
        ALL_TASKS,
        True,
        "a Kronecker product of two small matrices (arXiv:2309.14859)",
    ),
    "VERA": Entry(
        "peft_dist.methods.weight.vera:VeraConfig",
        "vera_lambda_",
        ALL_TASKS,
        True,
        "vectors that scale random matrices, shared by all layers (arXiv:2310.11454)",
    ),
    "RANDLORA": Entry(
        "peft_dist.methods.weight.randlora:RandLoraConfig",
        "randlora_",
        ALL_TASKS,
        True,
        "full-rank sums of scaled random bases, shared by all layers (arXiv:2502.00987)",
    ),
    "VBLORA": Entry(
        "peft_dist.methods.weight.vblora:VBLoRAConfig",
        "vblora_",
        ALL_TASKS,
        True,
        "low-rank updates made of vectors from one bank (arXiv:2405.15179)",
    ),
    "GRALORA": Entry(
        "peft_dist.methods.weight.gralora:GraloraConfig",
        "gralora_",
        ALL_TASKS,
        True,
        "a grid of blocks with a low-rank update each (arXiv:2505.20355)",
    ),
    "DELORA": Entry(
        "peft_dist.methods.weight.delora:DeloraConfig",
        "delora_",
        ALL_TASKS,
        True,
        "low-rank updates of bounded norm (arXiv:2503.18225)",
    ),
    "POLY": Entry(
        "peft_dist.methods.weight.poly:PolyConfig",
        "poly_",
        ALL_TASKS,
        False,
        "low-rank skills that each task mixes, by `task_ids` (arXiv:2202.13914)",
        mixes=False,
    ),
}


def entry(peft_type: str) -> Entry:
    """The row of `peft_type` (either case).

    Raises:
        ConfigError: there is no such method; names the closest one.
    """
    name = str(peft_type).upper()
    if name not in METHODS:
        lower = [known.lower() for known in METHODS]
        raise ConfigError(f"{str(peft_type)!r} is not a method.{suggest(name.lower(), lower)}")
    return METHODS[name]


def config_class(peft_type: str) -> Any:
    """The config class of `peft_type`; imports its file, which imports no torch."""
    found = entry(peft_type)
    if isinstance(found.config, type):
        return found.config
    module, _, path = found.config.partition(":")
    target: Any = importlib.import_module(module)
    for part in path.split(".") if path else ():
        target = getattr(target, part)
    return target if isinstance(target, type) else _registered_by(str(peft_type).upper(), target)


def prefix_of(peft_type: str) -> str:
    """What the names of the method's tensors in a checkpoint start with."""
    return entry(peft_type).prefix or config_class(peft_type).prefix


def class_name(peft_type: str) -> str:
    """What the class that stands on a base for a method is called: that of its config, with another end."""
    config = entry(peft_type).config
    title = config.__name__ if isinstance(config, type) else config.partition(":")[2]
    return title.removesuffix("Config") + "Model"


# What has no layers of its own to share with others, or decides over them all.
_ALONE = frozenset(
    {
        "PROMPT_TUNING",
        "MULTITASK_PROMPT_TUNING",
        "P_TUNING",
        "PREFIX_TUNING",
        "CPT",
        "ADAPTION_PROMPT",
        "XLORA",
        "POLY",
        "OSF",
    }
)


def mixes(peft_type: str) -> bool:
    """Whether adapters of the method can stand beside others' in a `PeftMixedModel`."""
    name = str(peft_type).upper()
    return entry(name).mixes and name not in _ALONE


def is_free(name: str) -> bool:
    """Whether no method is called so, or only an entry point that was not read yet."""
    return name not in METHODS or METHODS[name].summary == _NOT_READ


def _registered_by(name: str, register: Any) -> Any:
    """The config class of a method whose entry point is a module, or a function, that registers it."""
    row = METHODS[name]
    if callable(register):
        register()
    if METHODS[name] is row:
        raise ConfigError(
            f"entry point {name.lower()!r} of {ENTRY_POINTS}: {row.config} registered no method of this name. "
            f"It is to be a config class, or to call register_peft_method(name={name.lower()!r}, ...)."
        )
    return config_class(name)


ENTRY_POINTS = "peft_dist.methods"
_NOT_READ = "a method of another package"


def _find_entry_points() -> None:
    for point in importlib.metadata.entry_points(group=ENTRY_POINTS):
        name = point.name.upper()
        if name not in METHODS:
            PeftType.extend(name)
            METHODS[name] = Entry(point.value, None, ALL_TASKS, True, _NOT_READ)


_find_entry_points()
