"""Rows from a JSON array or from JSONL: what is broken names its file and, in JSONL, its line."""

import json

import pytest

from tooln1.io.errors import UserError
from tooln1.io.jsonl import read_rows


@pytest.fixture
def write(tmp_path):
    def written(data: str | bytes):
        path = tmp_path / "rows.json"
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        return path

    return written


@pytest.mark.parametrize("indent", [None, 1])
def test_an_array(write, indent):
    rows = [{}, {"é😀\u2028": "😀", "n": -12.5e3, "deep": [[[{"x": [True]}]]]}]
    path = write("\ufeff \n" + json.dumps(rows, indent=indent, ensure_ascii=indent is None) + " \n")
    assert read_rows(path) == [(f"{path}, row 0", rows[0]), (f"{path}, row 1", rows[1])]


def test_lines_with_blank_ones_a_byte_order_mark_and_separators_in_strings(write):
    path = write('\ufeff\n {"a": "x\u2028y\x85z"}\r\n\u2003\n\n{"a": 2, "a": 3}')
    assert read_rows(path) == [(f"{path}, line 2", {"a": "x\u2028y\x85z"}), (f"{path}, line 5", {"a": 3})]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": 1}\n{"a": 1', ", line 2: not valid JSON (Expecting ',' delimiter at character 8); is it complete?"),
        ('[{"a": 1},\n {"a": 1', ": not valid JSON (Expecting ',' delimiter at line 2); is it complete?"),
        ('[{"a": 1}, 12]', ", row 1: expected a JSON object, found a number"),
        ("{}\n[]", ", line 2: expected a JSON object, found a list"),
        ('[{}, {"a": NaN}]', ": NaN is not a JSON value"),
        ('{}\n{"a": -Infinity}', ", line 2: -Infinity is not a JSON value"),
        ('{"a": ' + "9" * 4301 + "}", ", line 1: Exceeds the limit"),
        ("{}\n" + '{"a": ' * 99999, ", line 2: JSON nested too deeply"),
        ("[{}, " + '{"a":' * 99999, ": JSON nested too deeply"),
        (b'{}\n{"a": "\xff"}', ", line 2: not UTF-8"),
        (b"\0" * 1000, ", line 1: not valid JSON"),
        ('{}\n\ufeff{"a": 1}', ", line 2: not valid JSON"),
        ("\ufeff \n\t\n", " holds no rows"),
    ],
)
def test_what_is_broken_is_named(write, text, words):
    path = write(text)
    with pytest.raises(UserError) as caught:
        read_rows(path)
    assert str(caught.value).startswith(f"{path}{words}") and len(str(caught.value)) < 500


@pytest.mark.parametrize("name", ["", "absent"])
def test_what_cannot_be_read_is_refused(tmp_path, name):
    with pytest.raises(UserError, match=f"cannot read {tmp_path / name}: "):
        read_rows(tmp_path / name)
