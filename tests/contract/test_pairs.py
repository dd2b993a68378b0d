"""Methods beside each other on one base, and docs/methods.md: what it says is what running gives."""

from __future__ import annotations

import random

import pytest

import peft_dist
from peft_dist.catalog import METHODS, config_class, mixes
from peft_dist.errors import AdapterError, ConfigError
from tests.contract import bases, methods_table, pairs

MIXING = [name for name in METHODS if mixes(name)]
COMPOSED = [(one, other) for one, other in pairs.PAIRS if one in MIXING and other in MIXING]
# Of these alone the issue of pairs says that they may be refused.
REFUSABLE = {"ADAPTION_PROMPT", "XLORA", "POLY", "OSF"} | {
    name for name in METHODS if config_class(name).is_prompt_learning
}
SOME = random.Random(0).sample(COMPOSED, 24)


def page() -> dict[tuple[str, str], str]:
    """(row, column) -> cell of both tables."""
    cells, header = {}, []
    for line in methods_table.PAGE.read_text(encoding="utf-8").splitlines():
        if not line.startswith("| "):
            continue
        first, *rest = [cell.strip() for cell in line.strip("|").split("|")]
        if first in ("method", ""):
            header = rest
            continue
        cells.update({(first, column): cell for column, cell in zip(header, rest, strict=True)})
    return cells


CELLS = page()


def test_nothing_else_is_refused() -> None:
    assert set(METHODS) - set(MIXING) == REFUSABLE
    for name in REFUSABLE:
        with pytest.raises(ConfigError, match=f"{name} cannot be mixed with other methods: ") as raised:
            peft_dist.get_peft_model(bases.llama(), pairs.config(name, task_type="CAUSAL_LM"), mixed=True)
        assert f"- {str(raised.value).partition(': ')[2]}" in methods_table.PAGE.read_text(encoding="utf-8")


def test_the_page_has_every_method_and_every_pair() -> None:
    for name in METHODS:
        for column in methods_table.COLUMNS:
            assert CELLS[name, column] not in ("", "wrong")
    for one, other in COMPOSED:
        assert CELLS[one, other] in ("+", ">") or one == other == "LN_TUNING"


def compare(one: str, other: str) -> None:
    found = pairs.outcome(one, other)
    if one == other == "LN_TUNING":
        assert found.startswith("refused: ") and found in methods_table.PAGE.read_text(encoding="utf-8")
        return
    assert found in ("sum", "chain"), found
    assert CELLS[one, other] == CELLS[other, one] == {"sum": "+", "chain": ">"}[found]


@pytest.mark.parametrize(("one", "other"), SOME)
def test_some_pairs_are_as_the_page_says(one, other) -> None:
    compare(one, other)


@pytest.mark.slow  # a minute: some 250 pairs of methods, each composed, merged, saved and loaded
def test_every_pair_is_as_the_page_says() -> None:
    for one, other in COMPOSED:
        compare(one, other)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", METHODS)
def test_a_methods_row_is_what_running_it_gives(name) -> None:
    for column, value in methods_table.row(name).items():
        assert CELLS[name, column] == value, column


@pytest.mark.parametrize("first", ["LN_TUNING", "LORA"])
def test_a_module_is_not_replaced_and_adapted_at_once(first) -> None:
    configs = {
        "LN_TUNING": peft_dist.LNTuningConfig(target_modules=["q_proj"]),
        "LORA": peft_dist.LoraConfig(r=2, target_modules=["q_proj"]),
    }
    second = next(name for name in configs if name != first)
    model = peft_dist.get_peft_model(bases.llama(), configs[first], "a", mixed=True)
    try:
        model.add_adapter("b", configs[second])
    except peft_dist.PeftDistError as error:
        assert "q_proj" in str(error)
        return
    before = model(pairs.IDS).logits
    with pytest.raises(AdapterError, match="stands in the module's place"):
        model.set_adapter(["a", "b"])
    assert model.active_adapters == ["a"] and model(pairs.IDS).logits.equal(before)
