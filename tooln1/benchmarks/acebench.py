"""ACEBench, English: the six normal atom categories and the two single-turn ones, 500 cases.

Each reply is scored twice, by the rules of ACEBench e6db74b:

    decoded calls   its calls go to the official checker as they are; this is the main score
    official text   its calls are first written as the text that ACEBench asks for, which then takes the whole
                    official path; that path removes whitespace inside strings and compares lists inside dicts as
                    printed text, so 39 of the gold answers fail on it (ceiling 93.0; 1 fails as decoded calls)

`score` takes a reply and gives both (`Verdict.ok`, `Verdict.also`); `score_text` takes a text written as ACEBench asks
for it. The last call block of a reply counts, as in training, and reasoning is not looked for. Deviations, none of
which changes what a readable reply is worth: where the official run crashes, the reply is wrong; over-long texts and
arithmetic on what is no number are not read (acebench_text).
"""

from __future__ import annotations

import os
import re
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tooln1.benchmarks import Case, Tally, Verdict, row_by_rule
from tooln1.benchmarks.acebench_checker import TYPES, Gold, base_name, calls_fault, described
from tooln1.benchmarks.acebench_text import Call, UnreadableText, read_text, write_text
from tooln1.data import checked_example
from tooln1.io.errors import UserError
from tooln1.io.jsonl import field, kind_of, read_rows
from tooln1.prompt import XLAM_SYSTEM, parse_reply

ATOM = tuple(f"normal_atom_{kind}" for kind in ("bool", "enum", "number", "list", "object_short", "object_deep"))
SINGLE_TURN = ("normal_single_turn_single_function", "normal_single_turn_parallel_function")
CATEGORIES = (*ATOM, *SINGLE_TURN)
DECODED, TEXT = "decoded calls", "official text"
UNREADABLE = "wrong_output_format"
FOLDERS = (".", "data_en", "data_all/data_en")  # where the data lie: their own folder, or an ACEBench checkout


@dataclass(frozen=True)
class AceCase(Case):
    """A question of ACEBench. `gold` is `acebench_checker.Gold`, or a list of such; any of them will do."""

    functions: list[dict]  # as the data describe them; `example.tools` is what the model sees

    @property
    def golds(self) -> list[Gold]:
        """The accepted answers."""
        return self.gold if isinstance(self.gold, list) else [self.gold]


# ------------------------------------------------------------------------------------------------------ scoring


def score(case: AceCase, completion: str, think: bool = True) -> Verdict:
    """The verdict on a reply's decoded calls, that on their official text beside it.

    `why` is the official error type; a reply without calls that read has the official one for unreadable text.
    """
    calls = parse_reply(completion).calls
    if calls is None or not all(isinstance(c["name"], str) and isinstance(c["arguments"], dict) for c in calls):
        return Verdict(False, UNREADABLE, {TEXT: False})
    calls = [(call["name"], call["arguments"]) for call in calls]
    try:
        by_text = score_text(case, write_text(calls)).ok
    except UnreadableText:
        by_text = False
    why = _fault(case, calls)
    return Verdict(not why, why, {TEXT: by_text})


def score_text(case: AceCase, text: str) -> Verdict:
    """The verdict of the whole official path on a text such as "[book(city='Bonn', nights=2)]"."""
    try:
        why = _fault(case, read_text(text))
    except UnreadableText:
        why = UNREADABLE
    return Verdict(not why, why)


def _fault(case: AceCase, calls: list[Call]) -> str:
    """The fault by the first accepted answer, "" if any of them has none."""
    faults = [calls_fault(calls, gold, case.functions) for gold in case.golds]
    return "" if "" in faults else faults[0]


def totals(by_category: dict[str, Tally]) -> dict[str, Tally | float]:
    """Unweighted means of categories: atom of six, single-turn of two, overall of all eight; first by official text.

    What the paper's ACEBench column averages is not known; most of its values fit a mean of eight.
    """
    parts = {"atom": ATOM, "single-turn": SINGLE_TURN, "overall": CATEGORIES}
    result: dict[str, Tally | float] = {}
    for rule in (TEXT, DECODED):
        for name, categories in parts.items():
            rows = [row_by_rule(category, rule) if rule == TEXT else category for category in categories]
            if all(row in by_category for row in rows):
                mean = statistics.fmean(by_category[row].accuracy for row in rows)
                result[row_by_rule(name, rule)] = mean
    return result


# --------------------------------------------------------------------------------------------------------- data


