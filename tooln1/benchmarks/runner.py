"""Benchmarks from cases to figures: what a model answers, or what a file says it did, and what that is worth.

    --bench NAME=PATH   -> `load_benches`      -> cases
    a model             -> `answer`            -> predictions
    a predictions file  -> `match_predictions` -> predictions
    cases, predictions  -> `score_bench` -> `summarise` -> results.json, printed by evaluation_table.py
                                         -> `failures`  -> failures.jsonl

train.py goes the same way with its held-out examples, so that the two agree.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tooln1.benchmarks import Benchmark, Case, Tally, Verdict, benchmark, row_by_rule
from tooln1.benchmarks import examples as examples_benchmark
from tooln1.data import Example, Rollout
from tooln1.distributed import World
from tooln1.io.errors import UserError
from tooln1.io.jsonl import field as json_field
from tooln1.io.progress import progress
from tooln1.model import Transformer
from tooln1.prompt import build_messages
from tooln1.sampler.distributed import generate_distributed
from tooln1.sampler.sampler import Sampler
from tooln1.tokenizer import Tokenizer

# What may be wrong with data and predictions; the first two are faults of a case as well.
NO_PREDICTION, CONFLICTING, MISSING_CATEGORIES = "no_prediction", "conflicting_predictions", "missing_categories"
REPEATED, UNKNOWN = "repeated_predictions", "unknown_ids"
MAKE_THE_SCORE_WRONG = (NO_PREDICTION, CONFLICTING, MISSING_CATEGORIES)
TOO_LONG = "prompt_too_long"  # for the model's context: a fault of a case
WORDINGS = {"train": "train", "released": "released_handler"}  # eval.py's --prompt -> build_messages' wording
CHANGED = ("all", "leave-out", "only")  # what to do with the cases that changed since the paper
MOST_SAMPLES = 10_000  # replies to a case: what is missing is counted, up to the highest number that a row names
Key = tuple[str, str, int]  # benchmark, case id, sample


@dataclass(frozen=True)
class Bench:
    """A benchmark as the command line names it, with its cases."""

    name: str
    path: str
    rules: Benchmark
    cases: list[Case]
    chosen: list[Case]  # those to evaluate

    @property
    def missing_categories(self) -> list[str]:
        """Categories that the benchmark has and the data lack."""
        there = {case.category for case in self.cases}
        return [category for category in getattr(self.rules, "CATEGORIES", ()) if category not in there]


@dataclass(frozen=True)
class GenerationConfig:
    """How a model is asked."""

    prompt: str = "train"  # a key of WORDINGS
    think: bool = True  # ask for reasoning
    max_reply_tokens: int = 4096
    temperature: float = 0.0  # 0: greedy
    samples: int = 1  # replies to each case
    seed: int = 0  # of the sampling

    def messages(self, case: Case) -> list[dict]:
        """The chat that asks for a reply."""
        return build_messages(case.example, self.think, wording=WORDINGS[self.prompt])


@dataclass(frozen=True)
class Prediction:
    """A model's reply to a case."""

    completion: str
    finished: bool | None = None  # ended with a stop token; None: its file does not say
    asked: bool = True  # False: the model's context cannot hold the prompt


NOT_ASKED = Prediction("", asked=False)


@dataclass(frozen=True)
class Predictions:
    """What a predictions file holds, matched with the cases."""

    found: dict[Key, Prediction] = field(default_factory=dict)
    conflicting: set[Key] = field(default_factory=set)  # given more than once, with different completions
    repeated: list[str] = field(default_factory=list)  # ids of rows that say again what an earlier one said
    unknown: list[str] = field(default_factory=list)  # ids that no case has

    @property
    def samples(self) -> int:
        """Replies to each case."""
        return 1 + max((sample for _, _, sample in self.found), default=0)


@dataclass(frozen=True)
class Scored:
    """A case's sample, its prediction and the verdict."""

    case: Case
    sample: int
    prediction: Prediction | None
    verdict: Verdict


# ---------------------------------------------------------------------------------------------------- reading


