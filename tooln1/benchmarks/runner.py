"""Run benchmarks, for eval.py and for the evaluation within train.py.

`load_benchmarks` -> cases -> `generate_predictions` or `match_predictions` -> `score_predictions` -> `summarise`
"""

import itertools
import math
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from tqdm import tqdm

from tooln1.benchmarks import Case, Tally, Verdict, examples, row_by_rule
from tooln1.benchmarks import benchmark as benchmark_module
from tooln1.data import Example
from tooln1.distributed import World
from tooln1.io.errors import UserError
from tooln1.io.jsonl import field as json_field
from tooln1.prompt import build_messages
from tooln1.sampler.distributed import generate_distributed
from tooln1.sampler.sampler import Sampler
from tooln1.task import TOOL_N1, Task
from tooln1.tokenizer import Tokenizer

# `Prediction.fault`
NO_PREDICTION, CONFLICTING, TOO_LONG = "no_prediction", "conflicting_predictions", "prompt_too_long"
WORDINGS = {"train": "train", "released": "released_handler"}  # eval.py's --prompt -> `wording` of build_messages
CHANGED = ("all", "leave-out", "only")  # which cases to choose of those that changed since the paper
MAX_SAMPLES = 10_000  # of one case in a predictions file
Key = tuple[str, str, int]  # benchmark name, case id, sample number


@dataclass(frozen=True)
class LoadedBenchmark:
    """A benchmark of the command line with its cases."""

    name: str
    path: str
    module: ModuleType
    cases: list[Case]  # all of the data
    chosen: list[Case]  # those to evaluate


@dataclass(frozen=True)
class GenerationConfig:
    """How replies are generated."""

    prompt: str = "train"  # a key of WORDINGS
    think: bool = True  # ask for reasoning
    max_reply_tokens: int = 4096
    temperature: float = 0.0  # 0: greedy
    samples: int = 1  # replies to each case
    seed: int = 0

    def messages(self, case: Case) -> list[dict]:
        """The chat messages of the prompt for a case."""
        return case.messages or build_messages(case.example, self.think, wording=WORDINGS[self.prompt])


@dataclass(frozen=True)
class Prediction:
    """A model's reply to a case."""

    completion: str | None  # None: there is none
    finished: bool | None = None  # whether it ended with a stop token; None: unknown
    fault: str = ""  # NO_PREDICTION, CONFLICTING or TOO_LONG: wrong whatever the completion


@dataclass(frozen=True)
class Scored:
    """The verdict on one sample of one case."""

    case: Case
    sample: int
    prediction: Prediction
    verdict: Verdict


def load_benchmarks(
    arguments: Sequence[str], limit: int = 0, changed: str = "all", task: Task = TOOL_N1
) -> list[LoadedBenchmark]:
    """The benchmarks of `--bench NAME=PATH ...`, of each the first `limit` cases (0: all).

    changed: one of CHANGED; applies to a benchmark that lists the cases which changed since the paper.
    task: that of a file asks and scores the benchmark "examples".
    Raises UserError for an unknown or repeated name and for data that cannot be read.
    """
    loaded: dict[str, LoadedBenchmark] = {}
    for argument in arguments:
        name, _, path = argument.partition("=")
        if not path:
            raise UserError(f"--bench takes NAME=PATH, such as examples=heldout.jsonl; found {argument!r}.")
        if name in loaded:
            raise UserError(f"--bench names {name} twice; evaluate the second one in another run.")
        module = examples.of_task(task) if task.file and name == "examples" else benchmark_module(name)
        cases = chosen = module.load(path)
        changed_ids = getattr(module, "CHANGED_SINCE_PAPER", ())
        if changed_ids and changed != "all":
            chosen = [case for case in cases if (case.id in changed_ids) == (changed == "only")]
        if not chosen:
            raise UserError(f"{path}: none of its {len(cases)} cases is chosen; use another --bfcl-changed.")
        loaded[name] = LoadedBenchmark(name, path, module, cases, chosen[: limit or None])
    return list(loaded.values())


