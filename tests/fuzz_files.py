"""Hostile files, each a function of (seed, index): data rows and model directories, mutated, read and used.

    python tests/fuzz_files.py --rows 20000 --models 2000 --seed 0 [--first INDEX]

Every file must be used as any other, or be refused by a UserError; one about a row must name file and row. Prints
counts by outcome, whatever else was raised with the index that makes it again, and the worst CPU time.
"""

import argparse
import copy
import json
import os
import random
import re
import shutil
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tiny

from tooln1.benchmarks.runner import failures, held_out_benchmark, match_predictions, score_predictions, summarise
from tooln1.data import read_examples, write_examples
from tooln1.io.errors import UserError
from tooln1.io.jsonl import read_rows
from tooln1.model import load_model, sequence_logits
from tooln1.prepare.convert import convert_toolace, convert_xlam
from tooln1.prepare.split import split
from tooln1.prompt import build_messages, drop_long, format_reply
from tooln1.rewards import REWARDS
from tooln1.run.metrics import to_json
from tooln1.sft import demonstrations
from tooln1.tokenizer import Tokenizer, load_tokenizer

KINDS = ("example", "xlam", "toolace", "sft", "prediction")
WHOLE_FILE = ("holds no rows", "text after the array's closing", "leaves one side empty", "example '")


class Raw(str):
    """A piece of JSON text that json.dumps would not write; see `to_text`."""


HOSTILE = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    0.5,
    -0.0,
    1e30,
    1e308,
    10**12,
    2**31,
    2**63,
    10**30,
    -(2**63),
    "",
    " ",
    "x",
    "true",
    "1e5",
    "\0",
    "\ud83d",
    "\ude00\ud83d",
    "\u2028",
    "\x85",
    "é😀",
    "../x",
    "/etc/passwd",
    "<|im_end|>",
    "{{ 1 }}",
    "a" * 3000,
    "[" * 2000,
    "[]",
    "{}",
    "[1]",
    "null",
    [],
    {},
    [[]],
    [{}],
    [None],
    ["x"],
    [1, 2],
    {"": ""},
    {"name": "f"},
    {"name": 5, "arguments": {}},
    {"name": "add", "arguments": []},
    {"role": "system", "content": ""},
    {"from": "user"},
    Raw("NaN"),
    Raw("-Infinity"),
    Raw("1e999"),
    Raw("9" * 4301),
    Raw("9" * 4299),
    Raw("-"),
    Raw("[" * 5000),
    Raw("[" * 90 + "]" * 90),
    Raw("[" * 101 + "]" * 101),
    Raw("[" * 970 + "]" * 970),
    Raw('{"a":' * 400 + "1" + "}" * 400),
    Raw('{"a": 1, "a": [2]}'),
    Raw('"\t"'),
    Raw('"\\x"'),
    Raw("'x'"),
    Raw(""),
    Raw("1 2"),
    Raw("/**/1"),
    Raw("[1,]"),
]


SIGNS = [
    b"\0",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\n",
    b"[",
    b"]",
    b"{",
    b"}",
    b'"',
    b",",
    b"\\",
    b"\\ud800",
    b"\xed\xa0\x80",
    b"\xe2\x80\xa8",
]


def to_text(value: object, **options: object) -> str:
    """JSON text of a value in which Raw stands for itself."""
    raws: list[str] = []

    def marked(node: object) -> object:
        if isinstance(node, Raw):
            raws.append(str(node))
            return f"\x01raw{len(raws) - 1}\x01"
        if isinstance(node, dict):
            return {key: marked(item) for key, item in node.items()}
        return [marked(item) for item in node] if isinstance(node, list) else node

    text = json.dumps(marked(value), **options)
    return re.sub(r'"(?:\\u0001|\x01)raw(\d+)(?:\\u0001|\x01)"', lambda match: raws[int(match[1])], text)


def places(value: object) -> list[tuple]:
    """(container, key) of every node in a JSON value."""
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [(value, key) for key in keys] + [place for key in keys for place in places(value[key])]


