"""Raw xLAM and ToolACE files to `Example`s: filters with counted reasons, split, resumable epoch order.

    python -m tooln1.data --xlam xlam_function_calling_60k.json --toolace data.json --out DIR

What differs from the released preprocessing (verl/examples/data_preprocess) is listed in DEVIATIONS and
printed with every conversion.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

from tqdm import tqdm

from tooln1.errors import UserError, atomic_write, check_writable, exit_on_user_error
from tooln1.jsonl import field, is_deep, kind_of, parse_json, read_rows, shown
from tooln1.order import IRRELEVANT, EpochOrder, split
from tooln1.prompt import XLAM_SYSTEM, build_messages
from tooln1.toolace import CallSyntaxError, is_call_turn, parse_calls, parse_function_call, split_system

__all__ = [
    "Conversion",
    "EpochOrder",
    "Example",
    "add_irrelevance",
    "convert_toolace",
    "convert_xlam",
    "drop_long",
    "read_examples",
    "read_toolace",
    "read_xlam",
    "split",
    "write_examples",
]

XLAM, SINGLE_TURN, MULTIPLE_TURN = SOURCES = ("xlam", "toolace_single_turn", "toolace_multiple_turn")
# sharegpt role names beside the public ones; function_call is an assistant turn that is always a call
ROLES = {
    "user": "user",
    "human": "user",
    "tool": "tool",
    "observation": "tool",
    "assistant": "assistant",
    "gpt": "assistant",
    "function_call": "assistant",
}
NO_CALL = "no call"
OUTSIDE = "calls a tool outside the list"
UNPARSABLE = "call does not parse"
NO_TOOLS = "tool list unreadable"
NO_QUESTION = "no user or tool turn right before it"
NOT_JSON = "holds NaN, infinity, half a surrogate pair or very deep nesting"
TABLE_NOTE = (
    "Raw: rows; a ToolACE row is multi with more than one assistant turn.\n"
    "Processed: instances, one per call step; multi from the third turn on, as the released code has it."
)
DEVIATIONS = (
    "The split is by source row and seeded, rows of equal tools and question on one side; the "
    "released one is by instance (steps of one dialogue fall on both sides) and unseeded.",
    "ToolACE call strings go through a parser that keeps ')' inside values, true/false/null, escaped quotes "
    "and names with slashes or parentheses; the released one cuts or drops them (docs/toolace_parser.md).",
    "Earlier calls stand in the history as JSON once; the released code encodes them twice.",
    "The filters (calls outside the candidate list, or that do not parse) hold for xLAM rows too, and rows "
    "with values that JSON or UTF-8 cannot hold are dropped; the released code filters ToolACE answers only.",
)


@dataclass(frozen=True)
class Example:
    """One training or evaluation instance: the context up to a call, and the calls that answer it.

    Everything in it is plain JSON data, shared between the examples of a row: treat it as read-only.
    """

    id: str  # unique in a file: "xlam-12" (row 12, from 0), "toolace-17-3" (the call at turn 3 of row 17)
    source: str  # "xlam", "toolace_single_turn", "toolace_multiple_turn", or the user's own label
    system: str  # text before the tools section of the system prompt
    tools: list[dict]  # candidate tools, each {"name", "description", "parameters", ...} as in the source
    messages: list[dict]  # {"role": "user" | "assistant" | "tool", "content": str}; never ends with assistant
    answer: list[dict]  # gold calls, each {"name": str, "arguments": dict}; [] where no call is right


@dataclass(frozen=True)
class Conversion:
    """What a raw file gave: examples + dropped = rows (xLAM) or assistant turns (ToolACE)."""

    examples: list[Example]
    rows: dict[str, int]  # raw rows by source; multiple-turn: with more than one assistant turn
    dropped: dict[str, int]  # reason -> rows (xLAM) or assistant turns (ToolACE)


# ---------------------------------------------------------------------------------------------- raw files


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
        if reason := _fault(example, keep_no_call):
            dropped[reason] += 1
        else:
            calls = [{"name": call["name"], "arguments": call["arguments"]} for call in answer]
            examples.append(replace(example, answer=calls))
    return Conversion(examples, {XLAM: len(rows)}, dict(dropped))


def convert_toolace(path: str | os.PathLike, keep_no_call: bool = False) -> Conversion:
    """Rows {system, conversations: [{from, value}]}: one example per call step, all before it as context.

    keep_no_call: assistant turns in plain words (and "[]") become examples with the answer []. Raises
    UserError naming file, row and reason for a row that is not of this shape; whatever else keeps a turn from
    being an example is counted (paper, "Data": calls outside the candidate list, or that do not parse).
    """
    examples, dropped, kinds = [], Counter(), Counter({SINGLE_TURN: 0, MULTIPLE_TURN: 0})
    for number, (where, row) in enumerate(tqdm(read_rows(path), desc="ToolACE", unit="row", disable=None)):
        turns = [
            _turn(turn, f"{where}, turn {index}") for index, turn in enumerate(field(row, "conversations", list, where))
        ]
        kinds[MULTIPLE_TURN if sum(role == "assistant" for role, *_ in turns) > 1 else SINGLE_TURN] += 1
        found, reasons = _dialogue(number, field(row, "system", str, where), turns, keep_no_call)
        examples += found
        dropped += reasons
    return Conversion(examples, dict(kinds), dict(dropped))


def _json_list(row: dict, key: str, where: str) -> list:
    """A list, given as such or as a JSON string. NaN in it is left to `_fault`, which counts it."""
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
    names = {tool["name"] for tool in tools or ()}
    examples, dropped, context = [], Counter(), []
    for index, (role, text, is_call) in enumerate(turns):
        calls, reason = [], ""
        if role == "assistant":
            try:
                if is_call or is_call_turn(text):
                    calls = (parse_function_call if is_call else parse_calls)(text, names)
            except CallSyntaxError as error:
                reason = f"{UNPARSABLE}: {error.reason}"
            source = MULTIPLE_TURN if len(context) >= 2 else SINGLE_TURN  # as the released code labels a step
            example = Example(f"toolace-{row}-{index}", source, prefix, tools or [], list(context), calls)
            reason = (NO_TOOLS if tools is None else reason) or _fault(example, keep_no_call)
            if reason:
                dropped[reason] += 1
            else:
                examples.append(example)
        context.append({"role": role, "content": json.dumps(calls) if calls else text})
    return examples, dropped


def _fault(example: Example, keep_no_call: bool) -> str:
    """The reason to drop a freshly converted example, or ""."""
    if not all(isinstance(tool, dict) and isinstance(tool.get("name"), str) for tool in example.tools):
        return NO_TOOLS
    if not all(_is_call(call) for call in example.answer):
        return f"{UNPARSABLE}: an answer without a name and arguments"
    if not example.answer and not keep_no_call:
        return NO_CALL
    if {call["name"] for call in example.answer} - {tool["name"] for tool in example.tools}:
        return OUTSIDE
    if not example.messages or example.messages[-1]["role"] == "assistant":
        return NO_QUESTION
    return "" if _is_storable(vars(example)) else NOT_JSON


def _is_call(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    return isinstance(value.get("name"), str) and isinstance(value.get("arguments"), dict)


def _is_storable(value: Any) -> bool:
    """Whether a row in strict JSON and UTF-8 can hold it: no NaN, no infinity, no half surrogate pair, not too deep."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
    except (ValueError, RecursionError):  # UnicodeEncodeError is a ValueError
        return False
    return not is_deep(value, text)


