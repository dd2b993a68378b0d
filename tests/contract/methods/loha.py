from tests.contract.case import LINEAR, Case, Field, Parity

CONVS = ("conv1d", "conv2d", "conv1d with groups", "conv2d with groups")

CASES = (
    Case("LOHA", "plain", {"r": 3, "alpha": 5}, (*LINEAR, *CONVS)),
    Case("LOHA", "kernels decomposed", {"r": 3, "use_effective_conv2d": True}, ("linear", *CONVS)),
    Case("LOHA", "random start", {"r": 3, "init_weights": False}, ("linear", "conv2d"), is_fresh=False),
    Case("LOHA", "patterns", {"rank_pattern": {"target": 2}, "alpha_pattern": {"target": 5}}, ("linear",)),
)

_LOHA = {"r": 3, "alpha": 5, "task_type": "CAUSAL_LM"}
_CONVS = {"r": 3, "alpha": 5, "target_modules": ["stem", "depth", "point", "wave", "narrow"]}
PARITY = {
    "loha": Parity("llama", "LoHaConfig", _LOHA),
    "loha on all linear": Parity("llama", "LoHaConfig", {**_LOHA, "target_modules": "all-linear"}),
    "loha with patterns": Parity(
        "llama",
        "LoHaConfig",
        {
            **_LOHA,
            "target_modules": ["q_proj", "down_proj"],
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 4},
            "alpha_pattern": {"down_proj": 9},
        },
    ),
    "loha in some layers": Parity(
        "llama",
        "LoHaConfig",
        {**_LOHA, "target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    ),
    "loha with a random start": Parity("llama", "LoHaConfig", {**_LOHA, "init_weights": False}),
    "loha on convolutions": Parity("convs", "LoHaConfig", _CONVS),
    "loha with decomposed kernels": Parity(
        "convs",
        "LoHaConfig",
        {**_CONVS, "use_effective_conv2d": True},
        wrong_gradients=("hada_w1_a", "hada_w2_a"),
    ),
}

FIELDS = {
    "r": (Field(3, "tensors"), Field(0, "error")),
    "alpha": Field(3, "output"),
    "rank_pattern": (Field({"q_proj": 3}, "tensors"), Field({"q_proj": 0}, "error")),
    "alpha_pattern": Field({"q_proj": 3}, "output"),
    "rank_dropout": (Field(0.5, "training"), Field(1.0, "error")),
    "module_dropout": (Field(0.5, "training"), Field(-0.1, "error")),
    "use_effective_conv2d": Field(True, "tensors", {"target_modules": ["stem"]}, base="convs"),
    "init_weights": Field(False, "start"),
}
