"""A short training run that any number of ranks makes: the subject, and on one rank the oracle, of law 8.

A global batch is 8 samples of unequal length in two micro-batches; its loss is the sum over all target tokens
divided by their number. Everything is float64, so that what remains of a difference is a mistake and not
rounding.
"""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft_dist import (
    AdaLoraConfig,
    AdaptionPromptConfig,
    BOFTConfig,
    BoneConfig,
    C3AConfig,
    CPTConfig,
    DeloraConfig,
    FourierFTConfig,
    GraloraConfig,
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    MultitaskPromptTuningConfig,
    OFTConfig,
    OSFConfig,
    PolyConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    RandLoraConfig,
    RoadConfig,
    Rows,
    ShiraConfig,
    TrainableTokensConfig,
    VBLoRAConfig,
    VeraConfig,
    WaveFTConfig,
    XLoraConfig,
    get_peft_model,
)
from peft_dist.config import PeftConfig
from peft_dist.model import PeftModel
from peft_dist.optim import AdapterOptimizer, Hyper
from peft_dist.sharding import elements_at_rest, partition_base

VOCAB, LENGTH, MICRO_BATCHES, PER_MICRO_BATCH, STEPS, SEED = 32, 9, 2, 4, 3, 11
ZERO3 = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
HYPER = Hyper(1e-3, weight_decay=0.01, max_grad_norm=1.0)

SOME: dict[str, Any] = {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
NUM_TASKS = 3

# Every method of the catalog, with a start that reads the base where it has one.
METHODS: dict[str, Callable[[], PeftConfig]] = {
    "LORA": lambda: LoraConfig(
        r=4,
        lora_dropout=0.1,
        target_modules=["q_proj", "v_proj", "down_proj", "embed_tokens"],
        modules_to_save=["lm_head"],
        task_type="CAUSAL_LM",
    ),
    "IA3": lambda: IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        task_type="CAUSAL_LM",
    ),
    "PROMPT_TUNING": lambda: PromptTuningConfig(
        num_virtual_tokens=3, prompt_tuning_init="SAMPLE_VOCAB", task_type="CAUSAL_LM"
    ),
    "MULTITASK_PROMPT_TUNING": lambda: MultitaskPromptTuningConfig(
        num_virtual_tokens=2, num_tasks=NUM_TASKS, num_ranks=2, task_type="CAUSAL_LM"
    ),
    "P_TUNING": lambda: PromptEncoderConfig(
        num_virtual_tokens=2,
        encoder_hidden_size=4,
        encoder_reparameterization_type="LSTM",
        task_type="CAUSAL_LM",
    ),
    "PREFIX_TUNING": lambda: PrefixTuningConfig(
        num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=4, task_type="CAUSAL_LM"
    ),
    "CPT": lambda: CPTConfig(cpt_token_ids=[3, 4, 5], cpt_tokens_type_mask=[1, 2, 3], task_type="CAUSAL_LM"),
    "ADAPTION_PROMPT": lambda: AdaptionPromptConfig(adapter_len=3, adapter_layers=2, task_type="CAUSAL_LM"),
    "LOHA": lambda: LoHaConfig(r=3, rank_dropout=0.2, **SOME),
    "LOKR": lambda: LoKrConfig(r=1, module_dropout=0.3, **SOME),
    "VERA": lambda: VeraConfig(r=5, vera_dropout=0.1, **SOME),
    "RANDLORA": lambda: RandLoraConfig(r=5, randlora_alpha=2, save_projection=False, **SOME),
    "VBLORA": lambda: VBLoRAConfig(r=2, num_vectors=9, vector_length=8, **SOME),
    "GRALORA": lambda: GraloraConfig(r=4, hybrid_r=2, gralora_dropout=0.1, **SOME),
    "DELORA": lambda: DeloraConfig(r=3, **SOME),
    "ADALORA": lambda: AdaLoraConfig(init_r=4, target_r=2, total_step=10, lora_dropout=0.1, **SOME),
    "XLORA": lambda: XLoraConfig(
        hidden_size=16,
        adapters=experts(),
        xlora_depth=2,
        xlora_size=5,
        layerwise_scalings=True,
        use_trainable_adapters=True,
        task_type="CAUSAL_LM",
    ),
    "POLY": lambda: PolyConfig(r=3, n_tasks=NUM_TASKS, n_splits=2, **SOME),
    "FOURIERFT": lambda: FourierFTConfig(n_frequency=9, **SOME),
    "WAVEFT": lambda: WaveFTConfig(n_frequency=9, wavelet_family="db2", **SOME),
    "C3A": lambda: C3AConfig(block_size=8, **SOME),
    "MISS": lambda: MissConfig(r=4, init_weights="bat", **SOME),
    "BONE": lambda: BoneConfig(r=4, **SOME),
    "SHIRA": lambda: ShiraConfig(r=2, **SOME),
    "OSF": lambda: OSFConfig(effective_rank=5, **SOME),
    "OFT": lambda: OFTConfig(oft_block_size=4, r=0, **SOME),
    "BOFT": lambda: BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=2, **SOME),
    "HRA": lambda: HRAConfig(r=4, **SOME),
    "ROAD": lambda: RoadConfig(variant="road_2", group_size=8, **SOME),
    "LN_TUNING": lambda: LNTuningConfig(target_modules=["input_layernorm", "norm"], task_type="CAUSAL_LM"),
    "TRAINABLE_TOKENS": lambda: TrainableTokensConfig(
        token_indices=[1, 4, 9], target_modules=["embed_tokens"], task_type="CAUSAL_LM"
    ),
}


