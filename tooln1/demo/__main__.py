"""The embedded demo: a synthetic tool-calling set, a small tokenizer and an untrained tiny model, all seeded.

    python -m tooln1.demo data --out DIR          pretrain.jsonl, warmstart.jsonl, train.jsonl, heldout.jsonl
    python -m tooln1.demo tokenizer --out DIR     tokenizer files, trained on that data
    python -m tooln1.demo init-model --out DIR    a random model beside its tokenizer

docs/demo.md has the whole recipe. The story is the paper's on a laptop: a model that can do the task (`pretrain`
teaches it, with right replies) picks up a bad teacher's habits (`warmstart`: numbers written as strings, the second
of two calls and what is optional forgotten), and the reward alone, which knows the truth, undoes them (`train`). No
combination of tool and values in `heldout` occurs in any other file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
from dataclasses import replace
from pathlib import Path

import tokenizers
from tokenizers import AddedToken

from tooln1.data import Example, write_examples
from tooln1.demo.tools import FAMILIES, TOOLS, VALUES
from tooln1.io.errors import UserError, exit_on_user_error
from tooln1.io.files import atomic_write, check_writable
from tooln1.io.model_config import parse_config
from tooln1.model import random_model, save_model
from tooln1.prompt import THINK_INSTRUCTION, TOOLS_SECTION, XLAM_SYSTEM, format_reply
from tooln1.tokenizer import load_tokenizer

HELD_OUT_SHARE = 8  # one combination of tool and values in so many is held out
SIZES = {"copy": 32_000, "pretrain": 40_000, "warmstart": 6_400, "train": 1_280, "heldout": 500}
CANDIDATES = (2, 3, 4)  # how many tools a prompt offers
TWO_CALLS = 0.3  # share of requests that need two calls
JOINS = (" Also: ", " Then: ", " Next: ")
# The bad teacher's habits: how often a reply has each of them.
STRING_NUMBERS = 0.65  # writes its numbers and truth values as strings
FORGOTTEN_CALL = 0.60  # drops the second of two calls
FORGOTTEN_OPTION = 0.60  # leaves out what is optional

Tool = tuple[str, str, dict, list[str]]  # as demo_tools has them

# ------------------------------------------------------------------------------------------------ requests

SLOT = re.compile(r"\{(\w+)(?::(true|false))?\}")
OPTION = re.compile(r"\[([^]]*)\]")


def draw_value(kind: str, rng: random.Random) -> object:
    """A value of a kind, as demo_tools explains them."""
    if kind.endswith("*"):
        return rng.sample(VALUES[kind[:-1]].split(), rng.randint(2, 3))
    if kind in VALUES:
        return rng.choice(VALUES[kind].split())
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


def draw_phrase(tool: Tool, rng: random.Random) -> str:
    """One of the tool's phrasings, with each [A|B] left out or decided."""
    return OPTION.sub(lambda part: rng.choice(["", rng.choice(part[1].split("|"))]), rng.choice(tool[3]))


def draw_call(tool: Tool, rng: random.Random) -> tuple[str, dict]:
    """A request for one call of `tool`, and the call; no two arguments of it are alike."""
    name, _, parameters, _ = tool
    while True:
        phrase = draw_phrase(tool, rng)
        asked = {slot[1]: slot[2] for slot in SLOT.finditer(phrase)}  # parameter -> "true", "false" or None
        arguments = {
            key: draw_value(kind, rng) if asked[key] is None else asked[key] == "true"
            for key, (_, _, kind, _) in parameters.items()
            if key in asked
        }
        if len(set(map(str, arguments.values()))) == len(arguments):
            words = {key: spoken(arguments[key]) if asked[key] is None else "" for key in arguments}
            return SLOT.sub(lambda slot: words[slot[1]], phrase), {"name": name, "arguments": arguments}  # noqa: B023


def schema(tool: Tool) -> dict:
    """A tool in the style of xLAM: flat parameters, "optional" in the type, a default."""
    name, description, parameters, _ = tool
    described = {
        key: {"description": about, "type": kind}
        if default is None
        else {"description": about, "type": f"{kind}, optional", "default": default}
        for key, (kind, about, _, default) in parameters.items()
    }
    return {"name": name, "description": description, "parameters": described}


def draw_calls(count: int, held_out: bool, rng: random.Random) -> list[tuple[str, dict]]:
    """Requests for calls of `count` different tools, and the calls, all from one side of the split."""
    drawn: list[tuple[str, dict]] = []
    while len(drawn) < count:
        request, call = draw_call(rng.choice(TOOLS), rng)
        if is_held_out(call) == held_out and call["name"] not in [other["name"] for _, other in drawn]:
            drawn.append((request, call))
    return drawn


