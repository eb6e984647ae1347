"""BFCL's scoring: official verdicts, the paper's averages, decoding, extreme replies, export."""

import json
from collections import Counter

import pytest
from bfcl_fixtures import function, gold_calls, make_case, typed, write_category
from conftest import shared, shared_rows

from tooln1.benchmarks import Case, Tally, bfcl
from tooln1.prompt import format_reply

# ---------------------------------------------------------------------------------------------- official verdicts


@pytest.fixture(scope="module")
def cases() -> dict[str, Case]:
    return {case.id: case for case in bfcl.load(shared("data/bfcl"))}


def test_golden_verdicts_and_error_types_are_equal(cases):
    for row in shared_rows("data/golden/golden_bfcl_dev.jsonl.gz"):
        verdicts = [bfcl.score_output(cases[row["id"]], row["model_output"])]
        if row["completion"] is not None:
            verdicts.append(bfcl.score(cases[row["id"]], row["completion"]))
        for verdict in verdicts:
            assert (verdict.ok, verdict.why) == (row["official_valid"], row["error_type"] or ""), row


def test_accepted_answers_fed_back_reach_the_ceilings(cases):
    right = {name: bfcl.score(case, format_reply(gold_calls(case), "t")).ok for name, case in cases.items()}
    assert {name for name, ok in right.items() if not ok} == set(bfcl.NEVER_RIGHT)
    counts = Counter(case.category for case in cases.values())
    assert list(counts) == list(bfcl.CATEGORIES) and counts.items() >= COUNTS.items()
    oks = Counter(case.category for name, case in cases.items() if right[name])
    tallies = {category: Tally(oks[category], count) for category, count in counts.items()}
    assert bfcl.totals(tallies)["simple"] == pytest.approx(0.99)


def test_the_entries_changed_since_the_paper_are_named(cases):
    lines = shared("data/bfcl/v3_2025-04-13_differences.jsonl").read_text(encoding="utf-8").splitlines()
    assert sorted(bfcl.CHANGED_SINCE_PAPER) == sorted(json.loads(line)["id"] for line in lines)
    assert set(bfcl.CHANGED_SINCE_PAPER) - set(cases) == {"live_relevance_16-16-0"}


# --------------------------------------------------------------------------------------------------------- totals

COUNTS = {
    **{"simple_python": 400, "simple_java": 100, "simple_javascript": 50},
    **{"multiple": 200, "parallel": 200, "parallel_multiple": 200},
    **{"live_simple": 258, "live_multiple": 1053, "live_parallel": 16, "live_parallel_multiple": 24},
}
PAPER = {  # right replies in the order of COUNTS; the paper's simple, non-live, live and overall
    "7B": ((324, 70, 40, 190, 189, 181, 212, 847, 10, 17), (77.00, 89.25, 80.38, 84.82)),
    "14B": ((367, 70, 40, 192, 187, 184, 217, 854, 13, 16), (80.58, 90.52, 81.42, 85.97)),
}


def figures(by_category: dict[str, Tally]) -> dict[str, float]:
    return {
        name: round(100 * (figure.accuracy if isinstance(figure, Tally) else figure), 2)
        for name, figure in bfcl.totals(by_category).items()
    }


@pytest.mark.parametrize("model", PAPER)
def test_the_papers_own_rows_are_reproduced(model):
    right, expected = PAPER[model]
    row = {name: Tally(number, COUNTS[name]) for name, number in zip(COUNTS, right, strict=True)}
    assert figures(row) == dict(zip(("simple", "non-live", "live", "overall"), expected, strict=True))
    relevance = {"irrelevance": Tally(120, 240), "live_irrelevance": Tally(0, 882), "live_relevance": Tally(18, 18)}
    result = figures(row | relevance)
    assert result["irrelevance mean"] == 25.00 and list(result)[-1] == "overall" and result["overall"] == expected[-1]
    assert result["live with relevance"] == round(100 * (sum(right[6:]) + 18) / (1351 + 900), 2)


# ------------------------------------------------------------------------------------------- replies and decoding

