"""eval.py with a model: killed and sampled runs, one process and two, a base model, and the figures of train.py.

The model of these tests is random, but five of its tokens are whole replies, and only they and the specials
have weight in its head: so some of its greedy answers are right, some wrong, and which depends on the prompt.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import tokenizers
import torch
from test_evaluation import (
    ONE,
    REPLIES,
    TWO,
    evaluate,
    example,
    exit_code,
    results,
    rows_of,
    words_of,
    write_rows,
)

from tooln1.benchmarks import examples as examples_benchmark
from tooln1.benchmarks import runner as evaluation
from tooln1.benchmarks.runner import load_benches
from tooln1.config import Config
from tooln1.data import write_examples
from tooln1.distributed import World
from tooln1.model import load_model, save_model
from tooln1.run import lifecycle, setup
from tooln1.run.metrics import JsonlLog
from tooln1.sampler.sampler import Sampler
from tooln1.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """The model described above."""
    folder = tiny.write_model(tmp_path_factory.mktemp("model"), vocab_size=264, tie_word_embeddings=False)
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_tokens([tokenizers.AddedToken(reply, normalized=False) for reply in REPLIES])
    backend.save(str(folder / "tokenizer.json"))
    weights = load_model(folder)
    with torch.no_grad():
        weights.head[:256] = 0  # bytes
        weights.head[256:] *= 8  # so that bytes are rare at T = 2 as well
    save_model(weights, folder / "parrot")
    return folder / "parrot"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """24 examples of two sources whose answers are among the model's replies."""
    file = tmp_path_factory.mktemp("data") / "examples.jsonl"
    answers = [[ONE], [TWO], [ONE, TWO]]
    rows = [
        example(f"e{i}", ("north", "south")[i % 2], answers[i % 3], f"Add {i * i * 7} " * (1 + i % 4))
        for i in range(24)
    ]
    write_examples(rows, file)
    return file


def arguments_for(model: Path, data: Path, out: Path) -> list:
    where = ["--bench", f"examples={data}", "--model", model, "--out", out]
    return [*where, "--max-reply-tokens", 3, "--rows", 8, "--device", "cpu"]


@pytest.fixture(scope="module")
def whole(model, data, tmp_path_factory) -> Path:
    """The folder of a run that nobody interrupted."""
    out = tmp_path_factory.mktemp("whole") / "out"
    evaluate(*arguments_for(model, data, out))
    return out


@pytest.fixture
def asked(monkeypatch) -> list[list[list[int]]]:
    """The prompts of each call of the sampler."""
    calls, generate = [], Sampler.generate

    def noted(self, prompts, *args, **how):
        calls.append(prompts)
        return generate(self, prompts, *args, **how)

    monkeypatch.setattr(Sampler, "generate", noted)
    return calls


@pytest.mark.parametrize("think", [True, False])
def test_the_score_is_the_one_that_train_prints(model, data, tmp_path, capsys, asked, think):
    paths = {"model": model, "train_data": data, "eval_data": data, "run_dir": tmp_path / "run"}
    paths = {name: str(path) for name, path in paths.items()}
    config = Config(
        **paths,
        max_reply_tokens=3,
        think=think,
        steps=1,
        eval_bench=f"examples={data}",
        prompts_per_step=4,
        prompts_per_minibatch=4,
    )
    world = World(0, 1, torch.device("cpu"))
    run = setup.build(config, world, *setup.prepare(config, world, None), lambda doing: None)
    figures = lifecycle.evaluate(run)
    accuracy = figures["heldout_accuracy"]
    assert 0 < accuracy < 1 and figures == {"heldout_accuracy": accuracy, "examples_overall": accuracy}
    save_model(run.sampler.model, tmp_path / "hf")  # as train.py does at the end
    evaluate(*arguments_for(tmp_path / "hf", data, tmp_path / "out"), *([] if think else ["--no-think"]))
    overall = results(tmp_path / "out")["benchmarks"]["examples"]["totals"]["overall"]
    assert overall["accuracy"] == accuracy and overall["right"] == round(24 * accuracy)
    assert f"overall {accuracy:.3f} {overall['right']}/24" in words_of(capsys.readouterr().out)
    by_train, by_train_too, by_eval = asked
    assert by_train == by_train_too == by_eval


