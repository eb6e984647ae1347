"""The template against the released texts and prompts, and the reading of replies."""

import hashlib
import json

import pytest
from conftest import shared, shared_rows

from tooln1 import prompt
from tooln1.data import Example
from tooln1.prepare import read_toolace, read_xlam
from tooln1.prompt import build_messages, format_reply, parse_reply, read_json

TEXTS = {
    "xlam_system_prefix.txt": prompt.XLAM_SYSTEM,
    "train_tools_section.txt": prompt.TOOLS_SECTION + prompt.THINK_INSTRUCTION,
    "sft_no_reason_instruction.txt": prompt.NO_THINK_INSTRUCTION,
    "released_bfcl_handler_system.txt": prompt.RELEASED_HANDLER_SYSTEM,
}
SHA256 = {
    "xlam_system_prefix.txt": "e08cc1d670a2152fcdd88df996d9aff48b6b6925b4fdecec0df108b674e155b9",
    "train_tools_section.txt": "1794e0d642a73bc0e2d5956d97af23605c9eda1bee9cdcc1d97790a8f77b1d45",
    "sft_no_reason_instruction.txt": "5f2fc6d60627fd70dba1393b427c24011303858b2a56b38b56a02d6f27dcba5a",
    "released_bfcl_handler_system.txt": "6877c90676c1c7fcb35cf10d9eb6b63176b86cccfed826a6183bec4b1ac346e3",
}


def example(**changes) -> Example:
    fields = {
        "id": "own-1",
        "source": "own",
        "system": "You call tools:\n",
        "tools": [{"name": "weather", "description": "Grüße {tools}"}, {"name": "clock", "parameters": {}}],
        "messages": [{"role": "user", "content": "What is it like in Paris?"}],
        "answer": [{"name": "weather", "arguments": {"city": "Paris"}}],
    }
    return Example(**(fields | changes))


# ---- the template ----


@pytest.mark.parametrize("name", TEXTS)
def test_texts_are_the_released_ones(name):
    assert hashlib.sha256(TEXTS[name].encode()).hexdigest() == SHA256[name]


def test_system_message_is_prefix_then_tools_then_instruction():
    system, *turns = build_messages(example())
    lines = (
        '{"type": "function", "function": {"name": "weather", "description": "Gr\\u00fc\\u00dfe {tools}"}}\n'
        '{"type": "function", "function": {"name": "clock", "parameters": {}}}'
    )
    assert system["role"] == "system"
    assert system["content"].startswith(
        "You call tools:\n# Tool\n\nHere is a list of functions in JSON format that you can invoke:\n\n"
        f"<tools>\n{lines}\n</tools>\n\nIn each action step, you MUST: \n1. Think about"
    )
    assert system["content"].endswith("Please make sure the type of the arguments is correct. \n")
    assert turns == [{"role": "user", "content": "What is it like in Paris?"}]


def test_without_thinking_only_the_instruction_differs():
    thinking = build_messages(example())[0]["content"]
    plain = build_messages(example(), think=False)[0]["content"]
    shared_part, _, _ = thinking.partition("In each action step")
    assert plain == shared_part + prompt.NO_THINK_INSTRUCTION
    assert "<think>" not in plain


def test_released_handler_wording_replaces_the_system_text():
    system, turn = build_messages(example(), wording="released_handler")
    assert "You call tools" not in system["content"]
    assert '\n    <tools>\n    {"type": "function", "function": {"name": "weather"' in system["content"]
    assert 'make tool_calls an empty list <tool_call>[]</tool_call>"\n    ' in system["content"]
    assert turn["role"] == "user"


def test_prompts_of_the_raw_rows_equal_the_released_ones():
    """All but those whose history holds a call with a name that the released parser cuts at "/", "&" or "("."""
    xlam = read_xlam(shared("data/fixtures/xlam_raw_format.jsonl"))
    toolace = read_toolace(shared("data/fixtures/toolace_raw_format.jsonl"))
    by_place = {(int(e.id.split("-")[1]), len(e.messages)): e for e in toolace}
    for case in shared_rows("data/golden/golden_prompts_dev.jsonl.gz"):
        given = xlam[case["row"]] if case["source"] == "xlam" else by_place[case["row"], case["n_context"]]
        answer = case.get("answer") or case["answers"]
        assert given.answer == (json.loads(answer) if isinstance(answer, str) else answer)
        for message in case["messages"]:  # the released code encodes earlier calls twice
            if message["role"] == "assistant" and message["content"].startswith('"'):
                message["content"] = json.loads(message["content"])
        if build_messages(given) != case["messages"]:
            history = [json.loads(m["content"]) for m in given.messages if m["content"].startswith("[{")]
            assert any(set("/&(") & set(call["name"]) for calls in history for call in calls), case["row"]


# ---- replies ----

MARKER = "<|im_start|>assistant\n"
CALL = '{"name": "clock", "arguments": {"zone": "CET"}}'
CALLS = [{"name": "clock", "arguments": {"zone": "CET"}}]
NESTED = "[" * 100_000 + "]" * 100_000


def block(payload: str) -> str:
    return f"<tool_call>{payload}</tool_call>"


