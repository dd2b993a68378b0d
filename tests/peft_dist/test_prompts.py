"""Batches whose rows name different prompt adapters, of different numbers of virtual tokens, against each row
alone; and what becomes of masks, positions and labels.

float64 where numbers are compared: 1e-9 is far below what a wrong place of a token changes.
"""

from __future__ import annotations

import peft as hf
import pytest
import torch
from torch import Tensor

import peft_dist
from peft_dist.errors import AdapterError, ConfigError, RowsError
from peft_dist.rows import BASE
from tests.contract import bases

N = {"prompt": 3, "network": 5, "past": 4, "tasks": 2, "context": 6}


def config(kind: str, task: str):
    common = {"task_type": task, "num_virtual_tokens": N.get(kind, 1)}
    if kind == "prompt":
        return peft_dist.PromptTuningConfig(**common)
    if kind == "network":
        return peft_dist.PromptEncoderConfig(**common, encoder_hidden_size=8)
    if kind == "past":
        return peft_dist.PrefixTuningConfig(**common)
    if kind == "tasks":
        return peft_dist.MultitaskPromptTuningConfig(**common, num_tasks=3, num_ranks=2)
    if kind == "context":
        types = [1, 2, 3, 4, 4, 8]
        return peft_dist.CPTConfig(
            task_type=task,
            cpt_token_ids=[7, 8, 9, 10, 11, 12],
            cpt_tokens_type_mask=types,
            opt_weighted_loss_type="decay",
            opt_loss_decay_factor=0.5,
        )
    targets = {"llama": ["q_proj"], "gpt2": ["c_attn"], "t5": ["q"], "bart": ["q_proj"], "bert": ["query"]}
    return peft_dist.LoraConfig(r=2, task_type=task, target_modules=targets[kind.removeprefix("lora ")])


def model(base: str, task: str, *kinds: str):
    made = getattr(bases, base)().double()
    peft = peft_dist.get_peft_model(made, config(kinds[0], task), kinds[0])
    for kind in kinds[1:]:
        peft.add_adapter(kind, config(kind, task))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for kind in kinds:
            for p in peft.adapter_tensors(kind).values():
                p.data.add_(torch.randn(p.shape, generator=generator).to(p) * 0.3)
    return peft.double().eval()


def ids(rows: int, length: int = 6) -> Tensor:
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(2))


def close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def close_loss(got: Tensor, wanted: Tensor) -> None:
    """transformers makes it of logits in fp32."""
    torch.testing.assert_close(got.double(), wanted.double(), rtol=1e-6, atol=1e-6)


def alone(peft, names, inputs: dict, **more) -> list:
    """Each row by itself, its adapter active."""
    rows = []
    for row, name in enumerate(names):
        mine = {key: value[row : row + 1] for key, value in inputs.items()}
        if name == BASE:
            with peft.disable_adapter():
                mine.pop("task_ids", None)
                rows.append(peft(**mine, **more))
        else:
            peft.set_adapter(name)
            if name != "tasks":
                mine.pop("task_ids", None)
            rows.append(peft(**mine, **more))
    return rows


CAUSAL = ("prompt", BASE, "network", "past", "tasks", "lora llama", "prompt", "tasks", "past")
PADDING = {
    "none": lambda t: torch.ones_like(t),
    "left": lambda t: (torch.arange(t.shape[1]) >= torch.arange(len(t))[:, None] % 3).long(),
    "right": lambda t: (torch.arange(t.shape[1]) < t.shape[1] - torch.arange(len(t))[:, None] % 3).long(),
}