def mutate_value(rng: random.Random, value: object) -> None:
    """Change one node: another value, gone, twice, renamed, deeper, or the text of JSON in it changed."""
    found = places(value)
    if not found:
        return
    holder, key = rng.choice(found)
    how = rng.randrange(8)
    if how < 4:
        holder[key] = copy.deepcopy(rng.choice(HOSTILE))
    elif how == 4:
        del holder[key]
    elif how == 5 and isinstance(holder, list):
        holder.insert(key, copy.deepcopy(holder[key]))
    elif how == 5:
        holder[rng.choice(["", "x", "reply", "id", "\ud800", "lm_head", "name"])] = copy.deepcopy(rng.choice(HOSTILE))
    elif how == 6 and isinstance(holder[key], str):
        holder[key] = mutate_bytes(rng, holder[key].encode("utf-8", "surrogatepass")).decode("latin-1")
    else:
        other, name = rng.choice(found)
        holder[key] = copy.deepcopy(other[name])


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """One edit: bytes flipped, gone, put in, repeated, cut off, moved."""
    data = bytearray(data)
    start = rng.randrange(len(data) + 1)
    end = min(len(data), start + rng.choice([1, 1, 1, 2, 5, 20, 200]))
    how = rng.randrange(7)
    if how == 0 and start < len(data):
        data[start] ^= 1 << rng.randrange(8)
    elif how == 1:
        del data[start:end]
    elif how == 2:
        data[start:start] = rng.choice([*SIGNS, rng.randbytes(9)])
    elif how == 3:
        data[start:start] = data[start:end] * rng.choice([1, 3, 50])
    elif how == 4:
        del data[start:]
    elif how == 5:
        data[start:end] = rng.randbytes(end - start)
    else:
        other = rng.randrange(len(data) + 1)
        data[other:other] = data[start:end]
    return bytes(data)


# ------------------------------------------------------------------------------------------------------- rows


def valid_rows(kind: str, count: int) -> list[dict]:
    examples = tiny.examples(count)
    if kind in ("example", "sft"):
        rows = [copy.deepcopy(vars(example)) for example in examples]
        for row in rows[1:] if kind == "sft" else ():
            row["reply"] = format_reply(row["answer"], "I add.")
        return rows
    if kind == "xlam":
        return [
            {"query": e.messages[0]["content"], "tools": json.dumps(e.tools), "answers": json.dumps(e.answer)}
            for e in examples
        ]
    if kind == "toolace":
        head = "Here is a list of functions in JSON format that you can invoke:\n"
        return [
            {
                "system": head + json.dumps(e.tools) + ". \nShould you",
                "conversations": [
                    {"from": "user", "value": e.messages[0]["content"]},
                    {"from": "assistant", "value": "[add(a=1, b=[2, 'x'])]"},
                    {"from": "tool", "value": "[3]"},
                    {"from": "function_call", "value": json.dumps(e.answer)},
                ],
            }
            for e in examples
        ]
    return [{"id": e.id, "completion": format_reply(e.answer, "x"), "sample": i % 2} for i, e in enumerate(examples)]


def mutated_file(rng: random.Random, kind: str) -> bytes:
    rows = valid_rows(kind, rng.randint(1, 3))
    for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
        mutate_value(rng, rows)
    array = rng.random() < 0.4
    options = {"ensure_ascii": rng.random() < 0.5, "indent": rng.choice([None, 1]) if array else None}
    end = rng.choice(["\n", "\r\n", "\n\n"])
    text = to_text(rows, **options) if array else end.join(to_text(row, **options) for row in rows) + end
    data = rng.choice([b"", b"", b"\xef\xbb\xbf"]) + text.encode("utf-8", "surrogatepass")
    for _ in range(rng.choice([0, 0, 0, 1, 2])):
        data = mutate_bytes(rng, data)
    return data


def use_rows(kind: str, path: Path, tokenizer: Tokenizer, rng: random.Random) -> None:
    """Read the file, and do with its rows what training and evaluation do."""
    if kind == "prediction":
        benchmark = held_out_benchmark("held out", tiny.examples(3))
        found, _ = match_predictions(read_rows(path), [benchmark])
        scored = score_predictions(benchmark, {key: found[key] for key in found if key[2] < 3}, True)
        json.dumps(summarise(benchmark, scored))
        for row in failures(benchmark, scored):
            to_json(row).encode()
        return
    if kind == "sft":
        examples = read_examples(path)
        demonstrations(examples, tokenizer, True, rng.random() < 0.5)
    elif kind == "example":
        examples = read_examples(path)
    else:
        convert = convert_xlam if kind == "xlam" else convert_toolace
        examples = convert(path, keep_no_call=rng.random() < 0.5).examples
    drop_long(examples, tokenizer, rng.choice([10, 4096]))
    for example in examples:
        tokenizer.encode(tokenizer.render(build_messages(example, False), add_generation_prompt=True))
        for reward in REWARDS.values():
            reward(format_reply(example.answer, "x"), example.answer)
    write_examples(examples, path.with_name("again"))
    assert examples == [] or read_examples(path.with_name("again")) == examples
    if len(examples) > 1:
        split(examples, 0, 0.5)