def load_benches(arguments: Sequence[str], limit: int | None = None, changed: str = "all") -> list[Bench]:
    """The benchmarks of `--bench NAME=PATH ...`.

    limit:   choose only the first so many cases of each.
    changed: one of CHANGED, for a benchmark that names the cases which changed since the paper.
    Raises UserError for a name that is unknown or given twice, for data that cannot be read, and for no case left.
    """
    benches = []
    for argument in arguments:
        name, equals, path = argument.partition("=")
        if not equals or not path:
            raise UserError(f"--bench takes NAME=PATH, such as examples=heldout.jsonl; found {argument!r}.")
        if name in [bench.name for bench in benches]:
            raise UserError(f"--bench names {name} twice; put the second into a run of its own.")
        rules = benchmark(name)
        cases = chosen = rules.load(path)
        ids = set(getattr(rules, "CHANGED_SINCE_PAPER", ()))
        if ids and changed != "all":
            chosen = [case for case in cases if (case.id in ids) == (changed == "only")]
        if not chosen:
            raise UserError(f"{path}: none of its {len(cases)} cases changed since the paper, so none is chosen.")
        benches.append(Bench(name, path, rules, cases, chosen[:limit]))
    return benches


def held_out_bench(path: str, examples: Sequence[Example]) -> Bench:
    """Held-out examples as a benchmark of the name "heldout"."""
    cases = examples_benchmark.cases_of(examples)
    return Bench("heldout", path, examples_benchmark, cases, cases)


def match_predictions(rows: Iterable[tuple[str, dict]], benches: Sequence[Bench]) -> Predictions:
    """Sort the rows of a predictions file, [(where, row)], to the cases they answer.

    A row is {"id", "completion"}, where needed with "bench" (for ids that several benchmarks have) and
    "sample" (0, 1, ..., of several replies to a case); "finished" and "asked" are kept, other keys do no harm.
    Raises UserError for values of another type and for an id of two benchmarks when the row does not say which.
    """
    ids = {bench.name: {case.id for case in bench.cases} for bench in benches}
    found, conflicting, repeated, unknown = {}, set(), [], []
    for where, row in rows:
        name, completion = json_field(row, "id", str, where), json_field(row, "completion", str, where)
        sample, finished = row.get("sample", 0), row.get("finished")
        if type(sample) is not int or not 0 <= sample < MOST_SAMPLES:
            raise UserError(f'{where}: "sample" must be a whole number from 0 to {MOST_SAMPLES - 1}, found {sample!r}')
        asked = [json_field(row, "bench", str, where)] if "bench" in row else list(ids)
        answers = [bench for bench in asked if name in ids.get(bench, ())]
        if len(answers) > 1:
            both = " and ".join(answers)
            raise UserError(f'{where}: {both} have a case {name!r}; say with "bench" which one is meant')
        if not answers:
            unknown.append(name)
            continue
        key = (answers[0], name, sample)
        if key not in found:
            finished = finished if isinstance(finished, bool) else None
            found[key] = Prediction(completion, finished, row.get("asked") is not False)
        elif found[key].completion == completion:
            repeated.append(name)
        else:
            conflicting.add(key)
    return Predictions(found, conflicting, repeated, unknown)


# ----------------------------------------------------------------------------------------------------- generation


