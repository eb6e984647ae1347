"""BFCL cases made here, in files as the benchmark has them; and right replies, made of a case's accepted values."""

import json
from pathlib import Path

from tooln1.benchmarks import Case, bfcl
from tooln1.benchmarks.bfcl_data import AST, RELEVANCE


def gold_calls(case: Case) -> list[dict]:
    """A right reply's calls: the first accepted value of every parameter, "" (left out) only if there is no other."""
    if case.category not in AST:
        return [{"name": "f", "arguments": {}}] if case.category in RELEVANCE else []
    calls = []
    for call in case.gold:
        ((name, accepted),) = call.items()
        parameters = next(function["parameters"] for function in case.functions if function["name"] == name)
        arguments = {key: _first(values) for key, values in accepted.items() if key in parameters["properties"]}
        arguments = {key: value for key, value in arguments.items() if value != "" or key in parameters["required"]}
        if case.category in ("simple_java", "simple_javascript"):
            arguments = {key: _source(value, parameters["properties"][key]) for key, value in arguments.items()}
        calls.append({"name": name, "arguments": arguments})
    return calls


def _first(choices: list):
    """The first choice that is not ""; in a dict, or a dict in a list, the first of every key."""
    value = _choice(choices)
    if isinstance(value, list):
        return [_entries(item) for item in value]
    return _entries(value)


def _choice(choices: list):
    """As `_first`; a bare string in place of the choices, as simple_java_64 has it, is meant as the only one."""
    return choices if isinstance(choices, str) else next((choice for choice in choices if choice != ""), "")


def _entries(value):
    return {key: _choice(inner) for key, inner in value.items()} if isinstance(value, dict) else value


def _source(value, schema: dict) -> str:
    """A value as Java or JavaScript source text of the declared type."""
    kind, element = schema["type"], schema.get("items", {}).get("type")
    if isinstance(value, str):
        return value
    if kind == "Array":
        return f"new Object[] {{{', '.join(map(str, value))}}}"
    if kind == "ArrayList":
        items = [json.dumps(item) + ("L" if element == "long" else "") for item in value]
        return f"new ArrayList<>(Arrays.asList({', '.join(items)}))"
    if kind == "HashMap":
        puts = "".join(f'put("{key}", {json.dumps(item)}); ' for key, item in value.items())
        return f"new HashMap<>() {{{{ {puts}}}}}"
    return json.dumps(value) + ("L" if kind == "long" else "")


def function(name="f", description="Does it.", required=(), **properties) -> dict:
    parameters = {"type": "dict", "properties": properties, "required": list(required)}
    return {"name": name, "description": description, "parameters": parameters}


def write_category(folder: Path, category: str, functions, gold=None, ids=None, version="v4", **changes) -> Path:
    """A question file of one row for each id, all alike, and where there is `gold` the file of answers."""
    (folder / "possible_answer").mkdir(parents=True, exist_ok=True)
    ids = ids or [f"{category}_0"]
    question = {"question": [[{"role": "user", "content": "Do."}]], "function": functions} | changes
    file = f"BFCL_{version}_{category}.json"
    (folder / file).write_text("\n".join(json.dumps({"id": name} | question) for name in ids), encoding="utf-8")
    if gold is not None:
        rows = [json.dumps({"id": name, "ground_truth": gold}) for name in ids]
        (folder / "possible_answer" / file).write_text("\n".join(rows), encoding="utf-8")
    return folder


def make_case(folder: Path, category="simple_python", accepted=None, gold=None, functions=None, **properties):
    """The one case of a category. accepted: of the parameters of f, which all are required; else gold, functions."""
    gold = [{"f": accepted}] if gold is None and accepted is not None else gold
    functions = functions or [function(required=accepted or (), **properties)]
    (case,) = bfcl.load(write_category(folder, category, functions, gold))
    return case


def why(case, *arguments, name="f") -> str:
    verdict = bfcl.score_output(case, [{"name": name, "arguments": each} for each in arguments])
    assert verdict.ok == (verdict.why == "")
    return verdict.why


def typed(kind: str, items: str = "") -> dict:
    return {"type": kind, "description": "It."} | ({"items": {"type": items}} if items else {})
