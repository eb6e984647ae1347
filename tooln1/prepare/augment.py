"""Augmentation: copies in which no tool fits, and names that say nothing (Hammer, arXiv 2410.04587)."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

from tooln1.data import Example
from tooln1.prepare.split import IRRELEVANT


def add_irrelevance(examples: list[Example], fraction: float, seed: int) -> list[Example]:
    """`examples`, then copies in which no tool fits (the answer's tools removed, answer []).

    fraction: copies as a share of the examples, 0 in the released run. Copied are examples with an answer and
    at least one other tool, drawn by a hash of (seed, id); fewer than asked where there are not enough.
    """
    copies = []
    for example in examples:
        used = {call["name"] for call in example.answer}
        others = [tool for tool in example.tools if tool["name"] not in used]
        if used and others:
            copies.append(replace(example, id=example.id + IRRELEVANT, tools=others, answer=[]))
    copies.sort(key=lambda copy: digest(seed, copy.id))
    return examples + copies[: round(fraction * len(examples))]


def digest(*parts: str | int) -> bytes:
    """The hash that draws."""
    return hashlib.sha256(":".join(map(str, parts)).encode()).digest()


def mask_names(examples: list[Example], part: str, fraction: float, seed: int) -> tuple[list[Example], int]:
    """`examples`, some of them `masked`, and how many these are.

    fraction: as a share of all examples, drawn by a hash of (seed, part, id); fewer where too few can be masked.
    """
    found: dict[int, Example] = {}
    for index in sorted(range(len(examples)), key=lambda index: digest(seed, part, examples[index].id)):
        if len(found) < round(fraction * len(examples)) and (new := masked(examples[index], part, seed)):
            found[index] = new
    return [found.get(index, example) for index, example in enumerate(examples)], len(found)


def masked(example: Example, part: str, seed: int) -> Example | None:
    """The example with random letters for the names of its functions or parameters, in tools, answer and earlier turns.

    part: "functions" or "parameters"; parameters inside others keep their names. None where there is nothing to rename,
    where parameters have an unknown form, and where an earlier turn names a function but is no JSON list of calls.
    """
    functions = [tool["name"] for tool in example.tools]
    properties = [_properties(tool) for tool in example.tools]
    if None in properties:
        return None
    names = functions if part == "functions" else {name: None for known in properties for name in known}
    letters = {name: "".join(chr(97 + byte % 26) for byte in digest(seed, example.id, name)[:8]) for name in names}
    new = (letters, {}) if part == "functions" else ({}, letters)
    messages = [_renamed_turn(turn, functions, *new) for turn in example.messages]
    if not letters or None in messages:
        return None
    tools, answer = [_renamed_tool(tool, *new) for tool in example.tools], [_renamed(c, *new) for c in example.answer]
    return replace(example, tools=tools, messages=messages, answer=answer)


def _properties(tool: dict) -> dict[str, dict] | None:
    """A tool's parameters by name, from a JSON schema or from xLAM's flat form; None where they are in neither."""
    found = tool.get("parameters") or {}
    if isinstance(found, dict) and isinstance(found.get("type"), str):
        found = found.get("properties") or {}
    return found if isinstance(found, dict) and all(isinstance(one, dict) for one in found.values()) else None


def _renamed_tool(tool: dict, functions: dict[str, str], parameters: dict[str, str]) -> dict:
    new, properties = _renamed(tool, functions, parameters), _properties(tool)
    renamed = {parameters.get(name, name): value for name, value in properties.items()}
    if properties is tool.get("parameters"):
        new["parameters"] = renamed
    elif properties:
        new["parameters"] = tool["parameters"] | {"properties": renamed}
        if isinstance(required := tool["parameters"].get("required"), list):
            new["parameters"]["required"] = [parameters.get(str(name), name) for name in required]
    return new


def _renamed(call: dict, functions: dict[str, str], parameters: dict[str, str]) -> dict:
    """A call; or a tool, or the result of a call, which have no arguments."""
    new = call | {"name": functions.get(call["name"], call["name"])}
    if isinstance(call.get("arguments"), dict):
        new["arguments"] = {parameters.get(key, key): value for key, value in call["arguments"].items()}
    return new


def _renamed_turn(turn: dict, names: list[str], functions: dict[str, str], parameters: dict[str, str]) -> dict | None:
    """The turn with its calls or results renamed; None where it names a function in another form."""
    text = turn["content"]
    if turn["role"] == "user":
        return turn
    try:
        calls = json.loads(text)
        new = [_renamed(call, functions, parameters) for call in calls]
    except (ValueError, TypeError, LookupError, RecursionError):  # no JSON, or no list of calls
        return None if any(name in text for name in names) else turn
    return turn if new == [*calls] else turn | {"content": json.dumps(new, ensure_ascii=text.isascii())}