CALL = {"name": "f", "arguments": {"p": 1}}
FAILED, MALFORMED = "ast_decoder:decoder_failed", "ast_decoder:decoder_wrong_output_format"
WRONG_COUNT = "simple_function_checker:wrong_count"
OUTPUTS = [  # what the call block holds, the fault in a category of calls, whether it counts as a call
    ([CALL], "", True),
    ([{"name": "g", "arguments": {}}], "simple_function_checker:wrong_func_name", True),
    ([CALL, {"name": "f", "arguments": None}], MALFORMED, False),
    ([{"name": "f", "arguments": '{"p": 1}'}], MALFORMED, False),
    ([], WRONG_COUNT, False),
    ({}, WRONG_COUNT, False),
    ("[]", FAILED, False),
    ([{"name": "f"}], FAILED, False),
    ([{"name": [], "arguments": {}}], FAILED, False),
]


@pytest.mark.parametrize(("output", "fault", "is_call"), OUTPUTS)
def test_decoding_and_relevance(tmp_path, output, fault, is_call):
    case = make_case(tmp_path / "calls", accepted={"p": [1]}, p=typed("integer"))
    no_call, any_call = "irrelevance_error:decoder_success", "relevance_error:decoder_failed"
    expected = {"irrelevance": no_call * is_call, "live_relevance": any_call * (not is_call)}
    for category, relevance_fault in expected.items():
        relevance = make_case(tmp_path / category, category, p=typed("integer"))
        assert bfcl.score(relevance, f"<tool_call>{json.dumps(output)}</tool_call>").why == relevance_fault
    assert bfcl.score(case, f"<tool_call>{json.dumps(output)}</tool_call>", think=False).why == fault


REPLIES = [
    (format_reply([CALL], "t"), ""),
    (format_reply([CALL]) + format_reply([]), ""),
    (format_reply([]) + format_reply([CALL]), WRONG_COUNT),
    ("<tool_call>\n" + json.dumps([CALL], indent=1) + "\n</tool_call><|im_end|>", ""),
    ("<think><tool_call> is a tag</think>" + format_reply([CALL]), FAILED),
    ("<tool_call>" + json.dumps([CALL]), FAILED),
    ("<tool_call>[" + "9" * 5000 + "]</tool_call>", FAILED),
    ("<tool_call>" + "[" * 100_000 + "]" * 100_000 + "</tool_call>", FAILED),
    ("", FAILED),
]


@pytest.mark.parametrize(("reply", "fault"), REPLIES)
def test_the_first_block_of_a_reply_counts(tmp_path, reply, fault):
    assert bfcl.score(make_case(tmp_path, accepted={"p": [1]}, p=typed("integer")), reply).why == fault


# --------------------------------------------------------------------------------------------------------- export


def test_exported_results_decode_to_the_same_calls(tmp_path):
    """As bfcl-eval's xLAM-2 handler decodes them; scripts/cross_check_bfcl.py has bfcl-eval itself score them."""

    names = [f"simple_java_{number}" for number in range(len(OUTPUTS))]
    write_category(tmp_path, "simple_java", [function()], [{"f": {}}], ids=[*names, "simple_java_99"])
    write_category(tmp_path, "live_relevance", [function()])
    replies = {
        name: f"<tool_call>{json.dumps(output)}</tool_call>" for name, (output, *_) in zip(names, OUTPUTS, strict=True)
    }
    replies |= {"live_relevance_0": "No block.", "of another benchmark": ""}
    files = bfcl.export(replies, bfcl.load(tmp_path), tmp_path / "result")
    assert [str(file.relative_to(tmp_path)) for file in files] == [
        "result/Salesforce_Llama-xLAM-2-8b-fc-r/non_live/BFCL_v4_simple_java_result.json",
        "result/Salesforce_Llama-xLAM-2-8b-fc-r/live/BFCL_v4_live_relevance_result.json",
    ]
    rows = [json.loads(line) for line in files[0].read_text().splitlines()]
    assert [row["id"] for row in rows] == names  # and none for the case without a reply
    for row, (output, *_) in zip(rows, OUTPUTS, strict=True):
        assert row["result"] == ("" if bfcl.decoded(output) is None else json.dumps(output or []))
    assert json.loads(files[1].read_text()) == {"id": "live_relevance_0", "result": ""}
