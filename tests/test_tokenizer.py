"""Encoding, decoding and chat templates against the stored values, and on a tokenizer made here."""

import gzip
import json
import shutil
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import jinja2
import pytest
import tokenizers
from conftest import shared
from fuzz_replies import slowness
from hostile_templates import COSTLY, ESCAPES
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from tooln1.io.errors import UserError
from tooln1.io.hub import local_directory
from tooln1.tokenizer import Tokenizer, load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
MESSAGES = [{"role": "user", "content": "hi"}]


def read_cases(path: str) -> list[dict]:
    with gzip.open(shared(path), "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


# ---- the published Qwen2.5 tokenizer, and LLaMA-3.1's template ----


@pytest.fixture(scope="module")
def qwen() -> Tokenizer:
    return load_tokenizer(shared("reference/qwen2.5-tokenizer"))


def test_qwen_encodes_as_the_reference(qwen):
    cases = read_cases("reference/tokenizer/encode_dev.jsonl.gz")
    assert len(cases) == 1241
    for case in cases:
        decoded = case.get("decoded", case["text"])
        assert qwen.encode(case["text"]) == case["ids"], case["id"]
        assert qwen.decode(case["ids"]) == decoded, case["id"]
        skipped = qwen.decode(case["ids"], skip_special_tokens=True)
        assert skipped == case.get("decoded_skip_special", decoded), case["id"]


def test_qwen_decodes_as_the_reference(qwen):
    cases = read_cases("reference/tokenizer/decode_dev.jsonl.gz")
    assert len(cases) == 300
    for case in cases:
        assert qwen.decode(case["ids"]) == case["text"], case["id"]
        assert qwen.decode(case["ids"], skip_special_tokens=True) == case["text_skip_special"], case["id"]


def test_qwen_renders_as_the_reference(qwen):
    cases = read_cases("reference/chat/qwen2.5_dev.jsonl.gz")
    assert len(cases) == 150
    for case in cases:
        for suffix, generation in (("", False), ("_gen", True)):
            text = qwen.render(case["messages"], tools=case["tools"], add_generation_prompt=generation)
            assert text == case["text" + suffix], case["id"]
            assert qwen.encode(text) == case["ids" + suffix], case["id"]


def test_llama_renders_as_the_reference(tmp_path):
    cases = read_cases("reference/chat/llama3.1_text_dev.jsonl.gz")
    assert len(cases) == 30
    directory = make_directory(tmp_path, config={"bos_token": {"content": "<|begin_of_text|>"}})
    shutil.copy(shared("reference/configs/Llama-3.1-8B-Instruct/chat_template.jinja"), directory)
    llama = load_tokenizer(directory)
    for case in cases:
        if "error" in case:
            with pytest.raises(ValueError, match=case["error"]):
                llama.render(case["messages"], tools=case["tools"])
            continue
        assert llama.render(case["messages"], tools=case["tools"]) == case["text"], case["id"]
        text = llama.render(case["messages"], tools=case["tools"], add_generation_prompt=True)
        assert text == case["text_gen"], case["id"]


@pytest.mark.parametrize("size", ["0.5B", "7B", "14B"])
def test_qwen_has_two_stop_ids_with_its_generation_config(tmp_path, size):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(shared(f"reference/qwen2.5-tokenizer/{name}"), tmp_path)
    shutil.copy(shared(f"reference/configs/Qwen2.5-{size}-Instruct/generation_config.json"), tmp_path)
    assert load_tokenizer(tmp_path).stop_ids == (151645, 151643)


def test_qwen_vocabulary(qwen):
    assert qwen.vocab_size == 151_665
    assert qwen.stop_ids == (151645,)  # the tokenizer's own eos_token, where no generation_config.json lies


# ---- a tokenizer made here ----


def make_directory(directory, template=None, config=None, **files):
    """A directory with a byte-level tokenizer: the bytes, then "th" 256, <|end|> 257, <tool_call> 258."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate([*alphabet, "th"])}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[("t", "h")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|end|>", special=True)])
    backend.add_tokens([AddedToken("<tool_call>", special=False)])
    # What a careless trainer leaves in the file, and what must not touch a text.
    backend.enable_truncation(3)
    backend.enable_padding(length=8)
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", 257)]
    )
    backend.save(str(directory / "tokenizer.json"))
    if config is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    if template is not None:
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    for name, text in files.items():
        (directory / f"{name}.json").write_text(text, encoding="utf-8")
    return directory


CHATML = (
    "{% for message in messages %}\n"
    "    {% if message.role != 'none' %}\n"
    "<{{ message.role }}>{{ message.content }}{{ eos_token }}\n"
    "    {% endif %}\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_encode_adds_nothing_and_cuts_nothing(tmp_path):
    tokenizer = load_tokenizer(make_directory(tmp_path))
    ids = tokenizer.encode("the path<|end|><tool_call>")
    assert ids.count(256) == 2
    assert ids[-2:] == [257, 258]
    assert len(ids) == 8
    assert tokenizer.decode(ids) == "the path<|end|><tool_call>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the path<tool_call>"
    assert tokenizer.vocab_size == 259
    assert tokenizer.encode("") == []
    assert tokenizer.decode([]) == ""


@pytest.mark.parametrize(
    ("text", "back"),
    [("é\0\n 😀", "é\0\n 😀"), ("a\ud800b", "a\ufffdb"), ("\ud83d\ude00", "😀"), ("\udc00", "\ufffd")],
)
def test_every_text_can_be_encoded(tmp_path, text, back):
    tokenizer = load_tokenizer(make_directory(tmp_path))
    assert tokenizer.decode(tokenizer.encode(text)) == back


def test_decode_of_broken_bytes_and_unknown_ids(tmp_path):
    tokenizer = load_tokenizer(make_directory(tmp_path))
    ids = tokenizer.encode("a😀b")
    assert tokenizer.decode(ids[:3]) == "a\ufffd"
    assert tokenizer.decode([*ids, 259, 100_000]) == "a😀b"


def test_render_trims_blocks_as_transformers_does(tmp_path):
    tokenizer = load_tokenizer(make_directory(tmp_path, CHATML, {"eos_token": "<|end|>"}))
    assert tokenizer.render(MESSAGES) == "<user>hi<|end|>\n"
    assert tokenizer.render(MESSAGES, add_generation_prompt=True) == "<user>hi<|end|>\n<assistant>"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ tools[0] | tojson }}", '{"b": "<é & \'>", "a": [1, 2.0, null]}'),
        ("{{ tools[0] | tojson(indent=1, sort_keys=true) }}", None),
        ("{{ tools is none }}{{ tools is defined }}{{ documents is defined }}", "FalseTrueTrue"),
        ("{{ '<b>' }}{{ unknown }}{{ bos_token is defined }}", "<b>False"),
        ("{{ strftime_now('%Y') }}", str(datetime.now().year)),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("a{% generation %}b{{ messages|length }}{% endgeneration %}c", "ab1c"),
        ("{% set n = namespace(x=1) %}{% set n.x = 2 %}{{ n.x }}\n", "2"),
    ],
)
def test_what_templates_may_use(tmp_path, template, expected):
    tool = {"b": "<é & '>", "a": [1, 2.0, None]}
    if expected is None:
        expected = json.dumps(tool, ensure_ascii=False, indent=1, sort_keys=True)
    tokenizer = load_tokenizer(make_directory(tmp_path, template))
    assert tokenizer.render(MESSAGES, tools=[tool]) == expected


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content.nothing.more }}", "nothing"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ cycler.__init__.__globals__['os'].popen('id').read() }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ messages[0].update(role='x') }}", "unsafe"),
        ("{% include '/etc/hostname' %}", "no loader"),
        ("{% for i in range(10**9) %}x{% endfor %}", "Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ 1 / 0 }}", "division by zero"),
    ],
)
def test_templates_that_fail_or_attack(tmp_path, template, words):
    tokenizer = load_tokenizer(make_directory(tmp_path, template))
    messages = [dict(MESSAGES[0])]
    with pytest.raises(ValueError, match=words) as caught:
        tokenizer.render(messages)
    assert str(tmp_path) in str(caught.value)
    assert messages == MESSAGES


@pytest.mark.parametrize("name", COSTLY)
def test_templates_that_take_too_much_are_refused_soon(tmp_path, name):
    make_directory(tmp_path, COSTLY[name])
    start = time.process_time()
    with pytest.raises(UserError) as caught:
        load_tokenizer(tmp_path).render([dict(MESSAGES[0])])
    assert time.process_time() - start < 5 * slowness()
    assert str(tmp_path) in str(caught.value) and len(str(caught.value)) < 1000


MEMORY = """
import resource, sys
sys.path.insert(0, "tests")
from hostile_templates import COSTLY
from tooln1.chat_template import compile_template
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for source in COSTLY.values():
    try:
        compile_template(source)(messages=[{"role": "user", "content": "hi"}], tools=None)
    except Exception:
        continue
    raise SystemExit(f"not refused: {source[:80]}")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_templates_that_take_too_much_do_not_get_the_memory():
    done = subprocess.run([sys.executable, "-c", MEMORY], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and int(done.stdout) < 500, done.stdout + done.stderr


@pytest.mark.parametrize("name", ESCAPES)
def test_templates_reach_nothing_of_python(tmp_path, name):
    tokenizer = load_tokenizer(make_directory(tmp_path, ESCAPES[name]))
    messages = [dict(MESSAGES[0])]
    try:
        text = tokenizer.render(messages)
    except UserError:
        text = ""
    assert messages == MESSAGES
    for word in ("class '", "class", "module", "object", "function <", "frame", "code", "built-in", "globals", "0x"):
        assert word not in text


def test_a_long_conversation_takes_a_small_part_of_what_a_template_may(qwen):
    turns = [{"role": ("user", "assistant")[i % 2], "content": "Sum these numbers: 1, 2. " * 40} for i in range(1000)]
    text = qwen.render([{"role": "system", "content": "s" * 10_000}, *turns], add_generation_prompt=True)
    assert len(text) > 1_000_000
    sandbox = Sandbox()
    template = sandbox.from_string((shared("reference/qwen2.5-tokenizer") / "chat_template.jinja").read_text())
    sandbox.begin()
    assert template.render(messages=turns, tools=None) and sandbox.left > 0.8 * ALLOWANCE


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ 'a' + 'b' ~ 1 + 'c' }}{{ 1 + 2 + 3 }}{{ [1] + [2] }}", "ab1c6[1, 2]"),
        ("{{ 2 ** 10 }} {{ 7 // 2 }} {{ 7 % 4 }} {{ 'x' * 3 }} {{ '%s-%d' % ('a', 5) }}", "1024 3 3 xxx a-5"),
        ("{% for a, b in {'x': 1}|items %}{{ a }}{{ b }}{{ loop.length }}{{ loop.last }}{% endfor %}", "x11True"),
        ("{% for i in [1, 2, 3]|select('odd') %}{{ i }}{{ loop.revindex }}{% endfor %}", "1231"),
        ("{% for x in [1, [2, [3]]] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}", "123"),
        (
            "{% macro f(x) %}<{{ x }}{{ caller() if caller }}>{% endmacro %}{{ f(1) }}{% call f(2) %}!{% endcall %}",
            "<1><2!>",
        ),
        (
            "{{ 'a,b'.split(',')[1:] }}{{ ' x '.strip() }}{{ 'aXa'.replace('a', 'bb') }}{{ 'x'.format() }}",
            "['b']xbbXbbx",
        ),
        ("{{ '{:>3}|{n}'.format(1, n=2) }}{{ 'ab'.startswith('a') }}{{ ['x', 'y']|join('-') }}", "  1|2Truex-y"),
        ("{{ {'a': 1}.get('b', 'none') }}{{ {'a': 1}.items()|list }}{{ 'a' in {'a': 1} }}", "none[('a', 1)]True"),
        (
            "{{ [3, 1, 2]|sort|list }}{{ ['a', 'B']|map('upper')|list }}{{ 'x y'|title }}{{ 3.14159|round(2) }}",
            "[1, 2, 3]['A', 'B']X Y3.14",
        ),
        (
            "{{ 'a\nb'|indent(2) }}{{ [{'a': 1}]|map(attribute='a')|sum }}{{ 'x' is string }}{{ 4 is divisibleby 2 }}",
            "a\n  b1TrueTrue",
        ),
    ],
)
def test_the_sandbox_changes_no_result(tmp_path, template, expected):
    plain = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    assert plain.from_string(template).render() == expected
    assert load_tokenizer(make_directory(tmp_path, template)).render(MESSAGES) == expected


