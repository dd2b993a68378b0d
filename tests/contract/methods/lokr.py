from tests.contract.case import LINEAR, Case, Field, Parity

CONVS = ("conv1d", "conv2d", "conv1d with groups", "conv2d with groups")

CASES = (
    Case("LOKR", "W2 of low rank", {"r": 1, "alpha": 3}, (*LINEAR, *CONVS)),
    Case("LOKR", "whole", {"r": 8, "alpha": 3}, (*LINEAR, *CONVS)),
    Case("LOKR", "both of low rank", {"r": 1, "decompose_both": True}, ("linear", *CONVS)),
    Case("LOKR", "kernels decomposed", {"r": 1, "use_effective_conv2d": True}, CONVS),
    Case("LOKR", "factor", {"r": 2, "decompose_factor": 2}, ("linear", "conv2d")),
    Case("LOKR", "as LyCORIS starts", {"r": 1, "init_weights": "lycoris"}, ("linear", "conv2d")),
    Case("LOKR", "random start", {"r": 1, "init_weights": False}, ("linear", "conv2d"), is_fresh=False),
    Case("LOKR", "patterns", {"rank_pattern": {"target": 1}, "alpha_pattern": {"target": 5}}, ("linear",)),
)

_LOKR = {"r": 1, "alpha": 5, "task_type": "CAUSAL_LM"}
_CONVS = {"r": 1, "alpha": 5, "target_modules": ["stem", "depth", "point", "wave", "narrow"]}
PARITY = {
    "lokr": Parity("llama", "LoKrConfig", _LOKR),
    "lokr of whole factors": Parity("llama", "LoKrConfig", {**_LOKR, "r": 8, "target_modules": "all-linear"}),
    "lokr of both": Parity(
        "llama", "LoKrConfig", {**_LOKR, "decompose_both": True, "target_modules": "all-linear"}
    ),
    "lokr with a factor": Parity(
        "llama", "LoKrConfig", {**_LOKR, "decompose_factor": 8, "target_modules": ["q_proj", "up_proj"]}
    ),
    "lokr with patterns": Parity(
        "llama",
        "LoKrConfig",
        {
            **_LOKR,
            "target_modules": ["q_proj", "down_proj"],
            "rank_pattern": {"q_proj": 2},
            "alpha_pattern": {"down_proj": 9},
        },
    ),
    "lokr with LyCORIS's start": Parity("llama", "LoKrConfig", {**_LOKR, "init_weights": "lycoris"}),
    "lokr with a random start": Parity("llama", "LoKrConfig", {**_LOKR, "init_weights": False}),
    "lokr on convolutions": Parity("convs", "LoKrConfig", _CONVS),
    "lokr on convolutions, whole": Parity("convs", "LoKrConfig", {**_CONVS, "r": 8}),
    "lokr on convolutions, both": Parity("convs", "LoKrConfig", {**_CONVS, "decompose_both": True}),
    "lokr with decomposed kernels": Parity(
        "convs", "LoKrConfig", {**_CONVS, "r": 2, "decompose_factor": 1, "use_effective_conv2d": True}
    ),
}

FIELD_BASE = {"target_modules": ["q_proj", "v_proj"], "r": 1}
FIELDS = {
    "r": (Field(1, "tensors"), Field(0, "error")),
    "alpha": Field(3, "output"),
    "rank_pattern": (Field({"q_proj": 3}, "tensors"), Field({"q_proj": 0}, "error")),
    "alpha_pattern": Field({"q_proj": 3}, "output"),
    "rank_dropout": (Field(0.5, "training"), Field(1.0, "error")),
    "rank_dropout_scale": Field(True, "training", {"rank_dropout": 0.5}),
    "module_dropout": (Field(0.5, "training"), Field(-0.1, "error")),
    "use_effective_conv2d": Field(True, "tensors", {"target_modules": ["stem"]}, base="convs"),
    "decompose_both": Field(True, "tensors"),
    "decompose_factor": (Field(2, "tensors"), Field(0, "error")),
    "init_weights": (Field("lycoris", "start"), Field(False, "start"), Field("none", "error")),
}
