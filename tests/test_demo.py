"""The embedded demo: its generator, its tokenizer, and the committed files, which must be what the generator makes."""

import json
import random

import pytest

from tooln1.config import REPOSITORY
from tooln1.data import write_examples
from tooln1.demo import requests as demo
from tooln1.demo.__main__ import SPECIAL, TAGS, write_model, write_tokenizer
from tooln1.model import load_model, sequence_logits
from tooln1.prompt import build_messages, parse_reply
from tooln1.rewards import REWARDS
from tooln1.tokenizer import load_tokenizer

ASSETS = REPOSITORY / "assets" / "demo"


@pytest.fixture(scope="module")
def splits():
    return {split: demo.examples_of(split) for split in ("train", "heldout")}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(ASSETS / "model")


def call_texts(examples):
    return {json.dumps(call, sort_keys=True) for example in examples for call in example.answer}


# ---- the generator ----


def test_held_out_calls_occur_in_no_other_split(splits, monkeypatch):
    monkeypatch.setitem(demo.SIZES, "pretrain", 3000)
    monkeypatch.setitem(demo.SIZES, "warmstart", 1000)
    held_out = call_texts(splits["heldout"])
    assert len(held_out) > 300
    assert not held_out & call_texts(splits["train"] + demo.examples_of("pretrain") + demo.examples_of("warmstart"))


def test_the_first_teacher_is_right_and_the_second_often_wrong_in_the_arguments_alone(splits):
    binary, rng, right = REWARDS["binary"], random.Random(0), 0
    for example in splits["train"]:
        assert binary(demo.reply_with(example.answer), example.answer) == 1.0
        calls = demo.with_habits(example, rng)
        reply = demo.reply_with(calls)
        assert parse_reply(reply).is_strict
        assert [call["name"] for call in calls] == [call["name"] for call in example.answer][: len(calls)]
        assert binary(reply, example.answer) == (calls == example.answer)
        right += calls == example.answer
    assert 0.3 < right / len(splits["train"]) < 0.6


# ---- the files ----


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_committed_data_are_what_the_generator_makes(split, splits, tmp_path):
    write_examples(splits[split], tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_bytes() == (ASSETS / f"{split}.jsonl").read_bytes()


def test_committed_tokenizer_is_what_the_command_makes(tmp_path):
    write_tokenizer(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert json.loads((tmp_path / name).read_text()) == json.loads((ASSETS / "model" / name).read_text())


def test_committed_model_is_finite_and_a_random_one_has_its_shape(tmp_path, tokenizer):
    model = load_model(ASSETS / "model")
    assert model.config.num_parameters < 1.2e6
    assert sequence_logits(model, tokenizer.encode("Play Imagine.")).isfinite().all()
    write_model(tmp_path, ASSETS / "model")
    again = load_model(tmp_path)
    assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


# ---- the tokenizer ----


def test_tokenizer_round_trips_and_prompts_and_replies_are_short(splits, tokenizer):
    for example in splits["heldout"]:
        prompt = tokenizer.render(build_messages(example), add_generation_prompt=True)
        for text, most in ((prompt, 200), (demo.reply_with(example.answer), 60)):
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids) == text and len(ids) <= most
    for text in ("Zürich, naïve café ☕ 中文\t\n\r  x", "", "<tool_call", '{"a": [1, -2.50e3]}', "get_wind_", "don't"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_word_has_the_same_tokens_in_a_request_and_in_json(tokenizer):
    for word in (word for words in demo.VALUES.values() for word in words):
        for before, after in (("Go to ", ", please"), ('{"city": "', '", "hour": 7}')):
            around = (tokenizer.encode(before), tokenizer.encode(after))
            assert tokenizer.encode(before + word + after) == [*around[0], *tokenizer.encode(word), *around[1]]


def test_special_tokens_and_stop_ids(tokenizer):
    ids = {text: tokenizer.encode(text) for text in (*SPECIAL, *TAGS)}
    assert all(len(token) == 1 for token in ids.values())
    assert set(tokenizer.stop_ids) == {ids["<|im_end|>"][0], ids["<|endoftext|>"][0]}
    assert tokenizer.decode(ids["<tool_call>"] + ids["<|im_end|>"], skip_special_tokens=True) == "<tool_call>"