@pytest.mark.parametrize("base", ["llama", "gpt2"])
@pytest.mark.parametrize("padding", [*PADDING, "no mask"])
def test_rows_of_every_kind_in_one_batch(base, padding) -> None:
    names = [n.replace("llama", base) for n in CAUSAL]
    peft = model(base, "CAUSAL_LM", "prompt", "network", "past", "tasks", f"lora {base}")
    x = ids(len(names))
    inputs = {"input_ids": x, "task_ids": torch.tensor([0, 0, 0, 0, 2, 0, 0, 1, 0])}
    if padding != "no mask":
        inputs["attention_mask"] = PADDING[padding](x)
    inputs["labels"] = x.masked_fill(inputs.get("attention_mask", torch.ones_like(x)) == 0, -100)
    wanted = alone(peft, names, inputs)
    got = peft(**inputs, adapter_names=names)
    shown = inputs.get("attention_mask", torch.ones_like(x)).bool()
    for row, each in enumerate(wanted):
        close(got.logits[row, -6:][shown[row]], each.logits[0, -6:][shown[row]])
    # The mean over all that is predicted.
    num = (inputs["labels"][:, 1:] != -100).sum(1)
    num = torch.tensor(
        [
            n + 1 if name in N and name != "past" and shown[i, 0] else n
            for i, (n, name) in enumerate(zip(num, names, strict=True))
        ]
    )
    close_loss(got.loss, sum(n * each.loss for n, each in zip(num, wanted, strict=True)) / num.sum())


def test_gradients_reach_each_rows_adapter_alone() -> None:
    peft = model("llama", "CAUSAL_LM", "prompt", "network", "past", "tasks", "lora llama")
    kinds = [*[k for k in N if k != "context"], "lora llama"]
    inputs = {"input_ids": ids(6), "task_ids": torch.tensor([1, 1, 1, 1, 1, 1])}
    names = [*kinds, BASE]
    for name in kinds:
        peft.set_requires_grad(name, True)
    weight = torch.randn(6, 6, 64, dtype=torch.double, generator=torch.Generator().manual_seed(4))
    tensors = {(k, key): p for k in kinds for key, p in own(peft, k).items()}
    got = peft(**inputs, adapter_names=names).logits[:, -6:]
    grads = torch.autograd.grad((got * weight).sum(), list(tensors.values()), allow_unused=True)
    for row, name in enumerate(kinds):
        peft.set_adapter(name)
        mine = {k: v[row : row + 1] for k, v in inputs.items() if name == "tasks" or k != "task_ids"}
        logits = peft(**mine).logits[:, -6:]
        params = own(peft, name)
        wanted = torch.autograd.grad((logits * weight[row]).sum(), list(params.values()))
        for key, gradient in zip(params, wanted, strict=True):
            close(dict(zip(tensors, grads, strict=True))[name, key], gradient)
    peft.set_requires_grad(kinds, True)
    only = peft(**inputs, adapter_names=[BASE] * 5 + ["prompt"]).logits.sum()
    others = [p for (k, _), p in tensors.items() if k != "prompt"]
    assert all(g is None for g in torch.autograd.grad(only, others, allow_unused=True))


def own(peft, name: str) -> dict[str, Tensor]:
    """The Parameters of an adapter."""
    return {key: p for key, p in peft.named_parameters() if f".{name}." in key or key.endswith(f".{name}")}


@pytest.mark.parametrize("base", ["llama", "gpt2"])
@pytest.mark.parametrize("padding", ["none", "left"])
def test_generation_of_rows_is_that_of_each_alone(base, padding) -> None:
    peft = model(base, "CAUSAL_LM", "prompt", "network", "past", "tasks", f"lora {base}")
    names = ["prompt", BASE, "network", "past", "tasks", f"lora {base}"]
    x = ids(6)
    mask, tasks = PADDING[padding](x), torch.tensor([0, 0, 0, 0, 2, 0])
    x = x.masked_fill(mask == 0, 0)
    how = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    for more in (
        {"max_new_tokens": 6},
        {"num_beams": 2, "max_new_tokens": 4},
        {"max_new_tokens": 4, "use_cache": False},
    ):
        got = peft.generate(x, attention_mask=mask, task_ids=tasks, adapter_names=names, **how, **more)
        for row, name in enumerate(names):
            one = {"input_ids": x[row : row + 1], "attention_mask": mask[row : row + 1], **how, **more}
            if name == BASE:
                with peft.disable_adapter():
                    wanted = peft.generate(**one)
            else:
                peft.set_adapter(name)
                wanted = peft.generate(
                    **one, **({"task_ids": tasks[row : row + 1]} if name == "tasks" else {})
                )
            assert torch.equal(got[row : row + 1], wanted), (name, more)


