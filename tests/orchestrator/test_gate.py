"""The gate: which metrics pass, and what it says about them."""

from __future__ import annotations

import math
import operator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.gate import check, names_in, parse_condition
from orchestrator.spec.job import GateSpec


def judged(condition: str, *, has_production: bool = True, **metrics: float) -> tuple[bool, str]:
    named = {name.replace("__", "."): value for name, value in metrics.items()}
    verdict = check(GateSpec(all=(condition,)), named, has_production=has_production)
    (reason,) = verdict.reasons
    return verdict.passed, reason


def test_reasons_carry_the_numbers_of_both_sides() -> None:
    assert judged("eval_loss < base.eval_loss", eval_loss=1.25, base__eval_loss=2.0) == (
        True,
        "eval_loss < base.eval_loss: holds, 1.25 < 2",
    )
    assert judged("eval_loss < base.eval_loss", eval_loss=2.5, base__eval_loss=2.0) == (
        False,
        "eval_loss < base.eval_loss: fails, 2.5 < 2 is not so",
    )
    assert judged("exact_match >= 0.82", exact_match=0.82) == (
        True,
        "exact_match >= 0.82: holds, 0.82 >= 0.82",
    )
    assert judged("eval_loss <= production.eval_loss + 0.01", eval_loss=1.02, production__eval_loss=1.0) == (
        False,
        "eval_loss <= production.eval_loss + 0.01: fails, 1.02 <= 1.01 is not so",
    )
    # two numbers that differ are never shown as one
    assert judged("eval_loss < base.eval_loss", eval_loss=2.0000001, base__eval_loss=2.0)[1].endswith(
        "2.0000001 < 2 is not so"
    )


def test_nan_and_missing_metrics_fail_and_are_named() -> None:
    assert judged("eval_loss < 3", eval_loss=math.nan) == (False, "eval_loss < 3: fails, eval_loss is NaN")
    assert judged("eval_loss < base.eval_loss", eval_loss=math.nan, base__eval_loss=math.nan)[1] == (
        "eval_loss < base.eval_loss: fails, eval_loss and base.eval_loss are NaN"
    )
    assert judged("exact_match != 1", eval_loss=1.0) == (
        False,
        "exact_match != 1: fails, exact_match is not measured",
    )
    assert judged("eval_loss < production.eval_loss", eval_loss=1.0)[1] == (
        "eval_loss < production.eval_loss: fails, production.eval_loss is not measured"
    )
    assert judged("1 / zero >= 0", zero=0.0) == (
        False,
        "1 / zero >= 0: fails, it divides by zero or subtracts infinities",
    )
    assert judged("eval_loss < 3", eval_loss=math.inf)[0] is False
    assert judged("eval_loss != eval_loss + 1", eval_loss=math.nan)[0] is False


def test_without_production_its_conditions_hold_and_say_so() -> None:
    condition = "eval_loss <= production.eval_loss + 0.01"
    assert judged(condition, has_production=False, eval_loss=9.0) == (
        True,
        f"{condition}: holds, there is no production version to compare with",
    )
    verdict = check(
        GateSpec(all=(condition, "exact_match >= 0.5")), {"exact_match": 0.1}, has_production=False
    )
    assert not verdict.passed


def test_without_production_a_nan_of_this_run_still_fails() -> None:
    condition = "eval_loss <= production.eval_loss"
    assert judged(condition, has_production=False, eval_loss=math.nan) == (
        False,
        f"{condition}: fails, eval_loss is NaN",
    )
    assert judged(condition, has_production=False)[1] == f"{condition}: fails, eval_loss is not measured"


def test_all_and_any() -> None:
    conditions = ("eval_loss < 1", "exact_match > 0.5")
    metrics = {"eval_loss": 2.0, "exact_match": 0.9}
    assert not check(GateSpec(all=conditions), metrics, has_production=False).passed
    assert check(GateSpec(any=conditions), metrics, has_production=False).passed
    assert not check(GateSpec(any=conditions), {**metrics, "exact_match": 0.1}, has_production=False).passed
    assert len(check(GateSpec(any=conditions), metrics, has_production=False).reasons) == 2


def test_no_gate_lets_everything_pass() -> None:
    verdict = check(None, {}, has_production=False)
    assert verdict.passed and verdict.reasons == ("no gate: deployed whatever its metrics are",)
    assert names_in(None) == ()


def test_names_in_a_gate() -> None:
    gate = GateSpec(all=("eval_loss < base.eval_loss * 0.9", "eval_loss <= production.eval_loss"))
    assert names_in(gate) == ("eval_loss", "base.eval_loss", "production.eval_loss")


@pytest.mark.parametrize(
    "text",
    ["", "eval_loss", "1 < 2", "a < b < c", "a <", "a < (b", "a < b)", "a = b", "__import__('os') < 1",
     "a < b c", "a < b ** 2", "a.b. < 1", "a[0] < 1", "lambda: a < 1", "a < 1 and b < 2", "a < 0x10"],
)  # fmt: skip
def test_what_is_no_comparison_is_refused_with_the_rule(text: str) -> None:
    with pytest.raises(ValueError, match="Write a comparison such as eval_loss < base"):
        parse_condition(text)


NUMBERS = st.floats(min_value=-1e6, max_value=1e6, allow_nan=False).map(lambda x: round(x, 3))
SUMS = st.recursive(
    st.one_of(
        NUMBERS.filter(lambda x: x >= 0).map(lambda x: f"{x:.3f}"),
        st.sampled_from(["a", "b", "base.a", "production.b"]),
    ),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", "*", "/"]), inner).map(
            lambda t: f"({t[0]} {t[1]} {t[2]})"
        ),
        st.tuples(inner, st.sampled_from(["+", "-", "*"]), inner).map(lambda t: f"{t[0]}{t[1]}{t[2]}"),
        inner.map(lambda t: f"-({t})"),
    ),
    max_leaves=8,
)
SIGNS = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "==": operator.eq,
    "!=": operator.ne,
}  # fmt: skip


@given(SUMS, st.sampled_from(list(SIGNS)), SUMS, st.tuples(NUMBERS, NUMBERS, NUMBERS, NUMBERS))
def test_comparisons_mean_what_python_means(left: str, sign: str, right: str, values) -> None:
    """Python's own arithmetic is the oracle, on text that hypothesis built from the grammar."""
    names = ("a", "b", "base.a", "production.b")
    metrics = dict(zip(names, values, strict=True))
    space = {name.replace(".", "_"): value for name, value in metrics.items()}

    def by_python(text: str) -> float:
        text = text.replace("base.a", "base_a").replace("production.b", "production_b")
        try:
            return float(eval(text, {"__builtins__": {}}, space))
        except (ZeroDivisionError, OverflowError):
            return math.nan

    text = f"{left} {sign} {right}"
    if not any(name in text for name in ("a", "b")):
        with pytest.raises(ValueError, match="names no metric"):
            parse_condition(text)
        return
    x, y = by_python(left), by_python(right)
    expected = not math.isnan(x) and not math.isnan(y) and SIGNS[sign](x, y)
    verdict = check(GateSpec(all=(text,)), metrics, has_production=True)
    assert verdict.passed == expected
    assert verdict.reasons[0].startswith(f"{text}: {'holds' if expected else 'fails'}, ")


@given(st.text(max_size=40))
def test_any_text_is_a_comparison_or_refused_with_the_rule(text: str) -> None:
    try:
        parse_condition(text)
    except ValueError as error:
        assert "Write a comparison such as" in str(error)
