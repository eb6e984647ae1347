"""Distillation with rejection: of a teacher's replies to the training prompts the right ones are kept to imitate.

    python -m tooln1.prepare.distill --examples data/tool_n1_toolace/train.jsonl --source toolace_single_turn \\
        --endpoint https://api.deepseek.com/v1 --teacher-model deepseek-reasoner --out data/distilled
    python eval.py --bench examples=train.jsonl --model DIR --samples 4 --temperature 1 --out runs/teacher
    python -m tooln1.prepare.distill --examples train.jsonl --predictions runs/teacher/predictions.jsonl --out DIR

Writes, in the order of the examples, traces.jsonl for SFT with reasoning (paper, Table 3), its first_half.jsonl and
second_half.jsonl, calls.jsonl (the same without the replies) and report.json. An endpoint's replies are in
predictions.jsonl, as eval.py writes them; after a kill the same command goes on from there. The key is read from
OPENAI_API_KEY and written nowhere.
"""

import argparse
import http.client
import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.pool import ThreadPool
from pathlib import Path

from tqdm import tqdm

from tooln1.data import Example, is_storable, read_examples, write_examples
from tooln1.io.errors import UserError, exit_on_user_error
from tooln1.io.files import atomic_write, check_writable
from tooln1.io.jsonl import field, read_jsonl, read_rows
from tooln1.prompt import THINK_CLOSE, THINK_OPEN, build_messages, without_stop_token
from tooln1.rewards import fault_of

ATTEMPTS, TIMEOUT = 8, 900  # requests for one reply, with pauses of 1, 2, 4 ... seconds; seconds that one may take


