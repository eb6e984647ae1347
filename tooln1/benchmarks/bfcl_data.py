"""The data of BFCL: its single-turn categories, and the questions and accepted answers of each.

`load` is the benchmark's own (tooln1.benchmarks.bfcl), which see. Everything that the rules rely on is checked here,
so that whatever is wrong with the data shows at once, with its file and row.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tooln1.benchmarks import Case
from tooln1.benchmarks.bfcl_checker import JAVA, JAVASCRIPT, PYTHON, Gold, Language
from tooln1.data import checked_example
from tooln1.io.errors import UserError
from tooln1.io.jsonl import field, kind_of, read_rows
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

# Entries that nobody wins by what the question asks for: no value of the declared type is accepted, or a parameter is
# demanded that does not exist. (An oddity: simple_java_64 takes an empty map.)
NEVER_RIGHT = (
    "simple_java_36",
    "simple_java_64",
    "simple_java_65",
    "live_simple_106-63-0",
    "live_simple_112-68-0",
    "live_multiple_862-181-3",
    "live_multiple_964-207-0",
)

# Entries of bfcl-eval 2026.3.23 that are new or other than on 2025-04-13 (gorilla 9108a65), which the paper used,
# and live_relevance_16-16-0, which was dropped.
CHANGED_SINCE_PAPER = (
    "simple_python_363",
    "simple_javascript_41",
    "parallel_84",
    "parallel_155",
    "parallel_158",
    "parallel_170",
    "parallel_multiple_141",
    "live_simple_137-90-0",
    "live_simple_138-91-0",
    "live_simple_205-116-13",
    "live_multiple_44-17-0",
    "live_multiple_1052-279-0",
    "live_parallel_9-5-0",
    "irrelevance_7",
    "irrelevance_232",
    "live_irrelevance_882-882-0",
    "live_irrelevance_883-883-0",
    "live_relevance_3-3-0",
    "live_relevance_13-13-0",
    "live_relevance_14-14-0",
    "live_relevance_15-15-0",
    "live_relevance_16-16-0",
)


@dataclass(frozen=True)
class BfclCase(Case):
    """A question of BFCL. `gold`: accepted values as `bfcl_checker.Gold`; [] for no call, "any call" for one."""

    functions: list[dict]  # as the data describe them; `example.tools` is what the model sees


def language_of(category: str) -> Language:
    """The language that the calls of a category are written in."""
    return LANGUAGES.get(category, PYTHON)


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
    Raises UserError for a folder without such files, for questions without answers or answers without questions,
    and, naming file and row, for rows that are not of BFCL's shape, ids given twice and answers to other questions.
    """
    files = _category_files(Path(path))
    seen: set[str] = set()
    return [case for category in CATEGORIES if category in files for case in _cases(category, *files[category], seen)]


def _category_files(path: Path) -> dict[str, tuple[Path, Path | None]]:
    """Category -> its files of questions and of answers, in the first of DATA_FOLDERS that has any."""
    for folder in (path / name for name in DATA_FOLDERS):
        files, answers = _files_in(folder), _files_in(folder / "possible_answer")
        if files:
            break
    else:
        raise UserError(
            f"{path} holds no BFCL data: expected BFCL_v4_<category>.json files there or under bfcl_eval/data, "
            "as a bfcl-eval installation or a gorilla checkout has them"
        )
    for category in AST:
        if category in answers and category not in files:
            raise UserError(f"{answers[category]} has answers, but {folder} lacks the questions; copy them there too")
        if category in files and category not in answers:
            raise UserError(f"{files[category]} has questions, but possible_answer beside it lacks their answers")
    return {category: (file, answers.get(category)) for category, file in files.items()}


