"""Evaluate a model, or a file of its replies, on benchmarks.

    python eval.py --bench bfcl=DIR acebench=DIR api_bank=DIR --model DIR --out DIR
    torchrun --standalone --nproc-per-node 8 eval.py --bench ... --model DIR --base-model DIR --out DIR
    python eval.py --bench examples=heldout.jsonl --predictions replies.jsonl --out DIR      # no model needed
    python eval.py --ask "Is it cold in Oslo?" --tools tools.json --model DIR                # one request, no files

The --out directory then holds results.json, failures.jsonl and, with --model, predictions.jsonl (written after every
chunk of replies: after a kill the same command goes on from there) and settings.json (how they were generated); base/
holds the same for --base-model, evaluated with the same settings.
Exit code 0: scored. 1: scored, but categories are missing, or cases without a usable prediction count as wrong.
2: an error of the user.
"""

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

from tooln1.benchmarks import NAMES, bfcl, runner, table
from tooln1.benchmarks.runner import GenerationConfig, Key, LoadedBenchmark, Prediction
from tooln1.data import Example
from tooln1.distributed import World, launch
from tooln1.io import weights
from tooln1.io.errors import UserError, exit_on_user_error
from tooln1.io.files import atomic_write, check_writable
from tooln1.io.jsonl import parse_json, read_rows, read_text
from tooln1.model import load_model, model_files, read_config
from tooln1.prompt import THINK_CLOSE, THINK_OPEN, XLAM_SYSTEM, parse_reply, without_stop_token
from tooln1.run.kernels import choose_decode
from tooln1.run.metrics import to_json
from tooln1.run.task_file import load_task
from tooln1.sampler.sampler import Sampler
from tooln1.tokenizer import Tokenizer, load_tokenizer

PATHS = ("model", "data")  # settings that may change between two runs with one --out: their contents are compared
BATCHES_PER_CHUNK = 4  # full batches (--rows) of replies in a chunk, which is what a kill may lose


def evaluate(options: argparse.Namespace, world: World) -> int:
    """Generate (or read) the predictions, score them, write and print the results; returns the exit code."""
    task = load_task(options.task, options.think)
    benchmarks = runner.load_benchmarks(options.bench, options.limit, options.bfcl_changed, task)
    out = check_writable(options.out, "--out")
    sources = {out: options.predictions or options.model}
    if options.base_model:
        sources[out / "base"] = options.base_model
    if options.model:
        for model in sources.values():  # what is wrong with the second should not be found hours later
            read_config(model)
            load_tokenizer(model).prompt_ids(options.generation.messages(benchmarks[0].chosen[0]))
    results = {}
    for folder, source in sources.items():
        file, settings = folder / "predictions.jsonl", {"predictions": source, "think": options.generation.think}
        if options.model:
            settings = generate(options, world, benchmarks, source, folder)
        if world.is_main:
            found, unknown_ids = runner.match_predictions(read_rows(options.predictions or file), benchmarks)
            if options.predictions and file.exists() and not file.samefile(source):
                raise UserError(f"{out} holds other predictions; choose another --out for {source}.")
            summaries = score(benchmarks, found, settings["think"], folder)
            settings |= {"task": task.fingerprint}
            result = {"settings": settings, "unknown_ids": unknown_ids, "benchmarks": summaries}
            with atomic_write(folder / "results.json") as opened:
                opened.write(json.dumps(result, indent=2) + "\n")
            results[f"{'ours' if folder == out else 'base'}: {'/'.join(Path(source).parts[-2:])}"] = result
            if folder == out and options.export_bfcl:
                export_bfcl(benchmarks, found, options.export_bfcl)
    if world.is_main:
        print(table.report(results), f"written to {out}", sep="\n\n")
    summaries = [summary for result in results.values() for summary in result["benchmarks"].values()]
    return world.broadcast(int(not all(summary["valid"] for summary in summaries)))


