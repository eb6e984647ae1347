"""Evaluate a model, or a file of its replies, on benchmarks.

    python eval.py --bench examples=assets/demo/heldout.jsonl --model runs/demo/hf --out runs/demo/eval
    torchrun --standalone --nproc-per-node 8 eval.py --bench ... --model DIR --out DIR
    python eval.py --bench examples=heldout.jsonl --predictions replies.jsonl --out DIR      # no model needed

The --out folder then holds predictions.jsonl (written as replies come: after a kill the same command goes on
from there), settings.json (what they were made with), results.json and failures.jsonl.
Exit code 0: scored; 1: scored, but cases without a usable prediction count as wrong; 2: a mistake to mend.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from tooln1.benchmarks import Case
from tooln1.distributed import World, launch, sample_everywhere
from tooln1.errors import UserError, atomic_write, exit_on_user_error
from tooln1.evaluation import (
    CONFLICTING,
    NO_PREDICTION,
    Bench,
    Prediction,
    Predictions,
    failures,
    load_benches,
    match_predictions,
    problem_lines,
    problems,
    score_bench,
    summarise,
    table,
)
from tooln1.jsonl import read_rows
from tooln1.metrics import JsonlLog, progress, read_jsonl, to_json
from tooln1.model import Transformer, load_model
from tooln1.prompt import build_messages
from tooln1.rollout import Sampler
from tooln1.tokenizer import TOKENIZER_FILES, Tokenizer, load_tokenizer

WORDINGS = {"train": "train", "released": "released_handler"}  # --prompt -> build_messages' name for it
NOT_COMPARED = ("model", "data")  # paths may move; what lies there is compared by its fingerprint


def evaluate(options: argparse.Namespace, world: World) -> int:
    """Generate what is missing (or read --predictions), score, print, write; returns the exit code."""
    benches = load_benches(options.bench, options.limit)
    out = Path(options.out)
    if options.predictions:
        predictions = match_predictions(read_rows(options.predictions), benches)
        own = out / "predictions.jsonl"
        if own.exists() and not own.samefile(options.predictions):
            raise UserError(f"{out} holds other predictions; choose another --out for {options.predictions}.")
        settings, samples = {"predictions": options.predictions, "think": options.think}, predictions.samples
    else:
        predictions, settings = generate(options, world, benches, out)
        samples = options.samples
    if not world.main:
        return 0
    scored = {bench.name: score_bench(bench, predictions, samples, options.think) for bench in benches}
    found = problems(predictions, scored)
    wrong = bool(found[NO_PREDICTION] or found[CONFLICTING])
    whole = all(len(bench.chosen) == len(bench.cases) for bench in benches)
    results = {
        "complete": whole and not wrong,  # the score is that of the whole benchmark
        "settings": settings,
        "problems": found,
        "benchmarks": {bench.name: summarise(bench, scored[bench.name]) for bench in benches},
    }
    with atomic_write(out / "failures.jsonl") as file:
        for bench in benches:
            file.writelines(to_json(row) + "\n" for row in failures(bench, scored[bench.name]))
    with atomic_write(out / "results.json") as file:
        file.write(json.dumps(results, indent=2) + "\n")
    print("\n\n".join(table(name, result) for name, result in results["benchmarks"].items()))
    print(f"\nwritten: {out / 'results.json'}, {out / 'failures.jsonl'}")
    for line in problem_lines(options.predictions or str(out / "predictions.jsonl"), found):
        print(line, file=sys.stderr)
    return int(wrong)


# ------------------------------------------------------------------------------------------------- generating


def generate(
    options: argparse.Namespace, world: World, benches: Sequence[Bench], out: Path
) -> tuple[Predictions, dict]:
    """(all predictions, the settings they are made with); those already in `out` are kept, the others made.

    Every rank reads the same file and comes to the same plan; the first one writes.
    """
    wording = WORDINGS[options.prompt]
    messages = {
        bench.name: [build_messages(case.example, options.think, wording=wording) for case in bench.cases]
        for bench in benches
    }
    dtype = torch.bfloat16 if world.device.type == "cuda" else torch.float32  # as train.py samples
    tokenizer = load_tokenizer(options.model)
    model = load_model(options.model, dtype, world.device, tokenizer.vocab_size)
    settings = {
        "model": options.model, "data": {bench.name: bench.path for bench in benches},
        "model_fingerprint": model_fingerprint(model), "dtype": str(dtype).removeprefix("torch."),
        "prompt": options.prompt, "think": options.think, "max_reply_tokens": options.max_reply_tokens,
        "temperature": options.temperature, "samples": options.samples, "seed": options.seed,
        **{f"prompts_of_{bench.name}": prompts_fingerprint(bench, messages[bench.name]) for bench in benches},
    }  # fmt: skip
    file = out / "predictions.jsonl"
    check_same_settings(out, settings)
    rows = enumerate(read_jsonl(file) if file.exists() else [], start=1)
    predictions = match_predictions(((f"{file}, line {number}", row) for number, row in rows), benches)
    world.wait()  # nobody writes while another still reads
    log = None
    if world.main:
        with atomic_write(out / "settings.json") as settings_file:
            settings_file.write(json.dumps(settings, indent=2) + "\n")
        log = JsonlLog(file)
    sampler = Sampler(model, tokenizer.stop_ids, options.rows)
    for bench in benches:
        prompts = [
            tokenizer.encode(tokenizer.render(turns, add_generation_prompt=True))
            for turns in messages[bench.name][: options.limit]
        ]
        answer(bench, prompts, predictions, log, sampler, tokenizer, options, world)
    if log:
        log.close()
    return predictions, settings


def answer(
    bench: Bench, prompts: Sequence[list[int]], predictions: Predictions, log: JsonlLog | None,
    sampler: Sampler, tokenizer: Tokenizer, options: argparse.Namespace, world: World,
) -> None:  # fmt: skip
    """Add to `predictions`, and to `log`, replies to the chosen cases that still lack one, batch by batch."""

    def is_right(case: Case, completion: str) -> bool:
        return bench.rules.score(case, completion, options.think).ok

    found, cases, samples = predictions.found, bench.chosen, options.samples
    keys = [[(bench.name, case.id, sample) for sample in range(samples)] for case in cases]
    # Prompts of like length share a batch, the longest first: if memory is short, that shows at once.
    longest_first = sorted(range(len(cases)), key=lambda i: -len(prompts[i]))
    missing = [i for i in longest_first if any(key not in found for key in keys[i])]
    present = set(range(len(cases))).difference(missing)
    right = sum(is_right(cases[i], found[key].completion) for i in present for key in keys[i])
    replies = len(present) * samples
    batch_size = max(1, options.rows // samples) * world.size if options.rows else len(cases)
    with progress(len(cases) * samples, bench.name, "replies", world.main) as bar:
        bar.update(replies)
        for start in range(0, len(missing), batch_size):
            batch = missing[start : start + batch_size]
            rollouts = sample_everywhere(
                sampler, world, [prompts[i] for i in batch], keys=batch, group_size=samples,
                temperature=options.temperature, max_new_tokens=options.max_reply_tokens, seed=options.seed,
                on_finished=bar.update,
            )  # fmt: skip
            for rollout in rollouts:
                case, key = cases[batch[rollout.group]], keys[batch[rollout.group]][rollout.sample]
                prediction = Prediction(tokenizer.decode(rollout.reply), rollout.finished)
                right += is_right(case, prediction.completion)
                if key in found:  # the kill came between two samples of a case
                    continue
                found[key] = prediction
                if log:
                    log.append(dict(zip(("bench", "id", "sample"), key, strict=True)) | vars(prediction))
            replies += len(rollouts)
            bar.n = replies  # of all ranks; until here it counted this one's
            bar.set_postfix_str(f"accuracy {right / replies:.3f}")


def check_same_settings(out: Path, settings: dict) -> None:
    """Raise UserError where `out` holds predictions made with other settings, or with unknown ones."""
    way_out = f"Choose another --out, or remove {out} to begin anew."
    try:
        before = json.loads((out / "settings.json").read_text(encoding="utf-8"))
        changed = [
            f"{name} was {before.get(name)!r} and is {settings.get(name)!r}"
            for name in {**before, **settings}
            if name not in NOT_COMPARED and before.get(name) != settings.get(name)
        ]
    except FileNotFoundError:
        if (out / "predictions.jsonl").exists():
            raise UserError(f"{out} holds predictions, but no settings.json beside them. {way_out}") from None
        return
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{out / 'settings.json'} cannot be read ({error}). {way_out}") from error
    if changed:
        raise UserError(f"{out} holds predictions made with other settings: {'; '.join(changed)}. {way_out}")


def prompts_fingerprint(bench: Bench, messages: list[list[dict]]) -> str:
    """A hash of the ids of all cases and of what the model is asked in each."""
    ids = [case.id for case in bench.cases]
    return _hash(json.dumps([ids, messages]).encode())


def model_fingerprint(model: Transformer) -> str:
    """A hash of some weights of every tensor and of the tokenizer's files, to tell models apart."""
    parts = []
    for name, weight in model.named_parameters():
        flat = weight.detach().flatten()
        some = flat[:: max(1, len(flat) // 256)].float().cpu()
        parts += [name.encode(), some.numpy().tobytes()]
    files = [Path(model.source) / name for name in TOKENIZER_FILES]
    return _hash(*parts, *(file.read_bytes() for file in files if file.exists()))


def _hash(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


# ----------------------------------------------------------------------------------------------- command line


def _at_least(kind: type, least: float):
    def number(text: str):
        value = kind(text)
        if not least <= value < 2**63:
            raise argparse.ArgumentTypeError(f"must be at least {least}, not {text}")
        return value

    number.__name__ = kind.__name__  # for argparse's own message about text that is no number
    return number


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--bench", nargs="+", required=True, metavar="NAME=PATH",
                        help="benchmarks and their data: examples=FILE.jsonl")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="Hugging Face folder or hub id")
    source.add_argument("--predictions", metavar="FILE", help='score these: JSON lines {"id", "completion"}')
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the results")
    parser.add_argument("--limit", type=_at_least(int, 1), metavar="N", help="only the first N cases of each")
    parser.add_argument("--no-think", dest="think", action="store_false",
                        help="neither ask for reasoning nor look for it")
    made = parser.add_argument_group("how replies are made (with --model)")
    choices = [
        made.add_argument("--prompt", choices=tuple(WORDINGS), default="train",
                          help="wording: that of training (default), or of the released BFCL handler"),
        made.add_argument("--max-reply-tokens", type=_at_least(int, 1), default=4096, metavar="N",
                          help="a longer reply is cut off there (4096)"),
        made.add_argument("--temperature", type=_at_least(float, 0), default=0.0, help="0: greedy (default)"),
        made.add_argument("--samples", type=_at_least(int, 1), default=1, metavar="N",
                          help="replies to each case, for mean and spread; needs a temperature (1)"),
        made.add_argument("--seed", type=_at_least(int, 0), default=0, help="of the sampling (0)"),
        made.add_argument("--rows", type=_at_least(int, 0), default=64, metavar="N",
                          help="replies in flight in each process (64); 0: all, saved at the end"),
        made.add_argument("--threads", type=_at_least(int, 1), metavar="N",
                          help="CPU threads of a process (torch's choice)"),
    ]  # fmt: skip
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto",
                        help="auto: a GPU if there is one")  # fmt: skip
    options = parser.parse_args(argv)
    if options.predictions:
        for choice in choices:
            if getattr(options, choice.dest) != choice.default:
                parser.error(f"{choice.option_strings[0]} is of no use: with --predictions no reply is made")
    if options.samples > 1 and options.temperature == 0:
        parser.error("--samples needs a --temperature above 0: greedy replies are all alike")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Read the options, join the other processes, evaluate."""
    options = parse(argv)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    if options.threads:
        torch.set_num_threads(options.threads)
    with launch(options.device) as world:
        code = evaluate(options, world)
    if code:
        sys.exit(code)


if __name__ == "__main__":
    exit_on_user_error(main)
