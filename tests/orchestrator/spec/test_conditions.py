import pytest

from orchestrator.spec.conditions import parse_comparison

METRICS = {"a": 1.0, "base.a": 2.0, "production.a": 1.5, "nan": float("nan")}


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("a < base.a", True),
        ("a>=base.a", False),
        ("a == 1", True),
        ("a != 1e0", False),
        ("a <= production.a + 0.01 - .5", True),
        ("a * 2 < base.a / 2", False),
        ("-a < 0", True),
        ("(a + 1) * 2 == 4", True),
        ("a - 1 - 1 == -1", True),
        ("nan < 1", False),
        ("nan != 1", False),
        ("a / 0 > 1", False),
    ],
)
def test_comparisons(text, holds):
    assert parse_comparison(text).holds(METRICS) is holds


def test_names_stand_once_in_their_order():
    assert parse_comparison("a + base.a < a * production.a").names == ("a", "base.a", "production.a")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("a", "'a' is not a comparison."),
        ("", "'' is not a comparison: it ends too early."),
        ("a <", "'a <' is not a comparison: it ends too early."),
        ("a < b < c", "'a < b < c' is not one comparison: '<' is left over."),
        ("a = 1", "'a = 1' is not a comparison: '=' has no meaning here."),
        ("(a < 1", "'(a < 1' is not a comparison: a bracket is not closed."),
        ("1 < 2", "'1 < 2' names no metric."),
        ("a < __import__('os')", "'a < __import__('os')' is not a comparison: ''' has no meaning here."),
        ("a < ) 1", "'a < ) 1' is not a comparison: ')' cannot stand there."),
    ],
)
def test_what_is_no_comparison(text, what):
    with pytest.raises(ValueError) as raised:
        parse_comparison(text)
    assert str(raised.value) == (
        f"{what} Write a comparison such as eval_loss < base.eval_loss, or exact_match >= 0.8."
    )


def test_a_missing_metric_is_named():
    with pytest.raises(KeyError, match="b"):
        parse_comparison("a < b").holds(METRICS)
