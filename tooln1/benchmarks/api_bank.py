"""API-Bank in call mode: one call, asked for at each API turn of a dialogue, with the dialogue's tools described.

    level 1   all dialogues of level-1-given-desc, 399 cases: 389 API turns, 10 of them twice, as the official
              evaluation counts them (it asks again for a turn that follows another API turn)
    level 2   the dialogues of level-2-toolsearcher that search for their tools, 67 cases: as ToolRL does, the
              searches are left out of cases and history, and the tools are described

Each reply is scored twice. The main score is level 1 by equality.

    name and arguments equal   one call, equal to the recorded one; recorded values are strings all, also numbers and
                               lists, which is what the last turn of a case asks for
    ToolRL soft match          `soft_match`: any of the calls is right

Neither is the official score, which executes the call and compares the results. Equality agrees with its verdicts on
1,586 of 1,721 recorded calls, intact and altered (92.2 %): 84 are equal but wrong there, most of them lists written as
the recorded string, and 51 are unequal but right, most of them for space, case or the type of a number. How the paper
scored is not known; its figures are not comparable.
The last call block of a reply counts, as in training, and reasoning is not looked for.
"""

import ast
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tooln1.benchmarks import Case, Tally, Verdict, row_by_rule
from tooln1.benchmarks.rows import row_errors
from tooln1.data import checked_example
from tooln1.io.errors import UserError
from tooln1.io.jsonl import read_rows
from tooln1.prompt import XLAM_SYSTEM, parse_reply, read_json
from tooln1.rewards import reply_fault

LEVELS = {"level-1-given-desc": "level 1", "level-2-toolsearcher": "level 2"}
EQUAL, SOFT = "name and arguments equal", "ToolRL soft match"
SEARCH = "ToolSearcher"
# The last turn of every case: most histories end with the assistant, and the official prompt names the year too.
REQUEST = (
    "Make the one tool call that this conversation needs next, and write every argument value as a string. "
    "The year is 2023."
)


# ------------------------------------------------------------------------------------------------------ scoring


def score(case: Case, completion: str, think: bool = True) -> Verdict:
    """The verdict on a reply: equality (`why` as `rewards.Fault`, without no_think), the soft match beside it."""
    reply = parse_reply(completion)
    why = reply_fault(reply, case.gold, think=False)
    (gold,) = map(_with_parameters, case.gold)
    soft = soft_match(list(map(_with_parameters, reply.calls or [])), gold)
    return Verdict(why == "none", "" if why == "none" else why, {SOFT: soft})


def soft_match(tool_calls: list, answer: dict | list[dict]) -> bool:
    """ToolRL's verdict (its evaluate.py): any call has the answer's name and parameters.

    tool_calls: JSON values; a string is read as JSON once more. What lacks "name" or "parameters" is taken for the
                parameters of a call to the right function; what cannot be looked at ends the search.
    answer:     {"name", "parameters"}, or a list that begins with it.
    """
    gold = answer[0] if isinstance(answer, list) else answer
    try:
        return any(_soft_equal(call, gold) for call in tool_calls)
    except (TypeError, ValueError, RecursionError):
        return False


def _soft_equal(call: Any, gold: dict) -> bool:
    if isinstance(call, str):
        call = read_json(call)
    if "name" in call and "parameters" in call:
        return call["name"] == gold["name"] and call["parameters"] == gold["parameters"]
    return call == gold["parameters"]


def _with_parameters(call: dict) -> dict:
    """A call of ours with ToolRL's keys."""
    return {"name": call["name"], "parameters": call["arguments"]}


def totals(by_category: dict[str, Tally]) -> dict[str, Tally | float]:
    """Both levels together by each rule, counting cases, then the main score: level 1 by equality."""
    result: dict[str, Tally | float] = {}
    for rule in (SOFT, EQUAL):
        rows = [row_by_rule(level, SOFT) if rule == SOFT else level for level in LEVELS.values()]
        if all(row in by_category for row in rows):
            tallies = [by_category[row] for row in rows]
            both = Tally(sum(tally.right for tally in tallies), sum(tally.count for tally in tallies))
            result[row_by_rule("levels 1 and 2", rule)] = both
    if "level 1" in by_category:
        result[row_by_rule("level 1", EQUAL)] = by_category["level 1"]
    return result


# -------------------------------------------------------------------------------------------------------- cases


def load(path: str | os.PathLike) -> list[Case]:
    """The cases of both levels, or of the one that is there; ids "<folder>/<dialogue>/<official sample number>".

    path: the official api-bank folder, a checkout of DAMO-ConvAI, or any folder with lv1-lv2-samples or the folders
    of LEVELS in it (a level may also be one file of {"file", "turns"} rows, such as level-1-given-desc.jsonl). The
    tools are described in api_docs.json there or in a folder above, else in the official apis/*.py, which are read,
    not run. Raises UserError for a folder without dialogues or descriptions and, naming file and row, for turns
    that are not of API-Bank's shape, ids given twice and tools without a description.
    """
    path = Path(path)
    dialogues = [(folder, *dialogue) for folder in LEVELS for dialogue in _dialogues(path, folder)]
    if not dialogues:
        raise UserError(
            f"{path} holds no API-Bank dialogues: expected {' or '.join(LEVELS)} there or under lv1-lv2-samples, "
            "as in the official api-bank folder"
        )
    tools, seen = _tools(path), set()
    return [case for dialogue in dialogues for case in _cases(*dialogue, tools, seen)]


