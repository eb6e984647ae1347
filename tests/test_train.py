"""The loop end to end on a tiny model: what it writes, that it learns, resumes and agrees with itself."""

import os
import signal
from pathlib import Path

import pytest
import tiny
import torch
from tiny import measured, run

import train
from tooln1.config import load_config, to_toml
from tooln1.data import read_examples
from tooln1.io.errors import Stopped, UserError
from tooln1.io.jsonl import read_jsonl
from tooln1.model import load_model
from tooln1.prompt import build_messages
from tooln1.rewards import REWARDS
from tooln1.sft import demonstrations, target_text
from tooln1.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model and data."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny.write_model(folder)
    tiny.write_data(folder)
    return folder


def weights(run_dir: Path) -> list[torch.Tensor]:
    return list(load_model(run_dir / "hf").parameters())


@pytest.fixture(scope="module")
def finished(place):
    return run(place, "finished", eval_before_training=True)


def test_the_run_directory_is_complete(finished, place):
    names = {path.name for path in finished.iterdir()}
    assert names == {"config.toml", "metrics.jsonl", "rollouts.jsonl", "checkpoints", "hf"}
    config = load_config(["--config", str(finished / "config.toml")], train.DEFAULT)
    assert to_toml(config) == (finished / "config.toml").read_text()
    there = sorted(path.name for path in (finished / "checkpoints").iterdir())
    assert there == ["step-000002", "step-000003"]
    rows = measured(finished)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert [row["step"] for row in rows if "heldout_accuracy" in row] == [0, 2, 3]
    wanted = {"reward", "accuracy", "format_ok", "kl", "entropy", "clip_fraction", "policy_loss", "loss", "grad_norm"}
    wanted |= {f"reply_tokens_{part}" for part in ("mean", "min", "max")} | {"truncated_fraction", "learning_rate"}
    wanted |= {"zero_variance_fraction", "sampler_logprob_gap", "skipped_steps"}
    assert wanted <= rows[1].keys()
    times = read_jsonl(finished / "metrics.jsonl")[1]
    for phase in ("rollout", "reward", "logprobs", "update", "sync", "step"):
        assert times[f"seconds/{phase}"] >= 0
    assert times["tokens_per_second/rollout"] > 0 and times["tokens_per_second/update"] > 0
    # untrained policies start where the reference stands; sampler and trainer agree on log-probs
    assert rows[1]["sampler_logprob_gap"] < 1e-4
    assert rows[2]["kl"] > 0
    assert not any(path.name.startswith(".") for path in finished.rglob("*"))
    assert load_tokenizer(finished / "hf").stop_ids == load_tokenizer(place / "model").stop_ids


def test_a_resumed_run_ends_where_the_whole_one_does(finished, place, capsys):
    run(place, "resumed", steps=2, eval_before_training=True, resume="auto")
    assert "no checkpoint in" in capsys.readouterr().out
    with pytest.raises(UserError, match="step-000009 cannot be resumed from: .*No such file"):
        run(place, "resumed", steps=3, resume=str(place / "resumed/checkpoints/step-000009"))
    run(place, "resumed", steps=3, eval_before_training=True, resume="auto")
    assert "step-000002 after step 2" in capsys.readouterr().out
    assert measured(place / "resumed") == measured(finished)
    for ours, theirs in zip(weights(place / "resumed"), weights(finished), strict=True):
        assert torch.equal(ours, theirs)


def test_sampler_weights_that_are_released_in_the_update_change_nothing(finished, place, monkeypatch):
    held, update = [], train.update

    def watched(run, *rest):
        held.append(sum(parameter.untyped_storage().size() for parameter in run.sampler.model.parameters()))
        update(run, *rest)

    monkeypatch.setattr(train, "update", watched)
    tiny.assert_same_run(tiny.run(place, "released", sampler_weights="release", eval_before_training=True), finished)
    assert len(held) == 6 and not any(held)


def test_it_learns_what_is_rewarded(place, monkeypatch):
    """Replies that begin with one of the first letters pay: from a quarter of them to nearly all."""
    monkeypatch.setitem(REWARDS, "binary", lambda text, answer: float(text[:1].lower() in "abcdefghijklm"))
    how = dict(steps=6, group_size=8, prompts_per_minibatch=4, max_reply_tokens=1, learning_rate=1e-2)
    rewards = [row["reward"] for row in measured(run(place, "learns", eval_every=0, save_every=0, **how))]
    assert rewards[0] < 0.5 and rewards[-1] > 0.9, rewards


