"""The data of BFCL: its single-turn categories, and the questions and accepted answers of each."""

from __future__ import annotations

import copy
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tooln1.benchmarks import Case
from tooln1.benchmarks.bfcl_checker import JAVA, JAVASCRIPT, PYTHON, Gold, Language
from tooln1.benchmarks.rows import read_pairs, row_errors
from tooln1.data import checked_example
from tooln1.io.errors import UserError
from tooln1.io.jsonl import read_rows
from tooln1.prompt import XLAM_SYSTEM

SIMPLE = ("simple_python", "simple_java", "simple_javascript")
NON_LIVE = (*SIMPLE, "multiple", "parallel", "parallel_multiple")
LIVE = ("live_simple", "live_multiple", "live_parallel", "live_parallel_multiple")
IRRELEVANCE = ("irrelevance", "live_irrelevance")  # right is a reply without calls
RELEVANCE = ("live_relevance",)  # right is any call
AST = (*NON_LIVE, *LIVE)  # right is a call with accepted arguments
CATEGORIES = (*NON_LIVE, "irrelevance", *LIVE, "live_irrelevance", *RELEVANCE)
LANGUAGES = {"simple_java": JAVA, "simple_javascript": JAVASCRIPT}  # all others are in Python

# The data of version 3 name three categories otherwise, in file names and ids, and have one id mistyped.
V3_CATEGORIES = {"simple": "simple_python", "java": "simple_java", "javascript": "simple_javascript"}
V3_IDS = {"live_multiple_1052-79-0": "live_multiple_1052-279-0"}


@dataclass(frozen=True)
class BfclCase(Case):
    """A question of BFCL. `gold`: accepted values as `bfcl_checker.Gold`; [] for no call, "any call" for one."""

    functions: list[dict]  # as the data describe them; `example.tools` is what the model sees


# ------------------------------------------------------------------------------------------------------- files

# Where the data lie in a bfcl-eval installation (its own folder or site-packages) and in gorilla, new and old.
DATA_FOLDERS = (
    ".",
    "data",
    "bfcl_eval/data",
    "berkeley-function-call-leaderboard/bfcl_eval/data",
    "berkeley-function-call-leaderboard/data",
)


def load(path: str | os.PathLike) -> list[BfclCase]:
    """The cases of all categories that a folder holds, in the order of CATEGORIES.

    path: a bfcl-eval installation, a gorilla checkout, or any folder with files such as BFCL_v4_simple_java.json
    and, for the categories that want calls, others of the same name in possible_answer/. Version 3 is read too; its
    ids become those of version 4.
    Raises UserError for a folder without such files, and, naming file and row, for questions without an answer, rows
    that are not of BFCL's shape and ids given twice.
    """
    files = {}
    for name in DATA_FOLDERS:
        for file in sorted(Path(path, name).glob("BFCL_v*.json")):  # of two versions, the later one
            category = re.sub(r"^BFCL_v\d+_", "", file.stem)
            files[V3_CATEGORIES.get(category, category)] = file
        if files:
            break
    else:
        raise UserError(
            f"{path} holds no BFCL data: expected BFCL_v4_<category>.json files there or under bfcl_eval/data, "
            "as a bfcl-eval installation or a gorilla checkout has them"
        )
    seen: set[str] = set()
    cases = []
    for category in CATEGORIES:
        if category not in files:
            continue
        for where, row, gold in _rows(category, files[category]):
            with row_errors(where):
                cases.append(_case(category, where, row, gold, seen))
    return cases


def _rows(category: str, file: Path) -> list[tuple[str, dict, Any]]:
    """[(where, question, gold)] of a category."""
    if category in AST:
        return read_pairs(file, file.parent / "possible_answer" / file.name, _id)
    return [(where, row, "any call" if category in RELEVANCE else []) for where, row in read_rows(file)]


def _id(row: dict) -> str:
    """A row's id as version 4 has it."""
    prefix, _, number = row["id"].rpartition("_")
    return V3_IDS.get(row["id"], f"{V3_CATEGORIES[prefix]}_{number}" if prefix in V3_CATEGORIES else row["id"])


def _case(category: str, where: str, row: dict, gold: Any, seen: set[str]) -> BfclCase:
    """The case of one question; `seen` collects the ids of all."""
    language = LANGUAGES.get(category, PYTHON)
    if category in AST:
        _check_shape(row["function"], gold, language)
    (turns,) = row["question"]
    example = {
        "id": _id(row),
        "source": category,
        "system": XLAM_SYSTEM,
        # A system message (50 AST entries have one) is left out: the released handler overwrites it.
        "messages": [message for message in turns if message["role"] != "system"],
        "tools": [_described(function, language) for function in row["function"]],
        "answer": [],  # a reply may be right in many ways: `gold` has them
    }
    return BfclCase(example["id"], category, checked_example(example, where, seen), gold, row["function"])


# --------------------------------------------------------------------------------------------------- functions


def _check_shape(functions: list[dict], gold: list[Gold], language: Language) -> None:
    """Every gold call is to one of the functions, and every parameter is of a known type. Raises LookupError."""
    names = [function["name"] for function in functions]
    for call in gold:
        if len(call) != 1 or not call.keys() <= set(names):
            raise LookupError(f"the answer calls {[*call]}, which must be one of {names}")
    for function in functions:
        for parameter, schema in function["parameters"]["properties"].items():
            kinds = [schema["type"], *([schema["items"]["type"]] if schema["type"] in language.lists else [])]
            if not set(kinds) <= language.types.keys():
                raise LookupError(f"parameter {parameter!r} of {function['name']!r} has the unknown type {kinds}")


def _described(function: dict, language: Language) -> dict:
    """A copy of a function as the model sees it: its language named, and source text asked for as strings."""
    function = copy.deepcopy(function)
    function["description"] += f" Note that the provided function is in {language.title} syntax."
    if language.read:
        for schema in function["parameters"]["properties"].values():
            _ask_for_text(schema, language)
    return function


def _ask_for_text(schema: dict, language: Language) -> None:
    """Declare a parameter a string, and say in its description what the string holds."""
    kind, title = schema["type"], language.title.split()[0]
    if kind == "any":
        note = f" This parameter can be of any type of {title} object in string representation."
    else:
        note = f" This is {title} {kind} type parameter in string representation."
    if kind in language.lists:
        element = schema.pop("items")["type"]
        note += f" The list elements are of type {element}; they are not in string representation."
    if kind == "dict" and "properties" in schema:
        entries = json.dumps(schema.pop("properties"))
        note += f" The dictionary entries have the following schema; they are not in string representation. {entries}"
    schema["description"] += note
    schema["type"] = "string"
