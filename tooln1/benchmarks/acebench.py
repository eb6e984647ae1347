"""ACEBench, English: the six normal atom categories and the two single-turn ones, 500 cases.

Each reply is scored twice, by the rules of ACEBench e6db74b:

    decoded calls   its calls go to the official checker as they are; this is the main score
    official text   its calls are first written as the text that ACEBench expects, which then takes the
                    official path; that path removes whitespace inside strings and compares lists inside dicts as
                    printed text, so 39 of the gold answers fail on it (ceiling 93.0; 1 fails as decoded calls)

`score` takes a reply and gives both (`Verdict.ok`, `Verdict.also`); `score_text` takes a text written as ACEBench asks
for it. The last call block of a reply counts, as in training, and reasoning is not looked for. Deviations, none of
which changes what a readable reply is worth: where the official run crashes, the reply is wrong; over-long texts and
arithmetic on what is no number are not read (acebench_text).
"""

import os
import re
import statistics
from operator import itemgetter
from pathlib import Path

from tooln1.benchmarks import Case, Tally, Verdict, row_by_rule
from tooln1.benchmarks.acebench_checker import Gold, calls_fault
from tooln1.benchmarks.acebench_text import Call, UnreadableText, read_text, write_text
from tooln1.benchmarks.rows import cases_of, data_folder, read_pairs
from tooln1.data import Example
from tooln1.prompt import XLAM_SYSTEM, parse_reply

ATOM = tuple(f"normal_atom_{kind}" for kind in ("bool", "enum", "number", "list", "object_short", "object_deep"))
SINGLE_TURN = ("normal_single_turn_single_function", "normal_single_turn_parallel_function")
CATEGORIES = (*ATOM, *SINGLE_TURN)
DECODED, TEXT = "decoded calls", "official text"
UNREADABLE = "wrong_output_format"
FOLDERS = (".", "data_en", "data_all/data_en")  # where the data lie: their own folder, or an ACEBench checkout


# ------------------------------------------------------------------------------------------------------ scoring


def score(case: Case, completion: str, think: bool = True) -> Verdict:
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


def score_text(case: Case, text: str) -> Verdict:
    """The verdict of the official text path on a text such as "[book(city='Bonn', nights=2)]"."""
    try:
        why = _fault(case, read_text(text))
    except UnreadableText:
        why = UNREADABLE
    return Verdict(not why, why)


def _fault(case: Case, calls: list[Call]) -> str:
    """The fault by the first accepted answer, "" if any of them has none."""
    accepted = case.gold if isinstance(case.gold, list) else [case.gold]
    faults = [calls_fault(calls, gold, case.functions) for gold in accepted]
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
                result[row_by_rule(name, rule)] = statistics.fmean(by_category[row].accuracy for row in rows)
    return result


# --------------------------------------------------------------------------------------------------------- data


def load(path: str | os.PathLike) -> list[Case]:
    """The cases of the eight categories, in the order of CATEGORIES.

    path: an ACEBench checkout, or a folder with its files data_normal_atom_bool.json, ... and, in possible_answer/,
    others of the same names. Raises UserError for a missing file and, naming file and row, for questions without an
    answer, rows that are not of ACEBench's shape and ids given twice.
    """
    folder = data_folder(Path(path), FOLDERS, f"data_{CATEGORIES[0]}.json", "ACEBench")
    rows = []
    for category in CATEGORIES:
        name = f"data_{category}.json"
        pairs = read_pairs(folder / name, folder / "possible_answer" / name, itemgetter("id"))
        rows += [(where, category, question, gold) for where, question, gold in pairs]
    return cases_of(rows, _case)


def _case(category: str, row: dict, gold: Gold | list[Gold]) -> Case:
    """The case of one question. gold: a list where any of several answers is right."""
    example = Example(
        id=row["id"],
        source=category,
        system=XLAM_SYSTEM,
        tools=[_tool(function) for function in row["function"]],
        messages=_messages(row["question"], row.get("time", "")),
        answer=[],
    )
    return Case(example.id, category, example, gold, row["function"])


def _messages(question: str, time: str) -> list[dict]:
    """The turns of a question, one text "user: ...\\nsystem: ...\\n", where "system" is the assistant.

    The current time, where a case has one, goes before the first turn, so that no wording of the prompt loses it.
    """
    _, *parts = re.split(r"^(user|system):", question, flags=re.MULTILINE)
    roles = [{"user": "user", "system": "assistant"}[role] for role in parts[::2]]
    texts = [text.strip() for text in parts[1::2]]
    texts[0] = f"{time}\n{texts[0]}" if time else texts[0]
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]


def _tool(function: dict) -> dict:
    """A function as the model sees it: name, description, parameters.

    The data write the parameters of most functions that are not the answer as "arguments", with "results" and
    "tags" beside them. All functions are shown with the same key, so that it does not reveal the answer.
    """
    parameters = function["parameters"] if "parameters" in function else function["arguments"]
    return {"name": function["name"], "description": function["description"], "parameters": parameters}
