import pytest

from orchestrator.spec.canonical import resolved_values
from orchestrator.spec.quantization import Quantization, quantization_of

from .jobs import refused, spec_of


def model_of(keys):
    return spec_of(overrides=[f"model.{key}" for key in keys]).model


@pytest.mark.parametrize(
    ("keys", "precision", "stage", "expected"),
    [
        ([], "bf16", 3, None),
        (["load_in_8bit=true"], "fp32", 0, Quantization(8, "int8", False, "float16", "int8")),
        (["load_in_4bit=true"], "fp32", 2, Quantization(4, "nf4", True, "float32", "uint8")),
        (["load_in_4bit=true"], "bf16", 3, Quantization(4, "nf4", True, "bfloat16", "bfloat16")),
        (["load_in_4bit=true"], "fp32", 3, Quantization(4, "nf4", True, "float32", "float32")),
        (
            ["load_in_4bit=true", "bnb_4bit_quant_type=fp4", "bnb_4bit_use_double_quant=false"],
            "fp16", 1, Quantization(4, "fp4", False, "float16", "uint8"),
        ),
        (
            ["load_in_4bit=true", "bnb_4bit_compute_dtype=bfloat16", "bnb_4bit_quant_storage=uint8"],
            "fp32", 3, Quantization(4, "nf4", True, "bfloat16", "uint8"),
        ),
    ],
)  # fmt: skip
def test_what_a_job_says_of_its_base(keys, precision, stage, expected):
    assert quantization_of(model_of(keys), precision, stage) == expected


def test_names_tell_them_apart():
    names = {
        quantization_of(model_of(keys)).name
        for keys in (
            ["load_in_8bit=true"],
            ["load_in_4bit=true"],
            ["load_in_4bit=true", "bnb_4bit_use_double_quant=false"],
            ["load_in_4bit=true", "bnb_4bit_quant_type=fp4"],
        )
    }
    assert names == {"int8", "nf4+double", "nf4", "fp4+double"}


def test_the_resolved_job_says_all_of_it():
    resolved = resolved_values(spec_of(overrides=["model.load_in_4bit=true"]))["model"]
    assert resolved == {
        "base_model": "b",
        "revision": "main",
        "trust_remote_code": False,
        "load_in_8bit": False,
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "auto",
        "bnb_4bit_quant_storage": "auto",
    }


DATA = "data: {datasets: [{path: a}]}\n"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("load_in_4bit: true, load_in_8bit: true",
         "model.load_in_8bit: true beside model.load_in_4bit: true. Keep one of the two."),
        ("bnb_4bit_quant_type: fp4",
         "model.bnb_4bit_quant_type: 'fp4': of a 4-bit base, and model.load_in_4bit is false. "
         "Write load_in_4bit: true beside it, or remove it."),
        ("load_in_8bit: true, bnb_4bit_use_double_quant: false",
         "model.bnb_4bit_use_double_quant: false: of a 4-bit base, and model.load_in_4bit is false. "
         "Write load_in_4bit: true beside it, or remove it."),
        ("load_in_4bit: true, bnb_4bit_quant_type: nf3",
         "model.bnb_4bit_quant_type: 'nf3' is not one of nf4, fp4. Closest: 'nf4'."),
        ("load_in_4bit: 4", "model.load_in_4bit: 4 is not true or false."),
    ],
)  # fmt: skip
def test_what_contradicts_itself_is_refused(model, message):
    assert refused(f"model: {{base_model: b, {model}}}\n{DATA}") == f"jobs/x.yaml:1 {message}"


def test_keys_that_say_their_default_are_no_contradiction():
    assert quantization_of(model_of(["bnb_4bit_quant_type=nf4", "load_in_4bit=false"])) is None
