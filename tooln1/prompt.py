"""The one template: an `Example` to chat messages, and a reply's text back to calls.

Training, supervised fine-tuning and evaluation all render and parse here. The wording is that of the released
code, byte for byte (paper, appendix E; NOTICE names the origin), odd spaces and stray quote included: a model
trained on one wording need not do as well under another.

Deviations from the released code:
- earlier calls stand in the history as one JSON list; the released preprocessing encodes them twice;
- a reply is read by a scan in linear time, and whatever it holds, a `Reply` comes back; the released parser
  raises on a bare number, on integers of more than 4300 digits and on very deep nesting. Call blocks of more
  than MAX_JSON_LENGTH characters or MAX_JSON_MARKS commas and opening brackets are not read.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tqdm import tqdm

from tooln1.data import Example
from tooln1.io.errors import UserError
from tooln1.io.jsonl import kind_of, shown
from tooln1.tokenizer import Tokenizer

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
CALL_OPEN, CALL_CLOSE = "<tool_call>", "</tool_call>"
ASSISTANT_MARKER = "<|im_start|>assistant"
# What may end a reply decoded with its special tokens: ChatML, then LLaMA-3.
STOP_TOKENS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>")
# What 8192 tokens can hold, by the longest token of Qwen2.5 (128 characters) and that with the most marks (8).
MAX_JSON_LENGTH = 2**20  # characters
MAX_JSON_MARKS = 2**16  # "[", "{" and ",", also those in strings; there are about as many values

# The text before the tools section of an xLAM row; a ToolACE row brings its own.
XLAM_SYSTEM = (
    "You are an expert in composing functions. You are given a question and a set of possible "
    "functions. \n"
    "Based on the question, you will need to make one or more function/tool calls to achieve the "
    "purpose. \n"
    "If none of the function can be used, point it out. If the given question lacks the "
    "parameters required by the function,\n"
    "also point it out. You should only return the function call in tools call sections. Here is "
    "a list of functions in JSON format that you can invoke:\n"
)

# {tools} is one tool a line.
TOOLS_SECTION = (
    "# Tool\n\nHere is a list of functions in JSON format that you can invoke:\n\n<tools>\n{tools}\n</tools>\n\n"
)

# Follows the tools in training and evaluation.
THINK_INSTRUCTION = (
    "In each action step, you MUST: \n"
    "1. Think about the reasoning process in the mind and enclosed your reasoning within <think> "
    "</think> XML tags.\n"
    "2. Then, provide a json object with function names and arguments within "
    '<tool_call></tool_call> XML tags. i.e., <tool_call>[{"name": <function-name>, "arguments": '
    '<args-json-object>}, {"name": <function-name2>, "arguments": <args-json-object2>}, '
    "...]</tool_call>\n"
    "3. Make sure both the reasoning and the tool call steps are included together in one single "
    "reply.\n"
    "A complete reply example is: <think>To address the query, I need to send the email to Bob "
    'and then buy the banana through walmart. </think> <tool_call> [{"name": "email", '
    '"arguments": {"receiver": "Bob", "content": "I will bug banana through walmart"}}, {"name": '
    '"walmart", "arguments": {"input": "banana"}}]</tool_call>. Please make sure the type of the '
    "arguments is correct. \n"
)

# Takes its place for supervised fine-tuning without reasoning.
NO_THINK_INSTRUCTION = (
    "When you want to perform tool call, in each action step, providing a json object with "
    "function names and arguments within <tool_call></tool_call> XML tags. i.e., "
    '<tool_call>[{"name": <function-name>, "arguments": <args-json-object>}, {"name": '
    '<function-name2>, "arguments": <args-json-object2>}, ...]</tool_call>\n'
    'A complete reply example is: <tool_call> [{"name": "email", "arguments": {"receiver": '
    '"Bob", "content": "I will bug banana through walmart"}}, {"name": "walmart", "arguments": '
    '{"input": "banana"}}]</tool_call>. Please make sure the type of the arguments is correct.'
)

# The whole system text of the released BFCL handler.
RELEASED_HANDLER_SYSTEM = (
    "\n"
    "        You are an expert in composing functions. You are given a question and a set of "
    "possible functions. Based on the question, you will need to make one or more function/tool "
    "calls to achieve the purpose. If none of the function can be used, point it out. If the "
    "given question lacks the parameters required by the function, also point it out. You should "
    "only return the function call in tools call sections.\n"
    "\n"
    "    # Tool\n"
    "    Here is a list of functions in JSON format that you can invoke:\n"
    "\n"
    "    <tools>\n"
    "    {tools}\n"
    "    </tools>\n"
    "\n"
    "    In each action step, you MUST: \n"
    "    1. think about the reasoning process in the mind before and enclosed your reasoning "
    "within <think> </think> XML tags.\n"
    "    2. then return a json object with function names and arguments within "
    '<tool_call></tool_call> XML tags. i.e., <tool_call>[{"name": <function-name>, "arguments": '
    '<args-json-object>}, {"name": <function-name2>, "arguments": <args-json-object2>}, '
    "...]</tool_call>\n"
    "    3. remember complete 1 and 2 in one single reply.\n"
    "    A complete reply example is: <think>To address the query, I need to send the email to "
    'Bob and then buy the banana through walmart. </think> <tool_call> [{"name": "email", '
    '"arguments": {"receiver": "Bob", "content": "I will bug banana through walmart"}}, {"name": '
    '"walmart", "arguments": {"input": "banana"}}]</tool_call>. Please make sure the type of the '
    "arguments is correct.  If no functions could be used in the current task, please make "
    'tool_calls an empty list <tool_call>[]</tool_call>"\n'
    "    "
)

Wording = Literal["train", "released_handler"]


def build_messages(example: Example, think: bool = True, *, wording: Wording = "train") -> list[dict]:
    """The chat messages that ask for `example`'s calls: one system message, then the example's own turns.

    example: reads its `system`, `tools` and `messages`; leaves them as they are.
    think:   True asks for <think> reasoning before the call; False is the wording of supervised fine-tuning
             without reasoning (paper, table 3).
    wording: "train" is the template of training. "released_handler" is that of the released BFCL handler:
             another system text, with a rule for "no function fits", in place of `example.system`.
    Returns [{"role": "system" | "user" | "assistant" | "tool", "content": str}, ...].
    Raises UserError for an unknown wording, and for the released handler's without reasoning, which does not exist.
    """
    if wording == "train":
        section = TOOLS_SECTION + (THINK_INSTRUCTION if think else NO_THINK_INSTRUCTION)
        prefix = example.system
    elif wording == "released_handler" and think:
        section, prefix = RELEASED_HANDLER_SYSTEM, ""
    else:
        raise UserError(f"there is no prompt wording {wording!r} with think={think}; use train, or released_handler")
    system = prefix + section.replace("{tools}", render_tools(example.tools))
    turns = [{"role": turn["role"], "content": turn["content"]} for turn in example.messages]
    return [{"role": "system", "content": system}, *turns]


def render_tools(tools: list[dict]) -> str:
    """One JSON object {"type": "function", "function": tool} a line, no line break after the last."""
    return "\n".join(json.dumps({"type": "function", "function": tool}) for tool in tools)


def format_reply(calls: list[dict], thought: str | None = None) -> str:
    """The reply the template asks for: `<think>thought</think> <tool_call>[...]</tool_call>`.

    Without a thought, the call block alone. `parse_reply` reads the same calls back, unless the thought or a
    string in the calls holds one of the tags itself.
    """
    block = f"{CALL_OPEN}{json.dumps(calls, ensure_ascii=False)}{CALL_CLOSE}"
    return block if thought is None else f"{THINK_OPEN}{thought}{THINK_CLOSE} {block}"


ReplyFault = Literal[
    "none",
    "no_call_block",  # no <tool_call> with a </tool_call> after it
    "bad_json",  # the block does not read as JSON, or is null
    "bad_format",  # JSON, but not a list of objects with "name" and "arguments"
    "no_think",  # the calls read well, but <think> or </think> is missing
]


@dataclass(frozen=True)
class Reply:
    """What a reply's text says, read once; see `parse_reply`."""

    calls: list[dict] | None  # each has "name" and "arguments", of any JSON type; None when they do not read
    has_think: bool  # "<think>" and "</think>" both occur, anywhere and in any order
    fault: ReplyFault  # the first that applies, in the order of its list
    is_strict: bool  # one think block, then one call block with a list of well-typed calls, and nothing else


