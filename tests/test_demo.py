"""The embedded demo: its generator, its tokenizer, and the committed files, which must be what the generator makes."""

import json
import random
from collections import Counter

import pytest

from tooln1.config import REPOSITORY
from tooln1.data import read_examples, write_examples
from tooln1.demo import requests as demo
from tooln1.demo.__main__ import write_tokenizer
from tooln1.demo.requests import FAMILIES, TOOLS, VALUES
from tooln1.model import load_model, sequence_logits
from tooln1.prompt import build_messages, parse_reply
from tooln1.rewards import REWARDS
from tooln1.sft import demonstrations
from tooln1.tokenizer import load_tokenizer

ASSETS = REPOSITORY / "assets" / "demo"
TYPES = {"str": str, "int": int, "float": float, "bool": bool, "List[str]": list}


@pytest.fixture(scope="module")
def splits():
    return {split: demo.examples_of(split) for split in ("train", "heldout")}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(ASSETS / "model")


def call_texts(examples):
    return {json.dumps(call, sort_keys=True) for example in examples for call in example.answer}


def prompt(tokenizer, example):
    return tokenizer.render(build_messages(example), add_generation_prompt=True)


# ---- the generator ----


def test_the_same_seed_gives_the_same_examples_and_another_seed_others(splits):
    assert demo.examples_of("train") == splits["train"]
    assert demo.examples_of("train", seed=1)[:20] != splits["train"][:20]


def test_held_out_calls_occur_in_no_other_split(splits, monkeypatch):
    monkeypatch.setitem(demo.SIZES, "pretrain", 3000)
    monkeypatch.setitem(demo.SIZES, "warmstart", 1000)
    held_out = call_texts(splits["heldout"])
    seen = call_texts(splits["train"] + demo.examples_of("pretrain") + demo.examples_of("warmstart"))
    assert len(splits["heldout"]) >= 400 and len(held_out) > 300
    assert not held_out & seen


def test_splits_draw_different_requests(splits, monkeypatch):
    monkeypatch.setitem(demo.SIZES, "pretrain", 1000)

    def requests(examples):
        return {example.messages[0]["content"] for example in examples}

    overlap = requests(splits["train"]) & requests(demo.examples_of("pretrain"))
    assert len(overlap) < 0.2 * len(splits["train"])  # short requests of few values meet by chance


def test_answers_fit_the_schemas_and_omit_only_what_is_optional(splits):
    for example in (*splits["train"], *splits["heldout"]):
        schemas = {tool["name"]: tool["parameters"] for tool in example.tools}
        for call in example.answer:
            parameters = schemas[call["name"]]
            assert set(call["arguments"]) <= set(parameters)
            for key, about in parameters.items():
                assert ("default" in about) == about["type"].endswith(", optional")
                kind = TYPES[about["type"].removesuffix(", optional")]
                if key in call["arguments"]:
                    assert type(call["arguments"][key]) is kind
                else:
                    assert "default" in about
                if "default" in about:
                    assert type(about["default"]) is kind


def test_every_value_of_an_answer_is_said_in_the_request(splits):
    for example in splits["train"]:
        request = example.messages[0]["content"]
        for call in example.answer:
            for value in call["arguments"].values():
                if not isinstance(value, bool):
                    assert all(str(part) in request for part in (value if isinstance(value, list) else [value]))


def test_the_set_has_the_variety_it_promises(splits):
    examples = splits["train"]
    assert len(TOOLS) >= 40 and len({tool["name"] for tool in TOOLS}) == len(TOOLS)
    assert all(len(tool["phrasings"]) >= 2 for tool in TOOLS)
    used = Counter(call["name"] for example in examples for call in example.answer)
    assert set(used) == {tool["name"] for tool in TOOLS}
    assert {len(example.tools) for example in examples} == set(demo.CANDIDATES)
    two = sum(len(example.answer) == 2 for example in examples) / len(examples)
    assert two == pytest.approx(demo.TWO_CALLS, abs=0.04)
    types = {about["type"] for example in examples for tool in example.tools for about in tool["parameters"].values()}
    assert {"str", "int", "float", "List[str]", "bool, optional", "int, optional", "str, optional"} <= types
    assert {type(value) for e in examples for call in e.answer for value in call["arguments"].values()} == {
        str,
        int,
        float,
        bool,
        list,
    }


def test_a_sibling_of_a_wanted_tool_is_among_the_candidates(splits):
    family_of = {tool["name"]: number for number, family in enumerate(FAMILIES) for tool in family}
    offered = [
        any(family_of[tool["name"]] == family_of[call["name"]] and tool["name"] != call["name"] for tool in e.tools)
        for e in splits["train"]
        for call in e.answer[:1]
        if len(e.answer) == 1
    ]
    assert all(offered)


def test_values_are_single_words():
    for words in VALUES.values():
        assert all(word.isalpha() for word in words)


def test_optional_parts_of_a_phrase():
    tool = {
        "name": "f",
        "parameters": {"a": {"kind": "5-5"}, "b": {"kind": "", "default": False}},
        "phrasings": ["say {a}[ on{b:true}| off{b:false}]."],
    }
    seen = {}
    rng = random.Random(0)
    for _ in range(50):
        request, call = demo.draw_call(tool, rng)
        seen[request] = call["arguments"]
    assert seen == {"say 5.": {"a": 5}, "say 5 on.": {"a": 5, "b": True}, "say 5 off.": {"a": 5, "b": False}}


# ---- the teachers ----


