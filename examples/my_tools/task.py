"""Own tools: they stand in tools.json beside this file, and a row of data is {"request": text, "calls": [...]}."""

import json
from pathlib import Path

from tooln1.data import Example
from tooln1.io.jsonl import read_rows
from tooln1.prompt import XLAM_SYSTEM, format_reply
from tooln1.rewards import REWARDS

TOOLS = json.loads(Path(__file__).with_name("tools.json").read_text())


def read(path: str) -> list[Example]:
    return [
        Example(
            id=where,
            source="own",
            system=XLAM_SYSTEM,
            tools=TOOLS,
            messages=[{"role": "user", "content": row["request"]}],
            answer=row["calls"],
            reply=format_reply(row["calls"], "The tools fit."),  # for --mode sft
        )
        for where, row in read_rows(path)
    ]


def reward(reply: str, example: Example) -> float:
    return REWARDS["binary"](reply, example.answer)
