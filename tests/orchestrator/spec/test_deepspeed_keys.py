import pytest

from orchestrator.deepspeed_config import deepspeed_config, warnings
from orchestrator.spec.deepspeed_keys import zero_stage

from .jobs import refused_after_minimal, spec_of


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_stage_by_name(stage):
    config = deepspeed_config(
        spec_of(f"deepspeed: zero{stage}\ntraining: {{micro_batch_size: 4}}\n"), hidden=64
    )
    assert config["zero_optimization"]["stage"] == stage
    assert config["train_micro_batch_size_per_gpu"] == config["train_batch_size"] == 4
    assert config["gradient_clipping"] == 1.0  # DeepSpeed's own default is not relied on
    assert config["fp16"] == config["bf16"] == {"enabled": False}
    assert "optimizer" not in config and "offload_param" not in config["zero_optimization"]
    assert ("stage3_prefetch_bucket_size" in config["zero_optimization"]) == (stage == 3)


def test_auto_is_filled_in():
    text = """\
        deepspeed:
          train_batch_size: auto
          gradient_accumulation_steps: auto
          gradient_clipping: auto
          bf16: {enabled: auto}
          optimizer: {type: AdamW, params: {lr: auto}}
          steps_per_print: 5
          zero_optimization: {stage: 3, stage3_prefetch_bucket_size: auto, overlap_comm: true}
        training: {global_batch_size: 6, micro_batch_size: 3, max_grad_norm: 0.5}
        """
    spec = spec_of(text)
    config = deepspeed_config(spec, hidden=64)
    assert config["train_batch_size"] == 6 and config["gradient_accumulation_steps"] == 2
    assert config["gradient_clipping"] == 0.5 and config["steps_per_print"] == 5
    assert config["zero_optimization"]["stage3_prefetch_bucket_size"] == int(0.9 * 64 * 64)
    assert "auto" not in str(config)
    assert "optimizer" not in config and "overlap_comm" not in config["zero_optimization"]
    assert warnings(spec) == [
        "deepspeed: no effect here: optimizer, zero_optimization.overlap_comm. The adapter's states and gradients are "
        "sharded by raypeft's own optimizer; write training.* for what it does."
    ]
    assert warnings(spec_of()) == []


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ("{train_batch_size: 8}", "deepspeed.train_batch_size: 8 contradicts training.global_batch_size: 1. "
                                  "Write training.global_batch_size, and 'auto' or nothing here."),
        ("{train_micro_batch_size_per_gpu: 2}",
         "deepspeed.train_micro_batch_size_per_gpu: 2 contradicts training.micro_batch_size: 1. "
         "Write training.micro_batch_size, and 'auto' or nothing here."),
        ("{gradient_clipping: 0.3}", "deepspeed.gradient_clipping: 0.3 contradicts training.max_grad_norm: 1.0. "
                                     "Write training.max_grad_norm, and 'auto' or nothing here."),
        ("{fp16: {enabled: true}}", "deepspeed.fp16.enabled: true contradicts training.precision: auto, which is fp32 "
                                    "where there is no GPU. Write training.precision: fp16, and 'auto' or nothing "
         "here."),
        ("{optimizer: {params: {lr: 1}}}", "deepspeed.optimizer.params.lr: 1 contradicts training.learning_rate: "
                                           "0.0002. Write training.learning_rate alone."),
        ("{zero_optimization: {stage: 2, offload_param: {device: cpu}}}",
         "deepspeed.zero_optimization.offload_param: only stage 3 has pieces of the base to keep elsewhere; the stage "
         "is 2. Write zero_optimization.stage: 3, or remove it."),
        ("{zero_optimization: {stage: 3, offload_param: {device: nvme}}}",
         "deepspeed.zero_optimization.offload_param.device: 'nvme': pieces of the base rest on the devices or in the "
         "nodes' memory. Write device: cpu, or none."),
        ("{zero_optimization: {stage: 3, offload_param: {pin_memori: true}}}",
         "deepspeed.zero_optimization.offload_param.pin_memori: is not a key of DeepSpeed's config. "
         "Closest: 'zero_optimization.offload_param.pin_memory'."),
        ("{zero_optimization: {stage: 3, offload_param: cpu}}",
         "deepspeed.zero_optimization.offload_param: is not a mapping. Write offload_param: {device: cpu}."),
        ("{zero_optimization: {stage: 3, cpu_offload_params: true}}",
         "deepspeed.zero_optimization.cpu_offload_params: is what DeepSpeed called it once. Write zero_optimization: "
         "{stage: 3, offload_param: {device: cpu}}."),
        ("{zero_optimization: {stage: 4}}",
         "deepspeed.zero_optimization.stage: 4 is not a stage. Stages: 0, 1, 2, 3."),
        ("{zero_optimisation: {stage: 2}}",
         "deepspeed.zero_optimisation: is not a key of DeepSpeed's config. Closest: 'zero_optimization'."),
        ("{zero_optimization: {stge: 2}}",
         "deepspeed.zero_optimization.stge: is not a key of DeepSpeed's config. Closest: 'zero_optimization.stage'."),
    ],
)  # fmt: skip
def test_conflicts_name_both(mapping, message):
    assert refused_after_minimal(f"deepspeed: {mapping}\n") == f"jobs/x.yaml:3 {message}"


def test_what_agrees_is_no_conflict():
    spec = spec_of(
        "deepspeed: {train_batch_size: 1, fp16: {enabled: true}, zero_optimization: {stage: 2, offload_param: "
        "{device: none}}}\ntraining: {precision: fp16}\n"
    )
    assert zero_stage(spec.deepspeed) == 2
    assert deepspeed_config(spec)["fp16"] == {"enabled": False}  # our own loop scales the loss
    assert zero_stage({}) == 0


def test_the_base_s_pieces_rest_in_the_nodes_memory():
    by_name = deepspeed_config(spec_of("deepspeed: zero3-offload\n"))["zero_optimization"]
    assert by_name["stage"] == 3 and by_name["offload_param"] == {"device": "cpu", "pin_memory": True}
    text = "deepspeed: {zero_optimization: {stage: 3, offload_param: {device: cpu, pin_memory: false}}}\n"
    given = deepspeed_config(spec_of(text))["zero_optimization"]
    assert given["offload_param"] == {"device": "cpu", "pin_memory": False}
    none = deepspeed_config(spec_of(text.replace("device: cpu", "device: none")))["zero_optimization"]
    assert "offload_param" not in none


def test_an_adapter_s_states_are_ours_and_stay_where_they_are():
    spec = spec_of("deepspeed: {zero_optimization: {stage: 3, offload_optimizer: {device: cpu}}}\n")
    assert "offload_optimizer" not in deepspeed_config(spec)["zero_optimization"]
    assert warnings(spec)[0].startswith("deepspeed: no effect here: zero_optimization.offload_optimizer. ")
