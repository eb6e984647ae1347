"""eval.py with a model: resumed and sampled runs, one process and two, a base model, and the numbers of train.py.

The model of these tests is random, but five of its tokens are complete replies, and only they and the special tokens
have weight in its head: some of its greedy answers are right and some wrong, depending on the prompt.
"""

import json
import shutil
import statistics
from pathlib import Path

import pytest
import tiny
import tokenizers
import torch
from tiny import read_rows, run_eval

from tooln1.benchmarks.examples import score
from tooln1.benchmarks.runner import GenerationConfig, load_benchmarks
from tooln1.config import Config
from tooln1.data import write_examples
from tooln1.distributed import World
from tooln1.model import load_model, save_model
from tooln1.prompt import format_reply
from tooln1.run import lifecycle, setup
from tooln1.sampler.sampler import Sampler
from tooln1.tokenizer import load_tokenizer

ONE, TWO = {"name": "add", "arguments": {"a": 1}}, {"name": "add", "arguments": {"a": 2}}
ANSWERS = [[ONE], [TWO], [ONE, TWO]]
REPLIES = [*(format_reply(answer, "t") for answer in ANSWERS), format_reply([ONE]), "<think>t</think> Nothing fits."]


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
    """24 examples whose answers are among the model's replies."""
    rows = [
        tiny.Example(f"e{i}", "s", "You add.\n", [{"name": "add"}], [{"role": "user", "content": text}], ANSWERS[i % 3])
        for i, text in enumerate(f"Add {i * i * 7} " * (1 + i % 4) for i in range(24))
    ]
    file = tmp_path_factory.mktemp("data") / "examples.jsonl"
    write_examples(rows, file)
    return file


def arguments(model: Path, data: Path, out: Path, rows: int = 2) -> list:
    where = ["--bench", f"examples={data}", "--model", model, "--out", out]
    return [*where, "--max-reply-tokens", 3, "--rows", rows, "--device", "cpu"]  # chunks of 4 * rows replies