def test_one_task_is_that_of_all_rows() -> None:
    peft, x = model("llama", "CAUSAL_LM", "tasks"), ids(3)
    all_of_one = torch.full((3,), 2)
    assert torch.equal(
        peft(input_ids=x, task_ids=all_of_one[:1]).logits, peft(input_ids=x, task_ids=all_of_one).logits
    )
    how = {"do_sample": False, "max_new_tokens": 3, "num_beams": 2, "pad_token_id": 0}
    got = peft.generate(x, task_ids=all_of_one[:1], **how)
    assert torch.equal(got, peft.generate(x, task_ids=all_of_one, **how))
    with pytest.raises(RowsError, match="2 entries for 3 sequences"):
        peft(input_ids=x, task_ids=all_of_one[:2])


def test_generation_is_the_greedy_choice_of_forwards() -> None:
    for kind in ("prompt", "network", "past", "tasks", "context"):
        peft = model("llama", "CAUSAL_LM", kind)
        more = {"task_ids": torch.tensor([1, 2])} if kind == "tasks" else {}
        x = ids(2)
        got = peft.generate(x, **more, do_sample=False, max_new_tokens=4, pad_token_id=0, eos_token_id=None)
        for _ in range(4):
            x = torch.cat([x, peft(input_ids=x, **more).logits[:, -1:].argmax(-1)], 1)
        assert torch.equal(got, x), kind


def test_steps_by_hand_keep_their_virtual_tokens_in_the_cache() -> None:
    peft = model("llama", "CAUSAL_LM", "prompt", "past", "network")
    names = ["prompt", BASE, "past"]
    x = ids(3)
    whole = peft(input_ids=x, adapter_names=names).logits
    first = peft(input_ids=x[:, :4], adapter_names=names, use_cache=True)
    mask = torch.ones_like(x)
    rest = peft(
        input_ids=x[:, 4:], attention_mask=mask, past_key_values=first.past_key_values, adapter_names=names
    )
    close(rest.logits, whole[:, -2:])


def test_context_beside_others_keeps_its_own_loss() -> None:
    peft = model("llama", "CAUSAL_LM", "context", "prompt", "past")
    names = ["context", "prompt", BASE, "past", "context"]
    x = ids(5)
    kinds = torch.tensor([[1, 2, 3, 4, 4, 4]] * 5)
    inputs = {"input_ids": x, "labels": x, "input_type_mask": kinds}
    before = kinds.clone()
    got = peft(**inputs, adapter_names=names)
    total, count = 0, 0
    for row, name in enumerate(names):
        mine = {k: v[row : row + 1] for k, v in inputs.items() if name == "context" or k != "input_type_mask"}
        if name == BASE:
            with peft.disable_adapter():
                each = peft(**mine)
        else:
            peft.set_adapter(name)
            each = peft(**mine)
        close(got.logits[row, -6:], each.logits[0, -6:])
        # A context's answers: three of its own tokens and three of the text's; others predict all but the first.
        num = {"context": 6, "prompt": 6}.get(name, 5)
        total, count = total + num * each.loss, count + num
    close_loss(got.loss, total / count)
    assert torch.equal(kinds, before)


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize(
    ("base", "task"),
    [
        ("bert", "SEQ_CLS"),
        ("tagger", "TOKEN_CLS"),
        ("answerer", "QUESTION_ANS"),
        ("features", "FEATURE_EXTRACTION"),
    ],
)
def test_rows_of_bases_that_read_both_ways(base, task, padding) -> None:
    peft = model(base, task, "prompt", "network", "past", "tasks", "lora bert")
    names = ["prompt", BASE, "network", "past", "tasks", "lora bert"]
    x = ids(6)
    inputs = {
        "input_ids": x,
        "attention_mask": PADDING[padding](x),
        "task_ids": torch.tensor([0, 0, 0, 0, 2, 0]),
    }
    labels = {
        "SEQ_CLS": {"labels": x[:, 0] % 3},
        "TOKEN_CLS": {"labels": x % 3},
        "QUESTION_ANS": {"start_positions": x[:, 0] % 6, "end_positions": x[:, 1] % 6},
        "FEATURE_EXTRACTION": {},
    }[task]
    wanted = alone(peft, names, {**inputs, **labels})
    got = peft(**inputs, **labels, adapter_names=names)
    shown = inputs["attention_mask"].bool()
    for key in ("logits", "start_logits", "end_logits", "last_hidden_state", "pooler_output"):
        if key in got:
            for row, each in enumerate(wanted):
                a, b = got[key][row], each[key][0]
                if key not in ("pooler_output",) and task != "SEQ_CLS":
                    a, b = a[-6:][shown[row]], b[-6:][shown[row]]
                close(a, b)
    if "loss" in got and task != "QUESTION_ANS":
        close_loss(got.loss, torch.stack([each.loss for each in wanted]).mean())


