"""Raw xLAM and ToolACE files to `Example`s: filters with counted reasons."""

import json
import os
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from tqdm import tqdm

from tooln1.data import NOT_JSON, Example, is_call, is_storable
from tooln1.io.errors import UserError
from tooln1.io.jsonl import field, kind_of, parse_json, read_rows, shown
from tooln1.prepare.toolace import CallSyntaxError, is_call_turn, parse_calls, parse_function_call, split_system
from tooln1.prompt import XLAM_SYSTEM

XLAM, SINGLE_TURN, MULTIPLE_TURN = SOURCES = ("xlam", "toolace_single_turn", "toolace_multiple_turn")

# sharegpt role names beside the public ones; function_call is an assistant turn that is always a call
ROLES = (
    dict.fromkeys(("user", "human"), "user")
    | dict.fromkeys(("tool", "observation"), "tool")
    | dict.fromkeys(("assistant", "gpt", "function_call"), "assistant")
)

# Reasons for which a row or turn is dropped, as the report counts them.
NO_CALL = "no call"
OUTSIDE = "calls a tool outside the list"
UNPARSABLE = "call does not parse"
NO_TOOLS = "tool list unreadable"
NO_QUESTION = "no user or tool turn right before it"


@dataclass(frozen=True)
class Conversion:
    """The result of converting a raw file: examples + dropped = rows (xLAM) or assistant turns (ToolACE)."""

    examples: list[Example]
    rows: dict[str, int]  # raw rows by source; multiple-turn: with more than one assistant turn
    dropped: dict[str, int]  # reason -> rows (xLAM) or assistant turns (ToolACE)


def read_xlam(path: str | os.PathLike) -> list[Example]:
    """Examples of an xLAM file (Salesforce/xlam-function-calling-60k, array or JSONL): `convert_xlam`."""
    return convert_xlam(path).examples


def read_toolace(path: str | os.PathLike) -> list[Example]:
    """Examples of a ToolACE file (Team-ACE/ToolACE, JSON array or JSONL): `convert_toolace`."""
    return convert_toolace(path).examples


def convert_xlam(path: str | os.PathLike, keep_no_call: bool = False) -> Conversion:
    """Rows {query, tools, answers} (the last two as JSON strings or lists): one example each.

    keep_no_call: keep rows whose answers are [] (the released run has none).
    Raises UserError naming file, row and reason for a row that is not of this shape. Calls to tools outside
    the row's list, answers that are no calls and values that JSON cannot hold drop the row, counted.
    """
    examples, dropped = [], Counter()
    rows = read_rows(path)
    for number, (where, row) in enumerate(tqdm(rows, desc="xLAM", unit="row", disable=None)):
        query = field(row, "query", str, where)
        tools = _json_list(row, "tools", where)
        answer = _json_list(row, "answers", where)
        messages = [{"role": "user", "content": query}]
        example = Example(f"xlam-{number}", XLAM, XLAM_SYSTEM, tools, messages, answer)
        if reason := _drop_reason(example, keep_no_call):
            dropped[reason] += 1
        else:
            calls = [{"name": call["name"], "arguments": call["arguments"]} for call in answer]
            examples.append(replace(example, answer=calls))
    return Conversion(examples, {XLAM: len(rows)}, dict(dropped))


def convert_toolace(path: str | os.PathLike, keep_no_call: bool = False) -> Conversion:
    """Rows {system, conversations: [{from, value}]}: one example per call turn, the turns before it as context.

    keep_no_call: assistant turns of plain text (and "[]") become examples with the answer []. Raises UserError
    naming file, row and reason for a row that is not of this shape; turns dropped for any other reason are
    counted (paper, "Data": calls outside the candidate list, or that do not parse).
    """
    examples, dropped, kinds = [], Counter(), Counter({SINGLE_TURN: 0, MULTIPLE_TURN: 0})
    for number, (where, row) in enumerate(tqdm(read_rows(path), desc="ToolACE", unit="row", disable=None)):
        conversations = field(row, "conversations", list, where)
        turns = [_turn(turn, f"{where}, turn {index}") for index, turn in enumerate(conversations)]
        kinds[MULTIPLE_TURN if sum(role == "assistant" for role, *_ in turns) > 1 else SINGLE_TURN] += 1
        found, reasons = _dialogue(number, field(row, "system", str, where), turns, keep_no_call)
        examples += found
        dropped += reasons
    return Conversion(examples, dict(kinds), dict(dropped))


def _json_list(row: dict, key: str, where: str) -> list:
    """A list, given as such or as a JSON string. NaN in it is left to `_drop_reason`, which counts it."""
    value = row.get(key)
    if isinstance(value, str):
        value = parse_json(value, f'{where}, "{key}"', constants=True)
        row = {key: value}
    return field(row, key, list, where)


def _turn(turn: Any, where: str) -> tuple[str, str, bool]:
    """(role, text, whether the role says that the text is a call)."""
    if not isinstance(turn, dict):
        raise UserError(f'{where}: expected {{"from": ..., "value": ...}}, found {kind_of(turn)}')
    role, text = field(turn, "from", str, where), field(turn, "value", str, where)
    if role not in ROLES:
        raise UserError(f"{where}: unknown role {shown(role)}; known are {', '.join(ROLES)}")
    return ROLES[role], text, role == "function_call"


def _dialogue(row: int, system: str, turns: list[tuple], keep_no_call: bool) -> tuple[list[Example], Counter]:
    """The examples of one ToolACE row, and its other assistant turns counted by reason."""
    prefix, tools = split_system(system)
    examples, dropped, context = [], Counter(), []
    for index, (role, text, must_call) in enumerate(turns):
        calls, reason = [], ""
        if role == "assistant":
            try:
                if must_call:
                    calls = parse_function_call(text)
                elif is_call_turn(text):
                    calls = parse_calls(text)
            except CallSyntaxError as error:
                reason = f"{UNPARSABLE}: {error}"
            source = MULTIPLE_TURN if len(context) >= 2 else SINGLE_TURN  # as the released code labels a step
            example = Example(f"toolace-{row}-{index}", source, prefix, tools or [], list(context), calls)
            reason = (NO_TOOLS if tools is None else reason) or _drop_reason(example, keep_no_call)
            if reason:
                dropped[reason] += 1
            else:
                examples.append(example)
        context.append({"role": role, "content": json.dumps(calls) if calls else text})
    return examples, dropped


def _drop_reason(example: Example, keep_no_call: bool) -> str:
    """The reason to drop a freshly converted example, or ""."""
    if not all(isinstance(tool, dict) and isinstance(tool.get("name"), str) for tool in example.tools):
        return NO_TOOLS
    if not all(is_call(call) for call in example.answer):
        return f"{UNPARSABLE}: an answer without a name and arguments"
    if not example.answer and not keep_no_call:
        return NO_CALL
    if {call["name"] for call in example.answer} - {tool["name"] for tool in example.tools}:
        return OUTSIDE
    if not example.messages or example.messages[-1]["role"] == "assistant":
        return NO_QUESTION
    return "" if is_storable(vars(example)) else NOT_JSON