def draw_candidates(wanted: list[str], rng: random.Random) -> list[Tool]:
    """The tools that a prompt offers: the wanted ones, a sibling of the first, and others, in any order."""
    family = next(family for family in FAMILIES if wanted[0] in [tool[0] for tool in family])
    candidates = [tool for tool in TOOLS if tool[0] in wanted]
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


# ------------------------------------------------------------------------------------------------ files


def examples_of(split: str, seed: int = 0) -> list[Example]:
    """The examples of a split of tool-calling requests, the same for the same seed on every machine."""
    rng = random.Random(f"{split} {seed}")
    return [draw_example(number, split, rng) for number in range(SIZES[split])]


def copying(seed: int = 0) -> list[Example]:
    """Exercises in copying, and their solutions: say a list of words and numbers again, or look values up by name.

    Short and dense, they bring about in minutes what tool calls alone do not in an hour: heads that find a word's
    last occurrence and go on from there.
    """
    rng = random.Random(f"copy {seed}")
    words = sorted({word for words in VALUES.values() for word in words.split()})
    keys = sorted({key for _, _, parameters, _ in TOOLS for key in parameters})
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


CHAT_TEMPLATE = (
    "{%- for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tools>", "</tools>")
# The training template says the same 350 words in every prompt. Each piece of it is one token here, so that a laptop
# spends its time on what differs.
PIECES = (
    XLAM_SYSTEM + TOOLS_SECTION[: TOOLS_SECTION.index("<tools>")],
    THINK_INSTRUCTION,
    '{"type": "function", "function": {"name": "',
    '", "description": "',
    '", "parameters": {"',
    '": {"description": "',
    '", "type": "',
    ', optional", "default": ',
    '"}, "',
    '}, "',
    '"}}}}\n',
    "}}}}\n",
    '[{"name": "',
    ', {"name": "',
    '", "arguments": {"',
)


def write_tokenizer(folder: Path, seed: int = 0, vocab_size: int = 2048) -> None:
    """A byte-level BPE tokenizer in Hugging Face layout, trained on the demo's prompts and replies.

    Words, single digits and everything between are split first, spaces standing alone, so that a word in a request
    and the same word in JSON are the same token: what the model has to learn is to copy.
    """
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    words = tokenizers.Regex("[A-Za-z_]+|[0-9]|[^A-Za-z0-9_]+")
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(words, "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    texts = [
        text
        for example in examples_of("train", seed)
        for text in (example.messages[0]["content"], reply_with(example.answer), *map(json.dumps, example.tools))
    ] + ["system\n", "user\n", "assistant\n"] * 10
    for piece in (*TAGS, *sorted(PIECES, key=len, reverse=True)):
        texts = [part for text in texts for part in text.split(piece)]
    backend.train_from_iterator(texts, trainer)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    backend.add_tokens([AddedToken(token, normalized=False) for token in (*TAGS, *PIECES)])
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / "tokenizer.json") as file:
        file.write(backend.to_str())
    settings = {
        "chat_template": CHAT_TEMPLATE,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 1024,
    }
    stops = [backend.token_to_id("<|im_end|>"), backend.token_to_id("<|endoftext|>")]
    generation = {"eos_token_id": stops, "pad_token_id": stops[1], "do_sample": True, "temperature": 1.0}
    for name, value in (("tokenizer_config.json", settings), ("generation_config.json", generation)):
        with atomic_write(folder / name) as file:
            file.write(json.dumps(value, indent=2) + "\n")


def write_model(folder: Path, tokenizer_folder: Path, seed: int = 0) -> None:
    """A random Qwen2 of about a million parameters, with the tokenizer of `tokenizer_folder` copied beside it."""
    vocab = -(-load_tokenizer(tokenizer_folder).vocab_size // 64) * 64
    raw = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "vocab_size": vocab,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "initializer_range": 0.05,
        "max_position_embeddings": 1024,
        "use_sliding_window": False,
        "attention_dropout": 0.0,
        "torch_dtype": "float32",
    }
    model = random_model(parse_config(raw), seed)
    model.source = tokenizer_folder
    save_model(model, folder)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tooln1.demo", description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("data", "tokenizer", "init-model"))
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    parser.add_argument("--tokenizer", type=Path, help="init-model: the tokenizer's folder")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not 0 <= args.seed < 2**63:
        raise UserError(f"--seed must be at least 0 and below 2**63, not {args.seed}.")
    check_writable(args.out, "--out")
    if args.what == "data":
        write_data(args.out, args.seed)
    elif args.what == "tokenizer":
        write_tokenizer(args.out, args.seed)
    elif args.tokenizer is None:
        raise UserError("init-model needs --tokenizer FOLDER.")
    else:
        write_model(args.out, args.tokenizer, args.seed)
    print(f"written: {args.out}")


if __name__ == "__main__":
    exit_on_user_error(main)
