import json
import struct
from pathlib import Path

import fsspec
import pytest

from orchestrator.errors import ModelError, SpecError
from orchestrator.model_folder import ModelFolder
from orchestrator.plan import make_plan
from orchestrator.plan.model_sizes import read_sizes
from orchestrator.spec.load import load_job_mapping
from peft_dist.loading import load_base

ROOT = Path(__file__).parents[2]

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 16, "vocab_size": 32,
    "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip
BLOCK = "model.layers.0"
SHAPES = {
    "model.embed_tokens.weight": (32, 8),
    f"{BLOCK}.self_attn.q_proj.weight": (8, 8),
    f"{BLOCK}.self_attn.k_proj.weight": (4, 8),
    f"{BLOCK}.mlp.down_proj.weight": (8, 16),
    f"{BLOCK}.input_layernorm.weight": (8,),
    "lm_head.weight": (32, 8),
}


def safetensors(shapes, dtype="F32", size=4):
    """The bytes of a safetensors file of zeros."""
    table, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        count = size
        for axis in shape:
            count *= axis
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + count]}
        end += count
    head = json.dumps(table).encode()
    return struct.pack("<Q", len(head)) + head + bytes(end)


def base(folder, config=CONFIG, **files):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name, content in (files or {"model.safetensors": safetensors(SHAPES)}).items():
        (folder / name.replace("__", ".")).write_bytes(content)
    return str(folder)


def test_sizes_of_a_base(tmp_path):
    sizes = read_sizes(base(tmp_path / "m"))
    assert sizes.parameters == 32 * 8 * 2 + 64 + 32 + 128 + 8
    assert (sizes.hidden, sizes.layers, sizes.heads, sizes.kv_heads, sizes.intermediate) == (8, 1, 2, 1, 16)
    assert (sizes.vocab, sizes.max_positions, sizes.dtype, sizes.architecture) == (
        32,
        64,
        "float32",
        "LlamaForCausalLM",
    )
    assert sizes.linear_shapes == {
        f"{BLOCK}.self_attn.q_proj": (8, 8), f"{BLOCK}.self_attn.k_proj": (4, 8), f"{BLOCK}.mlp.down_proj": (8, 16),
    }  # fmt: skip
    assert not sizes.tied and sizes.head_dim == 4 and sizes.stored_bytes == 4 * sizes.parameters
    assert sizes.heads_of_output == {"lm_head"}
    kinds = sizes.module_kinds
    assert (kinds["model.embed_tokens"], kinds[BLOCK], kinds["lm_head"]) == ("embedding", "module", "linear")


def test_half_precision_and_tied_weights(tmp_path):
    shapes = {name: shape for name, shape in SHAPES.items() if name != "lm_head.weight"}
    folder = base(tmp_path / "m", {**CONFIG, "tie_word_embeddings": True})
    (tmp_path / "m" / "model.safetensors").write_bytes(safetensors(shapes, "BF16", 2))
    sizes = read_sizes(folder)
    assert sizes.tied and sizes.dtype == "bfloat16" and sizes.stored_bytes == 2 * sizes.parameters
    assert sizes.module_kinds["lm_head"] == "linear"


def test_shards_are_read_together_and_a_missing_one_is_named(tmp_path):
    names = list(SHAPES)
    first, second = {n: SHAPES[n] for n in names[:3]}, {n: SHAPES[n] for n in names[3:]}
    folder = tmp_path / "m"
    base(folder)
    whole = read_sizes(str(folder)).parameters
    (folder / "model.safetensors").unlink()
    (folder / "a.safetensors").write_bytes(safetensors(first))
    (folder / "b.safetensors").write_bytes(safetensors(second))
    index = {name: "a.safetensors" if name in first else "b.safetensors" for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert read_sizes(str(folder)).parameters == whole
    (folder / "b.safetensors").unlink()
    with pytest.raises(ModelError, match=r"lacks b.safetensors, which model.safetensors.index.json names"):
        read_sizes(str(folder))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (safetensors(SHAPES)[:-100], "is truncated"),
        (safetensors(SHAPES)[:20], "is truncated"),
        (b"abc", "is truncated"),
        (struct.pack("<Q", 10) + b"not json!!" + bytes(50), "is not a safetensors file"),
        (struct.pack("<Q", 2**60) + bytes(100), "is truncated"),
    ],
)
def test_damaged_weights_are_found_by_their_header(tmp_path, content, message):
    folder = base(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=message) as raised:
        read_sizes(folder)
    assert f"model.safetensors of the base '{folder}'" in str(raised.value)


