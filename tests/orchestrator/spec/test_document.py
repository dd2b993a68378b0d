import pytest

from orchestrator.errors import SpecError
from orchestrator.spec.document import decode, parse_document, parse_value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1E5", 1e5),
        ("no", "no"),
        ("on", "on"),
        ("Yes", "Yes"),
        ("true", True),
        ("012", 12),
        ("0x1F", 31),
        ("1_000", 1000),
        ("2024-01-01", "2024-01-01"),
        ("12:30", "12:30"),
        ("'1e-3'", "1e-3"),
        ("!!str 12", "12"),
        ("~", None),
        ("", None),
        ("9" * 80, "9" * 80),
    ],
)
def test_scalars_follow_yaml_1_2_in_files_and_in_overrides(text, value):
    assert parse_document(f"a: {text}\n", "f").values == {"a": value}
    assert parse_value(text, "a", "--set")[0] == value


def test_every_value_has_its_place():
    tree = parse_document("a:\n  b: [1, {c: 2}]\n", "f.yaml")
    place = tree.places[("a", "b", 1, "c")]
    assert place[:2] == (2, 11)
    assert str(place) == "f.yaml:2 a.b.1.c"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "f.yaml:3 a: the key stands twice, on line 1 and on line 3. Keep one of them."),
        ("a: {b: 1, b: 2}\n", "f.yaml:1 a.b: the key stands twice, on line 1 and on line 1. Keep one of them."),
        ("- 1\n", "f.yaml:1: the top level is a list; a job is a mapping of keys, such as 'model: {base_model: ...}'. "
                  "See one: raypeft init minimal"),
        ("hello\n", "f.yaml:1: the top level is a single value; a job is a mapping of keys, such as "
                    "'model: {base_model: ...}'. See one: raypeft init minimal"),
        ("", "f.yaml: the file is empty. Start from a commented one: raypeft init"),
        ("# only a comment\n", "f.yaml: the file is empty. Start from a commented one: raypeft init"),
        ("a: [1\n", "f.yaml:2: not YAML: expected ',' or ']', but got '<stream end>' (column 1)."),
        ("a: b: c\n", "f.yaml:1: not YAML: mapping values are not allowed here (column 5). Put quotes around a value "
                      "that contains ': ', and check the indentation."),
        ("a:\n\tb: 1\n", "f.yaml:2: not YAML: found character '\\t' that cannot start any token (column 1). "
                         "Indent with spaces, not tabs."),
        ("a: *x\n", "f.yaml:1: not YAML: found undefined alias 'x' (column 4). "
                    "Put quotes around a value that starts with '*'."),
        ("a: 1\n---\nb: 2\n", "f.yaml:2: holds several YAML documents ('---'). One file is one job."),
        ("1: x\n", "f.yaml:1: the key 1 is not text. Put it in quotes."),
        ("a: .nan\n", "f.yaml:1 a: .nan is not a finite number. Write a number."),
        ("a: 1e999\n", "f.yaml:1 a: 1e999 is not a finite number. Write a number."),
        ("a: !!python/object:os.system x\n",
         "f.yaml:1 a: the tag !!python/object:os.system is not allowed. Remove it."),
        ("a: !x {b: 1}\n", "f.yaml:1 a: the tag !x is not allowed. Remove it."),
        ("a: &x [*x]\n", "f.yaml:1: an anchor contains itself."),
    ],
)  # fmt: skip
def test_what_is_no_job_is_refused_with_its_line(text, message):
    with pytest.raises(SpecError) as raised:
        parse_document(text, "f.yaml")
    assert str(raised.value) == message


def test_all_duplicates_are_told_together():
    with pytest.raises(SpecError) as raised:
        parse_document("a: 1\na: 2\nb: 1\nb: 2\n", "f")
    assert len(str(raised.value).splitlines()) == 2


def test_anchors_that_multiply_are_stopped():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 7)]
    with pytest.raises(SpecError, match="multiply to too many values"):
        parse_document("\n".join(lines), "f")


def test_deep_nesting_is_an_error_not_a_crash():
    with pytest.raises(SpecError, match="nested too deeply"):
        parse_document("a: " + "[" * 5000 + "]" * 5000, "f")


def test_merge_keys_yield_to_what_is_written():
    tree = parse_document("a: &a {x: 1, y: 1}\nb: {<<: *a, y: 2}\n", "f")
    assert tree.values["b"] == {"x": 1, "y": 2}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"a: \0\x89PNG", "f: is a binary file, not a YAML job."),
        (b"\x89PNG\r\n\x1a\n\0", "f: is a binary file, not a YAML job."),
        (b"a: 1\nb: caf\xe9\n", "f:2: byte 0xe9 is not UTF-8. Save the file as UTF-8."),
    ],
)
def test_bytes_that_are_no_text(raw, message):
    with pytest.raises(SpecError) as raised:
        decode(raw, "f")
    assert str(raised.value) == message


def test_a_byte_order_mark_is_passed_over():
    assert decode(b"\xef\xbb\xbfa: 1", "f") == "a: 1"


def test_an_override_that_is_no_yaml_is_text_unless_it_opens_a_bracket():
    assert parse_value("*.jsonl", "k", "--set")[0] == "*.jsonl"
    with pytest.raises(
        SpecError, match=r"--set k: '\[1' is not a YAML value: a bracket or a quote is not closed."
    ):
        parse_value("[1", "k", "--set")