def _cases(folder: str, name: str, turns: list[tuple[str, dict]], tools: dict, seen: set[str]) -> Iterator[Case]:
    """The cases of one dialogue, [(where, turn)]; `seen` collects the ids of all."""
    called = {}  # name -> tool, in the order of the calls
    for where, turn in turns:
        with row_errors(where):
            if _messages(turn) and turn["role"] == "API" and turn["api_name"] != SEARCH:
                called[turn["api_name"]] = tools[turn["api_name"]]
    is_level_2 = LEVELS[folder] == "level 2"
    if is_level_2 and not any(turn.get("api_name") == SEARCH for _, turn in turns):
        return
    asked = set()
    for number, index in enumerate(_official_samples([turn for _, turn in turns])):
        where, turn = turns[index]
        if turn.get("api_name") not in called or (is_level_2 and index in asked):
            continue
        asked.add(index)
        past = [earlier for _, earlier in turns[:index] if earlier.get("api_name") != SEARCH]
        answer = [{"name": turn["api_name"], "arguments": turn["param_dict"]}]
        example = {
            "id": f"{folder}/{name}/{number}",
            "source": LEVELS[folder],
            "system": XLAM_SYSTEM,
            "tools": [called[api] for api in sorted(called)],
            "answer": answer,
            "messages": [
                *(message for earlier in past for message in _messages(earlier)),
                {"role": "user", "content": REQUEST},
            ],
        }
        yield Case(example["id"], LEVELS[folder], checked_example(example, where, seen), answer)


def _official_samples(turns: list[dict]) -> Iterator[int]:
    """The turns that the official evaluation asks for, by its numbers: each API turn and the one after it."""
    for index, turn in enumerate(turns):
        if turn["role"] == "API":
            yield index
            if index + 1 < len(turns):
                yield index + 1


def _messages(turn: dict) -> list[dict]:
    """A turn of the history; an API turn is a call and its result, as in the training data."""
    if turn["role"] != "API":
        return [{"role": {"User": "user", "AI": "assistant"}[turn["role"]], "content": turn["text"]}]
    call = [{"name": turn["api_name"], "arguments": turn["param_dict"]}]
    result = turn["result"]
    results = [{"name": turn["api_name"], "results": result.get("exception") or result.get("output")}]
    return [{"role": "assistant", "content": json.dumps(call)}, {"role": "tool", "content": json.dumps(results)}]


# -------------------------------------------------------------------------------------------------------- files

SAMPLE_FOLDERS = (".", "lv1-lv2-samples", "api-bank/lv1-lv2-samples")


def _dialogues(path: Path, folder: str) -> Iterator[tuple[str, list[tuple[str, dict]]]]:
    """(name, [(where, turn)]) of each dialogue of a level, by name; none where the level is not there."""
    for place in (path / samples / folder for samples in SAMPLE_FOLDERS):
        if place.is_dir():
            for file in sorted(place.glob("*.jsonl")):
                if file.stat().st_size:  # one official file is empty
                    yield file.stem, read_rows(file)
            return
        if place.with_suffix(".jsonl").exists():
            for where, row in read_rows(place.with_suffix(".jsonl")):
                with row_errors(where):
                    turns = [(f"{where}, turn {number}", turn) for number, turn in enumerate(row["turns"])]
                    yield Path(row["file"]).stem, turns
            return


def _tools(path: Path) -> dict[str, dict]:
    """Name -> tool as the model sees it: name, description, parameters."""
    for folder in (path / "api-bank", path, *list(path.resolve().parents)[:2]):
        if (folder / "api_docs.json").exists():
            rows = read_rows(folder / "api_docs.json")
            break
        if files := sorted((folder / "apis").glob("*.py")):
            rows = [row for file in files for row in _class_rows(file)]
            break
    else:
        raise UserError(
            f"nothing describes the tools of {path}: expected api_docs.json "
            '([{"name", "description", "input_parameters"}, ...]) or the official apis folder, there or one above'
        )
    tools = {}
    for where, row in rows:
        with row_errors(where):
            name, description, parameters = (row[key] for key in ("name", "description", "input_parameters"))
            tools[name] = {"name": name, "description": description, "parameters": parameters}
    return tools


def _class_rows(file: Path) -> Iterator[tuple[str, dict]]:
    """The tools that an official apis/*.py defines: classes with a description and input parameters."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in tree.body:
            row = {}
            for line in node.body if isinstance(node, ast.ClassDef) else ():
                match line:
                    case ast.Assign(targets=[ast.Name(id="description" | "input_parameters" as key)]):
                        row[key] = ast.literal_eval(line.value)
            if "input_parameters" in row:
                yield f"{file}, class {node.name}", row | {"name": node.name}
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None
