"""Distillation with rejection: a teacher answers the training prompts, and the right replies are kept to imitate.

    python -m tooln1.prepare.distill --examples data/tool_n1_toolace/train.jsonl --source toolace_single_turn \\
        --endpoint https://api.deepseek.com/v1 --teacher-model deepseek-reasoner --out data/distilled

Writes traces.jsonl for mode sft (paper, Table 3), report.json, and progress.jsonl, a line for each example: after a
kill the same command goes on from there. The key of an endpoint is read from OPENAI_API_KEY and written nowhere.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from multiprocessing.pool import ThreadPool
from pathlib import Path

from tqdm import tqdm

from tooln1.benchmarks.examples import cases_of
from tooln1.benchmarks.runner import GenerationConfig, generate_predictions, held_out_benchmark
from tooln1.data import Example, fingerprint, is_storable, read_examples, write_examples
from tooln1.distributed import launch
from tooln1.io import weights
from tooln1.io.errors import UserError, exit_on_user_error
from tooln1.io.files import atomic_write, check_writable
from tooln1.io.jsonl import parse_json, read_text
from tooln1.model import model_files
from tooln1.prompt import THINK_CLOSE, THINK_OPEN, build_messages, without_stop_token
from tooln1.rewards import fault_of
from tooln1.run.kernels import load_sampler

ATTEMPTS, TIMEOUT = 8, 900  # requests for one reply, with pauses of 1, 2, 4 ... seconds; seconds that one may take


def distill(options: argparse.Namespace) -> dict:
    """Complete progress.jsonl, then write traces.jsonl and report.json; returns the report."""
    out = check_writable(options.out, "--out")
    examples = [example for example in read_examples(options.examples) if options.source in ("", example.source)]
    if not examples:
        raise UserError(f"{options.examples} has no example of the source {options.source!r}; name another --source.")
    names = ("max_reply_tokens", "temperature", "samples", "seed")
    generation = GenerationConfig(**{name: getattr(options, name) for name in names})
    teacher = options.teacher_model or weights.fingerprint(model_files(options.model))
    settings = {"teacher": teacher, "examples": fingerprint(examples)} | asdict(generation)
    done = resume(out / "progress.jsonl", settings)
    left = [example for example in examples if example.id not in done]
    outcomes = ask_endpoint(left, options) if options.endpoint else ask_model(examples, left, options.model, generation)
    with open(out / "progress.jsonl", "a", encoding="utf-8") as file:
        for outcome in outcomes:
            file.write(json.dumps(outcome) + "\n")
            file.flush()
            done[outcome["id"]] = outcome
    kept = [replace(example, reply=reply) for example in examples if (reply := done[example.id]["reply"])]
    faults = Counter(done[example.id]["fault"] for example in examples)
    report = {"asked": len(examples), "kept": faults.pop("none", 0), "share_kept": len(kept) / len(examples)}
    report |= {"rejected": dict(faults.most_common()), "settings": settings, "options": vars(options)}
    write_examples(kept, out / "traces.jsonl")
    with atomic_write(out / "report.json") as file:
        file.write(json.dumps(report, indent=2) + "\n")
    return report


def resume(file: Path, settings: dict) -> dict[str, dict]:
    """The outcomes in a progress file, by id; its first line are its settings. UserError where these are others."""
    lines = read_text(file).split("\n")[:-1] if file.exists() else []  # behind the last "\n": torn by a kill
    before, *outcomes = [parse_json(line, str(file)) for line in lines] or [settings]
    if changed := [name for name in settings if settings[name] != before.get(name)]:
        was = ", ".join(f"{name} was {before.get(name)!r} and is {settings[name]!r}" for name in changed)
        raise UserError(f"{file} has other settings: {was}. Choose another --out, or remove the file to start again.")
    with atomic_write(file) as opened:
        opened.writelines(json.dumps(row) + "\n" for row in (before, *outcomes))
    return {outcome["id"]: outcome for outcome in outcomes}


def first_right(example: Example, replies: Iterable[str | None]) -> dict:
    """{"id", "reply", "fault"}: the first reply with the binary reward 1, else None and what is wrong with the last.

    fault: as in `rewards.Fault`, or "no_reply" for None and for text that UTF-8 cannot hold.
    """
    for reply in replies:
        if reply and THINK_CLOSE in reply and THINK_OPEN not in reply:
            reply = THINK_OPEN + reply  # which the teacher's chat template wrote
        fault = fault_of(reply, example.answer) if reply is not None and is_storable(reply) else "no_reply"
        if fault == "none":
            return {"id": example.id, "reply": reply, "fault": fault}
    return {"id": example.id, "reply": None, "fault": fault}


def ask_model(
    examples: Sequence[Example], left: Sequence[Example], model: str, generation: GenerationConfig
) -> Iterator[dict]:
    """The outcomes of the examples that are `left`, by a model on this machine, in one process."""
    benchmark = replace(held_out_benchmark("", examples), chosen=cases_of(left))
    by_id = {example.id: example for example in left}
    with launch() as world:
        tokenizer, sampler = load_sampler(model, world)
        chunk = 4 * sampler.max_num_seqs
        for found in generate_predictions(benchmark, sampler, tokenizer, world, generation, chunk_replies=chunk):
            for name in dict.fromkeys(name for _, name, _ in found):
                predictions = [found["heldout", name, sample] for sample in range(generation.samples)]
                outcome = first_right(by_id[name], (without_stop_token(one.completion) for one in predictions))
                yield outcome | ({"fault": predictions[0].fault} if predictions[0].fault else {})  # too long a prompt


def ask_endpoint(left: Sequence[Example], options: argparse.Namespace) -> Iterator[dict]:
    """The outcomes of the examples that are `left`, as they arrive, by an OpenAI-compatible endpoint."""

    def outcome(example: Example) -> dict:
        return first_right(example, (complete(example, options) for _ in range(options.samples)))

    with ThreadPool(options.concurrency) as pool:
        yield from tqdm(pool.imap_unordered(outcome, left), "teacher", len(left), unit=" examples", disable=None)


def complete(example: Example, options: argparse.Namespace) -> str | None:
    """The endpoint's reply, its reasoning in <think>; None if the answer has none. Raises UserError as `post` does."""
    body = {"model": options.teacher_model, "messages": build_messages(example)}
    body |= {"temperature": options.temperature, "max_tokens": options.max_reply_tokens}
    answer = post(f"{options.endpoint.rstrip('/')}/chat/completions", body)
    try:
        message = json.loads(answer)["choices"][0]["message"]
        thought = message.get("reasoning_content") or message.get("reasoning")  # the names of DeepSeek and vLLM
        is_apart = thought and THINK_OPEN not in message["content"]
        return (f"{THINK_OPEN}{thought}{THINK_CLOSE} " if is_apart else "") + message["content"]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def post(url: str, body: dict) -> bytes:
    """The body of the answer. Asks again after 429, 5xx and lost connections; UserError for others, and at last."""
    key = "".join(os.environ.get("OPENAI_API_KEY", "").split())  # http.client quotes one with a line break
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    request.add_unredirected_header("Authorization", f"Bearer {key}")
    for attempt in range(ATTEMPTS):
        wait = 2**attempt
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            reason, after = f"{error.code} {error.reason}", error.headers.get("Retry-After", "")
            if error.code != 429 and error.code < 500:
                reason += ": " + " ".join(error.read().decode(errors="replace").replace(key or "\n", "...").split())
                break
            wait = int(after) if after.isdecimal() else wait
        except (OSError, http.client.HTTPException) as error:
            reason = str(error)
        time.sleep(wait)
    raise UserError(f"{url} gives no reply: {reason[:300]}. Put that right, and the same command goes on.")


