"""Damaged data files, each a function of (seed, index), read and used.

    python tests/fuzz_files.py --rows 20000 --seed 0

Each file must be usable or refused by a UserError that names it. Prints counts by outcome, and whatever else was
raised with the index that reproduces it.
"""

import argparse
import copy
import json
import random
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tiny

from tooln1.benchmarks.runner import held_out_benchmark, match_predictions, score_predictions, summarise
from tooln1.data import read_examples, write_examples
from tooln1.io.errors import UserError
from tooln1.io.jsonl import read_rows
from tooln1.prepare.convert import convert_toolace, convert_xlam
from tooln1.prompt import build_messages, drop_long, format_reply
from tooln1.rewards import REWARDS
from tooln1.sft import demonstrations
from tooln1.tokenizer import Tokenizer, load_tokenizer

KINDS = ("example", "xlam", "toolace", "prediction")
VALUES = [None, True, 0, -1, 0.5, 1e308, 10**30, "", " ", "x", "1e5", "\0", "\ud83d", "\u2028", "é😀", "../x"]
VALUES += ["<|im_end|>", "{{ 1 }}", "a" * 3000, "[" * 2000, "[]", "{}", "null", [], {}, [[]], [{}], [None], [1, 2]]
VALUES += [{"": ""}, {"name": "f"}, {"name": 5, "arguments": {}}, {"name": "add", "arguments": []}, {"role": "system"}]
VALUES += [float("nan"), float("-inf"), json.loads("[" * 200 + "]" * 200)]
SIGNS = [b"\0", b"\xff", b"\xef\xbb\xbf", b"\n", b"[", b"]", b"{", b"}", b'"', b",", b"\\", b"\\ud800", b"\xed\xa0\x80"]

Case = tuple[str, Callable[[], None], Path]  # its name, what is done with the file, the file


def places(value: object) -> list[tuple]:
    """(container, key) of every node in a JSON value."""
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [(value, key) for key in keys] + [place for key in keys for place in places(value[key])]


def mutate_value(rng: random.Random, value: list) -> None:
    """Change one node in place: another value, gone, repeated, a new key beside it, a copy of another node."""
    found = places(value)
    if not found:
        return
    (holder, key), (other, name) = rng.choice(found), rng.choice(found)
    how = rng.randrange(6)
    if how < 3:
        holder[key] = copy.deepcopy(rng.choice(VALUES))
    elif how == 3:
        del holder[key]
    elif how == 4 and isinstance(holder, list):
        holder.insert(key, copy.deepcopy(holder[key]))
    elif how == 4:
        holder[rng.choice(["", "x", "reply", "id", "\ud800", "name"])] = copy.deepcopy(rng.choice(VALUES))
    else:
        holder[key] = copy.deepcopy(other[name])


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """One edit: a bit flipped; bytes removed, inserted, repeated, overwritten; the end cut off."""
    start = rng.randrange(len(data) + 1)
    end = min(len(data), start + rng.choice([1, 1, 1, 2, 5, 20, 200]))
    flipped = bytes([data[start] ^ 1 << rng.randrange(8)]) if start < len(data) else b""
    edits = (
        (flipped, start + len(flipped)),
        (b"", end),
        (rng.choice(SIGNS), start),
        (data[start:end] * rng.choice([1, 3, 50]), start),
        (rng.randbytes(end - start), end),
        (b"", len(data)),
    )
    inserted, resume = rng.choice(edits)
    return data[:start] + inserted + data[resume:]


def valid_rows(kind: str, count: int) -> list[dict]:
    examples = tiny.examples(count)
    if kind == "example":
        reply = {"reply": format_reply(examples[0].answer, "I add.")}
        return [copy.deepcopy(vars(example)) | (reply if number else {}) for number, example in enumerate(examples)]
    if kind == "prediction":
        return [{"id": e.id, "completion": format_reply(e.answer, "x"), "sample": 0} for e in examples]
    tools, answers = json.dumps(examples[0].tools), json.dumps(examples[0].answer)
    if kind == "xlam":
        return [{"query": e.messages[0]["content"], "tools": tools, "answers": answers} for e in examples]
    system = "Here is a list of functions in JSON format that you can invoke:\n" + tools + ". \nShould you"
    texts = [("user", "Add."), ("assistant", "[add(a=1, b=[2, 'x'])]"), ("tool", "[3]"), ("function_call", answers)]
    return [{"system": system, "conversations": [{"from": who, "value": text} for who, text in texts]}] * count


def mutated_rows(rng: random.Random, kind: str) -> bytes:
    rows = copy.deepcopy(valid_rows(kind, rng.randint(1, 3)))
    for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
        mutate_value(rng, rows)
    as_array, ascii_only = rng.random() < 0.4, rng.random() < 0.5
    texts = [json.dumps(row, ensure_ascii=ascii_only) for row in rows]
    text = f"[{', '.join(texts)}]" if as_array else "\n".join(texts) + "\n"
    data = rng.choice([b"", b"\xef\xbb\xbf"]) + text.encode("utf-8", "surrogatepass")
    for _ in range(rng.choice([0, 0, 0, 1, 2])):
        data = mutate_bytes(rng, data)
    return data


def use_rows(kind: str, path: Path, tokenizer: Tokenizer) -> None:
    """Read the file, and do with its rows what training and evaluation do."""
    if kind == "prediction":
        benchmark = held_out_benchmark("held out", tiny.examples(3))
        found, _ = match_predictions(read_rows(path), [benchmark])
        found = {key: prediction for key, prediction in found.items() if key[2] < 3}
        json.dumps(summarise(benchmark, score_predictions(benchmark, found, True)))
        return
    if kind == "example":
        examples = read_examples(path)
        demonstrations(examples, tokenizer, build_messages)
    else:
        examples = {"xlam": convert_xlam, "toolace": convert_toolace}[kind](path, keep_no_call=True).examples
    drop_long(examples, tokenizer, 100)
    for example in examples:
        tokenizer.encode(tokenizer.render(build_messages(example, False), add_generation_prompt=True))
        for reward in REWARDS.values():
            reward(format_reply(example.answer, "x"), example.answer)
    write_examples(examples, path.with_name("again"))
    assert not examples or read_examples(path.with_name("again")) == examples


def fuzz_rows(count: int, seed: int, folder: Path) -> Iterator[Case]:
    tokenizer = load_tokenizer(tiny.write_model(folder / "model"))
    path = folder / "rows.json"
    for index in range(count):
        rng = random.Random(f"{seed} row {index}")
        kind = rng.choice(KINDS)
        path.write_bytes(mutated_rows(rng, kind))
        yield f"{kind} row {index}", lambda kind=kind: use_rows(kind, path, tokenizer), path


def run(cases: Iterator[Case]) -> tuple[Counter, list[str]]:
    """(outcomes by kind, what was neither used nor refused with the file's name)."""
    outcomes, wrong = Counter(), []
    for name, use, path in cases:
        outcome = "accepted"
        try:
            use()
        except UserError as error:
            outcome, text = "refused", str(error)
            if str(path.parent) not in text or len(text) > 5000:
                wrong.append(f"{name}: {text[:300]}")
        except Exception:
            outcome = "failed"
            wrong.append(f"{name}:\n{traceback.format_exc()[-1500:]}")
        outcomes[f"{name.rsplit(' ', 1)[0]} {outcome}"] += 1
    return outcomes, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        outcomes, wrong = run(fuzz_rows(args.rows, args.seed, Path(folder)))
    print(f"{len(wrong)} wrong; {dict(sorted(outcomes.items()))}", *wrong[:20], sep="\n")


if __name__ == "__main__":
    main()