def load(path: str | os.PathLike) -> list[AceCase]:
    """The cases of the eight categories, in the order of CATEGORIES.

    path: an ACEBench checkout, or a folder with its files data_normal_atom_bool.json, ... and, in possible_answer/,
    others of the same names. Raises UserError for a missing file and, naming file and row, for rows that are not of
    ACEBench's shape, ids given twice and answers to other questions.
    """
    first = f"data_{CATEGORIES[0]}.json"
    folder = next((folder for name in FOLDERS if (folder := Path(path, name)) and (folder / first).exists()), None)
    if folder is None:
        raise UserError(
            f"{path} holds no ACEBench data: expected {first} and seven more there, or under data_all/data_en, "
            "as an ACEBench checkout has them"
        )
    seen: set[str] = set()
    return [case for category in CATEGORIES for case in _cases(category, folder, seen)]


def _cases(category: str, folder: Path, seen: set[str]) -> Iterator[AceCase]:
    """The cases of one category; `seen` collects the ids of all."""
    questions = read_rows(folder / f"data_{category}.json")
    answers = _answers(questions, folder / "possible_answer" / f"data_{category}.json")
    for (where, row), (answered, answer) in zip(questions, answers, strict=True):
        functions, gold = field(row, "function", list, where), answer.get("ground_truth")
        example = {
            "id": field(row, "id", str, where),
            "source": category,
            "system": XLAM_SYSTEM,
            "tools": [_tool(function, where) for function in functions],
            "messages": _messages(row, where),
            "answer": [],
        }
        case = AceCase(row["id"], category, checked_example(example, where, seen), gold, functions)
        for gold in case.golds or [None]:
            _check_gold(gold, functions, answered)
        yield case


def _answers(questions: list[tuple[str, dict]], file: Path) -> list[tuple[str, dict]]:
    """The rows of a file of answers, which has one for each question, in the same order."""
    answers = read_rows(file)
    for (asked, question), (answered, answer) in zip(questions, answers, strict=False):
        if field(answer, "id", str, answered) != field(question, "id", str, asked):
            raise UserError(f'{answered}: the id is "{answer["id"]}", but {asked} asks "{question["id"]}"')
    if len(answers) != len(questions):
        raise UserError(f"{file} has {len(answers)} answers to {len(questions)} questions; is a file cut off?")
    return answers


def _messages(row: dict, where: str) -> list[dict]:
    """The turns of a question, one text "user: ...\\nsystem: ...\\n", where "system" is the assistant.

    The current time, where a case has one, goes before the first turn, so that no wording of the prompt loses it.
    """
    question, time = field(row, "question", str, where), row.get("time", "")
    before, *parts = re.split(r"^(user|system):", question, flags=re.MULTILINE)
    if before.strip() or not parts or not isinstance(time, str):
        raise UserError(f'{where}: "question" must begin with "user:" or "system:", and "time" be a string')
    roles = [{"user": "user", "system": "assistant"}[role] for role in parts[::2]]
    texts = [text.strip() for text in parts[1::2]]
    texts[0] = f"{time}\n{texts[0]}" if time else texts[0]
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]


def _tool(function: Any, where: str) -> dict:
    """A function as the model sees it: name, description, parameters.

    The data write the parameters of most functions that are not the answer as "arguments", with "results" and
    "tags" beside them. All functions are shown alike, lest the key give the answer away.
    """
    if not isinstance(function, dict):
        raise UserError(f'{where}: "function" must hold objects, found {kind_of(function)}')
    key = "parameters" if "parameters" in function else "arguments"
    parts = {"name": str, "description": str, key: dict}
    name, description, parameters = (field(function, part, kind, where) for part, kind in parts.items())
    return {"name": name, "description": description, "parameters": parameters}


def _check_gold(gold: Any, functions: list[dict], where: str) -> None:
    """Every gold call has arguments, and is to a function with parameters of known types."""
    if not isinstance(gold, dict) or not gold:
        raise UserError(f'{where}: "ground_truth" must be {{function: {{parameter: value}}}} or a list of such')
    for key in gold:
        field(gold, key, dict, f"{where}, ground_truth")
        function = described(key, functions)
        if function is None:
            raise UserError(f"{where}: the answer calls {base_name(key)!r}, which the question does not offer")
        place = f"{where}, function {function['name']!r}"
        parameters = field(function, "parameters", dict, place)
        field(parameters, "required", list, place)
        for name, schema in field(parameters, "properties", dict, place).items():
            _check_type(schema, f"{place}, parameter {name!r}")


def _check_type(schema: Any, where: str) -> None:
    """A parameter has a known type, and its elements one or none."""
    items = schema.get("items") if isinstance(schema, dict) else None
    for part, needed in ((schema, True), (items, False)):
        if needed or (isinstance(part, dict) and "type" in part):
            kind = field(part, "type", str, where) if isinstance(part, dict) else None
            if kind not in TYPES:
                raise UserError(f"{where}: unknown type {kind!r}; known are {', '.join(TYPES)}")