def main(argv: Sequence[str] | None = None) -> None:
    """Read the options, ask the teacher, print what was kept."""
    parser = argparse.ArgumentParser(prog="python -m tooln1.prepare.distill", description=__doc__.splitlines()[0])
    add, teacher = parser.add_argument, parser.add_mutually_exclusive_group(required=True)
    add("--examples", required=True, metavar="FILE", help="JSONL as python -m tooln1.prepare writes it")
    add("--source", default="", help="only examples of this source (paper: toolace_single_turn)")
    teacher.add_argument("--endpoint", metavar="URL", help="of an OpenAI-compatible API, up to /v1")
    teacher.add_argument("--model", help="a teacher on this machine: Hugging Face directory or hub id")
    add("--teacher-model", metavar="NAME", help="the teacher's name at the endpoint")
    add("--out", required=True, metavar="DIR", help="directory for traces.jsonl, report.json and progress.jsonl")
    add(
        "--samples",
        type=int,
        default=1,
        metavar="N",
        help="replies to an example, of which the first right one is kept",
    )
    add("--temperature", type=float, default=0.6, help="of the sampling (%(default)s, as DeepSeek advises for R1)")
    add("--max-reply-tokens", type=int, default=4096, metavar="N", help="cut longer replies off (%(default)s)")
    add("--seed", type=int, default=0, help="of the sampling with --model (%(default)s)")
    add("--concurrency", type=int, default=16, metavar="N", help="requests to the endpoint at once (%(default)s)")
    options = parser.parse_args(argv)
    if bool(options.endpoint) != bool(options.teacher_model):
        parser.error("--endpoint and --teacher-model go together")
    if options.endpoint and not options.endpoint.startswith(("http://", "https://")):
        parser.error(f"--endpoint must begin with http:// or https://, found {options.endpoint}")
    if options.samples > 1 and options.temperature == 0:
        parser.error("--samples needs a --temperature above 0: greedy replies are all alike")
    report = distill(options)
    print(f"kept {report['kept']:,} of {report['asked']:,} examples ({report['share_kept']:.1%})")


if __name__ == "__main__":
    exit_on_user_error(main)
