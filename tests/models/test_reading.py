"""The one reader of JSON: what it refuses, and that it names the file."""

import pytest

from models.reading import fields_of, parse_json, read_json

BROKEN = {
    "cut": b'{"a": 1',
    "nested too deeply": b"[" * 100_000,
    "a number of 5,000 digits": b"[" + b"9" * 5000 + b"]",
    "half of a surrogate pair": b'{"a": "\\ud800"}',
    "the other half, in a name": b'{"\\uDFFF": 1}',
    "not UTF-8": b'{"a": "\xff"}',
    "empty": b"",
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN)
def test_what_is_no_json_is_named_by_its_place(text):
    with pytest.raises(ValueError, match=r"^a.json is not JSON"):
        parse_json(text, "a.json")


@pytest.mark.parametrize(
    ("text", "value"), [('"\\ud83d\\ude00"', "\N{GRINNING FACE}"), (b'"\\u00e9"', "\u00e9")]
)
def test_pairs_and_other_escapes_are_text(text, value):
    assert parse_json(text, "a.json") == value


def test_a_file_is_read_only_if_its_size_is_allowed_and_it_holds_an_object(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"a": 1}')
    assert read_json(path) == {"a": 1}
    with pytest.raises(ValueError, match=r"a.json has 8 bytes, but at most 7 are read"):
        read_json(path, limit=7)
    assert read_json(path, limit=8) == {"a": 1}
    path.write_text("[1]")
    with pytest.raises(ValueError, match=r"a.json holds \[1\], not an object"):
        read_json(path)


@pytest.mark.parametrize("error", [KeyError, TypeError, AttributeError, IndexError, OverflowError])
def test_values_of_another_form_are_named_by_their_file(error):
    with (
        pytest.raises(ValueError, match=r"^a.json has a value of an unexpected form"),
        fields_of("a.json"),
    ):
        raise error("x")