# ------------------------------------------------------------------------------- the project's own JSONL


def write_examples(examples: list[Example], path: str | os.PathLike) -> None:
    """Write one JSON object a line, atomically. Raises UserError for what `read_examples` would refuse."""
    seen = set()
    with atomic_write(path) as file:
        for example in examples:
            _check_example(vars(example), f'{path}, example "{example.id}"', seen)
            file.write(json.dumps(vars(example), ensure_ascii=False) + "\n")


def read_examples(path: str | os.PathLike) -> list[Example]:
    """Examples from JSONL (or a JSON array) of objects with exactly the keys of `Example`.

    Raises UserError naming file, line and reason: broken UTF-8 or JSON, NaN, missing or unknown keys, wrong
    types, ids given twice, answers without name and arguments, no messages, a last message by the assistant.
    """
    seen = set()
    return [checked_example(row, where, seen) for where, row in read_rows(path)]


def checked_example(row: dict, where: str, seen: set[str]) -> Example:
    """The Example of a JSON row, or UserError beginning with `where`; `seen` collects the ids of a file."""
    return Example(**_check_example(row, where, seen))


def _check_example(row: dict, where: str, seen: set[str]) -> dict:
    """`row` itself when it makes an Example; `seen` collects the ids."""
    known = {part.name for part in fields(Example)}
    if unknown := sorted(set(row) - known):
        raise UserError(f"{where}: unknown key {shown(unknown[0])}; an example has {', '.join(sorted(known))}")
    for key in ("id", "source", "system"):
        field(row, key, str, where)
    for number, tool in enumerate(field(row, "tools", list, where)):
        if not isinstance(tool, dict) or not isinstance(tool.get("name"), str):
            raise UserError(f'{where}: tools[{number}] must be an object with a "name" that is a string')
    messages = field(row, "messages", list, where)
    for number, message in enumerate(messages):
        place = f"{where}, messages[{number}]"
        if not isinstance(message, dict):
            raise UserError(f"{place}: expected an object, found {kind_of(message)}")
        field(message, "content", str, place)
        if (role := field(message, "role", str, place)) not in ("user", "assistant", "tool"):
            raise UserError(f"{place}: the role must be user, assistant or tool, found {shown(role)}")
    if not messages or messages[-1]["role"] == "assistant":
        raise UserError(f"{where}: messages must end with a user or tool turn, which the answer answers")
    for number, call in enumerate(field(row, "answer", list, where)):
        if not _is_call(call) or len(call) > 2:
            raise UserError(f'{where}: answer[{number}] must be {{"name": a string, "arguments": an object}}')
    if not _is_storable(row):
        raise UserError(f"{where}: {NOT_JSON}, which a row cannot carry; remove the row or the value")
    if row["id"] in seen:
        raise UserError(f'{where}: the id "{row["id"][:80]}" was given before; ids must be unique in a file')
    seen.add(row["id"])
    return row


