"""The demo's data: requests for calls of synthetic tools, and the replies of the teachers that its model had.

The tools are in assets/demo/tools.json. A parameter has a "kind": a key of "values", "a|b" to choose from, "2-14" a
range (with a decimal point: in tenths), or "city*" a list of two or three; it is required where it has no "default".
In a phrasing

    {city}              stands for the value, and asks for the parameter
    {breakfast:true}    becomes nothing, and asks for the parameter with this value
    [A|B]               is left out, or is one of A and B; only what is asked for is in the right call

The tools of a family are similar on purpose, so that they are confused with each other.
"""

import hashlib
import json
import random
import re
from dataclasses import replace
from pathlib import Path

from tooln1.data import Example, write_examples
from tooln1.prompt import XLAM_SYSTEM, format_reply

ASSETS = Path(__file__).resolve().parents[2] / "assets" / "demo"
_RAW = json.loads((ASSETS / "tools.json").read_text(encoding="utf-8"))
VALUES: dict[str, list[str]] = _RAW["values"]
FAMILIES: list[list[dict]] = _RAW["families"]  # a tool: {"name", "description", "parameters", "phrasings"}
TOOLS = [tool for family in FAMILIES for tool in family]

HELD_OUT_SHARE = 8  # one combination of tool and values in so many is held out
SIZES = {"copy": 32_000, "pretrain": 40_000, "warmstart": 6_400, "train": 1_280, "heldout": 500}
CANDIDATES = (2, 3, 4)  # how many tools a prompt offers
TWO_CALLS = 0.3  # share of requests that need two calls
JOINS = (" Also: ", " Then: ", " Next: ")
# The bad habits of the second teacher: how often a reply has each of them.
STRING_NUMBERS = 0.65  # writes its numbers and truth values as strings
FORGOTTEN_CALL = 0.60  # drops the second of two calls
FORGOTTEN_OPTION = 0.60  # leaves out what is optional

SLOT = re.compile(r"\{(\w+)(?::(true|false))?\}")
OPTION = re.compile(r"\[([^]]*)\]")


# ------------------------------------------------------------------------------------------------ requests


def draw_value(kind: str, rng: random.Random) -> object:
    """A value of a kind, as the module's docstring explains them."""
    if kind.endswith("*"):
        return rng.sample(VALUES[kind[:-1]], rng.randint(2, 3))
    if kind in VALUES:
        return rng.choice(VALUES[kind])
    if "|" in kind:
        return rng.choice(kind.split("|"))
    low, high = kind.split("-")
    if "." in low:
        return rng.randint(int(float(low) * 10), int(float(high) * 10)) / 10
    return rng.randint(int(low), int(high))


def spoken(value: object) -> str:
    """A value as the request says it."""
    return ", ".join(value[:-1]) + " and " + value[-1] if isinstance(value, list) else str(value)


def is_held_out(call: dict) -> bool:
    """Whether this combination of tool and values is kept for evaluation: a hash of it, the same in every file."""
    text = json.dumps(call, sort_keys=True)
    return hashlib.sha256(text.encode()).digest()[0] % HELD_OUT_SHARE == 0


def draw_call(tool: dict, rng: random.Random) -> tuple[str, dict]:
    """A request for one call of `tool`, and the call; no two arguments of it are alike."""
    while True:
        phrase = rng.choice(tool["phrasings"])
        phrase = OPTION.sub(lambda part: rng.choice(["", rng.choice(part[1].split("|"))]), phrase)
        asked = {slot[1]: slot[2] for slot in SLOT.finditer(phrase)}  # parameter -> "true", "false" or None
        arguments = {
            key: draw_value(about["kind"], rng) if asked[key] is None else asked[key] == "true"
            for key, about in tool["parameters"].items()
            if key in asked
        }
        if len(set(map(str, arguments.values()))) == len(arguments):
            words = {key: spoken(arguments[key]) if asked[key] is None else "" for key in arguments}
            request = SLOT.sub(lambda slot: words[slot[1]], phrase)  # noqa: B023
            return request, {"name": tool["name"], "arguments": arguments}


def schema(tool: dict) -> dict:
    """A tool in the style of xLAM: flat parameters, "optional" in the type, a default."""
    described = {}
    for key, about in tool["parameters"].items():
        described[key] = {"description": about["description"], "type": about["type"]}
        if "default" in about:
            described[key] |= {"type": f"{about['type']}, optional", "default": about["default"]}
    return {"name": tool["name"], "description": tool["description"], "parameters": described}


def draw_calls(count: int, held_out: bool, rng: random.Random) -> list[tuple[str, dict]]:
    """Requests for calls of `count` different tools, and the calls, all from one side of the split."""
    drawn: list[tuple[str, dict]] = []
    while len(drawn) < count:
        request, call = draw_call(rng.choice(TOOLS), rng)
        if is_held_out(call) == held_out and call["name"] not in [other["name"] for _, other in drawn]:
            drawn.append((request, call))
    return drawn