def ask(options: argparse.Namespace, world: World) -> None:
    """Print the prompt's size, the thought and the calls of the reply to one request."""
    tools = [tool for _, tool in read_rows(options.tools)] if options.tools else []
    example = Example("ask", "ask", XLAM_SYSTEM, tools, [{"role": "user", "content": options.ask}], [])
    benchmark = runner.held_out_benchmark("--ask", [example], load_task(options.task, options.think))
    tokenizer, sampler = load(options, world, options.model)
    prompt = tokenizer.prompt_ids(options.generation.messages(benchmark.cases[0]))
    (found,) = runner.generate_predictions(benchmark, sampler, tokenizer, world, options.generation)
    prediction = found["heldout", "ask", 0]
    text = without_stop_token(prediction.completion)
    reply, fault = parse_reply(text), prediction.fault or ("" if prediction.finished else "cut off")
    lines = [f"prompt:  {len(prompt)} tokens"]
    if reply.has_think:
        lines.append(f"thought: {text.partition(THINK_OPEN)[2].partition(THINK_CLOSE)[0].strip()}")
    lines += [f"call:    {json.dumps(call, ensure_ascii=False)}" for call in reply.calls or ()]
    if fault or reply.fault not in ("none", "" if options.think else "no_think"):
        lines += [f"fault:   {fault or reply.fault}; the reply as it is:", text]
    if world.is_main:
        print(*lines, sep="\n")


def score(
    benchmarks: Sequence[LoadedBenchmark], found: dict[Key, Prediction], think: bool, out: Path
) -> dict[str, dict]:
    """Score, and write failures.jsonl into `out`; returns each benchmark's summary."""
    summaries = {}
    with atomic_write(out / "failures.jsonl") as file:
        for benchmark in benchmarks:
            scored = runner.score_predictions(benchmark, found, think)
            notes = table.notes(benchmark.name, benchmark.module, benchmark.chosen)
            summaries[benchmark.name] = runner.summarise(benchmark, scored) | {"notes": notes}
            file.writelines(to_json(row) + "\n" for row in runner.failures(benchmark, scored))
    return summaries


def export_bfcl(benchmarks: Sequence[LoadedBenchmark], found: dict[Key, Prediction], directory: str) -> None:
    """Write the replies to BFCL (the first sample of each case) for the official `bfcl evaluate`."""
    cases = [case for benchmark in benchmarks if benchmark.name == "bfcl" for case in benchmark.chosen]
    predictions = {case.id: found.get(("bfcl", case.id, 0)) for case in cases}
    replies = {case_id: p.completion for case_id, p in predictions.items() if p and not p.fault}
    folder = Path(directory).resolve()  # bfcl-eval resolves relative paths from its own folder
    files = bfcl.export(replies, cases, folder)
    print(f"{len(files)} files for bfcl-eval, {len(cases) - len(replies)} cases left out. To score them:")
    print(f"bfcl evaluate --result-dir {folder} --model {bfcl.OFFICIAL_MODEL} --partial-eval\n")


def generate(
    options: argparse.Namespace, world: World, benchmarks: Sequence[LoadedBenchmark], source: str, out: Path
) -> dict:
    """Complete the model's predictions in `out`/predictions.jsonl; returns the settings they are generated with."""
    (tokenizer, sampler), generation = load(options, world, source), options.generation
    prompts = [[(case.id, generation.messages(case)) for case in benchmark.cases] for benchmark in benchmarks]
    settings = {
        "model": source,
        "data": {benchmark.name: benchmark.path for benchmark in benchmarks},
        "model_fingerprint": weights.fingerprint(model_files(source)),
        "dtype": str(next(sampler.model.parameters()).dtype).removeprefix("torch."),
        **asdict(generation),
        "prompts_fingerprint": hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16],
    }
    known = world.run_on_all_ranks(lambda: world.is_main and resume(out, settings, benchmarks), f"--out {out}")
    known = world.broadcast(known)

    def write() -> None:
        if world.is_main:
            with atomic_write(out / "predictions.jsonl") as file:
                for key, prediction in known.items():
                    row = dict(zip(("bench", "id", "sample"), key, strict=True)) | asdict(prediction)
                    file.write(to_json(row) + "\n")

    chunk = BATCHES_PER_CHUNK * sampler.max_num_seqs * world.size
    for benchmark in benchmarks:
        for new in runner.generate_predictions(benchmark, sampler, tokenizer, world, generation, known, chunk):
            known |= new
            world.run_on_all_ranks(write, f"--out {out}")
    return settings


