"""Rewards against the released scores, and by hand where a bare clone has no reference data."""

import json

import pytest
from conftest import shared_rows

from tooln1.prompt import parse_reply
from tooln1.rewards import REWARDS, RULES, fault_of, match

RELEASED = {
    "v0": "binary",
    "v2": "binary_no_think",
    "v3": "format_partial",
    "v4": "format_name_partial",
}


def value_where_the_released_code_raises(version: str, text: str) -> float:
    """The value of a reply without readable calls: 0.2 for thinking where format counts."""
    kept = text.split("<|im_start|>assistant")[-1]
    thinks = "<think>" in kept and "</think>" in kept
    return 0.2 if thinks and version in ("v3", "v4") else 0


def test_golden_rewards_are_equal():
    wrong = []
    for row in shared_rows("data/golden/golden_reward_dev.jsonl.gz"):
        text, gold = row["completion"], row["ground_truth"]
        for version, name in RELEASED.items():
            expected = row[version]
            if expected is None:
                expected = value_where_the_released_code_raises(version, text)
            got = REWARDS[name](text, gold)
            if got != expected or got != REWARDS[name](text, json.dumps(gold)):
                wrong.append((row["mutation"], version, got, expected))
        if (fault_of(text, gold) == "none") != (row["v0"] == 1):
            wrong.append((row["mutation"], "fault", fault_of(text, gold)))
        if (fault_of(text, gold, think=False) == "none") != (row["v2"] == 1):
            wrong.append((row["mutation"], "fault without thinking", fault_of(text, gold, think=False)))
        if REWARDS["strict"](text, gold) > (row["v0"] or 0):
            wrong.append((row["mutation"], "strict"))
    assert not wrong[:5]


def test_released_transcripts_are_equal():
    wrong = []
    for row in shared_rows("reference/reward/toolcall_dev.jsonl.gz"):
        for key, expected in row["scores"].items():
            version = key[-2:]
            if version not in RELEASED:
                continue
            if isinstance(expected, dict):
                expected = value_where_the_released_code_raises(version, row["solution_str"])
            if REWARDS[RELEASED[version]](row["solution_str"], row["ground_truth"]) != expected:
                wrong.append((row["id"], key))
    assert not wrong


GOLD = [
    {"name": "weather", "arguments": {"city": "Paris", "days": [1, 2], "metric": True}},
    {"name": "clock", "arguments": {}},
]
WEATHER, CLOCK = GOLD
ORDER = ("binary", "binary_no_think", "format_partial", "format_name_partial", "strict")


def reply(calls, thought="<think>t</think>") -> str:
    payload = calls if isinstance(calls, str) else json.dumps(calls)
    return f"{thought} <tool_call>{payload}</tool_call>"


def weather(**changes) -> dict:
    return {"name": "weather", "arguments": WEATHER["arguments"] | changes}


# GOLD again: keys in another order, an escape, one key too many.
OTHERWISE_WRITTEN = (
    '[{"arguments":{"metric":true,"days":[1,2],"city":"\\u0050aris"},"name":"weather"},'
    '{"name":"clock","arguments":{},"id":1}]'
)

