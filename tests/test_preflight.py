"""Each check before a run, failing and passing: on a tiny model and data, and with Qwen2.5's tokenizer."""

import json
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import tokenizers
from conftest import shared
from tooln1.run.preflight import (
    Finding,
    disk,
    lengths,
    longest_prompt,
    memory,
    report,
    sample,
    schedule,
    template,
    train_eval_overlap,
)

from tooln1.data import read_examples
from tooln1.io.model_config import parse_config
from tooln1.prompt import build_messages
from tooln1.rewards import REWARDS
from tooln1.run import preflight
from tooln1.run.memory import estimate
from tooln1.tokenizer import load_tokenizer

GIB = 1 << 30


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny.write_model(folder)
    return folder


@pytest.fixture
def changed(place, tmp_path):
    """Loads the tiny tokenizer with another template, other stop ids, or another normalizer."""

    def load(template="", stops=None, normalizer=None):
        folder = shutil.copytree(place / "model", tmp_path / "changed", dirs_exist_ok=True)
        if template:
            (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
        if stops is not None:
            (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
        if normalizer:
            backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
            backend.normalizer = normalizer
            backend.save(str(folder / "tokenizer.json"))
        return load_tokenizer(folder)

    return load


def levels(findings):
    return [finding.level for finding in findings]


def only(findings, level, *words):
    """There is one finding, of this level, and it says these words."""
    assert levels(findings) == [level], findings
    for word in words:
        assert word in findings[0].text, findings[0].text


def dialogue(name, *questions, source="talk"):
    turns = [{"role": "user", "content": questions[0]}]
    for question in questions[1:]:
        turns += [{"role": "assistant", "content": "[]"}, {"role": "tool", "content": question}]
    return replace(tiny.examples(1)[0], id=name, messages=turns, source=source)


# ------------------------------------------------------------------------------------------------ train_eval_overlap


def test_sides_without_a_common_row_or_query_are_clean():
    train, held_out = tiny.examples(12)[:8], tiny.examples(12)[8:]
    only(train_eval_overlap(train, held_out), "ok", "none of 4 held-out", "with 8")
    only(train_eval_overlap(train, []), "ok", "no held-out examples")


def test_a_common_source_row_is_a_leak():
    train = [dialogue("toolace-1-3", "one"), dialogue("toolace-12-3", "two")]
    held_out = [dialogue("toolace-1-5", "three"), dialogue("toolace-2-3", "four"), dialogue("toolace-1-7", "five")]
    only(train_eval_overlap(train, held_out), "warning", "2 of 3", "source row", "toolace-1-5, as toolace-1-3")
    only(
        train_eval_overlap(train, [dialogue("xlam-9", "one more"), dialogue("toolace-12-3-irrelevant", "x")]),
        "warning",
        "1 of 2",
    )


def test_the_same_query_and_tools_are_a_leak_in_any_order_of_the_tools():
    tools = [{"name": "f"}, {"name": "g"}]
    train = [replace(dialogue("a", "one"), tools=tools), dialogue("b", "two")]
    held_out = [replace(dialogue("c", "one", "more"), tools=tools[::-1]), dialogue("d", "one"), dialogue("e", "six")]
    only(
        train_eval_overlap(train, held_out),
        "warning",
        "1 of 3",
        "query and the tools",
        "the first: c, as a in training",
    )
    assert levels(train_eval_overlap(train, [*held_out, dialogue("b", "seven")])) == ["warning", "warning"]


def test_the_training_file_itself_gives_training_accuracy():
    examples = tiny.examples(6)
    only(train_eval_overlap(examples, examples[:4]), "warning", "all 4 held-out examples", "training accuracy")
    others = [replace(example, id=f"other-{example.id}") for example in examples]
    only(
        train_eval_overlap(examples, others), "warning", "6 of 6", "query and the tools"
    )  # copies, but not the file itself


def test_the_demo_has_no_leak():
    data = Path(__file__).resolve().parents[1] / "assets" / "demo"
    only(
        train_eval_overlap(read_examples(data / "train.jsonl"), read_examples(data / "heldout.jsonl")),
        "ok",
        "500",
        "1280",
    )


# ------------------------------------------------------------------------------------------------ template


@pytest.mark.parametrize("reward", REWARDS)
def test_a_sound_template_passes_with_every_reward(place, reward):
    tokenizer = load_tokenizer(place / "model")
    no_call = replace(dialogue("n", "Hi", source="no call"), answer=[])
    examples = [*tiny.examples(9), dialogue("t", "Hi", '{"a": 1}'), no_call]
    for supervised in (False, True):
        only(template(tokenizer, examples, True, reward, supervised), "ok", "5 examples")  # 3 of 9, and the others
        only(template(tokenizer, examples, False, reward, supervised), "ok")


def test_a_template_that_loses_text_is_an_error(changed):
    silent = tiny.CHAT_TEMPLATE.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
    found = template(changed(silent), tiny.examples(9), True, "binary")
    only(found, "error", "leaves out or changes what system say", "3 of 3", "tiny-0")


def test_what_holds_for_some_examples_is_a_warning(changed):
    deaf = tiny.CHAT_TEMPLATE.replace("{% for m in messages %}", "{% for m in messages if m.role != 'tool' %}")
    examples = [*tiny.examples(3), dialogue("t", "Hi", "42 degrees")]
    only(template(changed(deaf), examples, True, "binary"), "warning", "what tool say", "1 of 4", "the first: t)")


def test_a_template_that_strips_its_messages_is_sound(changed):
    trimming = tiny.CHAT_TEMPLATE.replace("m['content']", "m['content'] | trim")
    only(template(changed(trimming), tiny.examples(3), True, "binary"), "ok")


def test_a_template_that_refuses_is_an_error(changed):
    only(
        template(changed("{{ raise_exception('no system role') }}"), tiny.examples(3), True, "binary"),
        "error",
        "no system role",
    )


def test_a_template_that_does_not_ask_for_a_reply_is_a_warning(changed):
    mute = tiny.CHAT_TEMPLATE.split("{% if add_generation_prompt")[0]
    only(template(changed(mute), tiny.examples(3), True, "binary"), "warning", "add_generation_prompt changes nothing")


def test_a_template_that_opens_the_thought_itself_is_a_warning(changed):
    opened = tiny.CHAT_TEMPLATE.replace("assistant\n", "assistant\n<think>")
    only(template(changed(opened), tiny.examples(3), True, "binary"), "warning", "opens <think> itself")


def test_a_turn_must_end_with_a_stop_id(changed):
    found = template(changed(stops=[256]), tiny.examples(3), True, "binary")
    only(found, "warning", "ends a turn with '<|im_end|>' [258], none of the stop ids [256]")
    assert levels(template(changed(stops=[256]), tiny.examples(3), True, "binary", supervised=True)) == ["error"]
    empty = template(changed("{% if messages %}{% endif %}"), tiny.examples(3), True, "binary")
    assert "ends a turn with ''" in empty[-1].text


def test_a_finished_reply_must_begin_with_its_prompt_to_be_imitated(changed):
    tokenizer = changed(tiny.CHAT_TEMPLATE.replace("assistant\n", "assistant\nAnswer: "))
    only(template(tokenizer, tiny.examples(3), True, "binary", supervised=True), "error", "cannot be imitated")
    only(template(tokenizer, tiny.examples(3), True, "binary"), "ok")


def test_a_tokenizer_that_rewrites_text_is_found(changed):
    tokenizer = changed(normalizer=tokenizers.normalizers.Lowercase())
    only(template(tokenizer, tiny.examples(3), True, "binary"), "warning", "decode to another text")
    shouted = [replace(example, answer=[{"name": "ADD", "arguments": {}}]) for example in tiny.examples(3)]
    found = template(tokenizer, shouted, True, "binary")
    assert levels(found) == ["warning", "warning", "warning"] and "miss the full binary reward" in found[1].text


def test_an_answer_that_no_reply_can_hold_is_a_warning(place):
    tagged = replace(tiny.examples(1)[0], id="tag", answer=[{"name": "f", "arguments": {"a": "</tool_call>"}}])
    found = template(load_tokenizer(place / "model"), [*tiny.examples(2), tagged], True, "binary")
    assert set(levels(found)) == {"warning"} and "the first: tag" in found[0].text


def test_every_stop_token_must_close_a_right_reply(changed):
    letter = load_tokenizer(changed(stops=[258])._directory).encode("b")
    found = template(changed(stops=[258, *letter]), tiny.examples(3), True, "strict")
    only(found, "warning", "'b'", "full strict reward")
    only(template(changed(stops=[258, *letter]), tiny.examples(3), True, "binary"), "ok")


def test_a_stop_token_that_its_text_does_not_give_is_a_warning(changed):
    half = changed().encode("é")[0]  # a byte that is no text by itself
    found = template(changed(stops=[258, half]), tiny.examples(3), True, "binary")
    only(found, "warning", f"stop id {half} is not encoded as that one token")


def test_qwen_passes_on_all_kinds_of_messages():
    tokenizer = load_tokenizer(shared("reference/qwen2.5-tokenizer"))
    examples = [*tiny.examples(2), dialogue("t", "Wie spät?", '{"time": "12:00"}'), dialogue("z", "今天天气 🙂")]
    for think, supervised in ((True, False), (False, True)):
        only(template(tokenizer, examples, think, "strict", supervised), "ok", "4 examples")
    only(preflight.stop_ids(tokenizer, 152064), "ok", "151645 <|im_end|>", "151665", "152064")
    text = sample(tokenizer, examples[-1], True)
    assert "<|im_start|>system" in text and "今天天气 🙂" in text
    assert text.endswith("\n    | <|im_start|>assistant\n    | ")


# ------------------------------------------------------------------------------------------------ stop ids, sample


def test_stop_ids_must_be_tokens(place):
    tokenizer = load_tokenizer(place / "model")
    only(preflight.stop_ids(tokenizer, 259), "ok", "258 <|im_end|>, 256 <|endoftext|>", "259 ids")
    only(preflight.stop_ids(tokenizer, 258), "error", "259 ids, the model 258")
    tokenizer._stop_ids = (258, 300)  # `load_tokenizer` would not give them
    only(preflight.stop_ids(tokenizer, 320), "warning", "[300] of [258, 300]", "below 259")
    tokenizer._stop_ids = (2**40,)
    only(preflight.stop_ids(tokenizer, 320), "error", "no reply can end")
    only(template(tokenizer, tiny.examples(3), True, "binary"), "warning", "none of the stop ids")


def test_no_stop_id_at_all_is_an_error(changed):
    tokenizer = changed(template=tiny.CHAT_TEMPLATE)  # and so without eos_token
    (tokenizer._directory / "generation_config.json").unlink()
    tokenizer = load_tokenizer(tokenizer._directory)
    only(preflight.stop_ids(tokenizer, 259), "error", "nothing says which token ends a reply")
    only(template(tokenizer, tiny.examples(3), True, "binary"), "error", "nothing says which token ends a reply")


def test_the_sample_is_what_the_model_sees(place):
    tokenizer = load_tokenizer(place / "model")
    example = dialogue("d", "Tab\there, bell\x07, é\nnext")
    prompt = tokenizer.render(build_messages(example, False), add_generation_prompt=True)
    ids = tokenizer.encode(prompt)
    head, *lines = sample(tokenizer, example, False).split("\n")
    assert head == f"the prompt of d: {len(ids)} tokens, the last ones {ids[-6:]}"
    seen = "\n".join(line.removeprefix("    | ") for line in lines)
    assert seen == prompt.replace("\t", "\\t").replace("\x07", "\\x07")
    assert "<|im_start|>user\nTab\\there, bell\\x07, é\nnext<|im_end|>\n<|im_start|>assistant\n" in seen


def test_a_long_sample_lacks_its_middle(place):
    tokenizer, example = load_tokenizer(place / "model"), tiny.examples(1)[0]
    prompt = tokenizer.render(build_messages(example), add_generation_prompt=True)
    lines = sample(tokenizer, example, True, 100).split("\n")[1:]
    seen = "\n".join(line.removeprefix("    | ") for line in lines)
    assert seen == f"{prompt[:50]}\n[... {len(prompt) - 100} characters left out ...]\n{prompt[-50:]}"
    assert "left out" not in sample(tokenizer, example, True, len(prompt))


# ------------------------------------------------------------------------------------------------ lengths, schedule


def test_the_longest_prompt_is_counted_in_tokens(place):
    tokenizer, examples = load_tokenizer(place / "model"), tiny.examples(12)

    def count(example, think=True):
        return len(tokenizer.encode(tokenizer.render(build_messages(example, think), add_generation_prompt=True)))

    assert longest_prompt(tokenizer, examples, True) == max(map(count, examples))
    assert longest_prompt(tokenizer, examples, True, counted=1) == max(map(count, examples))  # a byte is a token here
    assert longest_prompt(tokenizer, examples, False) == max(count(example, False) for example in examples)
    assert longest_prompt(tokenizer, [], True) == 0


def test_prompts_and_replies_fit_the_context():
    only(lengths(100, 50, 4, 400, 150), "ok", "longest prompt 100", "at most 150 of 150", "at most 300, fits")
    only(lengths(100, 50, 4, 299, None), "ok", "of unknown tokens", "is split", "299")
    only(lengths(100, 50, 4, 400, 149), "warning", "max_reply_tokens 50", "context of 149", "max_reply_tokens to 49")
    only(lengths(100, 50, 4, 400, 100), "error", "has 100 tokens, the model's context 100", "max_prompt_tokens below")
    only(lengths(100, 50, 4, 149, 4096), "warning", "may have 150 tokens, tokens_per_microbatch is 149")
    assert levels(lengths(100, 50, 4, 149, 100)) == ["error", "warning"]


def numbers(examples, **changes):
    settings = dict(prompts_per_step=32, prompts_per_minibatch=16, processes=8, epochs=7, steps=0)
    return schedule(examples, **settings | changes)


def test_the_schedule_says_what_divides_what():
    only(numbers(100), "ok", "21 steps of 32", "mini-batches of 16", "8 processes", "7.0 passes", "(4 of the 100")
    only(numbers(100, steps=4, processes=1), "ok", "4 steps", "1 process:", "1.3 passes")
    only(numbers(31), "error", "prompts_per_step is 32", "31 training examples")
    only(numbers(100, prompts_per_minibatch=10), "error", "(10) does not divide prompts_per_step (32)")
    found = numbers(100, processes=20)
    assert levels(found) == ["warning", "ok"] and "prompts_per_minibatch is 16: 4 of 20" in found[0].text
    assert levels(numbers(100, processes=33)) == ["warning", "warning", "ok"]


# ------------------------------------------------------------------------------------------------ memory, disk


def needed(**changes):
    model = parse_config({**tiny.CONFIG, "vocab_size": 259})
    settings = dict(
        cuda=True,
        processes=4,
        available=GIB,
        reference=model,
        tokens_per_microbatch=100,
        logprob_chunk_tokens=64,
        activation_checkpointing=False,
        accumulate_whole=True,
        offload_reference=False,
        offload_optimizer=False,
        cache_tokens=0,
        most_cache_tokens=1000,
    )
    return estimate(model, **settings | changes)


def against(found, gpu, host=GIB, cuda=True, processes=4):
    return memory(found, cuda=cuda, device_bytes=gpu, host_bytes=host, local_processes=processes)


def test_memory_of_a_gpu():
    found = needed()
    assert found.loading < found.certain() < found.total()
    only(against(found, found.total()), "ok", "a GPU")
    only(against(found, found.total() - 1), "warning", "about", "activation_checkpointing on (now off)", "kl_coef 0")
    only(against(found, found.certain()), "warning")
    only(against(found, found.certain() - 1), "error", "cannot work", "accumulate_whole off (now on)")
    assert "tokens_per_microbatch" not in against(found, found.certain() - 1)[0].text
    only(against(found, found.loading - 1), "error", "while it is loaded")


def test_memory_of_the_host_is_shared_by_its_processes():
    found = needed(offload_optimizer=True, offload_reference=True)
    parts = 4 * found.certain(offloaded=True)
    assert levels(against(found, GIB, parts)) == ["ok", "ok"]
    assert levels(against(found, GIB, parts - 1)) == ["ok", "error"]
    found = needed(cuda=False)
    only(against(found, 0, 4 * found.total(), cuda=False), "ok", "its 4 processes together")
    only(against(found, 0, 4 * found.total() - 1, cuda=False), "warning", "this machine")
    only(against(found, 0, 4 * found.certain() - 1, cuda=False), "error", "fewer processes (now 4)")
    found = needed(cuda=False, processes=1)
    only(against(found, 0, found.certain() - 1, cuda=False, processes=1), "error", "of this machine, which has")


Usage = namedtuple("Usage", "free")
KEEPING = dict(present=[], steps=50, save_every=10, keep_checkpoints=2, keep_every=0, export_bytes=2)


def space(monkeypatch, free, **changes):
    """The disk check of a model of 1,000 parameters: a checkpoint is 12,000 bytes, the export 2,000."""
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: Usage(free))
    return disk("runs/nowhere", 1000, **KEEPING | changes)


@pytest.mark.parametrize(
    "changes, bytes_needed",
    [
        ({}, 36_000),  # the two that are kept and the new one; the export comes when only two are left
        ({"steps": 20}, 26_000),  # two, then the export
        ({"steps": 15}, 26_000),  # step 10, and the last one
        ({"save_every": 0}, 14_000),
        ({"keep_checkpoints": 0}, 62_000),
        ({"keep_checkpoints": 1, "keep_every": 20}, 38_000),  # at the end 20, 40 and 50, and the export
        ({"keep_every": 10}, 62_000),
        ({"present": [10, 20]}, 12_000),  # a third one for a while
        ({"present": [40, 50]}, 2_000),  # nothing but the export
        ({"present": [10, 20, 30]}, 12_000),  # the fourth comes before the others go
    ],
)
def test_disk_at_the_peak(monkeypatch, changes, bytes_needed):
    only(space(monkeypatch, bytes_needed, **changes), "ok", "are free")
    assert levels(space(monkeypatch, bytes_needed - 1, **changes)) != ["ok"]


def test_no_room_for_one_checkpoint_is_an_error(monkeypatch):
    only(space(monkeypatch, 13_999), "error", "35.2 KiB will be needed", "not even for one", "13.7 KiB are free")
    only(space(monkeypatch, 14_000), "warning", "at most 3 at once", "keep_checkpoints (2)", "keep_every (0)")
    only(space(monkeypatch, 1_999, present=[40, 50]), "error")


def test_the_disk_is_that_of_the_nearest_folder_there_is(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: asked.append(path) or Usage(9))
    disk(tmp_path / "all" / "runs" / "new", 1, **KEEPING)
    assert asked == [tmp_path]


# ------------------------------------------------------------------------------------------------ report


def test_the_report_is_aligned_plain_text():
    found = [Finding("ok", "disk", "fine."), Finding("warning", "stop ids", "word " * 30), Finding("error", "x", "no.")]
    assert report(found, 60).splitlines() == [
        "ok       disk      fine.",
        "warning  stop ids  word word word word word word word word",
        "                   word word word word word word word word",
        "                   word word word word word word word word",
        "                   word word word word word word",
        "error    x         no.",
    ]