def distill(options: argparse.Namespace) -> dict:
    """Ask the endpoint, if there is one, for what is missing; write what is kept; returns the report."""
    out = check_writable(options.out, "--out")
    examples = [example for example in read_examples(options.examples) if options.source in ("", example.source)]
    if not examples:
        raise UserError(f"{options.examples} has no example of the source {options.source!r}; name another --source.")
    file = Path(options.predictions or out / "predictions.jsonl")
    if options.endpoint:
        ask(examples, file, options)
    replies = defaultdict(list)
    for where, row in read_rows(file):
        if row.get("finished") is not False:  # a reply that was cut off has no end to imitate
            replies[field(row, "id", str, where)].append(without_stop_token(field(row, "completion", str, where)))
    kept, faults = [], Counter()
    for example in examples:
        found = {fault_of(reply, example.answer): reply for reply in reversed(replies[example.id])}
        if "none" in found:
            kept.append(replace(example, reply=found["none"]))
        else:
            faults[next(iter(found), "no_reply")] += 1
    report = {"asked": len(examples), "kept": len(kept), "share_kept": len(kept) / len(examples)}
    report |= {"rejected": dict(faults.most_common()), "options": vars(options)}
    write_examples(kept, out / "traces.jsonl")
    write_examples([replace(example, reply=None) for example in kept], out / "calls.jsonl")
    write_examples(kept[: len(kept) // 2], out / "first_half.jsonl")
    write_examples(kept[len(kept) // 2 :], out / "second_half.jsonl")
    with atomic_write(out / "report.json") as opened:
        opened.write(json.dumps(report, indent=2) + "\n")
    return report


def ask(examples: Sequence[Example], file: Path, options: argparse.Namespace) -> None:
    """Append the endpoint's replies to the predictions in `file`: for each example up to a right one."""
    before = read_jsonl(file) if file.exists() else []  # without a line that a kill tore
    teacher = f"{options.teacher_model} at temperature {options.temperature:g}"
    if others := {row["teacher"] for row in before} - {teacher}:
        raise UserError(f"{file} holds replies of {others.pop()}; choose another --out for {teacher}.")
    answers = {example.id: example.answer for example in examples}
    done = {row["id"] for row in before if fault_of(row["completion"], answers.get(row["id"], [])) == "none"}
    done |= {name for name, count in Counter(row["id"] for row in before).items() if count >= options.samples}
    left = [example for example in examples if example.id not in done]

    def answered(example: Example) -> list[dict]:
        rows = []
        for sample in range(options.samples):
            rows.append({"id": example.id, "sample": sample, "teacher": teacher})
            rows[-1]["completion"] = complete(example, options)
            if fault_of(rows[-1]["completion"], example.answer) == "none":
                break
        return rows

    with atomic_write(file) as opened:
        opened.writelines(json.dumps(row) + "\n" for row in before if row["id"] in done)
    with open(file, "a", encoding="utf-8") as opened, ThreadPool(options.concurrency) as pool:
        for rows in tqdm(pool.imap_unordered(answered, left), "teacher", len(left), unit=" examples", disable=None):
            opened.write("".join(json.dumps(row) + "\n" for row in rows))
            opened.flush()


def complete(example: Example, options: argparse.Namespace) -> str:
    """The endpoint's reply, its reasoning in <think>; "" if the answer has none. Raises UserError as `post` does."""
    body = {"model": options.teacher_model, "messages": build_messages(example)}
    body |= {"temperature": options.temperature, "max_tokens": options.max_reply_tokens}
    answer = post(f"{options.endpoint.rstrip('/')}/chat/completions", body)
    try:
        choice = json.loads(answer)["choices"][0]
        message = choice["message"]
        thought = message.get("reasoning_content") or message.get("reasoning")  # the names of DeepSeek and vLLM
        reply = message["content"]
        if thought and THINK_OPEN not in reply:
            reply = f"{THINK_OPEN}{thought}{THINK_CLOSE} {reply}"
        elif THINK_CLOSE in reply and THINK_OPEN not in reply:
            reply = THINK_OPEN + reply  # which the teacher's chat template wrote
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return ""
    return reply if is_storable(reply) and choice.get("finish_reason") != "length" else ""


def post(url: str, body: dict) -> bytes:
    """The body of the answer. Asks again after 429, 5xx and lost connections; UserError for others, and at last."""
    key = "".join(os.environ.get("OPENAI_API_KEY", "").split())  # http.client quotes one with a line break
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    request.add_unredirected_header("Authorization", f"Bearer {key}")
    wait = 0
    for attempt in range(ATTEMPTS):
        time.sleep(wait)
        wait = 2**attempt
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            reason, after = f"{error.code} {error.reason}", error.headers.get("Retry-After", "")
            if error.code != 429 and error.code < 500:
                reason += ": " + " ".join(error.read().decode(errors="replace").replace(key or "\n", "...").split())
                if error.code in (413, 422):  # too long, or refused for what it says: of this prompt alone
                    tqdm.write(f"no reply: {reason[:300]}", sys.stderr)
                    return b""
                break
            wait = min(int(after), TIMEOUT) if after.isdecimal() else wait
        except (OSError, http.client.HTTPException) as error:
            reason = str(error)
    raise UserError(f"{url} gives no reply: {reason[:300]}. Put that right, and the same command goes on.")


def main(argv: Sequence[str] | None = None) -> None:
    """Read the options, ask the teacher, print what was kept."""
    parser = argparse.ArgumentParser(prog="python -m tooln1.prepare.distill", description=__doc__.splitlines()[0])
    add, teacher = parser.add_argument, parser.add_mutually_exclusive_group(required=True)
    add("--examples", required=True, metavar="FILE", help="JSONL as python -m tooln1.prepare writes it")
    add("--source", default="", help="only examples of this source (paper: toolace_single_turn)")
    teacher.add_argument("--predictions", metavar="FILE", help="a teacher's replies, as eval.py writes them")
    teacher.add_argument("--endpoint", metavar="URL", help="of an OpenAI-compatible API, up to /v1")
    add("--teacher-model", metavar="NAME", help="the teacher's name at the endpoint")
    add("--out", required=True, metavar="DIR", help="directory for all that is written")
    add("--samples", type=int, default=1, metavar="N", help="most replies to an example; the first right one is kept")
    add("--temperature", type=float, default=0.6, help="of the sampling (%(default)s, as DeepSeek advises for R1)")
    add("--max-reply-tokens", type=int, default=4096, metavar="N", help="cut longer replies off (%(default)s)")
    add("--concurrency", type=int, default=16, metavar="N", help="requests to the endpoint at once (%(default)s)")
    options = parser.parse_args(argv)
    if bool(options.endpoint) != bool(options.teacher_model):
        parser.error("--endpoint and --teacher-model go together")
    if options.endpoint and not options.endpoint.startswith(("http://", "https://")):
        parser.error(f"--endpoint must begin with http:// or https://, found {options.endpoint}")
    report = distill(options)
    print(f"kept {report['kept']:,} of {report['asked']:,} examples ({report['share_kept']:.1%})")


if __name__ == "__main__":
    exit_on_user_error(main)