def generate_predictions(
    bench: Bench,
    sampler: Sampler,
    tokenizer: Tokenizer,
    world: World,
    generation: GenerationConfig,
    found: Mapping[Key, Prediction] | None = None,
    on_reply: Callable[[Key, Prediction], None] = lambda key, prediction: None,
    should_stop: Callable[[], bool] = lambda: False,
    check: Callable[[], None] = lambda: None,
) -> dict[Key, Prediction]:
    """Predictions for the chosen cases: those `found`, and the others, made on all ranks and known to all afterwards.

    A prompt that the model's context cannot hold is not asked, and a reply is cut off where the context ends.
    `on_reply` is told of each new prediction of this rank as soon as it is there. The bar shows this rank's accuracy.
    `should_stop` and `check` as in `generate_distributed`.
    """
    wanted = {(bench.name, case.id, sample): case for case in bench.chosen for sample in range(generation.samples)}
    found = {key: prediction for key, prediction in (found or {}).items() if key in wanted}
    missing = {case.id: case for key, case in wanted.items() if key not in found}
    prompts = {name: tokenizer.prompt_ids(generation.messages(case)) for name, case in missing.items()}
    context = context_tokens(sampler.model)
    asked = [name for name, prompt in prompts.items() if len(prompt) < context]
    too_long = {key: NOT_ASKED for key in wanted if len(prompts.get(key[1], ())) >= context}
    place = {case.id: number for number, case in enumerate(bench.cases)}  # names a case for the randomness
    oks: list[bool] = []

    def count(key: Key, prediction: Prediction, replies: int = 1) -> None:
        oks.append(verdict(bench, wanted[key], prediction, generation.think).ok)
        bar.set_postfix_str(f"accuracy {sum(oks) / len(oks):.3f}", refresh=False)
        bar.update(replies)

    def made(key: Key, prediction: Prediction, replies: int = 1) -> None:
        if key not in found:  # it is, where a kill came between two samples of a case
            count(key, prediction, replies)
            on_reply(key, prediction)

    def named(rollout: Rollout) -> tuple[Key, Prediction]:
        key = (bench.name, asked[rollout.group], rollout.sample)
        return key, Prediction(tokenizer.decode(rollout.reply), rollout.finished)

    with progress(len(wanted), bench.name, "replies", world.is_main) as bar:
        if world.is_main:
            for item in found.items():
                count(*item)
            for item in too_long.items():
                made(*item)
        rollouts = (
            generate_distributed(
                sampler,
                world,
                [prompts[name] for name in asked],
                keys=[place[name] for name in asked],
                group_size=generation.samples,
                temperature=generation.temperature,
                seed=generation.seed,
                max_new_tokens=[min(generation.max_reply_tokens, context - len(prompts[name])) for name in asked],
                on_finished=lambda rollout: made(*named(rollout), replies=world.size),
                should_stop=should_stop,
                check=check,
            )
            if asked
            else []
        )
    return {**too_long, **dict(map(named, rollouts)), **found}


def context_tokens(model: Transformer) -> float:
    """Tokens of prompt and reply together that the model was made for; inf where its config does not say."""
    return model.config.raw.get("max_position_embeddings") or math.inf


# ---------------------------------------------------------------------------------------------------- scoring


def verdict(bench: Bench, case: Case, prediction: Prediction | None, think: bool) -> Verdict:
    """What a prediction is worth; none at all, and one to a question that was not asked, is wrong."""
    if prediction is None:
        return Verdict(False, NO_PREDICTION)
    return bench.rules.score(case, prediction.completion, think) if prediction.asked else Verdict(False, TOO_LONG)


def score_bench(bench: Bench, predictions: Predictions, samples: int, think: bool) -> list[Scored]:
    """Every sample of every chosen case, in order; without a prediction, or with several, it is wrong."""
    scored = []
    for sample in range(samples):
        for case in bench.chosen:
            key = (bench.name, case.id, sample)
            prediction = predictions.found.get(key)
            conflicting = key in predictions.conflicting
            worth = Verdict(False, CONFLICTING) if conflicting else verdict(bench, case, prediction, think)
            scored.append(Scored(case, sample, prediction, worth))
    return scored


