"""A task that is not tool calling: sums of two numbers, rewarded where the reply is the right number.

python train.py --task examples/arithmetic.py --config examples/arithmetic_start.toml    # a brief supervised start
python train.py --task examples/arithmetic.py --config examples/arithmetic.toml          # GRPO
"""

import random

from tooln1.data import Example

SIZES = {"start": 3200, "train": 2000, "heldout": 500}


def read(path: str) -> list[Example]:
    """The examples of a split, drawn rather than read from a file; no sum is in two of them."""
    pairs = [(a, b) for a in range(100) for b in range(100)]
    random.Random(0).shuffle(pairs)
    first = sum(SIZES[name] for name in list(SIZES)[: list(SIZES).index(path)])
    return [example(path, a, b) for a, b in pairs[first : first + SIZES[path]]]


def example(split: str, a: int, b: int) -> Example:
    messages = [{"role": "user", "content": f"{a} + {b} ="}]
    reply = str(a + b) if split == "start" else None
    return Example(f"{split}-{a}-{b}", "sum", "", [], messages, [], reply, {"sum": a + b})


def messages(example: Example) -> list[dict]:
    return example.messages


def reward(reply: str, example: Example) -> float:
    return float(reply.strip() == str(example.extra["sum"]))