def fuzz_rows(count: int, seed: int, folder: Path, first: int = 0) -> Iterator[tuple[str, Callable[[], None], Path]]:
    """(name, what to do, the file) of each case."""
    tokenizer = load_tokenizer(tiny.write_model(folder / "model"))
    path = folder / "rows.json"
    for index in range(first, first + count):
        rng = random.Random(f"{seed} row {index}")
        kind = rng.choice(KINDS)
        path.write_bytes(mutated_file(rng, kind))
        yield f"{kind} row {index}", lambda kind=kind, rng=rng: use_rows(kind, path, tokenizer, rng), path


# ----------------------------------------------------------------------------------------------------- models


def base_models(folder: Path) -> list[dict[str, bytes]]:
    """The files of three small model directories: Qwen2 in one file, in shards with an index, LLaMA 3.1."""
    from tooln1.io import weights

    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    llama = {"model_type": "llama", "tie_word_embeddings": False, "rope_scaling": scaling}
    found = [tiny.write_model(folder / "qwen", **small), tiny.write_model(folder / "llama", **small, **llama)]
    before, weights.SHARD_BYTES = weights.SHARD_BYTES, 8_000
    try:
        found.append(tiny.write_model(folder / "shards", **small))
    finally:
        weights.SHARD_BYTES = before
    listed = [{"name": "default", "template": tiny.CHAT_TEMPLATE}, {"name": "tool_use", "template": tiny.CHAT_TEMPLATE}]
    tokens = {"eos_token": {"content": "<|im_end|>", "lstrip": False}, "bos_token": None, "chat_template": listed}
    (found[1] / "tokenizer_config.json").write_text(json.dumps(tokens))
    (found[2] / "chat_template.jinja").write_text(tiny.CHAT_TEMPLATE)
    return [{file.name: file.read_bytes() for file in model.iterdir()} for model in found]