def summarise(bench: Bench, scored: Sequence[Scored]) -> dict[str, Any]:
    """The results of one benchmark as plain JSON: accuracies, faults and the number of cut-off replies.

    With several samples an accuracy is the mean over them, and "spread" their standard deviation (n - 1). Where
    verdicts know other rules, categories have a row for each of them as well.
    """
    rules = bench.rules.score(bench.chosen[0], "", True).also  # also where no case has a prediction
    by_sample: dict[int, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for row in scored:
        by_sample[row.sample][row.case.category].append(row.verdict.ok)
    for rule in rules:
        for row in scored:
            by_sample[row.sample][row_by_rule(row.case.category, rule)].append(row.verdict.also.get(rule, False))
    tallies = [
        {category: Tally(sum(oks), len(oks)) for category, oks in categories.items()}
        for categories in by_sample.values()
    ]
    faults = Counter(row.verdict.why for row in scored if not row.verdict.ok)
    return {
        "path": bench.path,
        "cases": len(bench.chosen),
        "cases_in_data": len(bench.cases),
        "samples": len(tallies),
        "categories": _figures(tallies),
        "totals": _figures([bench.rules.totals(tally) for tally in tallies]),
        "faults": {why: {"replies": n, "share": n / len(scored)} for why, n in faults.most_common()},
        "truncated": sum(row.prediction is not None and row.prediction.finished is False for row in scored),
    }


def _figures(by_sample: Sequence[Mapping[str, Tally | float]]) -> dict[str, dict]:
    return {name: _over_samples([figures[name] for figures in by_sample]) for name in by_sample[0]}


def _over_samples(figures: Sequence[Tally | float]) -> dict[str, Any]:
    """One figure from its value in each sample."""
    values = [figure.accuracy if isinstance(figure, Tally) else figure for figure in figures]
    result: dict[str, Any] = {"accuracy": statistics.fmean(values)}
    if len(values) > 1:
        result |= {"spread": statistics.stdev(values), "by_sample": values}
    if all(isinstance(figure, Tally) for figure in figures):
        result |= {"right": sum(f.right for f in figures), "replies": sum(f.count for f in figures)}
    return result


def figures(
    benches: Sequence[Bench],
    sampler: Sampler,
    tokenizer: Tokenizer,
    world: World,
    generation: GenerationConfig,
    should_stop: Callable[[], bool],
    check: Callable[[], None],
) -> dict[str, float]:
    """Ask the benches, one sample a case: the totals of all, under names for a log."""
    found = {}
    for bench in benches:
        found |= metrics_of(
            bench,
            generate_predictions(bench, sampler, tokenizer, world, generation, should_stop=should_stop, check=check),
            generation.think,
        )
    return found


def metrics_of(bench: Bench, predictions: dict[Key, Prediction], think: bool) -> dict[str, float]:
    """The totals under names for a log, such as "bfcl_overall"."""
    totals = summarise(bench, score_bench(bench, Predictions(predictions), 1, think))["totals"]
    return {re.sub(r"\W+", "_", f"{bench.name}_{name}"): figure["accuracy"] for name, figure in totals.items()}


def failures(bench: Bench, scored: Sequence[Scored]) -> list[dict[str, Any]]:
    """The wrong replies, those of the commonest fault first, else in order."""
    count = Counter(row.verdict.why for row in scored if not row.verdict.ok)
    rank = {why: place for place, (why, _) in enumerate(count.most_common())}
    wrong = sorted((row for row in scored if not row.verdict.ok), key=lambda row: rank[row.verdict.why])
    return [
        {
            "bench": bench.name,
            "why": row.verdict.why,
            "id": row.case.id,
            "category": row.case.category,
            "sample": row.sample,
            "completion": row.prediction.completion if row.prediction else None,
            "answer": row.case.gold,
        }
        for row in wrong
    ]


def problems(benches: Sequence[Bench], predictions: Predictions, scored: dict[str, list[Scored]]) -> dict[str, list]:
    """What is wrong with data and predictions: kind -> ids.

    scored: benchmark -> its scored cases.
    """
    found: dict[str, list] = {NO_PREDICTION: [], CONFLICTING: []}
    found[MISSING_CATEGORIES] = [f"{bench.name} {name}" for bench in benches for name in bench.missing_categories]
    for row in (row for rows in scored.values() for row in rows):
        if row.verdict.why in (NO_PREDICTION, CONFLICTING):
            sample = f" (sample {row.sample})" if row.sample else ""
            found[row.verdict.why].append(row.case.id + sample)
    return found | {REPEATED: predictions.repeated, UNKNOWN: predictions.unknown}
