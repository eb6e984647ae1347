"""A task that is not tool calling: add two numbers below 100. The reward is 1 if the reply is the sum, else 0.

python train.py --task examples/arithmetic.py --config examples/arithmetic_start.toml    # a brief supervised start
python train.py --task examples/arithmetic.py --config examples/arithmetic.toml          # GRPO
python eval.py --task examples/arithmetic.py --bench examples=heldout --model runs/arithmetic/hf --out runs/sums
"""

import random

from tooln1.data import Example

SIZES = {"start": 3200, "train": 2000, "heldout": 500}


def read(path: str) -> list[Example]:
    """The examples of a split, which are drawn and not read from a file; no sum is in two splits."""
    pairs = [(a, b) for a in range(100) for b in range(100)]
    random.Random(0).shuffle(pairs)
    first = sum(SIZES[name] for name in list(SIZES)[: list(SIZES).index(path)])
    return [
        Example(
            id=f"{path}-{a}-{b}",
            source="sums",
            system="",
            tools=[],
            messages=[{"role": "user", "content": f"{a} + {b} ="}],
            answer=[],
            reply=str(a + b),  # for --mode sft
            extra={"sum": a + b},
        )
        for a, b in pairs[first : first + SIZES[path]]
    ]


def messages(example: Example) -> list[dict]:
    return example.messages


def reward(reply: str, example: Example) -> float:
    return float(reply == str(example.extra["sum"]))


def metrics(reply: str, example: Example) -> dict[str, float]:
    return {"is_number": reply.isdecimal()}
