"""What a user would write by hand for a sweep: Ray Tune over Ray Train, DeepSpeed ZeRO-2 and HF PEFT.

    python benchmarks/plain_sweep.py BASE DATA TRIALS STEPS DONE

The yardstick of `sweep.py`: each trial is a TorchTrainer of one worker, two at a time on two cores; writes each trial's
last evaluation loss into DONE.
"""

import json
import os
import sys
import tempfile

import ray
from ray import tune
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.tune.integration.ray_train import TuneReportCallback

BATCH, HELD_OUT = 8, 32


def loop(config):
    import deepspeed
    import torch
    from datasets import load_dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for name in deepspeed.ops.__compatible_ops__:
        deepspeed.ops.__compatible_ops__[name] = False
    deepspeed.init_distributed("gloo")
    tokenizer = AutoTokenizer.from_pretrained(config["base"])
    model = AutoModelForCausalLM.from_pretrained(config["base"], dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    rows = load_dataset("json", data_files=config["data"], split="train")
    rows = rows.map(
        lambda row: tokenizer.apply_chat_template(
            row["messages"], return_dict=True, truncation=True, max_length=128
        )
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=trained,
        optimizer=torch.optim.AdamW(trained, lr=config["lr"]),
        config={
            "train_micro_batch_size_per_gpu": BATCH,
            "zero_optimization": {"stage": 2},
            "zero_allow_untested_optimizer": True,
        },
    )

    def loss_of(numbers):
        batch = [rows[number]["input_ids"] for number in numbers]
        longest = max(map(len, batch))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in batch])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in batch])
        return engine(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss

    for step in range(config["steps"]):
        first = HELD_OUT + step * BATCH
        loss = loss_of(number % len(rows) for number in range(first, first + BATCH))
        engine.backward(loss)
        engine.step()
    with torch.no_grad():
        losses = [float(loss_of(range(first, first + BATCH))) for first in range(0, HELD_OUT, BATCH)]
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        ray.train.report(
            {"eval_loss": sum(losses) / len(losses)}, checkpoint=ray.train.Checkpoint.from_directory(folder)
        )


def trial(config):
    TorchTrainer(
        loop,
        train_loop_config=config,
        scaling_config=ScalingConfig(num_workers=1),
        run_config=RunConfig(
            name=f"trial-{config['lr']:g}",
            storage_path=config["storage"],
            callbacks=[TuneReportCallback()],
        ),
    ).fit()


if __name__ == "__main__":
    base, data, trials, steps, done = sys.argv[1:]
    os.environ["DS_ACCELERATOR"] = "cpu"
    ray.init(
        num_cpus=2, object_store_memory=200_000_000
    )  # with its dashboard: without, Tune leaks the trials' places
    rates = [10 ** (-4 + 2 * number / (int(trials) - 1)) for number in range(int(trials))]
    fixed = {"base": base, "data": data, "steps": int(steps), "storage": os.path.dirname(done)}
    results = tune.Tuner(
        tune.with_resources(trial, {"CPU": 0.01}),
        param_space={**fixed, "lr": tune.grid_search(rates)},
        tune_config=tune.TuneConfig(metric="eval_loss", mode="min", max_concurrent_trials=2),
        run_config=tune.RunConfig(name="tune", storage_path=os.path.dirname(done)),
    ).fit()
    with open(done, "w") as file:
        json.dump([result.metrics["eval_loss"] for result in results], file)
