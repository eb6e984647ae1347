"""The rule-based rewards: a reply's text and the gold calls to a number (paper, Eq. 5 and Table 4).

The reply is right when it has thought and its calls equal the gold calls as a multiset of (name, arguments):
the order of calls and of keys is free, duplicates count, the order inside lists counts, and 1, 1.0, true and
"1" all differ. What falls short of that is worth something in the paper's ablations; `RULES` is the whole
difference between them.

Every reward is total: any text gives a number, fast. Deviation from the released code (toolcall.py,
compute_score_v0, v2, v3, v4): where that raises (a bare number in the call block, integers of more than 4300
digits, very deep nesting), the reply gets what a reply without readable calls gets.
"""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from tooln1.io.errors import UserError
from tooln1.prompt import Reply, UnreadableCalls, checked_calls, parse_reply, read_calls

Calls = list[dict]  # [{"name": str, "arguments": dict}, ...]
Match = Literal["exact", "names", "none"]  # equal calls; equal names only; neither


@dataclass(frozen=True)
class Rule:
    """What a reward pays: `format_value` for having thought, plus what its calls deserve."""

    needs_think: bool  # without <think> and </think> the reply is worth nothing
    needs_strict: bool = False  # nor without the strict layout of `prompt.Reply`
    format_value: float = 0.0  # for <think> and </think>, whatever the calls are
    names_value: float = 0.0  # for the right multiset of function names, when arguments differ
    exact_value: float = 1.0  # for equal calls


RULES = {
    "binary": Rule(needs_think=True),  # the paper's reward; released v0
    "binary_no_think": Rule(needs_think=False),  # released v2
    "format_partial": Rule(needs_think=False, format_value=0.2, exact_value=0.8),  # released v3
    "format_name_partial": Rule(False, format_value=0.2, names_value=0.2, exact_value=0.8),  # released v4
    "strict": Rule(needs_think=True, needs_strict=True),  # ours: no second block, no text around the blocks
}


def score(rule: Rule, reply_text: str, answer: Calls | str) -> float:
    """The reward of a reply under `rule`: in [0, 1], for any text.

    reply_text: the reply decoded with its special tokens; what stands before a last "<|im_start|>assistant"
                does not count, except under "strict", which wants the reply alone.
    answer:     the gold calls, or their JSON text as the released data hold them; [] where no call is right.
    Raises UserError for an answer that is no list of calls: that is a fault of the data, not of the reply.
    """
    gold, reply = _gold_calls(answer), parse_reply(reply_text)
    if (rule.needs_think and not reply.has_think) or (rule.needs_strict and not reply.is_strict):
        return 0.0
    paid = {"exact": rule.exact_value, "names": rule.names_value, "none": 0.0}[match(reply, gold)]
    return paid + (rule.format_value if reply.has_think else 0.0)


REWARDS: dict[str, Callable[[str, Calls | str], float]] = {name: partial(score, rule) for name, rule in RULES.items()}


def match(reply: Reply, gold: Calls) -> Match:
    """How far the calls of a parsed reply are those of `gold`; "none" where the reply's calls do not read.

    Gold [] is matched by an explicit [] only. Arguments are compared as JSON text with sorted keys, as in the
    released code: so NaN equals NaN, 1e0 equals 1.0, and 0.0 differs from -0.0.
    """
    if reply.calls is None or not _equal_names(reply.calls, gold):
        return "none"
    try:
        equal = Counter(map(_as_text, reply.calls)) == Counter(map(_as_text, gold))
    except RecursionError:  # arguments nested just less deeply than they can be read
        return "none"
    return "exact" if equal else "names"


Fault = Literal[
    "none",
    "no_call_block",  # this and the next three as in `prompt.ReplyFault`
    "bad_json",
    "bad_format",
    "no_think",
    "wrong_count",  # more or fewer calls than gold
    "wrong_names",  # as many calls, of other functions
    "wrong_arguments",  # the right functions, and an argument that is not equal
]
FORMAT_FAULTS: tuple[Fault, ...] = ("no_call_block", "bad_json", "bad_format", "no_think")


def fault_of(reply_text: str, answer: Calls | str, think: bool = True) -> Fault:
    """Why a reply is wrong, the first reason in the order of `Fault`; "none" exactly where `binary` gives 1.

    With think=False reasoning is not asked for, and "none" is where `binary_no_think` gives 1.
    """
    gold = _gold_calls(answer)
    return reply_fault(parse_reply(reply_text), gold, think)


def reply_fault(reply: Reply, gold: Calls, think: bool = True) -> Fault:
    """`fault_of` for a reply that is parsed already."""
    if reply.fault != "none" and (think or reply.fault != "no_think"):
        return reply.fault
    if len(reply.calls) != len(gold):
        return "wrong_count"
    if not _equal_names(reply.calls, gold):
        return "wrong_names"
    return "none" if match(reply, gold) == "exact" else "wrong_arguments"


def _equal_names(calls: Calls, gold: Calls) -> bool:
    """Whether the function names agree as multisets; a name that is no string, in a reply, never does."""
    if len(calls) != len(gold) or not all(isinstance(call["name"], str) for call in calls + gold):
        return False
    return Counter(call["name"] for call in calls) == Counter(call["name"] for call in gold)


def _as_text(call: dict) -> tuple[str, str]:
    return call["name"], json.dumps(call["arguments"], sort_keys=True)


def _gold_calls(answer: Calls | str) -> Calls:
    """The answer as a list of calls; a UserError shows what is wrong with it."""
    try:
        return read_calls(answer) if isinstance(answer, str) else checked_calls(answer)
    except UnreadableCalls as error:
        raise UserError(f"the answer {str(answer)[:80]!r} is not a list of calls: {error}") from error