def held_out_benchmark(path: str, held_out: Sequence[Example], task: Task = TOOL_N1) -> LoadedBenchmark:
    """Held-out training examples as a benchmark with the name "heldout"."""
    module = examples.of_task(task) if task.file else examples
    cases = module.cases_of(held_out)
    return LoadedBenchmark("heldout", path, module, cases, cases)


def match_predictions(
    rows: Iterable[tuple[str, dict]], benchmarks: Sequence[LoadedBenchmark]
) -> tuple[dict[Key, Prediction], list[str]]:
    """(predictions by case, ids that no case has), from the rows [(where, row)] of a predictions file.

    A row is {"id", "completion"} and optionally "bench" (else the first benchmark with this id), "sample" (0, 1, ...),
    "finished" and "fault". Raises UserError for an id, completion or sample of a wrong type.
    """
    ids = {benchmark.name: {case.id for case in benchmark.cases} for benchmark in benchmarks}
    found: dict[Key, Prediction] = {}
    unknown_ids = []
    for where, row in rows:
        case_id, completion = json_field(row, "id", str, where), json_field(row, "completion", str, where)
        sample, finished = row.get("sample", 0), row.get("finished")
        if type(sample) is not int or not 0 <= sample < MAX_SAMPLES:
            raise UserError(f'{where}: "sample" must be an integer from 0 to {MAX_SAMPLES - 1}, found {sample!r}')
        names = [name for name in ids if case_id in ids[name] and row.get("bench", name) == name]
        if not names:
            unknown_ids.append(case_id)
            continue
        key, fault = (names[0], case_id, sample), TOO_LONG if row.get("fault") == TOO_LONG else ""
        prediction = Prediction(completion, finished if isinstance(finished, bool) else None, fault)
        if found.setdefault(key, prediction).completion != completion:
            found[key] = replace(found[key], fault=CONFLICTING)
    return found, unknown_ids


