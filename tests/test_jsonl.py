"""Rows from a file, one at a time: what is broken, huge or endless names its file and row."""

import gc
import json
import os
import tracemalloc

import pytest

from tooln1.io import jsonl
from tooln1.io.errors import UserError
from tooln1.io.jsonl import MAX_DEPTH, MAX_ROW, read_rows

ROW = {"a": 1, "b": ["x", None, 1.5]}


@pytest.fixture
def write(tmp_path):
    def written(data, name="rows.json"):
        (tmp_path / name).write_bytes(data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass"))
        return tmp_path / name

    return written


def refused(path):
    with pytest.raises(UserError) as caught:
        read_rows(path)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 1000
    return str(caught.value).removeprefix(str(path))


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 2**18])
@pytest.mark.parametrize("indent", [None, 1])
def test_an_array_is_the_same_whatever_the_chunks(write, monkeypatch, chunk, indent):
    rows = [ROW, {}, {"é😀\u2028": "😀", "n": -12.5e3, "deep": [[[{"x": [True]}]]]}, {"long": "y" * 50}]
    path = write("\ufeff \n" + json.dumps(rows, indent=indent, ensure_ascii=indent is None) + " \n")
    monkeypatch.setattr(jsonl, "_CHUNK", chunk)
    expected = [{**row} for row in json.loads(path.read_text(encoding="utf-8-sig"))]
    assert read_rows(path) == [(f"{path}, row {number}", row) for number, row in enumerate(expected)]


def test_lines_blank_ones_byte_order_mark_and_separators_in_strings(write):
    path = write('\ufeff\n {"a": "x\u2028y\x85z"}\r\n\u2003\n\n{"a": 2, "a": 3}')
    assert read_rows(path) == [(f"{path}, line 2", {"a": "x\u2028y\x85z"}), (f"{path}, line 5", {"a": 3})]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": 1}\n{"a": 1', ", line 2: not valid JSON (Expecting ',' delimiter at character 8); is it complete?"),
        ('{"a": 1}\n{"a": "x', ", line 2: not valid JSON (Unterminated string"),
        ('[{"a": 1},\n {"a": 1', ", row 1: not valid JSON (Expecting ',' delimiter at character 8); is it complete?"),
        ('[{"a": 1}, {"a": "x', ", row 1: not valid JSON (Unterminated string"),
        ('[{"a": 1}, {"a": x}, {}]' + " " * 99, ", row 1: not valid JSON (Expecting value at character 7)"),
        ('[{"a": 1}, {"b": 1},', ", row 2: not valid JSON (Expecting value"),
        ('[{"a": 1}', ", row 0: not valid JSON (no ',' or ']'"),
        ('[{"a": 1} {"a": 1}]', ", row 0: not valid JSON (no ',' or ']'"),
        ('[{"a": 1}] x', ": not valid JSON (text after the array's closing"),
        ("[", ", row 0: not valid JSON"),
        ('[{"a": 1}, 12]', ", row 1: expected a JSON object, found a number"),
        ('[{}, {"a": NaN}]', ", row 1: NaN is not a JSON value"),
        ('{}\n{"a": -Infinity}', ", line 2: -Infinity is not a JSON value"),
        ('[{}, {"a": ' + "9" * 4301 + "}]", ", row 1: a number of more digits than can be read"),
        ('{"a": ' + "9" * 4301 + "}", ", line 1: a number of more digits than can be read"),
        ("{}\n" + '{"a": ' * 5000, ", line 2: JSON nested too deeply"),
        ("[{}, " + '{"a":' * 5000, ", row 1: JSON nested too deeply"),
        ('[{}, {"a": "\0"}]', ", row 1: not valid JSON (Invalid control character"),
        (b'{}\n{"a": "\xff"}', ", line 2: the bytes at offset 10 are not UTF-8"),
        (b'[{}, {"a": "\xff"}]', ", row 1: the bytes at offset 12 are not UTF-8"),
        (b'[{}, {"a": "\xed\xa0\x80"}]', ", row 1: the bytes at offset 12 are not UTF-8"),
        (b'[{}, {"a": "\xe2\x80', ", row 1: the bytes at offset 12 are not UTF-8"),
        (b"[{}] \xff", ", row 1: the bytes at offset 5 are not UTF-8"),
        (b"[ \xff", ", row 0: the bytes at offset 2 are not UTF-8"),
        (b"[{} \xff", ", row 0: the bytes at offset 4 are not UTF-8"),
        (b"\xff\xfe[\0]\0", ", line 1: the bytes at offset 0 are not UTF-8"),
        (b"\0" * 1000, ", line 1: not valid JSON"),
        (b" \n\t\n", " holds no rows"),
        (b"\xef\xbb\xbf", " holds no rows"),
        ("[ ]", " holds no rows"),
        ('{}\n\ufeff{"a": 1}', ", line 2: not valid JSON (a byte order mark"),
    ],
)
@pytest.mark.parametrize("chunk", [5, 2**18])
def test_what_is_broken_names_its_row(write, monkeypatch, text, words, chunk):
    monkeypatch.setattr(jsonl, "_CHUNK", chunk)
    assert refused(write(text)).startswith(words)


def test_nesting_up_to_a_limit(write):
    def row(depth):
        return '{"a": ' + "[" * (depth - 1) + "]" * (depth - 1) + "}"

    for text in (f"[{{}}, {row(MAX_DEPTH)}]", row(MAX_DEPTH)):
        assert read_rows(write(text))[-1][1]
    assert refused(write(f"[{{}}, {row(MAX_DEPTH + 1)}]")).startswith(", row 1: JSON nested too deeply")
    assert refused(write(row(MAX_DEPTH + 1))).startswith(", line 1: JSON nested too deeply")
    wide = '{"a": "' + "[{" * 500 + '", "b": [' + ", ".join(["[[]]"] * 200) + "]}"
    assert len(read_rows(write(wide))) == 1  # many brackets are not deep


@pytest.mark.parametrize("text", ['[{"a": 1}, {"a": "', '{"a": 1}\n{"a": "'])
def test_a_gigabyte_row_is_refused_without_a_gigabyte(tmp_path, text):
    path = tmp_path / "huge"
    path.write_bytes(text.encode())
    os.truncate(path, 2**30)  # a hole: zeros without end, and no place on the disk
    with open(path, "r+b") as file:  # of a row that is valid as far as one can see
        file.seek(len(text))
        file.write(b"x" * (4 * MAX_ROW))
    tracemalloc.start()
    words = refused(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert words.startswith((", row 1: the row is larger than", ", line 2: the row is larger than"))
    assert peak < 12 * MAX_ROW


@pytest.mark.parametrize("name", ["/dev/zero", "/dev/null", "pipe", "folder", "absent", "a\0b", "a\ud800b"])
def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path, name):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    path = name if name.startswith("/") else str(tmp_path / name)
    with pytest.raises(UserError, match="cannot read"):
        read_rows(path)


def test_messages_stay_short(write):
    with pytest.raises(UserError) as caught:
        jsonl.field({f"{number}" + "k" * 5000: 1 for number in range(500)}, "a", str, "here")
    assert len(str(caught.value)) < 3000 and 'the key "a" is missing' in str(caught.value)


def test_garbage_collection_is_on_again(write):
    read_rows(write("{}"))
    refused(write("x"))
    assert gc.isenabled()
