"""Augmentation: copies in which no tool fits, and names that say nothing (Hammer, arXiv 2410.04587)."""

from dataclasses import replace

from tooln1.data import Example
from tooln1.prepare.split import IRRELEVANT, digest


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
    """The example with random letters for the names of its functions or parameters, in tools and answer alike.

    part: "functions" or "parameters"; parameters inside others keep their names. None where there is nothing to rename,
    where parameters have an unknown form, and where earlier turns hold the old names.
    """
    schemas = [properties(tool) for tool in example.tools]
    if len(example.messages) > 1 or None in schemas:
        return None
    names = [name for schema in schemas for name in schema]
    if part == "functions":
        names = [tool["name"] for tool in example.tools]
    new = {name: "".join(chr(97 + byte % 26) for byte in digest(seed, example.id, name)[:8]) for name in names}
    if part == "functions":
        tools = [tool | {"name": new[tool["name"]]} for tool in example.tools]
        answer = [call | {"name": new.get(call["name"], call["name"])} for call in example.answer]
    else:
        tools = [with_names(tool, new) for tool in example.tools]
        answer = [
            call | {"arguments": {new.get(key, key): value for key, value in call["arguments"].items()}}
            for call in example.answer
        ]
    return replace(example, tools=tools, answer=answer) if new else None


def properties(tool: dict) -> dict[str, dict] | None:
    """A tool's parameters by name, from a JSON schema or from xLAM's flat form; None where they are in neither."""
    found = tool.get("parameters") or {}
    if isinstance(found, dict) and isinstance(found.get("type"), str):
        found = found.get("properties") or {}
    return found if isinstance(found, dict) and all(isinstance(one, dict) for one in found.values()) else None


def with_names(tool: dict, new: dict[str, str]) -> dict:
    """The tool with new names of its parameters."""
    found = properties(tool)
    renamed = {new[name]: about for name, about in found.items()}
    if not found or found is tool["parameters"]:
        return tool | ({"parameters": renamed} if found else {})
    schema = tool["parameters"] | {"properties": renamed}
    if isinstance(schema.get("required"), list):
        schema["required"] = [new.get(str(name), name) for name in schema["required"]]
    return tool | {"parameters": schema}
