from tests.contract.case import CONVS, GROUPED, LINEAR, Case, Field, Parity, tensors_of

CASES = (
    Case("OFT", "plain", {"oft_block_size": 4}, (*LINEAR, "embedding", *CONVS, *GROUPED)),
    Case("OFT", "blocks", {"r": 3, "oft_block_size": 0, "bias": "oft_only"}, ("linear", "Conv1D", "conv2d")),
    Case(
        "OFT",
        "cayley",
        {"oft_block_size": 4, "use_cayley_neumann": False},
        ("linear", "embedding", "conv2d"),
    ),
    Case("OFT", "shared", {"oft_block_size": 4, "block_share": True}, ("linear", "embedding", "conv2d")),
    Case(
        "OFT",
        "constrained",
        {"oft_block_size": 4, "coft": True, "eps": 0.5},
        ("linear", "embedding", "conv2d"),
    ),
    Case("OFT", "random start", {"oft_block_size": 4, "init_weights": False}, ("linear",), is_fresh=False),
)

_OFT = {"task_type": "CAUSAL_LM", "oft_block_size": 8}
_ALL = {**_OFT, "target_modules": ["q_proj", "up_proj", "down_proj"]}
PARITY = {
    "oft": Parity("llama", "OFTConfig", _OFT),
    "oft by blocks": Parity("llama", "OFTConfig", {**_ALL, "oft_block_size": 0, "r": 2, "bias": "oft_only"}),
    "oft by an inverse": Parity("llama", "OFTConfig", {**_ALL, "use_cayley_neumann": False}),
    "oft of shared blocks": Parity("llama", "OFTConfig", {**_ALL, "block_share": True}),
    "oft constrained": Parity("llama", "OFTConfig", {**_ALL, "coft": True, "eps": 0.5}),
    "oft constrained and shared": Parity(
        "llama", "OFTConfig", {**_ALL, "coft": True, "eps": 0.3, "block_share": True}
    ),
    "oft of an adjusted size": Parity("llama", "OFTConfig", {**_ALL, "oft_block_size": 7}),
    "oft of an adjusted number": Parity("llama", "OFTConfig", {**_ALL, "oft_block_size": 0, "r": 7}),
    "oft on an embedding": Parity(
        "llama", "OFTConfig", {**_OFT, "target_modules": ["embed_tokens", "k_proj"]}
    ),
    **{
        f"oft of {terms} terms": Parity("llama", "OFTConfig", {**_OFT, "num_cayley_neumann_terms": terms})
        for terms in (2, 3, 4, 6, 7)
    },
}


def _r() -> None:
    given = {"target_modules": ["q_proj", "v_proj"], "oft_block_size": 0}
    few, more = (tensors_of("OFT", r=value, **given) for value in (2, 4))
    assert few.keys() == more.keys() and few != more


FIELD_BASE = {"oft_block_size": 4, "target_modules": ["q_proj", "v_proj"]}
FIELDS = {
    "r": (_r, Field(2, "error")),
    "oft_block_size": (Field(8, "tensors"), Field(0, "error")),
    "module_dropout": (Field(0.5, "training"), Field(1.0, "error")),
    "init_weights": (Field(False, "start"), Field("zero", "error")),
    "coft": Field(True, "output"),
    "eps": Field(0.1, "output", {"coft": True}),
    "block_share": Field(True, "tensors"),
    "use_cayley_neumann": Field(False, "output"),
    "num_cayley_neumann_terms": Field(6, "output"),
}
