"""YAML files: strict, bounded, and with errors that say where."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hexgen import yamlfile
from hexgen.errors import SpecError
from hexgen.yamlfile import Place, Section, parse_yaml, read_yaml, write_yaml

plain = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | st.text(alphabet=st.characters(blacklist_categories=("Cs", "Cc")), max_size=20)
    | st.sampled_from(
        ["no", "on", "1e5", "1e-7", "1_0", "0x1f", "~", "null", "1:30", ".5e3", "2026-01-01", "=", "<<"]
    )
)
trees = st.recursive(
    plain,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abcno1", max_size=4), inner),
    max_leaves=12,
)


@settings(deadline=None, max_examples=100)
@given(st.dictionaries(st.sampled_from(["a", "no", "1e5", "x y", "7"]), trees))
def test_what_is_written_is_read_back(value: dict[str, Any]) -> None:
    assert parse_yaml(write_yaml(value, "a comment\nof two lines"), "x") == value


def test_words_are_words_and_numbers_are_numbers() -> None:
    value = parse_yaml("{a: no, b: ON, c: true, d: 1e5, e: 1.5e-3, f: 1.0, g: '1e5', h: False}", "x")
    assert value == {"a": "no", "b": "ON", "c": True, "d": 1e5, "e": 1.5e-3, "f": 1.0, "g": "1e5", "h": False}


@pytest.mark.parametrize(
    "written",
    [
        "1:30",
        "1:30.5",
        "010",
        "0b11",
        "0x1f",
        "0o17",
        "1_000",
        "1_0.5",
        "2026-01-01",
        "=",
        "yes",
        "off",
        "Y",
        "1e",
    ],
)
def test_what_yaml_1_1_takes_for_something_else_stays_as_it_was_written(written: str) -> None:
    value = parse_yaml(f"a: {written}", "x")["a"]
    assert value == written
    with pytest.raises(SpecError) as caught:
        yamlfile.number()(value, Place("c.yaml").key("a"))
    assert str(caught.value) == f"c.yaml: a: must be a number, not {written!r}"


@pytest.mark.parametrize(
    ("written", "value"), [("0", 0), ("-7", -7), ("+7", 7), ("0.5", 0.5), (".5", 0.5), ("5.", 5.0)]
)
def test_numbers_in_their_usual_forms(written: str, value: float) -> None:
    read = parse_yaml(f"a: {written}", "x")["a"]
    assert (read, type(read)) == (value, type(value))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1, 2", ", line "),
        ("a: 1\nb: {\n  c: ]", "line 3"),
        ("a: 1\na: 2", "line 2: malformed YAML: the key 'a' stands twice"),
        ("- 1", "must be a mapping"),
        ("", "must be a mapping of keys to values, not empty"),
        ("just text", "must be a mapping"),
        ("a: !!python/object/apply:os.system [id]", "malformed YAML"),
        ("a: !new {}", "malformed YAML"),
        ("a: \x00", "malformed YAML"),
        ("a: &x [*x]", "leads back to itself"),
        ("a: {" * 30_000, "nested more than 100 deep"),
        ("[" * 200_000, "nested more than 100 deep"),
        ("a: 1\n---\nb: 2", "malformed YAML"),
    ],
)
def test_malformed(text: str, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_yaml(text, "cluster.yaml")
    assert str(caught.value).startswith("cluster.yaml")
    assert message in str(caught.value)


def test_alias_bombs_are_refused() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    with pytest.raises(SpecError, match="aliases expanded"):
        parse_yaml("\n".join(lines), "bomb.yaml")


def test_honest_aliases_work() -> None:
    assert parse_yaml("a: &x {b: 1}\nc: *x\nd: {<<: *x, e: 2}", "x")["d"] == {"b": 1, "e": 2}


def test_files(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="cannot be read: No such file"):
        read_yaml(tmp_path / "none.yaml")
    with pytest.raises(SpecError, match="cannot be read"):
        read_yaml(tmp_path)
    with pytest.raises(SpecError, match="cannot be read"):
        read_yaml("a\0b")
    large = tmp_path / "large.yaml"
    large.write_bytes(b"#" * (yamlfile.MAX_FILE_BYTES + 1))
    with pytest.raises(SpecError, match="larger than"):
        read_yaml(large)
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"a: \xff\xfe\xfd")
    with pytest.raises(SpecError, match="malformed"):
        read_yaml(binary)


def test_sections_name_the_place_and_the_likely_key() -> None:
    place = Place("c.yaml").key("nodes").index(2)
    with pytest.raises(SpecError) as caught:
        Section({"cuont": 1}, place, ("count", "name"))
    assert str(caught.value) == "c.yaml: nodes[2]: unknown key 'cuont' (did you mean 'count'?)"
    section = Section({"count": "4", "name": None}, place, ("count", "name"))
    with pytest.raises(
        SpecError, match=r"c\.yaml: nodes\[2\]\.count: must be a whole number between 1 and 9, not '4'"
    ):
        section.require("count", yamlfile.integer(1, 9))
    with pytest.raises(SpecError, match=r"'name' is missing"):
        section.require("name", yamlfile.text)
    with pytest.raises(SpecError, match="must be a mapping"):
        Section([1], place, ("a",))


@pytest.mark.parametrize("value", [True, "1", None, float("nan"), float("inf"), -1, 0, 10**400, [1]])
def test_numbers_are_positive_and_finite(value: object) -> None:
    with pytest.raises(SpecError):
        yamlfile.number()(value, Place("x"))


def test_a_name_that_reads_as_a_number_is_to_be_quoted() -> None:
    assert yamlfile.name(parse_yaml("a: 2024", "x")["a"], Place("x")) == "2024"
    with pytest.raises(SpecError, match=r"a: must be a name .*not 1200\.0 \(quote it: it reads as a number\)"):
        yamlfile.name(parse_yaml("a: 12e2", "x")["a"], Place("x").key("a"))


@pytest.mark.parametrize("value", [1e300, -1e301, float("nan"), float("inf"), 10**400])
def test_numbers_beyond_reason_are_told_what_is_reason(value: float) -> None:
    with pytest.raises(SpecError, match=r"must be a number below 1e\+300, not "):
        yamlfile.number()(value, Place("x"))


@pytest.mark.parametrize("value", ["", "a b", "a/b", "-a", "x" * 300, True, 1.5, None, "ü", "a\n"])
def test_names_are_plain(value: object) -> None:
    with pytest.raises(SpecError):
        yamlfile.name(value, Place("x"))