def draw_candidates(wanted: list[str], rng: random.Random) -> list[dict]:
    """The tools that a prompt offers: the wanted ones, a similar one to the first, and others, in any order."""
    family = next(family for family in FAMILIES if wanted[0] in [tool["name"] for tool in family])
    candidates = [tool for tool in TOOLS if tool["name"] in wanted]
    count = rng.choice(CANDIDATES)
    for pool in (family, TOOLS, TOOLS):
        if len(candidates) < count:
            candidates.append(rng.choice([tool for tool in pool if tool not in candidates]))
    rng.shuffle(candidates)
    return candidates


def draw_example(number: int, split: str, rng: random.Random) -> Example:
    """A request for one or two calls among a few candidate tools."""
    drawn = draw_calls(2 if rng.random() < TWO_CALLS else 1, split == "heldout", rng)
    return Example(
        id=f"demo-{split}-{number}",
        source="demo",
        system=XLAM_SYSTEM,
        tools=[schema(tool) for tool in draw_candidates([call["name"] for _, call in drawn], rng)],
        messages=[{"role": "user", "content": rng.choice(JOINS).join(request for request, _ in drawn)}],
        answer=[call for _, call in drawn],
    )


def examples_of(split: str, seed: int = 0) -> list[Example]:
    """The examples of a split of tool-calling requests, the same for the same seed on every machine."""
    rng = random.Random(f"{split} {seed}")
    return [draw_example(number, split, rng) for number in range(SIZES[split])]


# ------------------------------------------------------------------------------------------------ teachers


def reply_with(calls: list[dict]) -> str:
    """The reply that makes these calls: its thought chooses the tools, the calls spell them out."""
    return format_reply(calls, f"I call {' and '.join(call['name'] for call in calls)}.")


def with_habits(example: Example, rng: random.Random) -> list[dict]:
    """The calls as a teacher with bad habits makes them: well-formed, but often with wrong arguments."""
    strings, one_call, no_options = (
        rng.random() < share for share in (STRING_NUMBERS, FORGOTTEN_CALL, FORGOTTEN_OPTION)
    )
    optional = {
        (tool["name"], key) for tool in example.tools for key, about in tool["parameters"].items() if "default" in about
    }
    return [
        {
            "name": call["name"],
            "arguments": {
                key: value if isinstance(value, str | list) or not strings else json.dumps(value)
                for key, value in call["arguments"].items()
                if not (no_options and (call["name"], key) in optional)
            },
        }
        for call in (example.answer[:1] if one_call else example.answer)
    ]


def copying(seed: int = 0) -> list[Example]:
    """Exercises in copying, and their solutions: repeat a list of words and numbers, or look values up by name.

    Short and dense, they teach in minutes what tool calls alone do not in an hour: attention heads that find a word's
    last occurrence and continue from there.
    """
    rng = random.Random(f"copy {seed}")
    words = sorted({word for words in VALUES.values() for word in words})
    keys = sorted({key for tool in TOOLS for key in tool["parameters"]})
    examples = []
    for number in range(SIZES["copy"]):
        chosen = rng.sample(keys, rng.randint(2, 8))
        kinds = rng.choices(("word", "2-99", "1.1-99.5", "10-999"), (6, 2, 1, 1), k=len(chosen))
        values = {
            key: rng.choice(words) if kind == "word" else draw_value(kind, rng)
            for key, kind in zip(chosen, kinds, strict=True)
        }
        if rng.random() < 0.5:
            request = reply = " ".join(map(str, values.values()))
        else:
            request = ", ".join(f"{key} {value}" for key, value in values.items())
            reply = json.dumps({key: values[key] for key in rng.sample(chosen, len(chosen))})
        message = {"role": "user", "content": request}
        examples.append(Example(f"demo-copy-{number}", "demo_copy", XLAM_SYSTEM, [], [message], [], reply))
    return examples


def write_data(folder: Path, seed: int = 0) -> None:
    """All five files; the supervised ones with the reply to imitate."""
    rng = random.Random(f"habits {seed}")
    splits = {split: examples_of(split, seed) for split in ("train", "heldout")}
    splits["copy"] = copying(seed)
    splits["pretrain"] = [replace(one, reply=reply_with(one.answer)) for one in examples_of("pretrain", seed)]
    splits["warmstart"] = [
        replace(one, reply=reply_with(with_habits(one, rng))) for one in examples_of("warmstart", seed)
    ]
    for split, examples in splits.items():
        write_examples(examples, folder / f"{split}.jsonl")