def test_which_template_is_used(tmp_path):
    listed = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    make_directory(tmp_path, config={"chat_template": listed})
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.render(MESSAGES) == "plain"
    assert tokenizer.render(MESSAGES, tools=[]) == "tools"
    make_directory(tmp_path, config={"chat_template": "text"})
    assert load_tokenizer(tmp_path).render(MESSAGES) == "text"
    make_directory(tmp_path, template="file")
    assert load_tokenizer(tmp_path).render(MESSAGES) == "file"


@pytest.mark.parametrize("given", [None, "", [], [{"name": "rag", "template": "x"}]])
def test_no_template(tmp_path, given):
    tokenizer = load_tokenizer(make_directory(tmp_path, config={"chat_template": given}))
    with pytest.raises(ValueError, match="no chat template"):
        tokenizer.render(MESSAGES)


@pytest.mark.parametrize(
    ("generation_config", "config", "stop_ids"),
    [
        ('{"eos_token_id": [258, 257]}', None, (258, 257)),
        ('{"eos_token_id": 7}', {"eos_token": "<|end|>"}, (7,)),
        ('{"eos_token_id": null}', {"eos_token": "<|end|>"}, (257,)),
        ("{}", {"eos_token": {"__type": "AddedToken", "content": "<|end|>"}}, (257,)),
    ],
)
def test_stop_ids(tmp_path, generation_config, config, stop_ids):
    directory = make_directory(tmp_path, config=config, generation_config=generation_config)
    assert load_tokenizer(directory).stop_ids == stop_ids