@pytest.fixture(scope="module")
def undisturbed(model, data, tmp_path_factory) -> Path:
    """The --out directory of a run that was not interrupted."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert run_eval(*arguments(model, data, out)) == 0
    return out


@pytest.fixture
def calls(monkeypatch) -> list[dict]:
    """For each call of the sampler: prompt -> its max_new_tokens."""
    calls, generate = [], Sampler.generate

    def noted(self, prompts, max_new_tokens, **how):
        calls.append(dict(zip(map(tuple, prompts), max_new_tokens, strict=True)))
        return generate(self, prompts, max_new_tokens=max_new_tokens, **how)

    monkeypatch.setattr(Sampler, "generate", noted)
    return calls


def overall(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())["benchmarks"]["examples"]["totals"]["overall"]


def same_results(left: Path, right: Path) -> bool:
    summaries = [json.loads((out / "results.json").read_text())["benchmarks"] for out in (left, right)]
    return summaries[0] == summaries[1] and read_rows(left / "failures.jsonl") == read_rows(right / "failures.jsonl")


def test_the_score_is_the_one_that_train_logs(model, data, tmp_path, calls):
    paths = {"model": model, "train_data": data, "eval_data": data, "run_dir": tmp_path / "run"}
    paths = {name: str(path) for name, path in paths.items()} | {"eval_bench": f"examples={data}"}
    sizes = {"max_reply_tokens": 3, "prompts_per_step": 4, "prompts_per_minibatch": 4, "steps": 1}
    config, world = Config(**paths, **sizes, think=False), World(0, 1, torch.device("cpu"))
    run = setup.build(config, world, None, "", lambda doing: None)
    lifecycle.copy_weights(run.policy, run.sampler.model)
    metrics = lifecycle.evaluate(run)
    accuracy = metrics["heldout_accuracy"]
    assert 0 < accuracy < 1 and metrics == {"heldout_accuracy": accuracy, "examples_overall": accuracy}
    assert run_eval(*arguments(model, data, tmp_path / "out", rows=8), "--no-think") == 0
    assert overall(tmp_path / "out") == {"accuracy": accuracy, "right": round(24 * accuracy), "replies": 24}
    assert calls[0] == calls[1] == calls[2]


def test_a_killed_run_goes_on_after_its_last_chunk(model, data, undisturbed, tmp_path, calls, monkeypatch):
    """24 cases are three chunks of 8; the second call of the sampler is interrupted."""
    generate, out = Sampler.generate, tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "generate", lambda *args, **how: 1 / 0 if calls else generate(*args, **how))
        with pytest.raises(ZeroDivisionError):
            run_eval(*arguments(model, data, out))
    assert read_rows(out / "predictions.jsonl") == read_rows(undisturbed / "predictions.jsonl")[:8]
    assert run_eval(*arguments(model, data, out)) == 0
    assert [*map(len, calls)] == [8, 8, 8] and same_results(out, undisturbed)
    shutil.copytree(model, tmp_path / "moved")  # paths may change; and now nothing is left to do
    assert run_eval(*arguments(tmp_path / "moved", data, out)) == 0
    assert len(calls) == 3 and same_results(out, undisturbed)


def test_other_settings_or_another_model_are_refused(model, data, undisturbed, tmp_path, capsys):
    usual = arguments(model, data, undisturbed)
    weights = load_model(model)
    with torch.no_grad():
        weights.model.norm.weight[3] += 1e-3
    save_model(weights, tmp_path / "other")
    fewer = tiny.write_rows(tmp_path / "fewer.jsonl", read_rows(data)[1:])
    replies = tiny.write_rows(tmp_path / "replies.jsonl", [{"id": "e0", "completion": ""}])
    for changed, words in (
        ([*usual, "--temperature", 0.5], "temperature was 0.0 and is 0.5"),
        ([*usual, "--prompt", "released"], "prompt was 'train' and is 'released'"),
        (arguments(tmp_path / "other", data, undisturbed), "model_fingerprint was"),
        (arguments(model, fewer, undisturbed), "prompts_fingerprint was"),
        (["--bench", f"examples={data}", "--predictions", replies, "--out", undisturbed], "choose another --out"),
    ):
        assert run_eval(*changed) == 2
        assert words in capsys.readouterr().err


def test_prompts_beyond_the_context_are_a_fault_of_their_own(model, data, tmp_path, calls):
    tokenizer, (loaded,) = load_tokenizer(model), load_benchmarks([f"examples={data}"])
    lengths = {case.id: len(tokenizer.prompt_ids(GenerationConfig().messages(case))) for case in loaded.cases}
    context = sorted(lengths.values())[12]
    too_long = {name for name, length in lengths.items() if length >= context}
    shutil.copytree(model, tmp_path / "short")
    config = json.loads((model / "config.json").read_text()) | {"max_position_embeddings": context}
    (tmp_path / "short" / "config.json").write_text(json.dumps(config))
    out = tmp_path / "out"
    for _ in range(2):  # the second time nothing is left to do
        assert run_eval(*arguments(tmp_path / "short", data, out, rows=8), "--max-reply-tokens", 4096) == 0
        assert 0 < len(too_long) < 24 and [*map(len, calls)] == [24 - len(too_long)]
    assert all(max_new_tokens == context - len(prompt) for prompt, max_new_tokens in calls[0].items())
    faults = [row["id"] for row in read_rows(out / "failures.jsonl") if row["why"] == "prompt_too_long"]
    assert sorted(faults) == sorted(too_long)
    again = ["--bench", f"examples={data}", "--predictions", out / "predictions.jsonl", "--out", tmp_path / "again"]
    assert run_eval(*again) == 0 and same_results(out, tmp_path / "again")


def test_a_base_model_gets_the_same_prompts_and_its_own_row(model, data, tmp_path, calls, capsys):
    weights = load_model(model)
    with torch.no_grad():
        weights.model.norm.weight.mul_(-1)
    save_model(weights, tmp_path / "base_model")
    out, options = tmp_path / "out", ["--prompt", "released", "--base-model", tmp_path / "base_model"]
    assert run_eval(*arguments(model, data, out, rows=8), *options) == 0
    assert calls[0] == calls[1]
    assert "please make tool_calls an empty list" in load_tokenizer(model).decode(next(iter(calls[0])))
    ours, base = (100 * overall(folder)["accuracy"] for folder in (out, out / "base"))
    printed = " ".join(capsys.readouterr().out.split())
    assert ours != base and f"model/parrot {ours:.2f} base: " in printed and f"base_model {base:.2f} " in printed


def test_samples_have_a_mean_and_a_spread(model, data, tmp_path, calls):
    extra, out = ["--temperature", 2, "--samples", 3, "--seed", 5], tmp_path / "out"
    assert run_eval(*arguments(model, data, out, rows=6), *extra) == 0
    assert [*map(len, calls)] == [8, 8, 8]  # chunks of 4 * 6 replies
    rows, right = read_rows(out / "predictions.jsonl"), [0, 0, 0]
    assert len(rows) == 72 == len({(row["id"], row["sample"]) for row in rows})
    cases = {case.id: case for case in load_benchmarks([f"examples={data}"])[0].cases}
    for row in rows:
        right[row["sample"]] += score(cases[row["id"]], row["completion"]).ok
    assert len(set(right)) > 1 and overall(out)["by_sample"] == [count / 24 for count in right]
    assert overall(out)["spread"] == pytest.approx(statistics.stdev(count / 24 for count in right))
    for folder, seed in (("one_chunk", 5), ("reseeded", 6)):
        assert run_eval(*arguments(model, data, tmp_path / folder, rows=18), *extra[:-1], seed) == 0
        assert (read_rows(tmp_path / folder / "predictions.jsonl") == rows) == (seed == 5)


@pytest.mark.slow
def test_two_processes_give_the_same_results(model, data, undisturbed, tmp_path):
    run = tiny.torchrun(2, "eval.py", *map(str, arguments(model, data, tmp_path / "out", rows=1)))
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("overall") == 1 and len(read_rows(tmp_path / "out" / "predictions.jsonl")) == 24
    assert same_results(tmp_path / "out", undisturbed)
