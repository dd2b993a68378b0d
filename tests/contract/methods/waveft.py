from tests.contract.case import LINEAR, Case, Field, Parity, tensors_of

CASES = (
    Case("WAVEFT", "plain", {"n_frequency": 20}, LINEAR),
    Case("WAVEFT", "db3", {"n_frequency": 40, "wavelet_family": "db3"}, ("linear", "Conv1D")),
    Case("WAVEFT", "sym5", {"n_frequency": 40, "wavelet_family": "sym5", "bias": "waveft_only"}, ("linear",)),
    Case("WAVEFT", "coif2", {"n_frequency": 96, "wavelet_family": "coif2"}, ("linear",)),
    Case("WAVEFT", "without transform", {"n_frequency": 20, "use_idwt": False}, ("linear",)),
    Case(
        "WAVEFT",
        "proportional at random",
        {"n_frequency": 20, "proportional_parameters": True, "init_weights": False},
        ("linear",),
        is_fresh=False,
    ),
)

_FEW = {"task_type": "CAUSAL_LM", "n_frequency": 30, "scaling": 5.0}
PARITY = {
    "waveft": Parity("llama", "WaveFTConfig", _FEW),
    "waveft on Conv1D": Parity("gpt2", "WaveFTConfig", {**_FEW, "fan_in_fan_out": True}),
    "waveft without transform": Parity("llama", "WaveFTConfig", {**_FEW, "use_idwt": False}),
    "waveft by sizes": Parity(
        "llama",
        "WaveFTConfig",
        {
            **_FEW,
            "target_modules": ["q_proj", "up_proj", "down_proj"],
            "proportional_parameters": True,
            "wavelet_family": "sym4",
        },
    ),
    **{
        f"waveft of {family}": Parity(
            "llama",
            "WaveFTConfig",
            {
                **_FEW,
                "target_modules": ["v_proj", "up_proj"],
                "wavelet_family": family,
                "n_frequency_pattern": {"up_proj": 99},
                "random_loc_seed": 4,
                "bias": "waveft_only",
            },
        )
        for family in ("db2", "db7", "db10", "sym2", "sym9", "coif1", "coif3")
    },
}


def _n_frequency() -> None:
    given = {"target_modules": ["q_proj", "v_proj"]}
    few, more = (tensors_of("WAVEFT", n_frequency=value, **given) for value in (30, 31))
    assert few.keys() == more.keys() and few != more


FIELD_BASE = {"n_frequency": 30, "target_modules": ["q_proj", "up_proj"]}
FIELDS = {
    "n_frequency": (_n_frequency, Field(0, "error"), Field(385, "error")),
    "scaling": Field(100.0, "output"),
    "wavelet_family": (Field("db2", "output"), Field("db39", "error")),
    "use_idwt": Field(False, "output"),
    "random_loc_seed": Field(3, "output"),
    "n_frequency_pattern": Field({"up_proj": 4}, "tensors"),
    "proportional_parameters": Field(True, "tensors"),
    "init_weights": Field(False, "start"),
}