def test_a_base_that_is_not_there_names_the_closest(tmp_path):
    base(tmp_path / "tiny-llama")
    with pytest.raises(ModelError) as raised:
        read_sizes(str(tmp_path / "tiny-lama"))
    assert str(tmp_path / "tiny-lama") in str(raised.value) and "tiny-llama'" in str(raised.value)


def test_other_names_for_the_sizes(tmp_path):
    config = {
        "model_type": "gpt2",
        "n_embd": 8,
        "n_layer": 2,
        "n_head": 2,
        "vocab_size": 32,
        "n_positions": 16,
    }
    sizes = read_sizes(base(tmp_path / "m", config))
    assert (sizes.hidden, sizes.layers, sizes.kv_heads, sizes.intermediate, sizes.max_positions) == (
        8,
        2,
        2,
        32,
        16,
    )
    assert sizes.architecture == "gpt2"


def test_a_base_at_a_url():
    files = fsspec.filesystem("memory")
    files.pipe("/sizes/config.json", json.dumps(CONFIG).encode())
    files.pipe("/sizes/model.safetensors", safetensors(SHAPES))
    assert read_sizes("memory://sizes").hidden == 8


def test_the_embedded_base():
    sizes = read_sizes("jobs/assets/tiny-llama")
    assert sizes.architecture == "LlamaForCausalLM" and sizes.tied and sizes.parameters < 4_200_000


@pytest.mark.parametrize("quantised", ["int8", "nf4", "fp4"])
def test_stored_codes_count_as_what_they_stand_for(quantised, tmp_path, monkeypatch):
    full = ROOT / "jobs" / "assets" / "tiny-llama"
    load_base(str(full), dtype="bfloat16", quantization=quantised).save_pretrained(
        tmp_path / "stored", max_shard_size="1MB"
    )
    reads: list[int] = []
    read = ModelFolder.read

    def counted(folder, name, start=None, end=None):
        reads.append((end or 0) - (start or 0))
        return read(folder, name, start, end)

    monkeypatch.setattr(ModelFolder, "read", counted)
    sizes, expected = read_sizes(str(tmp_path / "stored")), read_sizes(str(full))
    assert (sizes.parameters, sizes.linear_shapes) == (expected.parameters, expected.linear_shapes)
    assert sizes.tensors == expected.tensors and sizes.dtype == "bfloat16"
    assert sizes.quantization is not None and sizes.quantization.quant_type == quantised
    # Heads of files, and of layers that are alike the facts of one.
    layers = len(expected.linear_shapes)
    files = len(list((tmp_path / "stored").glob("*.safetensors")))
    assert len(reads) - 2 * files < layers and sum(reads) < 40_000

    asked = {"base_model": str(tmp_path / "stored"), "load_in_4bit": True}
    spec = load_job_mapping(
        {"name": "x", "model": asked, "data": {"datasets": [{"path": "rows.jsonl"}]}}
    ).spec
    with pytest.raises(
        SpecError, match=rf"model.load_in_4bit: the base .* is stored quantised \({quantised}"
    ):
        make_plan(spec, None, sizes)
    spec = spec.model_copy(update={"model": spec.model.model_copy(update={"load_in_4bit": False})})
    assert make_plan(spec, None, sizes).quantization == sizes.quantization.name