def _files_in(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for file in sorted(folder.glob("BFCL_v*.json")):
        name = re.sub(r"^BFCL_v\d+_", "", file.stem)
        category = V3_CATEGORIES.get(name, name)
        if category not in CATEGORIES:  # multi-turn and agentic ones
            continue
        if category in found:
            raise UserError(f"{found[category]} and {file} are both {category}; keep one version in a folder")
        found[category] = file
    return found


def _cases(category: str, file: Path, answer_file: Path | None, seen: set[str]) -> Iterator[BfclCase]:
    """The cases of one category; `seen` collects the ids of all."""
    questions, language = read_rows(file), language_of(category)
    golds: list[Any] = ["any call" if category in RELEVANCE else []] * len(questions)
    if category in AST:
        answers = _answers(questions, answer_file)
        golds = [_gold(answer, where) for where, answer in answers]
    for (where, row), gold in zip(questions, golds, strict=True):
        functions = field(row, "function", list, where)
        if category in AST:
            _check_functions(functions, gold, language, where)
        example = {
            "id": _id(row, where),
            "source": category,
            "system": XLAM_SYSTEM,
            "messages": _messages(row, where),
            "tools": [_described(function, language, where) for function in functions],
            "answer": [],  # a reply may be right in many ways: `gold` has them
        }
        yield BfclCase(example["id"], category, checked_example(example, where, seen), gold, functions)


def _id(row: dict, where: str) -> str:
    """A row's id as version 4 has it."""
    name = field(row, "id", str, where)
    prefix, _, number = name.rpartition("_")
    return V3_IDS.get(name, f"{V3_CATEGORIES[prefix]}_{number}" if prefix in V3_CATEGORIES else name)


def _messages(row: dict, where: str) -> list[dict]:
    """The question's turns. A system message (50 AST entries) is left out: the released handler overwrites it."""
    turns = field(row, "question", list, where)
    if len(turns) != 1 or not isinstance(turns[0], list):
        raise UserError(f'{where}: "question" must hold one list of messages; multi-turn categories are not scored')
    return [message for message in turns[0] if not isinstance(message, dict) or message.get("role") != "system"]


# --------------------------------------------------------------------------------------------------- functions


def _described(function: Any, language: Language, where: str) -> dict:
    """A copy of a function as the model sees it: its language named, and source text asked for as strings."""
    function = copy.deepcopy(_object(function, f"{where}, function"))
    field(function, "description", str, f"{where}, function {function.get('name')!r}")
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


def _check_functions(functions: list, gold: list[Gold], language: Language, where: str) -> None:
    """Every gold call is to one of the functions, and every parameter is of a known type."""
    names = [field(_object(function, f"{where}, function"), "name", str, where) for function in functions]
    for call in gold:
        if not call.keys() <= set(names):
            raise UserError(f"{where}: the answer calls {[*call][0]!r}, which is not among the functions {names}")
    for function, name in zip(functions, names, strict=True):
        place = f"{where}, function {name!r}"
        parameters = field(function, "parameters", dict, place)
        if not all(isinstance(parameter, str) for parameter in field(parameters, "required", list, place)):
            raise UserError(f'{place}: "required" must be a list of names')
        for parameter, schema in field(parameters, "properties", dict, place).items():
            place = f"{where}, parameter {parameter!r} of {name!r}"
            kind = _known_type(schema, language, place)
            if kind in language.lists:
                _known_type(field(schema, "items", dict, place), language, f"{place}, items")
            if language.read:
                field(schema, "description", str, place)


def _known_type(schema: Any, language: Language, where: str) -> str:
    kind = field(_object(schema, where), "type", str, where)
    if kind not in language.types:
        raise UserError(f"{where}: unknown type {kind!r}; known in {language.title} are {', '.join(language.types)}")
    return kind


# ----------------------------------------------------------------------------------------------------- answers


def _answers(questions: list[tuple[str, dict]], file: Path) -> list[tuple[str, dict]]:
    """The rows of a file of answers, which has one for each question, in the same order."""
    answers = read_rows(file)
    for (asked, question), (answered, answer) in zip(questions, answers, strict=False):
        if _id(answer, answered) != _id(question, asked):
            raise UserError(f'{answered}: the id is "{answer["id"]}", but {asked} asks "{question["id"]}"')
    if len(answers) != len(questions):
        raise UserError(f"{file} has {len(answers)} answers to {len(questions)} questions; is a file cut off?")
    return answers


def _gold(answer: dict, where: str) -> list[Gold]:
    """The accepted answers of a row: [{function: {parameter: [accepted values]}}, ...], at least one call."""
    gold = field(answer, "ground_truth", list, where)
    if not gold:
        raise UserError(f'{where}: "ground_truth" is empty; a category whose questions want no call has no answers')
    for call in gold:
        if len(_object(call, f"{where}, ground_truth")) != 1:
            raise UserError(f"{where}: each call of the ground truth must have one function, found {[*call]}")
        for name in call:
            accepted = field(call, name, dict, where)
            for parameter in accepted:
                for value in field(accepted, parameter, list, f"{where}, {name!r}"):
                    _check_dicts(value, f"{where}, {parameter!r} of {name!r}")
    return gold


def _check_dicts(value: Any, where: str) -> None:
    """An accepted dict, or one in an accepted list, has lists of accepted values itself, or bare strings."""
    for item in [value, *(value if isinstance(value, list) else [])]:
        for key, choices in item.items() if isinstance(item, dict) else ():
            if not isinstance(choices, list | str):
                raise UserError(f"{where}: {key!r} must have a list of accepted values, found {kind_of(choices)}")


def _object(value: Any, where: str) -> dict:
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected an object, found {kind_of(value)}")
    return value