def test_special_tokens_of_an_older_layout(tmp_path):
    directory = make_directory(tmp_path, CHATML, special_tokens_map='{"eos_token": "<|end|>"}')
    assert load_tokenizer(directory).stop_ids == (257,)
    assert "<|end|>" in load_tokenizer(directory).render(MESSAGES)


@pytest.mark.parametrize("config", [None, {"eos_token": None}, {"eos_token": "<|unknown|>"}])
def test_no_stop_id_is_an_error_where_one_is_needed(tmp_path, config):
    tokenizer = load_tokenizer(make_directory(tmp_path, config=config))
    assert tokenizer.encode("th") == [256]
    with pytest.raises(ValueError, match="which token ends a reply"):
        _ = tokenizer.stop_ids


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b"\xff"),
        ("tokenizer_config.json", b"{"),
        ("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json", b"\xff\xfe"),
        ("tokenizer_config.json", b"[" * 100_000),
        ("tokenizer_config.json", b'{"chat_template": 5}'),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "default"}]}'),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "default", "template": 5}]}'),
        ("tokenizer_config.json", b'{"chat_template": "{% if %}"}'),
        ("chat_template.jinja", b"{{ messages"),
        ("chat_template.jinja", b"\xff"),
        ("chat_template.jinja", b"{{" + b"(" * 5000 + b"1" + b")" * 5000 + b"}}"),
        ("generation_config.json", b"{"),
        ("generation_config.json", b'{"eos_token_id": "<|end|>"}'),
        ("generation_config.json", b'{"eos_token_id": []}'),
        ("generation_config.json", b'{"eos_token_id": [1, null]}'),
        ("generation_config.json", b'{"eos_token_id": true}'),
        ("generation_config.json", b'{"eos_token_id": -1}'),
        ("generation_config.json", b'{"eos_token_id": 259}'),
        ("generation_config.json", b'{"eos_token_id": [257, 1000000000000000000000]}'),
        ("special_tokens_map.json", b'{"eos_token": '),
    ],
    ids=lambda value: value[:30].decode("latin-1") if isinstance(value, bytes) else value,
)
def test_broken_files_are_named(tmp_path, name, content):
    make_directory(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as caught:
        load_tokenizer(tmp_path)
    assert type(caught.value).__name__ == "UserError"
    assert str(tmp_path / name) in str(caught.value)


DOUBLE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
REGEX = {"type": "Replace", "pattern": {"Regex": "."}, "content": "x" * 65}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("normalizer", {"type": "Sequence", "normalizers": [DOUBLE] * 40}),
        ("normalizer", {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": [DOUBLE] * 4}] * 4}),
        ("normalizer", {"type": "Sequence", "normalizers": [REGEX]}),
        ("pre_tokenizer", {"type": "Sequence", "pretokenizers": [BYTES] * 40}),
    ],
)
def test_a_tokenizer_that_makes_texts_grow_is_refused(tmp_path, part, value):
    file = make_directory(tmp_path) / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {part: value}))
    with pytest.raises(UserError, match=r"tokenizer.json: its normalizers would make a text up to \d+ times as long"):
        load_tokenizer(tmp_path)