def test_hf_peft_cannot_count_labels_of_tokens() -> None:
    theirs = hf.get_peft_model(
        bases.tagger(), hf.PromptTuningConfig(task_type="TOKEN_CLS", num_virtual_tokens=3)
    )
    x = ids(2)
    with pytest.raises(ValueError, match="batch_size"):
        theirs(input_ids=x, labels=x % 3)


def test_answers_are_looked_for_where_they_are() -> None:
    """The loss of each row is that of its own place, virtual tokens counted; HF PEFT leaves the place where it
    was."""
    theirs = hf.get_peft_model(
        bases.answerer(), hf.PromptTuningConfig(task_type="QUESTION_ANS", num_virtual_tokens=3)
    ).eval()
    first = torch.zeros(2, dtype=torch.long)
    said = theirs(input_ids=ids(2), start_positions=first, end_positions=first)
    wrong = [logits.log_softmax(-1)[:, 0].mean() for logits in (said.start_logits, said.end_logits)]
    torch.testing.assert_close(said.loss, -sum(wrong) / 2)
    peft = model("answerer", "QUESTION_ANS", "prompt", "network")
    x = ids(3)
    where = torch.tensor([0, 2, 5])
    names = ["prompt", BASE, "network"]
    got = peft(input_ids=x, start_positions=where, end_positions=where, adapter_names=names)
    for row, name in enumerate(names):
        if name == BASE:
            continue
        peft.set_adapter(name)
        each = peft(input_ids=x[row : row + 1])
        n = N[name]
        start = each.start_logits[0].log_softmax(-1)[n + where[row]]
        end = each.end_logits[0].log_softmax(-1)[n + where[row]]
        one = peft(
            input_ids=x[row : row + 1],
            start_positions=where[row : row + 1],
            end_positions=where[row : row + 1],
        )
        close_loss(one.loss, -(start + end) / 2)
    assert got.loss.isfinite()


