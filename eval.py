"""Evaluate a model, or a file of its replies, on benchmarks.

    python eval.py --bench bfcl=DIR acebench=DIR api_bank=DIR --model DIR --out DIR
    torchrun --standalone --nproc-per-node 8 eval.py --bench ... --model DIR --base-model DIR --out DIR
    python eval.py --bench examples=heldout.jsonl --predictions replies.jsonl --out DIR      # no model needed

The --out folder then holds predictions.jsonl (written as replies come: after a kill the same command goes on
from there), settings.json (what they were made with), results.json and failures.jsonl; base/ holds the same of
--base-model, made with the same settings.
Exit code 0: scored; 1: scored, but not as the whole benchmark is: categories are missing, or cases without a usable
prediction count as wrong; 2: a mistake to mend.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing.errors import record

from tooln1.benchmarks import NAMES, bfcl
from tooln1.benchmarks.runner import (
    CHANGED,
    MAKE_THE_SCORE_WRONG,
    MOST_SAMPLES,
    WORDINGS,
    Bench,
    GenerationConfig,
    Key,
    Prediction,
    Predictions,
    failures,
    generate_predictions,
    load_benches,
    match_predictions,
    problems,
    score_bench,
    summarise,
)
from tooln1.benchmarks.table import comparison, footnotes, note_lines, problem_lines, table
from tooln1.distributed import World, launch
from tooln1.io.errors import UserError, exit_on_user_error
from tooln1.io.files import atomic_write, check_writable
from tooln1.io.jsonl import read_rows
from tooln1.model import Transformer, load_model, read_config
from tooln1.run.checks import stop_ids
from tooln1.run.metrics import JsonlLog, read_jsonl, to_json
from tooln1.sampler.sampler import Sampler
from tooln1.tokenizer import TOKENIZER_FILES, load_tokenizer

NOT_COMPARED = ("model", "data")  # paths may move; what lies there is compared by its fingerprint
PREDICTIONS, PARTS = "predictions.jsonl", "predictions.rank*.jsonl"  # parts: of other ranks, until the end of a run


def evaluate(options: argparse.Namespace, world: World) -> int:
    """Generate what is missing (or read --predictions), score, write, print; returns the exit code."""
    if options.export_bfcl:
        check_writable(options.export_bfcl, "--export-bfcl")
    benches = load_benches(options.bench, options.limit, options.bfcl_changed)
    if options.export_bfcl and "bfcl" not in [bench.name for bench in benches]:
        raise UserError("--export-bfcl writes the replies to bfcl, which --bench does not name.")
    out = check_writable(options.out, "--out")
    runs = {out: ("ours", options.predictions or options.model)}
    if options.base_model:
        runs[out / "base"] = ("base", options.base_model)
    for _, source in [] if options.predictions else runs.values():
        check_model(source, benches, generation_config(options))  # all of them, before the first one is asked
    results, wrong = {}, False
    for folder, (role, source) in runs.items():
        if options.predictions:
            predictions, settings = from_file(options, benches, folder)
        else:
            predictions, settings = generate(options, world, benches, source, folder)
        if world.is_main:
            result = write_results(benches, predictions, settings, folder)
            results[f"{role}: {'/'.join(Path(source).parts[-2:])}"] = result
            wrong |= any(result["problems"][kind] for kind in MAKE_THE_SCORE_WRONG)
            if role == "ours" and options.export_bfcl:
                export_bfcl(benches, predictions, options.export_bfcl)
    if world.is_main:
        print_results(benches, results)
        for folder, result in zip(runs, results.values(), strict=True):
            print(f"written: {folder / 'results.json'}, {folder / 'failures.jsonl'}")
            for line in problem_lines(options.predictions or str(folder / PREDICTIONS), result["problems"]):
                print(line, file=sys.stderr)
    return int(wrong)


def check_model(source: str, benches: Sequence[Bench], generation: GenerationConfig) -> None:
    """Raise UserError where config.json, the tokenizer or its template are not fit to ask a model with."""
    config, tokenizer = read_config(source), load_tokenizer(source)
    for finding in stop_ids(tokenizer, config.vocab_size):
        if finding.level == "error":
            raise UserError(f"{source}: {finding.text}")
    for bench in benches:
        tokenizer.render(generation.messages(bench.chosen[0]), add_generation_prompt=True)


def generation_config(options: argparse.Namespace) -> GenerationConfig:
    """How the options want models to be asked."""
    return GenerationConfig(**{name: getattr(options, name) for name in GenerationConfig.__dataclass_fields__})


def from_file(options: argparse.Namespace, benches: Sequence[Bench], out: Path) -> tuple[Predictions, dict]:
    """(the predictions in the file --predictions, what is known of how they were made)."""
    predictions = match_predictions(read_rows(options.predictions), benches)
    own = out / PREDICTIONS
    if own.exists() and not own.samefile(options.predictions):
        raise UserError(f"{out} holds other predictions; choose another --out for {options.predictions}.")
    if options.export_bfcl and predictions.samples > 1:
        raise UserError(f"--export-bfcl takes one reply a case; {options.predictions} has {predictions.samples}.")
    settings = {"predictions": options.predictions, "think": options.think, "samples": predictions.samples}
    return predictions, settings


def write_results(benches: Sequence[Bench], predictions: Predictions, settings: dict, out: Path) -> dict:
    """Score; write results.json and failures.jsonl into `out`; returns what results.json holds."""
    scored = {bench.name: score_bench(bench, predictions, settings["samples"], settings["think"]) for bench in benches}
    found = problems(benches, predictions, scored)
    whole = all(len(bench.chosen) == len(bench.cases) for bench in benches)
    results = {
        "complete": whole and not any(found[kind] for kind in MAKE_THE_SCORE_WRONG),  # of all cases of all benchmarks
        "settings": settings,
        "problems": found,
        "benchmarks": {
            bench.name: summarise(bench, scored[bench.name]) | {"notes": footnotes(bench)} for bench in benches
        },
    }
    with atomic_write(out / "failures.jsonl") as file:
        for bench in benches:
            file.writelines(to_json(row) + "\n" for row in failures(bench, scored[bench.name]))
    with atomic_write(out / "results.json") as file:
        file.write(json.dumps(results, indent=2) + "\n")
    return results


def print_results(benches: Sequence[Bench], results: dict[str, dict]) -> None:
    """Each benchmark's figures in detail for the first of the models, then side by side with the others and the paper.

    results: label -> what `write_results` returned.
    """
    for bench in benches:
        by_model = {label: result["benchmarks"][bench.name] for label, result in results.items()}
        first = next(iter(by_model.values()))
        parts = [table(bench.name, first), comparison(bench.name, by_model), note_lines(first["notes"])]
        print("\n\n".join(filter(None, parts)), end="\n\n")


def export_bfcl(benches: Sequence[Bench], predictions: Predictions, directory: str) -> None:
    """Write the replies to BFCL for the official `bfcl evaluate`; what counts as wrong without a look is left out."""
    (chosen,) = (bench.chosen for bench in benches if bench.name == "bfcl")
    replies = {
        case_id: prediction.completion
        for (name, case_id, sample), prediction in predictions.found.items()
        if name == "bfcl" and prediction.asked and (name, case_id, sample) not in predictions.conflicting
    }
    folder = Path(directory).resolve()  # bfcl-eval takes other paths from its own folder
    files = bfcl.export(replies, chosen, folder)
    left_out = sum(case.id not in replies for case in chosen)
    part = " --partial-eval" if left_out else ""
    print(f"{len(files)} files for bfcl-eval, {left_out} cases left out. To score them:")
    print(f"bfcl evaluate --result-dir {folder} --model {bfcl.OFFICIAL_MODEL}{part}\n")


# ------------------------------------------------------------------------------------------------- generating


def generate(
    options: argparse.Namespace, world: World, benches: Sequence[Bench], source: str, out: Path
) -> tuple[Predictions, dict]:
    """(a model's predictions, the settings they are made with); those already in `out` are kept, the others made.

    Every rank writes its own down as they come; in the end they all stand in predictions.jsonl.
    """
    if world.device.type == "cuda":  # what is left of a model before
        gc.collect()
        torch.cuda.empty_cache()
    generation = generation_config(options)
    dtype = torch.bfloat16 if world.device.type == "cuda" else torch.float32  # as train.py samples
    tokenizer = load_tokenizer(source)
    model = load_model(source, dtype, world.device, tokenizer.vocab_size)
    settings = {
        "model": source,
        "data": {bench.name: bench.path for bench in benches},
        "model_fingerprint": model_fingerprint(model),
        "context": model.config.raw.get("max_position_embeddings"),
        "dtype": str(dtype).removeprefix("torch."),
        **asdict(generation),
        **{f"prompts_of_{bench.name}": prompts_fingerprint(bench, generation) for bench in benches},
    }
    predictions = resume(out, settings, benches, world)
    log = JsonlLog(out / (PREDICTIONS if world.is_main else PARTS.replace("*", str(world.rank))))

    def keep(key: Key, prediction: Prediction) -> None:
        log.append(dict(zip(("bench", "id", "sample"), key, strict=True)) | asdict(prediction))

    sampler = Sampler(model, tokenizer.stop_ids, options.rows or (512 if world.device.type == "cuda" else 64))
    for bench in benches:
        predictions.found.update(
            generate_predictions(bench, sampler, tokenizer, world, generation, predictions.found, keep)
        )
    log.close()
    world.barrier()
    if world.is_main:
        gather_parts(out)
    return predictions, settings


def resume(out: Path, settings: dict, benches: Sequence[Bench], world: World) -> Predictions:
    """The predictions in `out`, which must have been made with the same settings; afterwards ranks may write there."""
    check_same_settings(out, settings)
    world.barrier()  # nobody writes while another still looks
    file = out / PREDICTIONS
    if world.is_main:
        with atomic_write(out / "settings.json") as settings_file:
            settings_file.write(json.dumps(settings, indent=2) + "\n")
        gather_parts(out)
    world.barrier()
    if not (out / "settings.json").exists():
        raise UserError(f"{out}: not seen by rank {world.rank}; --out must be on storage that all nodes share.")
    rows = enumerate(read_jsonl(file) if file.exists() else [], start=1)
    predictions = match_predictions(((f"{file}, line {number}", row) for number, row in rows), benches)
    world.barrier()  # all ranks have come to the same plan
    return predictions


def gather_parts(out: Path) -> None:
    """Move what other ranks wrote to predictions.jsonl; a kill in between neither loses nor repeats a line."""
    parts = sorted(out.glob(PARTS))
    if not parts:
        return
    log = JsonlLog(out / PREDICTIONS)
    there = {to_json(row) for row in read_jsonl(log.path)}
    for part in parts:
        for row in read_jsonl(part):
            if to_json(row) not in there:
                log.append(row)
    log.close()
    for part in parts:
        part.unlink()


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
        if (out / PREDICTIONS).exists():
            raise UserError(f"{out} holds predictions, but no settings.json beside them. {way_out}") from None
        return
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(f"{out / 'settings.json'} cannot be read ({error}). {way_out}") from error
    if changed:
        raise UserError(f"{out} holds predictions made with other settings: {'; '.join(changed)}. {way_out}")


def prompts_fingerprint(bench: Bench, generation: GenerationConfig) -> str:
    """A hash of the ids of all cases and of what the model is asked in each."""
    return _hash(json.dumps([(case.id, generation.messages(case)) for case in bench.cases]).encode())


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


def _between(kind: type, least: float, most: float = 10**9):
    def number(text: str):
        value = kind(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"must be at least {least} and at most {most}, not {text}")
        return value

    number.__name__ = kind.__name__  # for argparse's own message about text that is no number
    return number


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    generation, count = GenerationConfig(), _between(int, 1)

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "--bench",
        nargs="+",
        action="extend",
        required=True,
        metavar="NAME=PATH",
        help=f"benchmarks and their data: {', '.join(NAMES)}",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="Hugging Face folder or hub id")
    source.add_argument("--predictions", metavar="FILE", help='score these: JSON lines {"id", "completion"}')
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the results")
    parser.add_argument("--limit", type=count, metavar="N", help="only the first N cases of each")
    parser.add_argument(
        "--bfcl-changed",
        choices=CHANGED,
        default=CHANGED[0],
        help="BFCL's entries that changed after the paper's date: count them (all), not, or only them",
    )
    parser.add_argument(
        "--no-think", dest="think", action="store_false", help="neither ask for reasoning nor look for it"
    )
    parser.add_argument("--export-bfcl", metavar="DIR", help="write the replies to BFCL for the official bfcl evaluate")
    made = parser.add_argument_group("how replies are made (with --model)")
    choices = [
        made.add_argument("--base-model", metavar="MODEL", help="ask this one the same, and print its row beside"),
        made.add_argument(
            "--prompt",
            choices=tuple(WORDINGS),
            default=generation.prompt,
            help="wording: that of training (default), or of the released BFCL handler",
        ),
        made.add_argument(
            "--max-reply-tokens",
            type=count,
            default=generation.max_reply_tokens,
            metavar="N",
            help="a longer reply is cut off there (%(default)s)",
        ),
        made.add_argument(
            "--temperature", type=_between(float, 0), default=generation.temperature, help="0: greedy (default)"
        ),
        made.add_argument(
            "--samples",
            type=_between(int, 1, MOST_SAMPLES),
            default=generation.samples,
            metavar="N",
            help="replies to each case, for mean and spread; needs a temperature (%(default)s)",
        ),
        made.add_argument(
            "--seed", type=_between(int, 0, 2**63 - 1), default=generation.seed, help="of the sampling (%(default)s)"
        ),
        made.add_argument(
            "--rows", type=count, metavar="N", help="most replies in flight in each process (on CUDA 512, else 64)"
        ),
        made.add_argument(
            "--threads", type=_between(int, 1, 4096), metavar="N", help="CPU threads of a process (torch's choice)"
        ),
    ]
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one")

    options = parser.parse_args(argv)
    if options.predictions:
        for choice in choices:
            if getattr(options, choice.dest) != choice.default:
                parser.error(f"{choice.option_strings[0]} is of no use: with --predictions no reply is made")
    if options.samples > 1 and options.temperature == 0:
        parser.error("--samples needs a --temperature above 0: greedy replies are all alike")
    if options.samples > 1 and options.export_bfcl:
        parser.error("--export-bfcl takes one reply a case, not --samples")
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
    record(exit_on_user_error)(main)