REPLIES = [
    (f"<think>t</think> {block(f'[{CALL}]')}", CALLS, "none"),
    (f"{block(f'[{CALL}]')} </think><think>", CALLS, "none"),  # any place, any order
    (f"<think>t</think>{block(f'[{CALL}]')}<|im_end|>", CALLS, "none"),
    (f"<think></think>{block(CALL)}", CALLS, "none"),  # one object stands for a list of one
    (f"<think></think>{block(json.dumps(f'[{CALL}]'))}", CALLS, "none"),  # encoded twice
    (f"<think></think>{block('x')}{block(f'[{CALL}]')}", CALLS, "none"),  # the last block
    ("<think></think>" + block("[]"), [], "none"),
    ("<think></think>" + block("\u00a0\u2003[]\r\n"), [], "none"),  # Unicode white space
    (f"<think>no end{block('[]')}", [], "no_think"),
    (block("[]"), [], "no_think"),
    (f"<think></think><|im_start|>assistant\n{block('[]')}", [], "no_think"),  # cut at the marker
    (f"{MARKER}<think></think>{MARKER}{block('[]')}", [], "no_think"),  # at the last one
    (f"{block('x')}<|im_start|>assistant\n<think></think>{block('[]')}", [], "none"),
    ("", None, "no_call_block"),
    (f"<think></think>[{CALL}]", None, "no_call_block"),
    (f"<think></think><tool_call>[{CALL}]", None, "no_call_block"),
    (f"<think></think></tool_call>[{CALL}]<tool_call>", None, "no_call_block"),
    (f"<think>maybe <tool_call> it is</think>{block(f'[{CALL}]')}", None, "bad_json"),  # swallowed
    ("<think></think>" + block(""), None, "bad_json"),
    ("<think></think>" + block(f"[{CALL}"), None, "bad_json"),
    ("<think></think>" + block("null"), None, "bad_json"),
    ("<think></think>" + block(f"[{'9' * 5000}]"), None, "bad_json"),
    ("<think></think>" + block(NESTED), None, "bad_json"),
    ("<think></think>" + block("5"), None, "bad_format"),
    ("<think></think>" + block("NaN"), None, "bad_format"),
    ("<think></think>" + block('["a"]'), None, "bad_format"),
    ("<think></think>" + block("[[]]"), None, "bad_format"),
    ("<think></think>" + block('[{"name": "clock"}]'), None, "bad_format"),
    ("<think></think>" + block('[{"arguments": {}}]'), None, "bad_format"),
]


@pytest.mark.parametrize(
    ("text", "calls", "fault"), REPLIES, ids=[f"{number}-{case[-1]}" for number, case in enumerate(REPLIES)]
)
def test_calls_and_fault(text, calls, fault):
    reply = parse_reply(text)
    assert (reply.calls, reply.fault) == (calls, fault)


STRICT = f"<think>t</think> {block(f'[{CALL}]')}"


@pytest.mark.parametrize(
    ("text", "strict"),
    [
        (STRICT, True),
        (f"\n{STRICT}\n<|im_end|>\n", True),
        (f"{STRICT}<|eot_id|>", True),
        (f"<think></think>\n\n{block('[]')}<|endoftext|>", True),
        (f"{STRICT}.", False),
        (f"So: {STRICT}", False),
        (f"<think>t</think> so {block(f'[{CALL}]')}", False),
        (f"{STRICT}<|im_end|><|im_end|>", False),
        (f"{STRICT}{block('[]')}", False),
        (f"<think><think>t</think> {block(f'[{CALL}]')}", False),
        (f"</think>t<think> {block(f'[{CALL}]')}", False),
        (f"<think>{block(f'[{CALL}]')}</think>", False),
        (block(f"[{CALL}]"), False),
        (f"<think>t</think> {block(CALL)}", False),  # an object, not a list
        (f"<think>t</think> {block(json.dumps(f'[{CALL}]'))}", False),  # a string
        ("<think>t</think>" + block('[{"name": 5, "arguments": {}}]'), False),
        ("<think>t</think>" + block('[{"name": "a", "arguments": []}]'), False),
        (f"<|im_start|>assistant\n{STRICT}", False),
        (f"<think>t<|im_start|>assistant</think>{block('[]')}", False),
    ],
)
def test_strict_layout(text, strict):
    assert parse_reply(text).is_strict is strict


UNREADABLE = {
    "not JSON: .* at character 1": "{",
    "nested too deeply": "[" * 50_000,
    "more digits than Python reads": "9" * 5000,
    "longer than 1048576 characters": " " * (prompt.MAX_JSON_LENGTH + 1),
    "more than 65536 commas and opening brackets": f"[{'1,' * (prompt.MAX_JSON_MARKS - 1)}{{}}]",
}


@pytest.mark.parametrize(("words", "text"), UNREADABLE.items(), ids=UNREADABLE)
def test_read_json_fails_in_one_way(words, text):
    with pytest.raises(ValueError, match=words) as caught:
        read_json(text)
    assert type(caught.value) is ValueError


@pytest.mark.parametrize("thought", [None, "", "It asks for Zürich."])
def test_format_reply_reads_back(thought):
    calls = [{"name": "weather", "arguments": {"city": "Zürich", "days": [1, 2.0, None]}}, *CALLS]
    text = format_reply(calls, thought)
    reply = parse_reply(text)
    assert reply.calls == calls
    assert reply.is_strict == reply.has_think == (thought is not None)
    assert "Zürich" in text