def test_the_good_teacher_is_right_and_the_bad_one_often_wrong_in_the_arguments_alone(splits):
    binary, rng = REWARDS["binary"], random.Random(0)
    right, faulty = 0, 0
    for example in splits["train"]:
        assert binary(demo.reply_with(example.answer), example.answer) == 1.0
        calls = demo.with_habits(example, rng)
        reply = demo.reply_with(calls)
        assert parse_reply(reply).is_strict
        assert [call["name"] for call in calls] == [call["name"] for call in example.answer][: len(calls)]
        right += binary(reply, example.answer)
        faulty += calls != example.answer
    assert right + faulty == len(splits["train"])
    assert 0.3 < right / len(splits["train"]) < 0.6


def test_each_habit_leaves_the_right_way_a_fair_share():
    for share in (demo.STRING_NUMBERS, demo.FORGOTTEN_CALL, demo.FORGOTTEN_OPTION):
        assert 0.35 <= 1 - share <= 0.45


def test_copying_exercises_say_the_solution(monkeypatch):
    monkeypatch.setitem(demo.SIZES, "copy", 200)
    pairs = demo.copying()
    assert pairs == demo.copying()
    lookups = 0
    for example in pairs:
        request, reply = example.messages[0]["content"], example.reply
        request = example.messages[0]["content"]
        if reply.startswith("{"):
            lookups += 1
            for key, value in json.loads(reply).items():
                assert f"{key} {value}" in request
        else:
            assert reply == request
    assert 60 < lookups < 140


# ---- the files ----


def test_data_command_writes_all_files_and_rows_to_imitate(tmp_path, monkeypatch):
    for split in demo.SIZES:
        monkeypatch.setitem(demo.SIZES, split, 12)
    demo.write_data(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "copy.jsonl",
        "heldout.jsonl",
        "pretrain.jsonl",
        "train.jsonl",
        "warmstart.jsonl",
    ]
    for split in ("copy", "pretrain", "warmstart"):
        pairs = read_examples(tmp_path / f"{split}.jsonl")
        assert len(pairs) == 12 and all(example.reply for example in pairs)
    for example in read_examples(tmp_path / "pretrain.jsonl"):
        assert REWARDS["binary"](example.reply, example.answer) == 1.0


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_committed_data_are_what_the_generator_makes(split, splits, tmp_path):
    write_examples(splits[split], tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_bytes() == (ASSETS / f"{split}.jsonl").read_bytes()
    assert read_examples(ASSETS / f"{split}.jsonl") == splits[split]


def test_committed_tokenizer_is_what_the_command_makes(tmp_path):
    write_tokenizer(tmp_path)
    made, committed = (json.loads((folder / "tokenizer.json").read_text()) for folder in (tmp_path, ASSETS / "model"))
    for part in ("model", "added_tokens", "pre_tokenizer"):
        assert made[part] == committed[part]
    for name in ("tokenizer_config.json", "generation_config.json"):
        assert json.loads((tmp_path / name).read_text()) == json.loads((ASSETS / "model" / name).read_text())


def test_assets_are_small():
    assert sum(file.stat().st_size for file in ASSETS.rglob("*") if file.is_file()) < 8e6


def test_committed_model_is_finite_and_a_random_one_has_its_shape(tmp_path, tokenizer):
    model = load_model(ASSETS / "model")
    assert model.config.num_parameters < 1.2e6
    assert sequence_logits(model, tokenizer.encode("Play Imagine.")).isfinite().all()
    demo.write_model(tmp_path, ASSETS / "model")
    again = load_model(tmp_path)
    assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


# ---- the tokenizer ----


def test_tokenizer_round_trips(splits, tokenizer):
    for example in splits["heldout"]:
        for text in (prompt(tokenizer, example), demo.reply_with(example.answer)):
            assert tokenizer.decode(tokenizer.encode(text)) == text
    for text in ("Zürich, naïve café ☕ 中文\t\n\r  x", "", "<tool_call", '{"a": [1, -2.50e3]}', "get_wind_", "don't"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_prompts_and_replies_are_short(splits, tokenizer):
    for example in (*splits["train"], *splits["heldout"]):
        assert len(tokenizer.encode(prompt(tokenizer, example))) <= 200
        assert len(tokenizer.encode(demo.reply_with(example.answer))) <= 60


def test_a_word_has_the_same_tokens_in_a_request_and_in_json(tokenizer):
    words = [word for words in VALUES.values() for word in words.split()]
    for word in words:
        tokens = tokenizer.encode(word)
        for before, after in (("Go to ", ", please"), ('{"city": "', '", "hour": 7}')):
            around = (tokenizer.encode(before), tokenizer.encode(after))
            assert tokenizer.encode(before + word + after) == [*around[0], *tokens, *around[1]]
    assert sum(len(tokenizer.encode(word)) == 1 for word in words) > 0.99 * len(words)
    assert len(tokenizer.encode("1234")) == 4


def test_special_tokens_and_stop_ids(tokenizer):
    ids = {text: tokenizer.encode(text) for text in (*demo.SPECIAL, *demo.TAGS)}
    assert all(len(token) == 1 for token in ids.values())
    assert set(tokenizer.stop_ids) == {ids["<|im_end|>"][0], ids["<|endoftext|>"][0]}
    assert tokenizer.decode(ids["<tool_call>"] + ids["<|im_end|>"], skip_special_tokens=True) == "<tool_call>"


def test_template_is_chatml_and_a_reply_ends_with_its_stop_token(splits, tokenizer):
    example = splits["heldout"][0]
    text = prompt(tokenizer, example)
    system, user = (message["content"] for message in build_messages(example))
    assert text == (
        f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"
    )
    (rollout,) = demonstrations([(example, demo.reply_with(example.answer))], tokenizer, think=True, on_prompt=False)
    assert rollout.prompt == tokenizer.encode(text)
    assert tokenizer.decode(rollout.reply) == demo.reply_with(example.answer) + "<|im_end|>"