@pytest.mark.parametrize("padding", PADDING)
def test_positions_that_a_base_counts_by_itself(padding) -> None:
    peft = model("roberta", "SEQ_CLS", "prompt", "network", "past")
    x = ids(6)
    mask = PADDING[padding](x)
    x = x.masked_fill(mask == 0, peft.get_base_model().config.pad_token_id)
    for names in (["prompt", BASE, BASE, "past", "network", "past"], ["past", BASE, BASE] * 2):
        wanted = alone(peft, names, {"input_ids": x, "attention_mask": mask})
        got = peft(input_ids=x, attention_mask=mask, adapter_names=names).logits
        close(got, torch.cat([each.logits for each in wanted]))


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("base", ["t5", "bart"])
def test_rows_of_an_encoder_and_a_decoder(base, padding) -> None:
    kinds = ["prompt", "network", "tasks", f"lora {base}", "past"]
    peft = model(base, "SEQ_2_SEQ_LM", *kinds)
    names = [*kinds, BASE]
    x = ids(len(names))
    inputs = {
        "input_ids": x,
        "attention_mask": PADDING[padding](x),
        "labels": ids(len(names), 4),
        "task_ids": torch.full((len(names),), 2),
    }
    wanted = alone(peft, names, inputs)
    got = peft(**inputs, adapter_names=names)
    for row, each in enumerate(wanted):
        close(got.logits[row, -4:], each.logits[0, -4:])
    close_loss(got.loss, torch.stack([each.loss for each in wanted]).mean())
    how = {"do_sample": False, "pad_token_id": 1, "max_new_tokens": 5, "eos_token_id": None}
    serving = [n for n in names if base == "t5" or n != "tasks"]
    keep = [names.index(n) for n in serving]
    tokens = peft.generate(
        input_ids=x[keep],
        attention_mask=inputs["attention_mask"][keep],
        task_ids=inputs["task_ids"][keep],
        adapter_names=serving,
        **how,
    )
    for row, name in enumerate(serving):
        one = {
            "input_ids": x[keep][row : row + 1],
            "attention_mask": inputs["attention_mask"][keep][row : row + 1],
        }
        if name == BASE:
            with peft.disable_adapter():
                alike = peft.generate(**one, **how)
        else:
            peft.set_adapter(name)
            tasks = {"task_ids": torch.tensor([2])} if name == "tasks" else {}
            alike = peft.generate(**one, **tasks, **how)
        assert torch.equal(tokens[row : row + 1], alike), name