# --------------------------------------------------------------------------------- filters and options


class ChatTokenizer(Protocol):
    """The part of `tooln1.tokenizer` that measures a prompt."""

    def render(self, messages: list[dict], *, add_generation_prompt: bool) -> str: ...
    def encode(self, text: str) -> list[int]: ...


def drop_long(
    examples: Sequence[Example | tuple[Example, str]],
    tokenizer: ChatTokenizer,
    max_prompt_tokens: int,
    think: bool = True,
    where: str = "",
) -> tuple[list, int]:
    """(examples whose rendered prompt has at most `max_prompt_tokens` tokens, number of the others).

    Pairs (example, reply to imitate) go by their example. Raises UserError, naming `where` and the example, where the
    chat template refuses it.
    """
    kept = []
    for one in tqdm(examples, desc="prompt lengths", unit="prompt", disable=None):
        example = one[0] if isinstance(one, tuple) else one
        try:
            prompt = tokenizer.render(build_messages(example, think), add_generation_prompt=True)
        except UserError as error:
            raise UserError(f"{where + ', ' if where else ''}example {shown(example.id)}: {error}") from error
        short = len(prompt.encode()) <= max_prompt_tokens  # a token is a byte at least: no need to count
        if short or len(tokenizer.encode(prompt)) <= max_prompt_tokens:
            kept.append(one)
    return kept, len(examples) - len(kept)


def add_irrelevance(examples: list[Example], fraction: float, seed: int) -> list[Example]:
    """`examples`, then copies in which no tool fits (the answer's tools removed, answer []).

    fraction: copies as a share of the examples, 0 in the released run. Copied are examples with an answer and
    at least one other tool, drawn by a hash of (seed, id); fewer than asked where there are not enough.
    Raises UserError unless 0 <= fraction <= 1.
    """
    if not 0 <= fraction <= 1:
        raise UserError(f"the irrelevance fraction must be between 0 and 1, got {fraction}")
    copies = []
    for example in examples:
        used = {call["name"] for call in example.answer}
        others = [tool for tool in example.tools if tool["name"] not in used]
        if used and others:
            copies.append(replace(example, id=example.id + IRRELEVANT, tools=others, answer=[]))
    copies.sort(key=lambda copy: hashlib.sha256(f"{seed}:{copy.id}".encode()).digest())
    return examples + copies[: round(fraction * len(examples))]


# ------------------------------------------------------------------------------------------ command line


