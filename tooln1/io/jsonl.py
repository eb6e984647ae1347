"""JSON rows from a file: a JSON array or JSONL, with errors that name the file, the row and the reason."""

from __future__ import annotations

import codecs
import gc
import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

from tooln1.io.errors import UserError

MAX_ROW = 2**24  # bytes of a line, characters of an array's element; no prompt of 4 million tokens is trained on
MAX_DEPTH = 100  # of lists and objects in one another: what hashes, compares or writes a row later recurses
_CHUNK = 2**18  # bytes read at once
_SPACE = re.compile(r"[ \t\n\r]*")


def read_rows(path: str | os.PathLike) -> list[tuple[str, dict]]:
    """The rows of a JSON array of objects, or of JSONL (one object a line; blank lines are skipped).

    Returns [(where, row)]; `where` names the row in messages: "file.jsonl, line 3" (from 1) or "file.json,
    row 2" (from 0). Raises UserError for what is no regular file, bytes that are no UTF-8, broken JSON, NaN or
    Infinity (they are no JSON, and not every reader takes them), a row over MAX_ROW or MAX_DEPTH, a row that is
    no object, and a file without rows. Beside the rows only one of them is in memory as text.
    """
    found = []
    with open_file(path) as file, _no_garbage_collection():
        for where, row in _array_rows(path, file) if _starts_array(file) else _line_rows(path, file):
            if not isinstance(row, dict):
                raise UserError(f"{where}: expected a JSON object, found {kind_of(row)}")
            found.append((where, row))
    if not found:
        raise UserError(f"{path} holds no rows: expected a JSON array of objects or one JSON object a line")
    return found


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """JSON has no cycles; looking for them in what has just been read takes a third of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def open_file(path: str | os.PathLike) -> IO[bytes]:
    """A regular file, opened to be read. UserError for any other: a pipe would hang, a device never end."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UserError(f"cannot read {path}: it is a folder, pipe or device, not a file")
        return open(path, "rb")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"cannot read {str(path)!r}: {error}") from None  # a NUL or half a surrogate pair in it


