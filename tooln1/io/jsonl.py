"""JSON files: rows of a JSON array or of JSONL, with errors that name the file, the row and the reason."""

import json
import os
from typing import Any

from tooln1.io.errors import UserError


def read_rows(path: str | os.PathLike) -> list[tuple[str, dict]]:
    """The rows of a JSON array of objects, or of JSONL (one object a line; blank lines are skipped).

    Returns [(where, row)]; `where` names the row in messages: "file.jsonl, line 3" (from 1) or "file.json, row 2"
    (from 0). Raises UserError for a file that cannot be read or has no rows, broken JSON, NaN or infinity, and a row
    that is no object.
    """
    text = read_text(path)
    if text.lstrip().startswith("["):
        rows = [(f"{path}, row {number}", row) for number, row in enumerate(parse_json(text, str(path)))]
    else:  # split at "\n" only: U+2028 and other ends of lines may stand inside a JSON string
        lines = [(f"{path}, line {number}", line) for number, line in enumerate(text.split("\n"), start=1)]
        rows = [(where, parse_json(line, where)) for where, line in lines if line.strip()]
    for where, row in rows:
        if not isinstance(row, dict):
            raise UserError(f"{where}: expected a JSON object, found {kind_of(row)}")
    if not rows:
        raise UserError(f"{path} holds no rows: expected a JSON array of objects or one JSON object a line")
    return rows


def read_jsonl(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The objects of a JSON lines file; a last line without its newline, cut off by a crash, is left out.

    Raises `UserError` for a file that cannot be read and for a line that is not JSON.
    """
    lines = read_text(path).split("\n")[:-1]  # splitlines() would split at U+2028, too
    return [parse_json(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]


def read_text(path: str | os.PathLike) -> str:
    """The text of a UTF-8 file, without its byte order mark. Raises UserError."""
    try:
        with open(path, "rb") as file:
            data = file.read()
        return data.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not UTF-8 ({error.reason}); save the file as UTF-8") from None


def parse_json(text: str, where: str, constants: bool = False) -> Any:
    """`json.loads` whose errors are UserErrors that begin with `where`; NaN and infinity only if `constants`."""
    try:
        return json.loads(text, parse_constant=None if constants else _refuse_constant)
    except json.JSONDecodeError as error:
        place = f"{error.msg} at " + (f"line {error.lineno}" if "\n" in text else f"character {error.pos + 1}")
        raise UserError(f"{where}: not valid JSON ({place}); is it complete?") from None
    except RecursionError:
        raise UserError(f"{where}: JSON nested too deeply to read") from None
    except ValueError as error:  # NaN, or a number of more digits than Python reads
        raise UserError(f"{where}: {error}") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


def field(row: dict, key: str, kind: type, where: str) -> Any:
    """`row[key]`, which must be there and of this kind (str, list or dict), else a UserError."""
    if key not in row:
        raise UserError(f'{where}: the key "{key}" is missing; the row has {shown(*row) or "no keys"}')
    if not isinstance(row[key], kind):
        raise UserError(f'{where}: "{key}" must be {kind_of(kind())}, found {kind_of(row[key])}')
    return row[key]


def kind_of(value: Any) -> str:
    """The kind of a JSON value, for messages."""
    if isinstance(value, bool):
        return "true or false"
    names = {int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), "null")


def shown(*texts: str) -> str:
    """Texts from a file as a message quotes them: 'a', 'b', and shortened."""
    words = ", ".join(repr(text if len(text) < 80 else f"{text[:80]}...") for text in texts[:20])
    return words + (", ..." if len(texts) > 20 else "")