def test_a_panic_in_rust_is_a_sentence(tmp_path, capfd):
    file = make_directory(tmp_path) / "tokenizer.json"
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pre_tokenizer": split}))
    tokenizer = load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="the tokenizer cannot encode a text"):
        tokenizer.encode("a" * 40 + "!")  # its regular expression gives up after ten million steps


def test_missing_tokenizer_file(tmp_path):
    with pytest.raises(ValueError, match="tokenizer.json: no such file"):
        load_tokenizer(tmp_path)


# ---- where a model lies ----


def test_an_existing_directory_goes_before_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert local_directory("org/name", ["*"]).resolve() == tmp_path / "org" / "name"


def test_a_hub_id_is_fetched_by_its_patterns(tmp_path, monkeypatch):
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert local_directory("Qwen/Qwen2.5-7B-Instruct", ["*.json"]) == tmp_path
    assert asked == [("Qwen/Qwen2.5-7B-Instruct", ["*.json"])]


def test_a_hub_that_refuses_is_told_with_the_name(monkeypatch):
    def snapshot_download(name, allow_patterns):
        raise OSError("401 gated")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(ValueError, match="(?s)org/name.*401 gated.*hf auth login"):
        local_directory("org/name", ["*"])


@pytest.mark.parametrize("path", ["/no/such/place", "nowhere", "a/b/c", "../no/such/place", ""])
def test_a_path_that_is_neither(path, monkeypatch):
    def snapshot_download(name, allow_patterns):
        raise AssertionError("the hub must not be asked")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(ValueError, match="no such directory"):
        local_directory(path, ["*"])