def test_the_released_wording_is_an_option(model, data, tmp_path, asked):
    evaluate(*arguments_for(model, data, tmp_path / "out"), "--prompt", "released", "--limit", 2)
    text = load_tokenizer(model).decode(asked[0][0])
    assert "please make tool_calls an empty list <tool_call>[]</tool_call>" in text


def cut_copy(whole: Path, folder: Path, lines: int) -> Path:
    """A run killed while it wrote the line after `lines`."""
    folder.mkdir()
    (folder / "settings.json").write_bytes((whole / "settings.json").read_bytes())
    written = (whole / "predictions.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "predictions.jsonl").write_bytes(b"".join(written[:lines]) + written[lines][:20])
    return folder


def same_results(left: Path, right: Path) -> bool:
    names = ("results.json", "failures.jsonl")
    return all((left / name).read_bytes() == (right / name).read_bytes() for name in names)


def test_a_killed_run_goes_on_where_it_stopped(model, data, whole, tmp_path, asked):
    out = cut_copy(whole, tmp_path / "out", 5)
    before = rows_of(whole / "predictions.jsonl")
    evaluate(*arguments_for(model, data, out))
    assert [*map(len, asked)] == [19]
    rows = rows_of(out / "predictions.jsonl")
    assert rows[:5] == before[:5]
    assert sorted(row["id"] for row in rows) == sorted(f"e{i}" for i in range(24))
    assert same_results(out, whole)
    asked.clear()
    evaluate(*arguments_for(model, data, out))  # once more: nothing is left to do
    assert asked == [] and rows_of(out / "predictions.jsonl") == rows and same_results(out, whole)


def test_every_reply_that_ended_before_a_kill_is_kept(model, data, whole, tmp_path, asked, monkeypatch):
    left, append = [7], JsonlLog.append

    def killed(log, row):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        append(log, row)

    monkeypatch.setattr(JsonlLog, "append", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate(*arguments_for(model, data, tmp_path / "out"))
    assert len(rows_of(tmp_path / "out" / "predictions.jsonl")) == 7
    monkeypatch.setattr(JsonlLog, "append", append)
    evaluate(*arguments_for(model, data, tmp_path / "out"))
    assert [*map(len, asked)] == [24, 17] and same_results(tmp_path / "out", whole)


def test_what_other_ranks_wrote_before_a_kill_is_kept_once(model, data, whole, tmp_path, asked):
    """Killed while rank 1's lines were moved: one of them stands in both files; the last one is cut off."""
    out = cut_copy(whole, tmp_path / "out", 9)
    written = (whole / "predictions.jsonl").read_bytes().splitlines(keepends=True)
    (out / "predictions.rank1.jsonl").write_bytes(b"".join(written[8:14]) + written[14][:30])
    (out / "predictions.rank2.jsonl").write_bytes(written[20])
    evaluate(*arguments_for(model, data, out))
    assert [*map(len, asked)] == [24 - 9 - 5 - 1]
    rows = rows_of(out / "predictions.jsonl")
    assert len(rows) == len({row["id"] for row in rows}) == 24
    assert same_results(out, whole) and not list(out.glob("*rank*"))


def test_the_bar_shows_the_accuracy_so_far(model, data, whole, tmp_path, monkeypatch):
    class Bar:
        def __init__(self, *about):
            self.count, self.said = 0, []
            bars.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def update(self, count):
            self.count += count

        def set_postfix_str(self, text, refresh):
            self.said.append(text)

    bars: list[Bar] = []
    monkeypatch.setattr(evaluation, "progress", Bar)
    evaluate(*arguments_for(model, data, tmp_path / "out"))
    evaluate(*arguments_for(model, data, cut_copy(whole, tmp_path / "cut", 5)))
    oks = {row["id"] for row in rows_of(whole / "failures.jsonl")}
    right = [row["id"] not in oks for row in rows_of(tmp_path / "out" / "predictions.jsonl")]
    assert bars[0].said == [f"accuracy {sum(right[:n]) / n:.3f}" for n in range(1, 25)]
    assert [bar.count for bar in bars] == [24, 24] and bars[1].said[-1] == bars[0].said[-1] != bars[0].said[0]


def test_prompts_beyond_the_context_are_a_fault_of_their_own(model, data, tmp_path, asked, monkeypatch, capsys):
    tokenizer, lengths = load_tokenizer(model), {}
    for case in load_benches([f"examples={data}"])[0].cases:
        text = tokenizer.render(evaluation.GenerationConfig().messages(case), add_generation_prompt=True)
        lengths[case.id] = len(tokenizer.encode(text))
    context = sorted(lengths.values())[12]
    short = tmp_path / "short"
    shutil.copytree(model, short)
    config = json.loads((short / "config.json").read_text()) | {"max_position_embeddings": context}
    (short / "config.json").write_text(json.dumps(config))
    caps, sample = [], evaluation.generate_distributed
    noted = lambda *words, **how: caps.extend(how["max_new_tokens"]) or sample(*words, **how)  # noqa: E731
    monkeypatch.setattr(evaluation, "generate_distributed", noted)
    out = tmp_path / "out"
    evaluate(*arguments_for(short, data, out), "--max-reply-tokens", 4096)
    assert caps == [context - len(prompt) for prompt in asked[0]]
    too_long = {name for name, length in lengths.items() if length >= context}
    assert 0 < len(too_long) < 24 and [*map(len, asked)] == [24 - len(too_long)]
    rows = {row["id"]: row for row in rows_of(out / "predictions.jsonl")}
    assert {name for name, row in rows.items() if not row["asked"]} == too_long
    faults = [row["id"] for row in rows_of(out / "failures.jsonl") if row["why"] == "prompt_too_long"]
    assert set(faults) == too_long and len(faults) == len(too_long)
    assert f"context cannot hold the prompt: {len(too_long)} replies" in words_of(capsys.readouterr().out)
    evaluate(*arguments_for(short, data, out), "--max-reply-tokens", 4096)
    assert len(asked) == 1  # they are not looked at again
    where = ["--bench", f"examples={data}", "--predictions", out / "predictions.jsonl", "--out", tmp_path / "again"]
    evaluate(*where)
    benchmarks = [results(folder)["benchmarks"] for folder in (out, tmp_path / "again")]
    assert benchmarks[0] == benchmarks[1]


def test_a_base_model_is_asked_the_same_and_stands_beside(model, data, whole, tmp_path, asked, capsys):
    weights = load_model(model)
    with torch.no_grad():
        weights.model.norm.weight.mul_(-1)
    save_model(weights, tmp_path / "base_model")
    alone = ["--prompt", "released", "--out", tmp_path / "alone"]
    evaluate(*arguments_for(tmp_path / "base_model", data, tmp_path), *alone)
    capsys.readouterr()
    beside = ["--prompt", "released", "--base-model", tmp_path / "base_model"]
    evaluate(*arguments_for(model, data, tmp_path / "out"), *beside)
    assert asked[1] == asked[2] == asked[0]
    assert same_results(tmp_path / "out" / "base", tmp_path / "alone")
    ours, base = (results(tmp_path / "out" / name)["benchmarks"]["examples"] for name in ("", "base"))
    ours, base = (100 * result["totals"]["overall"]["accuracy"] for result in (ours, base))
    printed = words_of(capsys.readouterr().out)
    assert ours != base and f"model/parrot {ours:.2f} base: " in printed and f"base_model {base:.2f} " in printed


def test_a_limited_run_goes_on_without_the_limit(model, data, whole, tmp_path, asked):
    out = tmp_path / "out"
    evaluate(*arguments_for(model, data, out), "--limit", 6)
    partial = results(out)
    assert not partial["complete"] and partial["benchmarks"]["examples"]["totals"]["overall"]["replies"] == 6
    evaluate(*arguments_for(model, data, out), "--rows", 20)
    assert [*map(len, asked)] == [6, 18] and same_results(out, whole)


def test_other_settings_or_another_model_do_not_mix(model, data, whole, tmp_path, capsys):
    before = (whole / "predictions.jsonl").read_bytes()
    usual = arguments_for(model, data, whole)
    weights = load_model(model)
    with torch.no_grad():
        weights.model.norm.weight[3] += 1e-3
    save_model(weights, tmp_path / "other")
    fewer = write_rows(tmp_path / "fewer.jsonl", rows_of(data)[1:])
    for changed, words in (
        ([*usual, "--temperature", 0.5], "temperature was 0.0 and is 0.5"),
        ([*usual, "--no-think"], "think was True and is False"),
        ([*usual, "--max-reply-tokens", 4], "max_reply_tokens was 3 and is 4"),
        ([*usual, "--prompt", "released"], "prompt was 'train' and is 'released'"),
        (arguments_for(tmp_path / "other", data, whole), "model_fingerprint was"),
        (arguments_for(model, fewer, whole), "prompts_of_examples was"),
    ):
        assert exit_code(*changed) == 2
        error = capsys.readouterr().err
        assert words in error and "Choose another --out, or remove" in error
    assert (whole / "predictions.jsonl").read_bytes() == before
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "predictions.jsonl").write_bytes(before)
    assert exit_code(*arguments_for(model, data, tmp_path / "bare")) == 2
    assert "no settings.json beside them" in capsys.readouterr().err


def test_paths_may_move(model, data, whole, tmp_path, asked):
    out = cut_copy(whole, tmp_path / "out", 23)
    (tmp_path / "model").symlink_to(model)
    evaluate(*arguments_for(tmp_path / "model", data, out))
    assert [*map(len, asked)] == [1]


def test_samples_have_a_mean_and_a_spread_and_survive_a_kill(model, data, tmp_path, asked):
    extra = ["--temperature", 2, "--samples", 3, "--seed", 5]
    evaluate(*arguments_for(model, data, tmp_path / "out"), *extra)
    rows = rows_of(tmp_path / "out" / "predictions.jsonl")
    assert len(rows) == 72 == len({(row["id"], row["sample"]) for row in rows})
    right = [0, 0, 0]
    for case in load_benches([f"examples={data}"])[0].cases:
        for row in rows:
            if row["id"] == case.id:
                right[row["sample"]] += examples_benchmark.score(case, row["completion"]).ok
    overall = results(tmp_path / "out")["benchmarks"]["examples"]["totals"]["overall"]
    assert len(set(right)) > 1
    assert overall["by_sample"] == [count / 24 for count in right]
    assert overall["spread"] == pytest.approx(statistics.stdev(count / 24 for count in right))
    assert (overall["right"], overall["replies"]) == (sum(right), 72)
    asked.clear()
    out = cut_copy(tmp_path / "out", tmp_path / "cut", 41)  # in the middle of several cases
    evaluate(*arguments_for(model, data, out), *extra)
    assert len(asked) == 1 and same_results(out, tmp_path / "out")
    assert {*map(str, rows_of(out / "predictions.jsonl"))} == {*map(str, rows)}
    assert len(rows_of(out / "predictions.jsonl")) == 72
    extra[-1] = 6
    evaluate(*arguments_for(model, data, tmp_path / "reseeded"), *extra)
    assert rows_of(tmp_path / "reseeded" / "predictions.jsonl") != rows


def test_two_processes_write_the_same_results(model, data, whole, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "eval.py"]
    command += map(str, arguments_for(model, data, tmp_path / "out"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("overall") == 1
    assert len(rows_of(tmp_path / "out" / "predictions.jsonl")) == 24
    assert same_results(tmp_path / "out", whole) and not list((tmp_path / "out").glob("*rank*"))