@functools.cache
def experts() -> dict[str, str]:
    """Two LoRA adapters of the base, saved."""
    folder = tempfile.mkdtemp(prefix="experts-")
    for number, targets in enumerate((["q_proj", "embed_tokens"], ["q_proj", "down_proj"])):
        torch.manual_seed(number)
        config = LoraConfig(
            r=2 + number,
            target_modules=targets,
            lora_dropout=0.1,
            init_lora_weights=False,
            task_type="CAUSAL_LM",
        )
        get_peft_model(base(), config).save_pretrained(f"{folder}/{number}")
    return {str(number): f"{folder}/{number}" for number in range(2)}


def base(initializer_range: float = 0.02) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        initializer_range=initializer_range,
    )
    # X-LoRA's tokens are decided from a run over all of them.
    config.use_cache = False
    model = LlamaForCausalLM(config).double().train()
    # DeepSpeed looks at the first parameter alone, and refuses float64 there.
    model.first = nn.Parameter(torch.zeros(2, dtype=torch.float32), requires_grad=False)
    return model


def rank_and_world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def batch(step: int, micro: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, labels and global indices of the samples of this rank's contiguous share."""
    rank, world = rank_and_world()
    generator = torch.Generator().manual_seed(1000 * step + micro)
    ids = torch.randint(0, VOCAB, (PER_MICRO_BATCH, LENGTH), generator=generator)
    labels = ids.clone()
    for row in range(PER_MICRO_BATCH):
        labels[row, : 1 + (row * 3 + step + micro) % (LENGTH - 3)] = -100
    share = slice(rank * PER_MICRO_BATCH // world, (rank + 1) * PER_MICRO_BATCH // world)
    indices = torch.arange(PER_MICRO_BATCH) + PER_MICRO_BATCH * (MICRO_BATCHES * step + micro)
    return ids[share], labels[share], indices[share]


def num_target_tokens(step: int, micro_batches: int = MICRO_BATCHES) -> int:
    """Over the whole global batch, on every rank."""
    total = 0
    for micro in range(micro_batches):
        for row in range(PER_MICRO_BATCH):
            total += LENGTH - max(1, 1 + (row * 3 + step + micro) % (LENGTH - 3))
    return total


def token_loss_sum(logits: Tensor, labels: Tensor) -> Tensor:
    logits = logits[:, -labels.shape[1] :]  # without virtual tokens
    targets = labels[:, 1:].flatten()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), targets, ignore_index=-100, reduction="sum")


def disturb(model: PeftModel, seed: int = 3) -> None:
    """Moves every trained tensor off its start, the same on each rank."""
    for number, name in enumerate(model.peft_config):
        generator = torch.Generator().manual_seed(seed + number)
        for parameter in trained(model, name).values():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.05
            parameter.data.add_(noise.to(parameter.device))


def trained(model: PeftModel, name: str) -> dict[str, nn.Parameter]:
    return {key: p for key, p in model.adapter_tensors(name).items() if p.requires_grad}


