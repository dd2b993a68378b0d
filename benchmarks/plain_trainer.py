"""What a user would write by hand: a TorchTrainer, DeepSpeed ZeRO-2 and HF PEFT, no more than is needed.

    python benchmarks/plain_trainer.py BASE DATA

The yardstick of `startup.py`; prints `first step` once the first optimizer step has ended.
"""

import os
import sys

import ray
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer


def loop(config):
    import deepspeed
    import torch
    from datasets import load_dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # without this the first job of a machine compiles an op for a minute; a plain script that ran before has it
    for name in deepspeed.ops.__compatible_ops__:
        deepspeed.ops.__compatible_ops__[name] = False
    deepspeed.init_distributed("gloo")
    tokenizer = AutoTokenizer.from_pretrained(config["base"])
    model = AutoModelForCausalLM.from_pretrained(config["base"], dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    rows = load_dataset("json", data_files=config["data"], split="train")
    rows = rows.map(
        lambda row: tokenizer.apply_chat_template(
            row["messages"], return_dict=True, truncation=True, max_length=512
        )
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=trained,
        optimizer=torch.optim.AdamW(trained, lr=1e-3),
        config={
            "train_micro_batch_size_per_gpu": 8,
            "zero_optimization": {"stage": 2},
            "zero_allow_untested_optimizer": True,
        },
    )
    rank, size = ray.train.get_context().get_world_rank(), ray.train.get_context().get_world_size()
    batch = [rows[number]["input_ids"] for number in range(rank, 8 * size, size)]
    longest = max(map(len, batch))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in batch])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in batch])
    loss = engine(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
    engine.backward(loss)
    engine.step()
    if rank == 0:
        with open(config["done"], "w") as file:
            file.write("first step\n")


if __name__ == "__main__":
    base, data, done = sys.argv[1:]
    os.environ["DS_ACCELERATOR"] = "cpu"
    ray.init(num_cpus=2, object_store_memory=200_000_000)
    TorchTrainer(
        loop,
        train_loop_config={"base": base, "data": data, "done": done},
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(storage_path=os.path.dirname(done)),
    ).fit()
