"""Each check before a run, failing and passing: on a tiny model and data, and with Qwen2.5's tokenizer."""

import json
import shutil
from collections import namedtuple
from dataclasses import asdict, replace

import pytest
import tiny
import tokenizers
from conftest import shared

from tooln1.config import Config
from tooln1.io.errors import UserError
from tooln1.prompt import format_reply
from tooln1.rewards import REWARDS
from tooln1.run import checks
from tooln1.run.checks import (
    Finding,
    disk,
    fits_memory,
    lengths,
    report,
    schedule,
    stop_ids,
    train_eval_overlap,
)
from tooln1.run.checks import template as check_template
from tooln1.run.memory import Estimate, Part
from tooln1.sft import demonstrations
from tooln1.task import Task
from tooln1.tokenizer import load_tokenizer

SETTINGS = asdict(Config(prompts_per_step=32, prompts_per_minibatch=16, tokens_per_microbatch=400))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny.write_model(folder)
    return folder


@pytest.fixture
def changed(place, tmp_path):
    """Loads the tiny tokenizer with another template, other stop ids."""

    def load(template="", stops=None):
        folder = shutil.copytree(place / "model", tmp_path / "changed", dirs_exist_ok=True)
        if template:
            (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
        if stops is not None:
            (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
        return load_tokenizer(folder)

    return load


def worst(findings, level, *words):
    """The most severe finding has this level and contains these words."""
    order = ("ok", "warning", "error")
    finding = max(findings, key=lambda finding: order.index(finding.level))
    assert finding.level == level, finding
    for word in words:
        assert word in finding.text, finding.text


def dialogue(name, *questions, source="talk"):
    turns = [{"role": "user", "content": questions[0]}]
    for question in questions[1:]:
        turns += [{"role": "assistant", "content": "[]"}, {"role": "tool", "content": question}]
    return replace(tiny.examples(1)[0], id=name, messages=turns, source=source)


# --- overlap of training and held-out examples


def test_examples_without_a_common_row_or_content_do_not_overlap():
    train, held_out = tiny.examples(12)[:8], tiny.examples(12)[8:]
    worst(train_eval_overlap(train, held_out, Task()), "ok", "0 of 4 held-out")
    worst(train_eval_overlap(train, [], Task()), "ok")


def test_a_common_source_row_is_an_overlap():
    train = [dialogue("toolace-1-3", "one"), dialogue("toolace-12-3", "two")]
    held_out = [dialogue("toolace-2-3", "four"), dialogue("toolace-1-5", "three"), dialogue("toolace-1-7", "five")]
    worst(train_eval_overlap(train, held_out, Task()), "warning", "2 of 3", "source row", "the first: toolace-1-5")
    held_out = [dialogue("xlam-9", "one more"), dialogue("toolace-12-3-irrelevant", "x")]
    worst(train_eval_overlap(train, held_out, Task()), "warning", "1 of 2")


def test_the_same_tools_in_any_order_and_first_message_are_an_overlap():
    tools = [{"name": "f"}, {"name": "g"}]
    train = [replace(dialogue("a", "one"), tools=tools), dialogue("b", "two")]
    held_out = [replace(dialogue("c", "one", "more"), tools=tools[::-1]), dialogue("d", "one"), dialogue("e", "six")]
    worst(train_eval_overlap(train, held_out, Task()), "warning", "1 of 3", "the first: c")


# --- template, stop ids


@pytest.mark.parametrize("reward", REWARDS)
def test_a_sound_template_passes_with_every_reward(place, reward):
    tokenizer = load_tokenizer(place / "model")
    no_call = replace(dialogue("n", "Hi", source="no call"), answer=[])
    examples = [*tiny.examples(9), dialogue("t", "Hi", '{"a": 1}'), no_call]
    for supervised in (True, False):
        for think in (True, False):
            found = check_template(tokenizer, examples, Task(think, reward), supervised)
            worst(found, "ok", "3 examples")  # one of each source


FOR_EACH = "{% for m in messages %}"
TEMPLATES = [  # what is replaced in the sound template, by what, the level, words of the finding
    (FOR_EACH, "{% for m in messages if m.role != 'system' %}", "error", "omits or changes system messages"),
    (FOR_EACH, "{% for m in messages if m.role != 'tool' %}", "warning", "omits or changes tool messages"),
    ("m['content']", "m['content'] | trim", "ok", "unchanged"),
    ("{% if add_generation_prompt %}", "{% if false %}", "warning", "ignores add_generation_prompt"),
    ("assistant\n", "assistant\n<think>", "warning", "writes <think> itself"),
    ("assistant\n", "assistant\nAnswer: ", "ok", "unchanged"),
]


@pytest.mark.parametrize(("old", "new", "level", "words"), TEMPLATES)
def test_what_a_template_changes_is_found(changed, old, new, level, words):
    examples = [*tiny.examples(3), dialogue("t", "Hi ", "42 degrees")]
    tokenizer = changed(tiny.CHAT_TEMPLATE.replace(old, new))
    worst(check_template(tokenizer, examples, Task(), False), level, words)


@pytest.mark.parametrize("reward", ["binary", "strict"])
def test_llama_the_whole_way(tmp_path, reward):
    """Messages, prompt, ids, reply and reward: LLaMA 3.1's template and special ids, over a tokenizer of bytes."""
    published, folder = shared("reference/configs/Llama-3.1-8B-Instruct"), tmp_path
    for file in ("chat_template.jinja", "generation_config.json"):
        shutil.copy(published / file, folder)
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}')
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {word: i for i, word in enumerate([*alphabet, *(f"unused {i}" for i in range(128_000 - 256))])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    special = [
        "begin_of_text",
        "end_of_text",
        "0",
        "1",
        "2",
        "3",
        "start_header_id",
        "end_header_id",
        "eom_id",
        "eot_id",
    ]
    backend.add_special_tokens([f"<|{name}|>" for name in special])  # 128000, 128001, ...
    backend.save(str(folder / "tokenizer.json"))
    llama = load_tokenizer(folder)

    one = replace(tiny.examples(1)[0], system="You add.\n")
    result = dialogue("t", "Hi", '[{"name": "add", "results": "3 µm"}]')
    for supervised in (True, False):
        worst(check_template(llama, [one, result], Task(rule=reward), supervised), "ok", "2 examples")
    worst(stop_ids(llama, 128_256), "ok", "128001 <|end_of_text|>, 128008 <|eom_id|>, 128009 <|eot_id|>")
    prompt = llama.prompt_ids(Task().messages(one))
    header = "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
    dates = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"  # the template's own words
    text = llama.decode(prompt)
    assert text.startswith(f"{header}{dates}You add.\n# Tool") and prompt[:2] == [128000, 128006]
    assert text.endswith("<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n") and 128000 not in prompt[1:]
    reply = replace(one, reply=format_reply(one.answer, "It adds."))
    (target,) = demonstrations([reply], llama, Task().messages)
    assert target.prompt == prompt and target.reply == [*llama.encode(reply.reply), 128009]
    wrong = llama.encode(format_reply([], "It adds."))
    for stop in llama.stop_ids:
        assert REWARDS[reward](llama.decode([*target.reply[:-1], stop]), one.answer) == 1
        assert REWARDS[reward](llama.decode([*wrong, stop]), one.answer) == 0


@pytest.mark.parametrize(("supervised", "level"), [(False, "warning"), (True, "error")])
def test_a_reply_must_end_with_a_stop_id(changed, supervised, level):
    found = list(check_template(changed(stops=[256]), tiny.examples(3), Task(), supervised))
    worst(found, level, "ends a reply with '<|im_end|>', none of the stop ids")
    letter = changed(stops=[*changed().encode("b"), 258])
    strict = check_template(letter, tiny.examples(3), Task(rule="strict"), supervised)
    worst(strict, "warning", "a right reply does not get the full strict reward")


def test_stop_ids_and_vocabulary(place, changed):
    worst(stop_ids(load_tokenizer(place / "model"), 259), "ok", "258 <|im_end|>, 256 <|endoftext|>")
    worst(stop_ids(load_tokenizer(place / "model"), 258), "error", "259 ids, the model 258")
    tokenizer = changed(template=tiny.CHAT_TEMPLATE)  # without eos_token
    (tokenizer._directory / "generation_config.json").unlink()
    worst(stop_ids(load_tokenizer(tokenizer._directory), 259), "error", "which token ends a reply")


# --- lengths, schedule


@pytest.mark.parametrize(
    ("context", "changes", "level", "words"),
    [
        (150, {}, "ok", "the longest prompt has 100 tokens, with a reply up to 150; the model's context is 150"),
        (None, {}, "ok", "not known"),
        (149, {}, "warning", "the model's context is 149: lower"),
        (100, {}, "error", "the model's context is 100: lower max_prompt_tokens"),
        (4096, {"tokens_per_microbatch": 149}, "warning", "tokens_per_microbatch is 149"),
        (4096, {"rollout_cache_tokens": 149}, "error", "rollout_cache_tokens is 149: raise it"),
        (4096, {"rollout_cache_tokens": 149, "mode": "sft"}, "ok", ""),
    ],
)
def test_prompts_and_replies_must_fit(context, changes, level, words):
    worst(lengths(SETTINGS | changes, context, 100, 50), level, words)


def test_the_schedule_must_have_work():
    worst(schedule(100, SETTINGS, 8), "ok", "21 steps of 32 prompts, 7.0 epochs of 3 steps")
    worst(schedule(100, SETTINGS | {"steps": 4}, 8), "ok", "4 steps", "1.3 epochs")
    worst(schedule(31, SETTINGS, 8), "error", "prompts_per_step is 32", "31 training examples")
    worst(schedule(100, SETTINGS, 20), "warning", "prompts_per_minibatch is 16", "20 processes")


# --- memory, disk


def test_memory_of_the_gpu_and_of_the_host():
    parts = (
        Part("whole weights", "GPU", (90, 0, 0, 0)),
        Part("weights", "GPU", (0, 100, 100, 100)),
        Part("moments", "host", (0, 30, 30, 30)),
        Part("activations", "GPU", (0, 0, 0, 60), "traced"),
    )
    needed = Estimate(parts, 0)

    def against(gpu, host):
        return list(fits_memory(needed, SETTINGS, {"GPU": gpu, "host": host}))

    assert [finding.level for finding in against(160, 30)] == ["ok", "ok"]
    worst(against(159, 30), "warning", "needs 160 bytes, 100 bytes of it certain", "tokens_per_microbatch (400)")
    worst(against(99, 30), "error", "it has 99 bytes on the GPU", "offload_optimizer (False)")
    assert "tokens_per_microbatch" not in against(99, 30)[0].text
    worst(against(160, 29), "error", "needs 30 bytes", "it has 29 bytes on the host")


@pytest.mark.parametrize(
    ("free", "level"), [(40_000, "ok"), (39_999, "warning"), (16_000, "warning"), (15_999, "error")]
)
def test_disk_for_checkpoints_and_the_export(monkeypatch, tmp_path, free, level):
    """1,000 parameters: 12,000 bytes a checkpoint (two kept, one being written), 4,000 the export."""
    asked = []
    monkeypatch.setattr(
        checks.shutil, "disk_usage", lambda path: asked.append(path) or namedtuple("Usage", "free")(free)
    )
    worst(disk(SETTINGS | {"run_dir": str(tmp_path / "all/runs")}, 1000, 1000), level, "a checkpoint takes 11.7 KiB")
    assert asked == [tmp_path]  # the nearest folder that exists


# --- what follows


def test_errors_stop_a_run_and_warnings_only_a_check(capsys):
    fine, warning, error = (Finding(level, level[:2], "text.") for level in ("ok", "warning", "error"))
    report([fine, warning], check=False)
    assert capsys.readouterr() == ("", "warning: wa: text.\n")
    with pytest.raises(UserError, match="^er: text.$"):
        report([fine, warning, error], check=False)
    report([fine], check=True)
    assert capsys.readouterr().out == "ok       ok: text.\n"
    with pytest.raises(UserError, match="1 of 2 findings, printed above, need a change: wa"):
        report([fine, warning], check=True)
