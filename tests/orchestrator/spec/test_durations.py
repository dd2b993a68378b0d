import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.spec.durations import format_duration, parse_duration


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", None),
        (90, 90),
        ("90s", 90),
        ("10m", 600),
        ("1h30m", 5400),
        ("1d", 86400),
        ("1.5h", 5400),
        ("2 h", 7200),
    ],
)
def test_forms(text, seconds):
    if seconds is None:
        with pytest.raises(ValueError, match="is not a duration"):
            parse_duration(text)
    else:
        assert parse_duration(text) == seconds


@pytest.mark.parametrize("value", ["", "soon", "-5s", -5, float("inf"), float("nan"), "5x", "m", True])
def test_what_is_no_duration(value):
    with pytest.raises(ValueError, match=r"is not a duration.*Write seconds, or 90s, 10m, 2h, 1h30m, 1d."):
        parse_duration(value)


@given(st.integers(0, 10**7))
def test_what_is_printed_reads_back(seconds):
    assert parse_duration(format_duration(seconds)) == seconds