def generate_predictions(
    benchmark: LoadedBenchmark,
    sampler: Sampler,
    tokenizer: Tokenizer,
    world: World,
    generation: GenerationConfig,
    known: Collection[Key] = (),
    chunk_replies: int = 0,
    **how,
) -> Iterator[dict[Key, Prediction]]:
    """Generate the predictions for the chosen cases that are not `known`, on all ranks, chunk by chunk.

    Yields each chunk's predictions on every rank. chunk_replies: replies per chunk, 0 for one chunk.
    A prompt that does not fit into the model's context gets no reply, and a reply is cut off where the context ends.
    how: `should_stop` and `check` of `generate_distributed`.
    """
    cases = [case for case in benchmark.chosen if (benchmark.name, case.id, 0) not in known]
    place = {case.id: number for number, case in enumerate(benchmark.cases)}  # the key of a case's random numbers
    chunk_cases = max(1, chunk_replies // generation.samples) if chunk_replies else max(1, len(cases))
    context = sampler.model.config.raw.get("max_position_embeddings") or math.inf
    total, hidden = len(cases) * generation.samples, None if world.is_main else True  # None: not on a terminal
    with tqdm(desc=benchmark.name, total=total, unit=" replies", leave=False, disable=hidden) as bar:
        for start in range(0, len(cases), chunk_cases):
            chunk = cases[start : start + chunk_cases]
            prompts = {case.id: tokenizer.prompt_ids(generation.messages(case)) for case in chunk}
            fitting = [case_id for case_id, prompt in prompts.items() if len(prompt) < context]
            found = {}
            for case_id, sample in itertools.product(prompts, range(generation.samples)):
                if len(prompts[case_id]) >= context:
                    found[benchmark.name, case_id, sample] = Prediction("", fault=TOO_LONG)
            rollouts = fitting and generate_distributed(
                sampler,
                world,
                [prompts[case_id] for case_id in fitting],
                keys=[place[case_id] for case_id in fitting],
                group_size=generation.samples,
                temperature=generation.temperature,
                seed=generation.seed,
                max_new_tokens=[min(generation.max_reply_tokens, context - len(prompts[name])) for name in fitting],
                on_finished=lambda rollout: bar.update(world.size),
                **how,
            )
            for rollout in rollouts:
                key = (benchmark.name, fitting[rollout.group], rollout.sample)
                found[key] = Prediction(tokenizer.decode(rollout.reply), rollout.finished)
            yield found


def score_predictions(benchmark: LoadedBenchmark, found: Mapping[Key, Prediction], think: bool) -> list[Scored]:
    """Score every sample of every chosen case, in order; a case without a prediction is wrong."""
    samples = 1 + max((sample for name, _, sample in found if name == benchmark.name), default=0)
    scored = []
    for sample, case in itertools.product(range(samples), benchmark.chosen):
        prediction = found.get((benchmark.name, case.id, sample), Prediction(None, fault=NO_PREDICTION))
        verdict = benchmark.module.score(case, prediction.completion or "", think)
        if prediction.fault:
            verdict = Verdict(False, prediction.fault, dict.fromkeys(verdict.also, False))
        scored.append(Scored(case, sample, prediction, verdict))
    return scored


def summarise(benchmark: LoadedBenchmark, scored: Sequence[Scored]) -> dict[str, Any]:
    """The results of one benchmark as plain JSON: accuracies, counts of faults, and of cut-off replies.

    "valid" is False where categories or predictions are missing. With several samples an accuracy is the mean over
    them and "spread" their standard deviation (n - 1). Where verdicts have other rules (`Verdict.also`), each category
    has a row for each of them too.
    """
    by_sample: dict[int, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for row in scored:
        counts = row.verdict.ok if row.verdict.reward is None else row.verdict.reward
        by_sample[row.sample][row.case.category].append(counts)
    for row in scored:  # a second loop, so that the rows of other rules come last
        for rule, ok in row.verdict.also.items():
            by_sample[row.sample][row_by_rule(row.case.category, rule)].append(ok)
    tallies = [{name: Tally(sum(oks), len(oks)) for name, oks in rows.items()} for rows in by_sample.values()]
    totals = [benchmark.module.totals(tally) for tally in tallies]
    faults = Counter(row.verdict.why for row in scored if not row.verdict.ok)
    present = {case.category for case in benchmark.cases}
    missing = [name for name in getattr(benchmark.module, "CATEGORIES", ()) if name not in present]
    return {
        "path": benchmark.path,
        "valid": not missing and not {NO_PREDICTION, CONFLICTING} & faults.keys(),
        "missing_categories": missing,
        "cases": len(benchmark.chosen),
        "cases_in_data": len(benchmark.cases),
        "samples": len(tallies),
        "categories": {name: _over_samples([sample[name] for sample in tallies]) for name in tallies[0]},
        "totals": {name: _over_samples([sample[name] for sample in totals]) for name in totals[0]},
        "faults": {why: {"replies": n, "share": n / len(scored)} for why, n in faults.most_common()},
        "truncated": sum(row.prediction.finished is False for row in scored),
    }


def failures(benchmark: LoadedBenchmark, scored: Sequence[Scored]) -> list[dict[str, Any]]:
    """The wrong replies, grouped by fault, as rows of failures.jsonl."""
    return [
        {"bench": benchmark.name, "id": row.case.id, "category": row.case.category, "sample": row.sample}
        | {"why": row.verdict.why, "completion": row.prediction.completion, "answer": row.case.gold}
        for row in sorted(scored, key=lambda row: row.verdict.why)
        if not row.verdict.ok
    ]


def _over_samples(values: Sequence[Tally | float]) -> dict[str, Any]:
    """One row of the results from its value in each sample."""
    accuracies = [value.accuracy if isinstance(value, Tally) else value for value in values]
    result: dict[str, Any] = {"accuracy": statistics.fmean(accuracies)}
    if len(accuracies) > 1:
        result |= {"spread": statistics.stdev(accuracies), "by_sample": accuracies}
    if all(isinstance(value, Tally) for value in values):
        result |= {"right": sum(value.right for value in values), "replies": sum(value.count for value in values)}
    return result


def totals_by_log_name(benchmark: LoadedBenchmark, found: Mapping[Key, Prediction], think: bool) -> dict[str, float]:
    """The accuracies in total, by names for a log such as "bfcl_overall"."""
    totals = summarise(benchmark, score_predictions(benchmark, found, think))["totals"]
    return {re.sub(r"\W+", "_", f"{benchmark.name}_{name}"): total["accuracy"] for name, total in totals.items()}