def prepare(args: argparse.Namespace) -> dict:
    """Convert, filter, split and write train.jsonl, heldout.jsonl and report.json; returns the report."""
    if not (args.xlam or args.toolace):
        raise UserError("nothing to convert: pass --xlam FILE, --toolace FILE or both")
    out = check_writable(args.out, "--out")
    conversions = []
    if args.xlam:
        conversions.append(convert_xlam(args.xlam, args.keep_no_call))
    if args.toolace:
        conversions.append(convert_toolace(args.toolace, args.keep_no_call))
    examples = [example for conversion in conversions for example in conversion.examples]
    too_long = None
    if args.tokenizer:
        from tooln1.tokenizer import load_tokenizer  # only here: conversion itself needs no model

        examples, too_long = drop_long(examples, load_tokenizer(args.tokenizer), args.max_prompt_tokens)
    if not examples:
        dropped = [f"{reason}: {count}; " for c in conversions for reason, count in c.dropped.items()]
        raise UserError(f"no example is left, nothing was written ({''.join(dropped)}too long: {too_long or 0})")
    sides = split(examples, args.seed, args.held_out)
    sides = [add_irrelevance(side, args.irrelevance, args.seed) for side in sides]
    raw = Counter()
    for conversion in conversions:
        raw.update(conversion.rows)
    report = {
        "raw": {source: raw[source] for source in SOURCES},
        "processed": {source: sum(e.source == source for e in examples) for source in SOURCES},
        "train": len(sides[0]),
        "heldout": len(sides[1]),
        "irrelevance_copies": sum(map(len, sides)) - len(examples),
        "dropped": {
            "xlam" if XLAM in conversion.rows else "toolace": dict(sorted(conversion.dropped.items()))
            for conversion in conversions
        },
        "too_long": too_long,
        "options": {key: value for key, value in vars(args).items() if key != "out"},
        "deviations": list(DEVIATIONS),
    }
    for name, side in zip(("train.jsonl", "heldout.jsonl"), sides, strict=True):
        write_examples(side, out / name)
    with atomic_write(out / "report.json") as file:
        file.write(json.dumps(report, indent=2) + "\n")
    return report


def format_report(report: dict) -> str:
    """The table of the paper's Table 1, then what was dropped and why, then the deviations."""
    lines = ["| | xLAM single | ToolACE single | ToolACE multi |", "|---|---|---|---|"]
    for key in ("raw", "processed"):
        lines.append(f"| {key} | " + " | ".join(f"{report[key][source]:,}" for source in SOURCES) + " |")
    lines += ["", TABLE_NOTE, ""]
    for source, unit in (("xlam", "xLAM rows"), ("toolace", "ToolACE assistant turns")):
        for reason, count in report["dropped"].get(source, {}).items():
            lines.append(f"dropped {unit}, {reason}: {count:,}")
    options = report["options"]
    counted = "not checked, pass --tokenizer" if report["too_long"] is None else f"{report['too_long']:,}"
    lines.append(f"dropped examples, prompt over {options['max_prompt_tokens']:,} tokens: {counted}")
    if report["irrelevance_copies"]:
        lines.append(f"irrelevance copies added after the split: {report['irrelevance_copies']:,}")
    lines.append(f"train {report['train']:,}, held out {report['heldout']:,} (seed {options['seed']})")
    lines += ["", "Differs from the released preprocessing:", *(f"- {line}" for line in report["deviations"])]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tooln1.data", description=__doc__.splitlines()[0])
    parser.add_argument("--xlam", help="xLAM rows, JSON array or JSONL: {query, tools, answers}")
    parser.add_argument("--toolace", help="ToolACE rows, JSON array or JSONL: {system, conversations}")
    parser.add_argument("--out", required=True, help="folder for train.jsonl, heldout.jsonl and report.json")
    parser.add_argument("--held-out", type=float, default=0.1, help="share of rows held out (paper: 0.1)")
    parser.add_argument("--seed", type=int, default=0, help="of the split and of the irrelevance draw")
    parser.add_argument(
        "--irrelevance",
        type=float,
        default=0.0,
        metavar="FRACTION",
        help="copies without the answer's tools, as a share of all (paper: 0)",
    )
    parser.add_argument("--keep-no-call", action="store_true", help="keep turns without a call, as answer []")
    parser.add_argument("--tokenizer", help="model folder or hub id; with it, over-long prompts are dropped")
    parser.add_argument("--max-prompt-tokens", type=int, default=4096, help="longest prompt kept")
    print(format_report(prepare(parser.parse_args())))


if __name__ == "__main__":
    exit_on_user_error(main)