def read_text(path: str | os.PathLike, limit: int = MAX_ROW) -> str:
    """The text of a UTF-8 file of at most `limit` bytes. Raises UserError."""
    with open_file(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise UserError(f"{path}: larger than {limit:,} bytes, which is no sensible size for it")
    return _decoded(data, str(path), 0)


def parse_json(text: str, where: str, constants: bool = False) -> Any:
    """`json.loads` whose every failure is a UserError that begins with `where`; NaN only on demand."""
    try:
        if text.startswith("\ufeff"):
            raise json.JSONDecodeError("a byte order mark", text, 0)
        value = (_LENIENT if constants else _STRICT).decode(text)
    except (ValueError, RecursionError) as error:
        raise _broken(error, where, 0) from None
    if is_deep(value, text):
        raise _broken(RecursionError(), where, 0)
    return value


def field(row: dict, key: str, kind: type, where: str) -> Any:
    """`row[key]`, which must be there and of this kind (str, list or dict), else a UserError."""
    if key not in row:
        present = shown(*row) or "no keys"
        raise UserError(f'{where}: the key "{key}" is missing; the row has {present}')
    if not isinstance(row[key], kind):
        raise UserError(f'{where}: "{key}" must be {kind_of(kind())}, found {kind_of(row[key])}')
    return row[key]


def kind_of(value: Any) -> str:
    """A JSON value's kind in words."""
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "a number"
    return {str: "a string", list: "a list", dict: "an object"}.get(type(value), "null")


def shown(*texts: str) -> str:
    """Texts from a file as an error message quotes them: 'a', 'b', and shortened."""
    words = ", ".join(repr(text if len(text) < 80 else f"{text[:80]}...") for text in texts[:20])
    return words + (", ..." if len(texts) > 20 else "")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


_STRICT = json.JSONDecoder(parse_constant=_refuse_constant)
_LENIENT = json.JSONDecoder(parse_constant=float)


def _broken(error: Exception, where: str, start: int) -> UserError:
    """What the decoder raised, as a sentence; the row begins at character `start` of its text."""
    if isinstance(error, RecursionError):
        return UserError(f"{where}: JSON nested too deeply to read (more than {MAX_DEPTH} levels)")
    if isinstance(error, json.JSONDecodeError):
        place = f"{error.msg} at character {error.pos - start + 1}"
        return UserError(f"{where}: not valid JSON ({place}); is it complete?")
    if "4300" in str(error) or "digits" in str(error):  # Python's limit for integers
        return UserError(f"{where}: a number of more digits than can be read")
    return UserError(f"{where}: {error}")


def is_deep(value: Any, text: str, start: int = 0, end: int | None = None) -> bool:
    """Whether a JSON value, written in text[start:end], has more than MAX_DEPTH lists and objects in one another."""
    if text.count("[", start, end) + text.count("{", start, end) <= MAX_DEPTH:
        return False  # true of nearly every row, and cheap to see
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [node for node in level if isinstance(node, dict | list)]
        if not level:
            return False
        level = [item for node in level for item in (node.values() if isinstance(node, dict) else node)]
    return True


def _decoded(data: bytes, where: str, offset: int) -> str:
    """UTF-8 text; `offset`: where in the file the data begin."""
    try:
        return data.decode("utf-8-sig" if not offset else "utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(where, offset + error.start, error) from None


def _not_utf8(where: str, offset: int, error: UnicodeDecodeError) -> UserError:
    return UserError(
        f"{where}: the bytes at offset {offset} are not UTF-8 ({error.reason}); "
        "save the file as UTF-8, or fetch it again if it was cut off"
    )


def _starts_array(file: IO[bytes]) -> bool:
    """Whether the first sign of the file is "["; leaves the file right behind it, or else at the beginning."""
    file.seek(3 if file.read(3) == codecs.BOM_UTF8 else 0)
    while chunk := file.read(_CHUNK):
        if text := chunk.lstrip():
            file.seek(1 - len(text) if text[:1] == b"[" else -file.tell(), os.SEEK_CUR)
            return text[:1] == b"["
    return False


def _line_rows(path: str | os.PathLike, file: IO[bytes]) -> Iterator[tuple[str, Any]]:
    # by "\n" alone, not splitlines(): U+2028 and its like may stand inside a JSON string
    offset = number = 0
    while line := file.readline(MAX_ROW + 1):
        number += 1
        where = f"{path}, line {number}"
        if len(line) > MAX_ROW:
            raise _too_large(where)
        text = _decoded(line, where, offset)
        offset += len(line)
        if text and not text.isspace():
            yield where, parse_json(text, where)


def _too_large(where: str) -> UserError:
    return UserError(f"{where}: the row is larger than {MAX_ROW:,} bytes, which no prompt is; remove or shorten it")


def _array_rows(path: str | os.PathLike, file: IO[bytes]) -> Iterator[tuple[str, Any]]:
    """The elements, one at a time: what is broken has a row, and the file need not fit into memory as text."""
    text = _ArrayText(file)
    more, number = text.sign(f"{path}, row 0") != "]", 0
    while more:
        where = f"{path}, row {number}"
        yield where, text.value(where)
        sign = text.sign(where)
        if sign not in (",", "]"):
            raise UserError(f"{where}: not valid JSON (no ',' or ']' after the row); is it complete?")
        text.position += sign == ","
        more, number = sign == ",", number + 1
    text.position += 1
    if text.sign(f"{path}, row {number}"):
        raise UserError(f"{path}: not valid JSON (text after the array's closing ']')")


class _ArrayText:
    """A file as text, of which only what is being parsed, from `position` on, is kept."""

    def __init__(self, file: IO[bytes]):
        self.file, self.text, self.position, self.ended = file, "", 0, False
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.fault: tuple[int, UnicodeDecodeError] | None = None  # offset and reason of the first broken bytes

    def more(self) -> bool:
        """Read on; False at the end, or where the bytes are no UTF-8."""
        if self.ended:
            return False
        start = self.file.tell() - len(self.decoder.getstate()[0])
        data = self.file.read(max(_CHUNK, len(self.text) - self.position))  # twice as much: linear in the end
        self.ended = not data
        try:
            new = self.decoder.decode(data, final=self.ended)
        except UnicodeDecodeError as error:  # what stands before is parsed first: it has the row's number
            new, self.fault, self.ended = error.object[: error.start].decode(), (start + error.start, error), True
        self.text, self.position = self.text[self.position :] + new, 0
        return True

    def sign(self, where: str) -> str:
        """The next sign that is not white space, left unread; "" at the end of the file."""
        while True:
            self.position = _SPACE.match(self.text, self.position).end()
            if self.position < len(self.text):
                return self.text[self.position]
            if not self.more():
                if self.fault:
                    raise _not_utf8(where, *self.fault)
                return ""

    def value(self, where: str) -> Any:
        """The JSON value that begins here; the position moves behind it."""
        self.sign(where)
        while True:
            failure = None
            try:
                value, end = _STRICT.raw_decode(self.text, self.position)
            except json.JSONDecodeError as error:
                failure, end = error, len(self.text)
                if error.pos < end - 20 and not error.msg.startswith("Unterminated"):
                    raise _broken(error, where, self.position) from None  # broken, not cut off by the chunk
            except (ValueError, RecursionError) as error:
                raise _broken(error, where, self.position) from None
            if end - self.position > MAX_ROW:
                raise _too_large(where)
            if not failure:
                break
            if not self.more():
                raise _not_utf8(where, *self.fault) if self.fault else _broken(failure, where, self.position)
        if is_deep(value, self.text, self.position, end):
            raise _broken(RecursionError(), where, 0)
        self.position = end
        return value