def parse_reply(text: str) -> Reply:
    """Read a reply by the rules of the released reward: total, and linear in the length of `text`.

    The text is cut at the last "<|im_start|>assistant", so a whole transcript may be given; of the call
    blocks the last one counts, and `read_calls` reads it. Source: released toolcall.py.

    `is_strict` looks at the layout as well, and for that the text must be the reply alone: no marker, each of
    the four tags once and in order, a real JSON list, names that are strings, arguments that are objects;
    whitespace and one trailing stop token are allowed.
    """
    kept = text[max(text.rfind(ASSISTANT_MARKER), 0) :]
    has_think = THINK_OPEN in kept and THINK_CLOSE in kept
    blocks = list(call_blocks(kept))
    if not blocks:
        return Reply(None, has_think, "no_call_block", is_strict=False)
    try:
        calls = read_calls(blocks[-1])
    except UnreadableCalls as error:
        return Reply(None, has_think, error.fault, is_strict=False)
    is_strict = blocks[-1].startswith("[") and _well_typed(calls) and _has_strict_layout(text)
    return Reply(calls, has_think, "none" if has_think else "no_think", is_strict)


def call_blocks(text: str) -> Iterator[str]:
    """The stripped contents of the non-overlapping `<tool_call>...</tool_call>` pairs, from left to right.

    An opening tag runs to the next closing one, whatever stands between, so an unclosed tag swallows the
    block after it. Training reads the last block, the released BFCL handler the first: `next(..., None)`.
    """
    position = 0
    while (start := text.find(CALL_OPEN, position)) >= 0:
        start += len(CALL_OPEN)
        end = text.find(CALL_CLOSE, start)
        if end < 0:
            return
        yield text[start:end].strip()
        position = end + len(CALL_CLOSE)