RIGHT = (1, 1, 1.0, 1.0, 1)
NAMES_ONLY = (0, 0, 0.2, 0.4, 0)
FORMAT_ONLY = (0, 0, 0.2, 0.2, 0)
NOTHING = (0, 0, 0, 0, 0)
CASES = [
    (reply(GOLD), RIGHT, "none"),
    (reply([CLOCK, WEATHER]), RIGHT, "none"),
    (reply(GOLD) + "<|im_end|>", RIGHT, "none"),
    (reply(OTHERWISE_WRITTEN), RIGHT, "none"),
    (reply(json.dumps(json.dumps(GOLD))), (1, 1, 1.0, 1.0, 0), "none"),
    (reply(GOLD) + " Done.", (1, 1, 1.0, 1.0, 0), "none"),
    (reply(GOLD, thought="</think><think>"), (1, 1, 1.0, 1.0, 0), "none"),
    (reply([CLOCK], "<think>t</think>") + reply(GOLD, ""), (1, 1, 1.0, 1.0, 0), "none"),
    (reply(GOLD, thought=""), (0, 1, 0.8, 0.8, 0), "no_think"),
    (reply(GOLD, thought="<think>"), (0, 1, 0.8, 0.8, 0), "no_think"),
    (reply([weather(city="paris"), CLOCK]), NAMES_ONLY, "wrong_arguments"),
    (reply([weather(days=[2, 1]), CLOCK]), NAMES_ONLY, "wrong_arguments"),
    (reply([weather(days=[1.0, 2]), CLOCK]), NAMES_ONLY, "wrong_arguments"),
    (reply([weather(metric=1), CLOCK]), NAMES_ONLY, "wrong_arguments"),
    (reply([weather(metric="true"), CLOCK]), NAMES_ONLY, "wrong_arguments"),
    (reply([weather(extra=None), CLOCK]), NAMES_ONLY, "wrong_arguments"),
    (reply([WEATHER, {"name": "clock", "arguments": None}]), NAMES_ONLY, "wrong_arguments"),
    (reply([weather(city="x"), CLOCK], ""), (0, 0, 0, 0.2, 0), "no_think"),
    (reply([WEATHER, {"name": "Clock", "arguments": {}}]), FORMAT_ONLY, "wrong_names"),
    (reply([WEATHER, {"name": ["clock"], "arguments": {}}]), FORMAT_ONLY, "wrong_names"),
    (reply([WEATHER, WEATHER]), FORMAT_ONLY, "wrong_names"),
    (reply([WEATHER]), FORMAT_ONLY, "wrong_count"),
    (reply([WEATHER, CLOCK, CLOCK]), FORMAT_ONLY, "wrong_count"),
    (reply([]), FORMAT_ONLY, "wrong_count"),
    (reply([WEATHER, {"name": "clock"}]), FORMAT_ONLY, "bad_format"),
    (reply("5"), FORMAT_ONLY, "bad_format"),
    (reply("sunny"), FORMAT_ONLY, "bad_json"),
    (reply("sunny", ""), NOTHING, "bad_json"),
    ("<think>t</think> " + json.dumps(GOLD), FORMAT_ONLY, "no_call_block"),
    ("", NOTHING, "no_call_block"),
]


@pytest.mark.parametrize(
    ("text", "expected", "fault"), CASES, ids=[f"{number}-{case[-1]}" for number, case in enumerate(CASES)]
)
def test_rewards_by_hand(text, expected, fault):
    assert tuple(REWARDS[name](text, GOLD) for name in ORDER) == expected
    assert tuple(REWARDS[name](text, json.dumps(GOLD)) for name in ORDER) == expected
    assert fault_of(text, GOLD) == fault


@pytest.mark.parametrize(
    ("text", "value"),
    [(reply("[]"), 1), (reply([CLOCK]), 0), ("<think>t</think> None fits.", 0), (reply("null"), 0)],
)
def test_an_empty_answer_wants_an_explicit_empty_list(text, value):
    assert REWARDS["binary"](text, []) == value
    assert REWARDS["binary"](text, "[]") == value


@pytest.mark.parametrize(
    ("ours", "gold", "expected"),
    [
        ("NaN", "NaN", "exact"),
        ("1e0", "1.0", "exact"),
        ("0.0", "-0.0", "names"),
        ("1", "1.0", "names"),
        ("1", "true", "names"),
        ('"\\u00e9"', '"é"', "exact"),
        ('"e\\u0301"', '"é"', "names"),
        ('"\\ud800"', '"\\ud800"', "exact"),
        ('{"b": [1], "a": 2}', '{"a": 2, "b": [1]}', "exact"),
    ],
)
def test_values_are_compared_as_json(ours, gold, expected):
    text = reply(f'[{{"name": "f", "arguments": {{"x": {ours}}}}}]')
    answer = json.loads(f'[{{"name": "f", "arguments": {{"x": {gold}}}}}]')
    assert match(parse_reply(text), answer) == expected


@pytest.mark.parametrize("depth", [150, 900, 990, 100_000])
def test_deep_arguments_give_a_number(depth):
    nested = "[" * depth + "]" * depth
    text = reply(f'[{{"name": "clock", "arguments": {nested}}}]')
    for name, rule in RULES.items():
        value = REWARDS[name](text, [CLOCK])
        assert value in (rule.format_value, rule.format_value + rule.names_value)


@pytest.mark.parametrize("answer", ["", "5", "{", '[{"name": "f"}]', [5], None, [{"arguments": {}}]])
def test_an_answer_that_is_no_list_of_calls_is_the_users_to_mend(answer):
    with pytest.raises(ValueError, match="is not a list of calls"):
        REWARDS["binary"](reply(GOLD), answer)
