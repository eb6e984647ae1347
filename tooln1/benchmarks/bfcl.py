"""BFCL, the Berkeley Function-Calling Leaderboard: its 13 single-turn categories, scored as the paper's Table 2.

`load` reads the data of a bfcl-eval installation or a gorilla checkout; the rules are those of bfcl-eval 2026.3.23
(the checker of the paper's date gives the same verdicts) with the released Tool-N1 handler in front: the first call
block of a reply counts, and reasoning is not looked for. Deviations: where the official run crashes ("raises:...") or
hangs, the reply is wrong; call blocks over the limits of `prompt.read_json` are not read.

Some entries differ from those of the paper's date (CHANGED_SINCE_PAPER), and some nobody can win (NEVER_RIGHT).
"""

import json
import os
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tooln1.benchmarks import Case, Tally, Verdict
from tooln1.benchmarks.bfcl_checker import PYTHON, Call, ast_fault
from tooln1.benchmarks.bfcl_data import CATEGORIES as CATEGORIES
from tooln1.benchmarks.bfcl_data import IRRELEVANCE, LANGUAGES, LIVE, RELEVANCE, SIMPLE
from tooln1.benchmarks.bfcl_data import load as load
from tooln1.io.files import atomic_write
from tooln1.prompt import call_blocks, read_json

_ENTRIES = json.loads(Path(__file__).with_name("bfcl_entries.json").read_text(encoding="utf-8"))
# No answer to these that fits the question is counted as right: no value of the declared type is accepted, or a
# parameter is required that does not exist. (An exception: simple_java_64 accepts an empty map.)
NEVER_RIGHT: tuple[str, ...] = tuple(_ENTRIES["never_right"])
# Entries of bfcl-eval 2026.3.23 that are new or differ from those of 2025-04-13 (gorilla 9108a65), which the paper
# used, and live_relevance_16-16-0, which was removed.
CHANGED_SINCE_PAPER: tuple[str, ...] = tuple(_ENTRIES["changed_since_paper"])

# ------------------------------------------------------------------------------------------------------ scoring


def score(case: Case, completion: str, think: bool = True) -> Verdict:
    """The verdict on a reply; `why` is the official error type. Reasoning is neither required nor looked at."""
    return score_output(case, stored_output(completion))


def stored_output(completion: str) -> Any:
    """What the released handler stores of a reply: the JSON value in its first call block, else None."""
    block = next(call_blocks(completion), None)
    try:
        return None if block is None else read_json(block)
    except ValueError:
        return None


def score_output(case: Case, model_output: Any) -> Verdict:
    """The verdict on what a reply's call block holds (`stored_output`): any JSON value."""
    calls = decoded(model_output)
    well_formed = calls is not None and all(type(arguments) is dict for call in calls for arguments in call.values())
    if case.category in IRRELEVANCE:
        why = "irrelevance_error:decoder_success" if well_formed and calls else ""
    elif case.category in RELEVANCE:
        why = "" if well_formed and calls else "relevance_error:decoder_failed"
    elif calls is None:
        why = "ast_decoder:decoder_failed"
    elif not well_formed:
        why = "ast_decoder:decoder_wrong_output_format"
    else:
        why = ast_fault(case.category, calls, case.gold, case.functions, LANGUAGES.get(case.category, PYTHON))
    return Verdict(not why, why)


def decoded(output: Any) -> list[Call] | None:
    """[{name: arguments}] of a list of calls, the arguments of any type; None where the released handler fails.

    An empty string or object decodes to no calls, as an empty list does; a single call that is not in a list fails.
    """
    if output in ("", {}):
        return []
    if not isinstance(output, list):
        return None
    calls = []
    for item in output:
        if not isinstance(item, dict) or not {"name", "arguments"} <= item.keys():
            return None
        if isinstance(item["name"], list | dict):
            return None
        calls.append({item["name"]: item["arguments"]})
    return calls


# ------------------------------------------------------------------------------------------------------- totals


AVERAGES = {  # name -> what it averages: Tally sums for those that begin with "live", unweighted means for the others
    "simple": SIMPLE,
    "non-live": ("simple", "multiple", "parallel", "parallel_multiple"),
    "live": LIVE,
    "irrelevance mean": IRRELEVANCE,
    "live with relevance": (*LIVE, "live_irrelevance", *RELEVANCE),
    "overall with relevance": ("non-live", "live with relevance"),
    "overall": ("non-live", "live"),
}


def totals(by_category: dict[str, Tally]) -> dict[str, Tally | float]:
    """The averages of the paper's Table 2, which are those of the leaderboard.

    The paper's own rows use "overall"; its baselines' "live" (and overall) includes the relevance categories, and is
    comparable with "live with relevance".
    """
    figures: dict[str, Tally | float] = dict(by_category)
    for name, parts in AVERAGES.items():
        if not figures.keys() >= set(parts):
            continue
        values = [figures[part] for part in parts]
        if name.startswith("live"):
            figures[name] = Tally(sum(tally.right for tally in values), sum(tally.count for tally in values))
        else:
            figures[name] = statistics.fmean(v.accuracy if isinstance(v, Tally) else v for v in values)
    return {name: figures[name] for name in AVERAGES if name in figures}


# ------------------------------------------------------------------------------------------------------- export

# Under whose name bfcl-eval finds the results, and whose handler decodes them: it knows no Tool-N1.
OFFICIAL_MODEL = "Salesforce/Llama-xLAM-2-8b-fc-r"


def export(predictions: Mapping[str, str], cases: Iterable[Case], directory: str | os.PathLike) -> list[Path]:
    """Write replies as result files of OFFICIAL_MODEL, which `bfcl evaluate --partial-eval` scores as `score` does.

    predictions: id -> the reply's text; a case without one is left out, and not counted.
    xLAM-2's handler reads the JSON list that a call block holds, keeps dots in names, and for "" fails to decode. So a
    reply becomes its call block, or "" where the Tool-N1 handler fails.
    Returns the files, <directory>/<model>/<non_live or live>/BFCL_v4_<category>_result.json.
    """
    rows: dict[str, list[dict]] = {}
    for case in cases:
        if case.id in predictions:
            rows.setdefault(case.category, []).append({"id": case.id, "result": _result(predictions[case.id])})
    files = []
    for category, results in rows.items():
        group = "live" if category.startswith("live_") else "non_live"
        files.append(Path(directory, OFFICIAL_MODEL.replace("/", "_"), group, f"BFCL_v4_{category}_result.json"))
        with atomic_write(files[-1]) as file:
            file.writelines(json.dumps(row) + "\n" for row in results)
    return files


def _result(completion: str) -> str:
    """The text of a reply's calls for a handler that expects a JSON list."""
    output = stored_output(completion)
    if decoded(output) is None:
        return ""
    return next(call_blocks(completion)) if isinstance(output, list) else "[]"