def mutate_header(rng: random.Random, data: bytes) -> bytes:
    """A safetensors file whose header says something else."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    how = rng.randrange(6)
    if how == 0:
        return struct.pack("<Q", rng.choice([0, 1, length - 1, length + 1, 2**31, 2**63, 10**8, len(data)])) + data[8:]
    name = rng.choice([key for key in header if key != "__metadata__"])
    if how == 1:
        types = ["I8", "I64", "BOOL", "F8_E4M3", "F8_E5M2", "F16", "BF16", "F64", "F4", "C64", ""]
        header[name]["dtype"] = rng.choice(types)
    elif how == 2:
        header[name]["data_offsets"] = [rng.choice([-1, 0, 4, 2**40, 2**64]) for _ in range(2)]
    elif how == 3:
        header[rng.choice(["extra", "\0", "a" * 5000, "lm_head.weight", "x.rotary_emb.inv_freq"])] = header.pop(name)
    elif how == 4:
        header["empty"] = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    else:
        mutate_value(rng, header)
    text = to_text(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def mutate_model(rng: random.Random, files: dict[str, bytes], folder: Path, marker: Path) -> None:
    """Write the files into `folder`, one to three things about them changed."""
    files = dict(files)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        name = rng.choice(sorted(files))
        how = rng.randrange(10)
        if how == 0:
            del files[name]
            if not files:
                break
        elif how == 1:
            files[name] = mutate_bytes(rng, files[name])
        elif how in (2, 3):
            files["chat_template.jinja"] = mutate_bytes(rng, tiny.CHAT_TEMPLATE.encode())
        elif how == 4:
            bad = rng.choice(
                [
                    "../qwen/model/model.safetensors",
                    "/etc/passwd",
                    "a\0.safetensors",
                    "\ud800.safetensors",
                    "x" * 300 + ".safetensors",
                    "pytorch_model.bin",
                    "model.safetensors",
                ]
            )
            files["model.safetensors.index.json"] = json.dumps({"weight_map": {"lm_head.weight": bad}}).encode()
        elif name.endswith(".safetensors"):
            try:
                files[name] = mutate_header(rng, files[name])
            except (ValueError, RecursionError, struct.error, AttributeError, TypeError, IndexError):
                files[name] = mutate_bytes(rng, files[name])  # an earlier step has left no header
        elif name.endswith(".json"):
            try:
                value = json.loads(files[name])
                mutate_value(rng, value)
                files[name] = to_text(value).encode("utf-8", "surrogatepass")
            except (ValueError, RecursionError):  # broken, or nested deeply, by an earlier step
                continue
    bomb = b"cos\nsystem\n(S'touch " + str(marker).encode() + b"'\ntR."
    for name, data in {**files, "pytorch_model.bin": bomb}.items():
        (folder / name).write_bytes(data)
    if rng.random() < 0.08:  # something that is no file
        place = folder / rng.choice(sorted([*files, "chat_template.jinja", "model.safetensors.index.json"]))
        place.unlink(missing_ok=True)
        rng.choice(
            [
                place.mkdir,
                lambda: os.mkfifo(place),
                lambda: place.symlink_to(place.name),
                lambda: place.symlink_to("/dev/zero"),
                lambda: place.symlink_to("nowhere"),
            ]
        )()


def use_model(folder: Path, marker: Path) -> None:
    """Load the directory, and run it for one prompt."""
    tokenizer = load_tokenizer(folder)
    size, stops = tokenizer.vocab_size, tokenizer.stop_ids
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1? <|im_end|>"}]
    ids = tokenizer.encode(tokenizer.render(messages, add_generation_prompt=True))[:20] or [0]
    tokenizer.decode([*ids, *stops])
    model = load_model(folder, vocabulary=size)
    assert sequence_logits(model, ids).shape == (len(ids), size)
    assert not marker.exists(), "a pickle was opened"


def fuzz_models(count: int, seed: int, folder: Path, first: int = 0) -> Iterator[tuple[str, Callable[[], None], Path]]:
    """(name, what to do, the directory) of each case."""
    bases = base_models(folder)
    place, marker = folder / "mutated", folder / "marker"
    for index in range(first, first + count):
        rng = random.Random(f"{seed} model {index}")
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        mutate_model(rng, rng.choice(bases), place, marker)
        yield f"model {index}", lambda: use_model(place, marker), place


# ---------------------------------------------------------------------------------------------------- outcomes


def run(cases: Iterator[tuple[str, Callable[[], None], Path]]) -> tuple[Counter, list[str], tuple[float, str]]:
    """(outcomes by kind, what should not have been, the worst CPU seconds and whose they were)."""
    outcomes, wrong, worst = Counter(), [], (0.0, "")
    for name, use, path in cases:
        start = time.process_time()
        try:
            use()
            outcome = "accepted"
        except UserError as error:
            outcome, text = "refused", str(error)
            of_rows = " row " in name
            named = re.search(r", (line|row) \d+", text) or any(words in text for words in WHOLE_FILE)
            if (of_rows and not named) or len(text) > 5000 or "Traceback" in text:
                wrong.append(f"{name}: {text[:300]}")
            if of_rows and str(path.parent) not in text and "leaves one side empty" not in text:
                wrong.append(f"{name}: names no file: {text[:300]}")
        except BaseException as error:
            outcome = "failed"
            wrong.append(f"{name}: {type(error).__name__}\n{traceback.format_exc()[-1500:]}")
            if isinstance(error, KeyboardInterrupt):
                raise
        outcomes[f"{name.rsplit(' ', 1)[0]} {outcome}"] += 1
        worst = max(worst, (time.process_time() - start, name))
    return outcomes, wrong, worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=0, help="files with mutated rows")
    parser.add_argument("--models", type=int, default=0, help="mutated model directories")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="index to begin with")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for what, count, fuzz in (("rows", args.rows, fuzz_rows), ("models", args.models, fuzz_models)):
            if not count:
                continue
            outcomes, wrong, worst = run(fuzz(count, args.seed, Path(folder) / what, args.first))
            print(f"{what}: " + ", ".join(f"{name} {number}" for name, number in sorted(outcomes.items())))
            print(f"{what}: {len(wrong)} wrong; worst {worst[0]:.2f} CPU seconds ({worst[1]}, seed {args.seed})")
            print("\n".join(wrong[:20]))


if __name__ == "__main__":
    main()
