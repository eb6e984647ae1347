"""The data of BFCL: its single-turn categories, and the questions and accepted answers of each."""

import copy
import json
import os
import re
from pathlib import Path
from typing import Any

from tooln1.benchmarks import Case
from tooln1.benchmarks.bfcl_checker import JAVA, JAVASCRIPT, PYTHON, Language
from tooln1.benchmarks.rows import cases_of, data_folder, read_pairs
from tooln1.data import Example
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


# ------------------------------------------------------------------------------------------------------- files

# Where the data lie in a bfcl-eval installation (its own folder or site-packages) and in gorilla, new and old.
DATA_FOLDERS = (
    ".",
    "data",
    "bfcl_eval/data",
    "berkeley-function-call-leaderboard/bfcl_eval/data",
    "berkeley-function-call-leaderboard/data",
)


def load(path: str | os.PathLike) -> list[Case]:
    """The cases of all categories that a folder holds, in the order of CATEGORIES.

    path: a bfcl-eval installation, a gorilla checkout, or any folder with files such as BFCL_v4_simple_java.json
    and, for the categories that want calls, others of the same name in possible_answer/. Version 3 is read too; its
    ids become those of version 4.
    Raises UserError for a folder without such files, and, naming file and row, for questions without an answer, rows
    that are not of BFCL's shape and ids given twice.
    """
    folder = data_folder(Path(path), DATA_FOLDERS, "BFCL_v*.json", "BFCL")
    files = {}
    for file in sorted(folder.glob("BFCL_v*.json")):  # of two versions, the later one
        category = re.sub(r"^BFCL_v\d+_", "", file.stem)
        files[V3_CATEGORIES.get(category, category)] = file
    found = [category for category in CATEGORIES if category in files]
    return cases_of((row for category in found for row in _rows(category, files[category])), _case)


def _rows(category: str, file: Path) -> list[tuple[str, str, dict, Any]]:
    """[(where, category, question, gold)] of a category."""
    if category in AST:
        rows = read_pairs(file, file.parent / "possible_answer" / file.name, _id)
    else:
        rows = [(where, row, "any call" if category in RELEVANCE else []) for where, row in read_rows(file)]
    return [(where, category, row, gold) for where, row, gold in rows]


def _id(row: dict) -> str:
    """A row's id as version 4 has it."""
    prefix, _, number = row["id"].rpartition("_")
    return V3_IDS.get(row["id"], f"{V3_CATEGORIES[prefix]}_{number}" if prefix in V3_CATEGORIES else row["id"])


def _case(category: str, row: dict, gold: Any) -> Case:
    """The case of one question. gold: accepted values as `bfcl_checker.Gold`; [] for no call, "any call" for one."""
    language = LANGUAGES.get(category, PYTHON)
    (turns,) = row["question"]
    example = Example(
        id=_id(row),
        source=category,
        system=XLAM_SYSTEM,
        # A system message (50 AST entries have one) is left out: the released handler overwrites it.
        messages=[message for message in turns if message["role"] != "system"],
        tools=[_described(function, language) for function in row["function"]],
        answer=[],  # a reply may be right in many ways: `gold` has them
    )
    return Case(example.id, category, example, gold, row["function"])


# --------------------------------------------------------------------------------------------------- functions


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
