from tests.contract.case import LINEAR, Case, Field, Parity

CASES = (
    Case("ROAD", "road_1", {"group_size": 4}, LINEAR),
    Case("ROAD", "road_2", {"group_size": 8, "variant": "road_2"}, LINEAR),
    Case("ROAD", "road_4", {"group_size": 2, "variant": "road_4"}, LINEAR),
    Case("ROAD", "random start", {"group_size": 4, "init_weights": False}, ("linear",), is_fresh=False),
)

_ROAD = {"task_type": "CAUSAL_LM", "group_size": 8}
PARITY = {
    variant: Parity(
        "llama", "RoadConfig", {**_ROAD, "variant": variant, "target_modules": ["q_proj", "up_proj"]}
    )
    for variant in ("road_1", "road_2", "road_4")
}

FIELD_BASE = {"group_size": 8, "target_modules": ["q_proj", "v_proj"]}
FIELDS = {
    "variant": (Field("road_2", "tensors"), Field("road_4", "tensors"), Field("road_3", "error")),
    "group_size": (
        Field(4, "output", {"target_modules": ["lm_head"]}),
        Field(3, "error"),
        Field(0, "error"),
        Field(6, "error"),
    ),
    "init_weights": Field(False, "start"),
}