def read_json(text: str) -> Any:
    """`json.loads` that fails in one way: ValueError with a sentence.

    Also for what is no JSONDecodeError: integers over Python's digit limit (4300), nesting over its recursion
    limit. Text over MAX_JSON_LENGTH or MAX_JSON_MARKS is refused unread. NaN and Infinity are read, and of equal
    keys the last wins, as json.loads does.
    """
    if len(text) > MAX_JSON_LENGTH:
        raise ValueError(f"longer than {MAX_JSON_LENGTH} characters")
    if sum(map(text.count, "[{,")) > MAX_JSON_MARKS:
        raise ValueError(f"more than {MAX_JSON_MARKS} commas and opening brackets")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at character {error.pos}") from None
    except ValueError:
        raise ValueError("a number has more digits than Python reads") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


class UnreadableCalls(ValueError):
    """Raised for text or a value that is not a list of calls; `fault` is its class, the message says why."""

    def __init__(self, fault: ReplyFault, detail: str):
        super().__init__(detail)
        self.fault = fault


def read_calls(text: str) -> list[dict]:
    """The calls in a block's text, as the released reward reads them: a JSON string in it is read once more.

    Raises UnreadableCalls; otherwise as `checked_calls`.
    """
    try:
        value = read_json(text)
        if isinstance(value, str):
            value = read_json(value)
    except ValueError as error:
        raise UnreadableCalls("bad_json", str(error)) from None
    if value is None:
        raise UnreadableCalls("bad_json", "null instead of calls")
    return checked_calls(value)


def checked_calls(value: Any) -> list[dict]:
    """A JSON value as a list of calls: objects with "name" and "arguments", each of any type.

    More keys do no harm, and a single object stands for a list of one. Raises UnreadableCalls.
    """
    if isinstance(value, dict):
        value = [value]
    if value == "":
        value = []  # the released loop over a string's characters finds nothing wrong with an empty one
    if not isinstance(value, list):
        raise UnreadableCalls("bad_format", f"{kind_of(value)} instead of a list of calls")
    for number, item in enumerate(value, start=1):
        if not isinstance(item, dict):
            raise UnreadableCalls("bad_format", f"call {number} is {kind_of(item)}, not an object")
        for key in ("name", "arguments"):
            if key not in item:
                raise UnreadableCalls("bad_format", f'call {number} has no "{key}"')
    return value


def _well_typed(calls: list[dict]) -> bool:
    return all(isinstance(call["name"], str) and isinstance(call["arguments"], dict) for call in calls)


def without_stop_token(text: str) -> str:
    """`text` without the stop token at its end, if there is one."""
    return next((text.removesuffix(token) for token in STOP_TOKENS if text.endswith(token)), text)


def _has_strict_layout(text: str) -> bool:
    """Whether `text` is a think block, then a call block, and besides only whitespace and a stop token."""
    if ASSISTANT_MARKER in text:
        return False
    text = without_stop_token(text.strip()).strip()
    if any(text.count(tag) != 1 for tag in (THINK_OPEN, THINK_CLOSE, CALL_OPEN, CALL_CLOSE)):
        return False
    after_thought = text.find(THINK_CLOSE) + len(THINK_CLOSE)
    between = text[after_thought : text.find(CALL_OPEN)]
    return text.startswith(THINK_OPEN) and text.endswith(CALL_CLOSE) and not between.strip()


def drop_long(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    max_prompt_tokens: int,
    messages: Callable[[Example], list[dict]] = build_messages,
    where: str = "",
) -> tuple[list[Example], int]:
    """(examples whose rendered prompt has at most `max_prompt_tokens` tokens, number of the others).

    Raises UserError, naming `where` and the example, where the chat template refuses it.
    """
    kept = []
    for example in tqdm(examples, desc="prompt lengths", unit="prompt", disable=None):
        asked = messages(example)
        try:
            prompt = tokenizer.render(asked, add_generation_prompt=True)
        except UserError as error:
            raise UserError(f"{where + ', ' if where else ''}example {shown(example.id)}: {error}") from error
        short = len(prompt.encode()) <= max_prompt_tokens  # a token is a byte at least: no need to count
        if short or len(tokenizer.encode(prompt)) <= max_prompt_tokens:
            kept.append(example)
    return kept, len(examples) - len(kept)
