"""JSON rows from a file: a JSON array or JSONL, with errors that name the file, the row and the reason."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from tooln1.errors import UserError


def read_rows(path: str | os.PathLike) -> list[tuple[str, dict]]:
    """The rows of a JSON array of objects, or of JSONL (one object a line; blank lines are skipped).

    Returns [(where, row)]; `where` names the row in messages: "file.jsonl, line 3" (from 1) or "file.json,
    row 2" (from 0). Raises UserError for a missing file, bytes that are no UTF-8, broken JSON, NaN or
    Infinity (they are no JSON, and not every reader takes them), a row that is no object, and a file without
    rows.
    """
    text = _read_text(path)
    rows = _array_rows(path, text) if text.lstrip()[:1] == "[" else _line_rows(path, text)
    if not rows:
        raise UserError(f"{path} holds no rows: expected a JSON array of objects or one JSON object a line")
    for where, row in rows:
        if not isinstance(row, dict):
            raise UserError(f"{where}: expected a JSON object, found {kind_of(row)}")
    return rows


def parse_json(text: str, where: str, constants: bool = False) -> Any:
    """`json.loads` whose every failure is a UserError that begins with `where`; NaN only on demand."""
    try:
        return json.loads(text, parse_constant=float if constants else _refuse_constant)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise UserError(f"{where}: not valid JSON ({error.msg} at {place}); is it complete?") from None
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    except RecursionError:
        raise UserError(f"{where}: JSON nested too deeply to read") from None


def field(row: dict, key: str, kind: type, where: str) -> Any:
    """`row[key]`, which must be there and of this kind (str, list or dict), else a UserError."""
    if key not in row:
        present = ", ".join(map(repr, row)) or "no keys"
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


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


def _read_text(path: str | os.PathLike) -> str:
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}, line {line}: the bytes at offset {error.start} are not UTF-8 ({error.reason}); "
            "save the file as UTF-8, or fetch it again if it was cut off"
        ) from None


def _array_rows(path: str | os.PathLike, text: str) -> list[tuple[str, Any]]:
    return [(f"{path}, row {number}", row) for number, row in enumerate(parse_json(text, str(path)))]


def _line_rows(path: str | os.PathLike, text: str) -> list[tuple[str, Any]]:
    # not splitlines(): U+2028 and its like may stand inside a JSON string
    lines = [(f"{path}, line {number}", line) for number, line in enumerate(text.split("\n"), start=1)]
    return [(where, parse_json(line, where)) for where, line in lines if line.strip()]