def build(
    stage: int, configs: dict[str, PeftConfig], *, partition_first: bool, checkpointing: bool
) -> tuple[PeftModel, AdapterOptimizer]:
    """The base with all these adapters, trainable, and an optimizer that holds them."""
    model = base()
    partitions = stage == 3 and dist.is_initialized()
    if partitions and partition_first:
        partition_base(model, ZERO3)
    torch.manual_seed(SEED)
    names = list(configs)
    peft_model = get_peft_model(model, copy.deepcopy(configs[names[0]]), names[0])
    for name in names[1:]:
        peft_model.add_adapter(name, copy.deepcopy(configs[name]))
    if partitions and not partition_first:
        partition_base(peft_model, ZERO3)
    if checkpointing:
        peft_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    peft_model.set_requires_grad(names, True)
    disturb(peft_model)
    optimizer = AdapterOptimizer(stage=stage)
    for name in names:
        optimizer.add(name, trained(peft_model, name), HYPER)
    return peft_model.train(), optimizer


def train(
    model: PeftModel,
    optimizer: AdapterOptimizer,
    steps: range,
    choose: Callable[[int], str | None] | None = None,
) -> dict[str, Any]:
    """Losses (whole), gradients of the first step (those that this rank keeps), norms, elements at rest.

    `choose` names the adapter of a sample by its place in its micro-batch; all ranks use the active one if
    None.
    """
    report: dict[str, Any] = {"losses": [], "norms": [], "gradients": {}, "at_rest": []}
    for step in steps:
        optimizer.zero_grad()
        loss_sum = backward(model, step, choose)
        optimizer.reduce()
        if step == steps[0]:
            report["gradients"] = gradients(model, optimizer.names)
        report["norms"].append(optimizer.step())
        report["at_rest"].append(elements_at_rest(model))
        report["losses"].append(over_all_ranks(loss_sum))
    return report


def backward(
    model: PeftModel,
    step: int,
    choose: Callable[[int], str | None] | None = None,
    micro_batches: int = MICRO_BATCHES,
) -> Tensor:
    """The gradients of this rank's share of a step's global batch, and its share of the loss."""
    loss_sum = torch.zeros((), dtype=torch.float64)
    for micro in range(micro_batches):
        ids, labels, indices = batch(step, micro)
        names = None if choose is None else [choose(int(i) % PER_MICRO_BATCH) for i in indices]
        with model.using(Rows(adapters=names, samples=indices, seed=SEED, step=step)):
            more = read(model, indices)
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **more).logits
            loss = token_loss_sum(logits, labels) / num_target_tokens(step, micro_batches)
            loss.backward()
        loss_sum += loss.detach()
    return loss_sum


def gradients(model: PeftModel, names: Iterable[str]) -> dict[str, Tensor]:
    """Those that this rank keeps, by adapter and name."""
    return {
        f"{name}/{key}": parameter.grad.clone()
        for name in names
        for key, parameter in trained(model, name).items()
        if parameter.grad is not None
    }


def over_all_ranks(share: Tensor) -> float:
    """The sum of the ranks' shares of a loss."""
    if rank_and_world()[1] > 1:
        dist.all_reduce(share)
    return share.item()


def read(model: PeftModel, indices: Tensor) -> dict[str, Tensor]:
    """What the model's adapters read of the samples with these indices."""
    names = {name for config in model.peft_config.values() for name in getattr(config, "reads", ())}
    return dict.fromkeys(names, indices % NUM_TASKS)


def evaluate(model: PeftModel) -> Tensor:
    """Logits of one batch that every rank sees whole."""
    generator = torch.Generator().manual_seed(99)
    ids = torch.randint(0, VOCAB, (2, LENGTH), generator=generator)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=ids, **read(model, torch.arange(2))).logits
    model.train(was_training)
    return logits.clone()


def saved(model: PeftModel, folder: str) -> Path:
    """The directory into which all ranks saved the model; every rank returns when it is there."""
    model.save_pretrained(folder)
    together()
    return Path(folder)


def of_rank_0(folder: str) -> str:
    """The folder that rank 0 names, on every rank."""
    named = [folder]
    if dist.is_initialized():
        dist.broadcast_object_list(named)
    return named[0]


def together() -> None:
    """Returns when every rank is here."""
    if dist.is_initialized():
        dist.barrier()