@pytest.mark.parametrize("base", ["t5", "bart"])
@pytest.mark.parametrize("kind", ["prompt", "past", "tasks"])
def test_a_decoders_generation_is_the_greedy_choice_of_forwards(base, kind) -> None:
    """Also of a multitask prompt's decoder tokens, which HF PEFT trains with and leaves out here."""
    peft = model(base, "SEQ_2_SEQ_LM", kind)
    x, more = ids(2), {"task_ids": torch.tensor([1, 2])} if kind == "tasks" else {}
    start = peft.get_base_model().config.decoder_start_token_id
    how = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 4}
    got = peft.generate(input_ids=x, attention_mask=torch.ones_like(x), **more, **how)
    y = torch.full((2, 1), start)
    for _ in range(4):
        logits = peft(input_ids=x, attention_mask=torch.ones_like(x), decoder_input_ids=y, **more).logits
        y = torch.cat([y, logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(got, y)


def test_what_a_decoder_cannot_honour_is_refused(monkeypatch) -> None:
    peft = model("bart", "SEQ_2_SEQ_LM", "past", "tasks", "prompt")
    x = ids(2)
    with monkeypatch.context() as patched:
        patched.setattr("peft_dist.prompts.decoder_positions.positions_of", lambda base: None)
        with pytest.raises(RowsError, match="counts its decoder's positions by itself"):
            peft(input_ids=x, labels=x, adapter_names=["past", BASE])
        with pytest.raises(RowsError, match="counts its decoder's positions by itself"):
            peft.generate(input_ids=x, task_ids=torch.tensor([0, 0]), adapter_names=["tasks", BASE])
    with pytest.raises(ConfigError, match=r"num_beams and num_return_sequences above 1 cannot be used"):
        peft.generate(input_ids=x, num_beams=2, adapter_names=["prompt", BASE])
    with pytest.raises(ConfigError, match="encoder_outputs: virtual tokens stand before the encoder's input"):
        peft.set_adapter("prompt")
        peft(encoder_outputs=(torch.randn(2, 6, 16),), decoder_input_ids=x)


def test_what_generate_is_told_is_none_stays_so() -> None:
    """`eos_token_id=None` means that nothing ends a text, not that it was not said."""
    peft = model("bart", "SEQ_2_SEQ_LM", "prompt")
    how = {"input_ids": ids(2), "max_new_tokens": 4, "do_sample": False}
    first = peft.generate(**how, eos_token_id=None)[0, 1].item()
    assert peft.generate(**how, eos_token_id=None).shape == (2, 5)
    peft.get_base_model().generation_config.eos_token_id = first
    assert peft.generate(**how, eos_token_id=None).shape == (2, 5)


def test_tasks_of_rows() -> None:
    peft = model("llama", "CAUSAL_LM", "tasks")
    x = ids(2)
    with pytest.raises(RowsError, match="task_ids: MultitaskPromptTuningConfig needs one for each sequence"):
        peft(input_ids=x)
    with pytest.raises(RowsError, match=r"task_ids: \[0, 3\], but the adapter has 3 tasks"):
        peft(input_ids=x, task_ids=torch.tensor([0, 3]))
    with pytest.raises(RowsError, match="task_ids: 3 entries for 2 sequences"):
        peft(input_ids=x, task_ids=torch.tensor([0, 1, 1]))


def test_what_virtual_tokens_cannot_stand_beside_is_refused() -> None:
    peft = model("llama", "CAUSAL_LM", "prompt", "past")
    x = ids(2)
    with pytest.raises(
        ConfigError, match=r"attention_mask: virtual tokens need a mask of \(sequences, positions\)"
    ):
        peft(input_ids=x, attention_mask=torch.ones(2, 1, 6, 6))
    with pytest.raises(ConfigError, match="needs a cache that grows"):
        peft.generate(x, cache_implementation="static", max_new_tokens=2)
    with pytest.raises(AdapterError, match="prompt adapters prompt, past are active at once"):
        peft.set_adapter(["prompt", "past"])
        peft(input_ids=x)


def test_positions_and_kinds_of_a_batchs_own_tokens_are_kept() -> None:
    for kind in ("prompt", "past"):
        peft = model("llama", "CAUSAL_LM", kind)
        x, own = ids(2), torch.tensor([[0, 1, 2, 0, 1, 2]] * 2)
        plain = peft(input_ids=x).logits
        close(peft(input_ids=x, position_ids=torch.arange(6)[None]).logits, plain)
        assert not torch.allclose(peft(input_ids=x, position_ids=own).logits, plain)
        peft = model("bert", "SEQ_CLS", kind)
        plain = peft(input_ids=x).logits
        close(peft(input_ids=x, token_type_ids=torch.zeros_like(x)).logits, plain)
        assert not torch.allclose(peft(input_ids=x, token_type_ids=torch.ones_like(x)).logits, plain)


def test_a_classifier_takes_the_last_token_of_each_row() -> None:
    """HF PEFT takes the last position, whatever stands there."""
    theirs = hf.get_peft_model(
        bases.classifier(), hf.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
    ).eval()
    one = torch.tensor([[5, 6, 7, 0, 0]])
    padded = theirs(input_ids=one, attention_mask=(one != 0).long()).logits
    assert not torch.allclose(padded, theirs(input_ids=one[:, :3]).logits, atol=1e-3)
    peft = model("classifier", "SEQ_CLS", "prompt")
    x = ids(3)
    short = peft(input_ids=x[:, :4]).logits
    padded = torch.cat([x[:, :4], torch.zeros(3, 2, dtype=torch.long)], 1)
    mask = (padded != 0).long()
    close(peft(input_ids=padded, attention_mask=mask).logits, short)
    mixed = peft(input_ids=padded, attention_mask=mask, adapter_names=["prompt", BASE, "prompt"]).logits
    close(mixed[[0, 2]], short[[0, 2]])
    with peft.disable_adapter():
        close(mixed[1:2], peft(input_ids=x[1:2, :4]).logits)