def test_replies_that_were_cut_off_count_neither_in_the_loss_nor_in_its_denominator(place, monkeypatch):
    counted = []
    monkeypatch.setattr(train, "loss_total", lambda how, lengths, cap: counted.append(len(lengths)) or 1)
    folder = run(place, "masked", steps=1, eval_every=0, mask_truncated=True, max_reply_tokens=300)
    finished = [row["reply"].endswith(("<|im_end|>", "<|endoftext|>")) for row in read_jsonl(folder / "rollouts.jsonl")]
    assert len(counted) == 2 and 0 < sum(counted) == sum(finished) < 12


DYNAMIC = dict(prompts_per_step=10, prompts_per_minibatch=5, steps=2, save_every=0, eval_every=9, dynamic_sampling=4)


@pytest.fixture
def coin(monkeypatch):
    """A reward of which three of four groups of three get unequal values."""
    monkeypatch.setitem(REWARDS, "binary", lambda text, answer: float(sum(text.encode()) % 2))


def test_dynamic_sampling_replaces_groups_with_equal_rewards(place, coin, monkeypatch):
    trained, rows_of = [], train.rows_to_train_on
    monkeypatch.setattr(
        train, "rows_to_train_on", lambda *how: trained.append((how[0], rows_of(*how))) or trained[-1][1]
    )
    folder, drawn = run(place, "dynamic", **DYNAMIC), 0
    for row, (rewards, rows) in zip(measured(folder), trained, strict=True):
        unequal = [0 < sum(group) < 3 for group in rewards.view(-1, 3).tolist()]
        assert row["prompts_drawn"] == len(unequal) and row["replies_sampled"] == len(rewards)
        assert row["zero_variance_fraction"] == pytest.approx(1 - sum(unequal) / len(unequal))
        assert len(rows) == 30 and all(unequal[row // 3] for row in rows)
        assert 1 < row["sampling_rounds"] < 5
        drawn += len(unequal)
    replies = [(row["step"], row["id"], row["reply"]) for row in read_jsonl(folder / "rollouts.jsonl")]
    assert len(replies) == 3 * drawn > 3 * 2 * 12  # more than there are examples: some are met again, in other rounds,
    assert len(set(replies)) == len(replies)  # and answered anew


def test_dynamic_sampling_stopped_between_rounds_resumes_bit_equal(place, coin, monkeypatch):
    calls, sample, whole = [], train.sample, run(place, "dynamic-whole", **DYNAMIC)

    def signalled(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return sample(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(train, "sample", signalled)
        run(place, "dynamic-stopped", **DYNAMIC)
    assert len(measured(place / "dynamic-stopped")) == 1
    run(place, "dynamic-stopped", resume="auto", **DYNAMIC)
    for log in ("metrics.jsonl", "rollouts.jsonl"):
        assert measured(place / "dynamic-stopped", log) == measured(whole, log)
    assert all(map(torch.equal, weights(place / "dynamic-stopped"), weights(whole)))


def test_shuffled_rewards_are_the_same_rewards_elsewhere(place, monkeypatch):
    monkeypatch.setitem(REWARDS, "binary", lambda text, answer: float(len(text) % 7))
    how = dict(steps=1, eval_every=0, save_every=0)
    plain, shuffled = (
        read_jsonl(run(place, f"shuffle-{on}", shuffle_rewards=on, **how) / "rollouts.jsonl") for on in (False, True)
    )
    assert sorted(row["reward"] for row in plain) == sorted(row["reward"] for row in shuffled)
    assert {(row["reply"], row["reward"]) for row in plain} != {(row["reply"], row["reward"]) for row in shuffled}


def test_supervised_training_lowers_the_loss(place):
    how = dict(mode="sft", steps=8, prompts_per_minibatch=4, learning_rate=3e-3, eval_every=8)
    folder = run(place, "sft", **how)
    rows = measured(folder)
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    assert rows[0]["loss"] == pytest.approx(rows[0]["cross_entropy"], rel=1e-5)


def test_demonstrations_end_with_the_stop_token(place):
    tokenizer = load_tokenizer(place / "model")
    pairs = read_examples(place / "data.jsonl")
    assert target_text(pairs[3]) == '<tool_call>[{"name": "add", "arguments": {"a": 3, "b": 111}}]</tool_call>'
    (demonstration,) = demonstrations(pairs[3:4], tokenizer, build_messages)
    assert tokenizer.decode(demonstration.reply) == target_text(pairs[3]) + "<|im_end|>"