def load(options: argparse.Namespace, world: World, source: str) -> tuple[Tokenizer, Sampler]:
    """A model's tokenizer, and the model in a sampler."""
    gc.collect()  # frees the memory of the model before this one
    torch.cuda.empty_cache()
    cuda, tokenizer = world.device.type == "cuda", load_tokenizer(source)
    dtype = torch.bfloat16 if cuda else torch.float32  # as in training
    model = load_model(source, dtype, world.device, tokenizer.vocab_size)
    sampler = Sampler(model, tokenizer.stop_ids, options.rows or (512 if cuda else 64))
    choose_decode(sampler, "auto", world)
    return tokenizer, sampler


def resume(out: Path, settings: dict, benchmarks: Sequence[LoadedBenchmark]) -> dict:
    """The predictions already in `out`, by key. Raises UserError if they were generated with other settings."""
    file = out / "settings.json"
    if not (out / "predictions.jsonl").exists():
        with atomic_write(file) as opened:
            opened.write(json.dumps(settings, indent=2) + "\n")
        return {}
    before = parse_json(read_text(file), str(file))
    for name in settings:
        if name not in PATHS and before.get(name) != settings[name]:
            raise UserError(
                f"{out} holds predictions made with other settings: {name} was {before.get(name)!r} and is "
                f"{settings[name]!r}. Choose another --out, or remove {out} to start again."
            )
    return runner.match_predictions(read_rows(out / "predictions.jsonl"), benchmarks)[0]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line; those of the generation as `options.generation`."""
    defaults = asdict(GenerationConfig())
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add, source = parser.add_argument, parser.add_mutually_exclusive_group(required=True)
    add("--bench", nargs="+", action="extend", metavar="NAME=PATH", help=f"NAME: {', '.join(NAMES)}")
    add("--ask", metavar="TEXT", help="print the reply to this request; neither --bench nor --out is needed")
    add("--tools", metavar="FILE", help="tools for --ask: a JSON list of objects with a name")
    source.add_argument("--model", help="Hugging Face directory or hub id")
    source.add_argument("--predictions", metavar="FILE", help='score these replies: JSON lines {"id", "completion"}')
    add("--out", metavar="DIR", help="directory for the results")
    add("--task", default="", metavar="FILE", help="Python file that scores the benchmark examples; it is run as code")
    add("--limit", type=int, default=0, metavar="N", help="only the first N cases of each benchmark")
    add("--bfcl-changed", choices=runner.CHANGED, default="all", help="BFCL's entries that changed since the paper")
    add("--no-think", dest="think", action="store_false", help="neither ask for reasoning nor check for it")
    add("--export-bfcl", metavar="DIR", help="write the replies to BFCL for the official bfcl evaluate")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one")
    add = parser.add_argument_group("generation, only with --model").add_argument
    add("--base-model", metavar="MODEL", help="evaluate this model too and print its row beside")
    add("--prompt", choices=tuple(runner.WORDINGS), help="wording of the training (default) or the released handler")
    add("--max-reply-tokens", type=int, metavar="N", help="cut longer replies off (%(default)s)")
    add("--temperature", type=float, help="0: greedy (default)")
    add("--samples", type=int, metavar="N", help="replies per case, for mean and spread; needs a temperature")
    add("--seed", type=int, help="seed of the sampling (%(default)s)")
    add("--rows", type=int, default=0, metavar="N", help="most replies at once per process (512 on CUDA, else 64)")
    parser.set_defaults(**defaults)
    options = parser.parse_args(argv)
    if options.ask and (options.bench or not options.model) or not (options.ask or (options.bench and options.out)):
        parser.error("it takes --bench and --out, or --ask and --model")
    if options.base_model and not options.model:
        parser.error("--base-model needs --model: with --predictions no reply is generated")
    if not 0 <= options.temperature < float("inf"):
        parser.error(f"--temperature must be a number of at least 0, not {options.temperature}")
    if options.samples > 1 and options.temperature == 0:
        parser.error("--samples needs a --temperature above 0: greedy replies are all alike")
    if min(options.limit, options.rows) < 0 or min(options.samples, options.max_reply_tokens) < 1:
        parser.error("--samples and --max-reply-tokens must be at least 1, --limit and --rows at least 0")
    options.generation = GenerationConfig(**{name: getattr(options, name) for name in defaults})
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Read the options, join the other processes, evaluate."""
    options = parse(argv)
    with launch(options.device) as world:
        code = ask(options, world) if options.ask else evaluate(options, world)
    if code:
        sys.exit(code)


if __name__ == "__main__":
    record(exit_on_user_error)(main)
