"""What is done with what was learned: principal components, intruders."""

from __future__ import annotations

import peft
import pytest
import torch

import peft_dist
from peft_dist.arithmetic.intruders import reduce_intruder_dimension
from peft_dist.calibration.incremental_pca import IncrementalPCA
from peft_dist.errors import ConfigError
from peft_dist.methods.lora.loftq import loftq_init, nf4, principal
from tests.contract import bases

IDS = torch.randint(1, 64, (3, 7), generator=torch.Generator().manual_seed(3))


def close(got, wanted, size=1e-5) -> None:
    torch.testing.assert_close(got, wanted, rtol=size, atol=size)


@pytest.mark.parametrize("more", [{}, {"lowrank": True, "lowrank_seed": 3}], ids=["exact", "random"])
def test_components_are_theirs(more) -> None:
    from peft.utils.incremental_pca import IncrementalPCA as Theirs

    generator = torch.Generator().manual_seed(0)
    X = torch.randn(90, 8, generator=generator, dtype=torch.double) @ torch.diag(
        torch.arange(1.0, 9).double()
    )
    ours, theirs = (kind(n_components=3, batch_size=25, **more) for kind in (IncrementalPCA, Theirs))
    for pca in (ours, theirs):
        pca.fit(X + 2)
    for name in ("components_", "singular_values_", "mean_", "var_", "explained_variance_ratio_"):
        close(getattr(ours, name).double(), getattr(theirs, name).double(), 1e-6)
    close(ours.transform(X), theirs.transform(X), 1e-6)


def test_components_of_one_batch_are_those_of_all() -> None:
    X = torch.randn(40, 6, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    pca = IncrementalPCA(n_components=6).partial_fit(X[:10]).partial_fit(X[10:])
    _, S, Vh = torch.linalg.svd(X - X.mean(0), full_matrices=False)
    close(pca.singular_values_, S, 1e-10)
    close((pca.components_ * Vh).sum(1).abs(), torch.ones(6).double(), 1e-10)
    with pytest.raises(ConfigError, match="7; 40 rows of 6 features have fewer"):
        IncrementalPCA(n_components=7).partial_fit(X)
    with pytest.raises(ConfigError, match="5 features, where there were 6"):
        pca.partial_fit(X[:, :5], check_input=False)
    with pytest.raises(ConfigError, match="lowrank needs n_components"):
        IncrementalPCA(lowrank=True)
    with pytest.raises(ConfigError, match="lowrank_q 2 is below n_components 3"):
        IncrementalPCA(3, lowrank=True, lowrank_q=2)


@pytest.mark.parametrize("epsilon", [0.0, 0.9])
def test_intruders_are_theirs(epsilon) -> None:
    logits, told = [], []
    for library in (peft_dist, peft):
        config = library.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], task_type="CAUSAL_LM")
        model = library.get_peft_model(bases.llama(), config)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, p in sorted(model.named_parameters()):
                if "lora_" in name:
                    p.copy_(torch.randn(p.shape, generator=generator) * 0.6)
        said = []
        if library is peft_dist:
            reduce_intruder_dimension(model, threshold_epsilon=epsilon, logging_sink=said.append)
        else:
            from peft.tuners.lora.intruders import reduce_intruder_dimension as theirs

            theirs(model, threshold_epsilon=epsilon, logging_sink=said.append)
        told.append([line.rpartition(": ")[2] for line in said])
        assert model.active_adapters == ["intruder_reduced"]
        with torch.no_grad():
            logits.append(model.eval()(input_ids=IDS).logits)
            model.set_adapter("default")
            changed = (model(input_ids=IDS).logits - logits[-1]).abs().max()
        assert (changed > 1e-3) == (epsilon > 0)
    assert told[0] == told[1]
    close(*logits, 1e-4)


def test_an_adapter_without_intruders_has_the_dtype_of_the_one_before() -> None:
    from peft.tuners.lora.intruders import reduce_intruder_dimension as theirs

    for library, reduce, autocast in (
        (peft_dist, reduce_intruder_dimension, True),
        (peft_dist, reduce_intruder_dimension, False),
        (peft, theirs, False),
    ):
        config = library.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
        model = library.get_peft_model(bases.llama().bfloat16(), config, autocast_adapter_dtype=autocast)
        reduce(model, threshold_epsilon=2, logging_sink=None)
        layer = model.get_base_model().model.layers[0].self_attn.q_proj
        dtypes = {layer.lora_A[name].weight.dtype for name in ("default", "intruder_reduced")}
        assert dtypes == {torch.float32 if autocast else torch.bfloat16}


def test_intruders_on_an_embedding_and_elsewhere() -> None:
    """HF PEFT puts the factors of an embedding's transposed change the wrong way round: shapes that do not fit."""
    models = []
    for library in (peft_dist, peft):
        config = library.LoraConfig(r=4, target_modules=["embed_tokens"], task_type="CAUSAL_LM")
        model = library.get_peft_model(bases.llama(), config)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_embedding" in name:
                    p.normal_()
        models.append(model)
    from peft.tuners.lora.intruders import reduce_intruder_dimension as theirs

    theirs(models[1], threshold_epsilon=0.99, logging_sink=None)
    broken = models[1].get_base_model().model.embed_tokens.lora_embedding_B["intruder_reduced"]
    assert broken.shape == (64, 4)
    reduce_intruder_dimension(models[0], threshold_epsilon=0.99, logging_sink=None)
    module = models[0].get_base_model().model.embed_tokens
    assert module.tensors("intruder_reduced")["B"].shape == (16, 4)
    before, after = (module.change([name])[0] for name in ("default", "intruder_reduced"))
    W = module.base.weight()
    assert torch.linalg.svdvals(W + after)[0] < torch.linalg.svdvals(W + before)[0]
    dora = peft_dist.get_peft_model(bases.llama(), peft_dist.LoraConfig(use_dora=True, task_type="CAUSAL_LM"))
    with pytest.raises(ConfigError, match="is no plain LoRA"):
        reduce_intruder_dimension(dora)


def test_loftq_of_one_weight() -> None:
    W = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    Q, A, B = loftq_init(W, num_bits=4, reduced_rank=8, num_iter=2)
    first = principal(W - nf4(W), 8)
    close(Q, nf4(W - first[0] @ first[1]))
    close(B @ A, torch.matmul(*principal(W - Q, 8)))
    with pytest.raises(ConfigError, match="num_iter is 0"):
        loftq_init(W, 4, 8, 0)
