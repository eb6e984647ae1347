"""Encoding, decoding and chat templates against the stored values, and on a tokenizer made here."""

import json
import shutil

import pytest
import tokenizers
from conftest import shared, shared_rows
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from tooln1.io.errors import UserError
from tooln1.io.hub import local_directory
from tooln1.tokenizer import Tokenizer, load_tokenizer

MESSAGES = [{"role": "user", "content": "hi"}]


# ---- the published Qwen2.5 tokenizer, and LLaMA-3.1's template ----


@pytest.fixture(scope="module")
def qwen() -> Tokenizer:
    return load_tokenizer(shared("reference/qwen2.5-tokenizer"))


def test_qwen_encodes_and_decodes_as_the_reference(qwen):
    for case in shared_rows("reference/tokenizer/encode_dev.jsonl.gz"):
        decoded = case.get("decoded", case["text"])
        assert qwen.encode(case["text"]) == case["ids"], case["id"]
        assert qwen.decode(case["ids"]) == decoded, case["id"]
        skipped = qwen.decode(case["ids"], skip_special_tokens=True)
        assert skipped == case.get("decoded_skip_special", decoded), case["id"]
    for case in shared_rows("reference/tokenizer/decode_dev.jsonl.gz"):
        assert qwen.decode(case["ids"]) == case["text"], case["id"]
        assert qwen.decode(case["ids"], skip_special_tokens=True) == case["text_skip_special"], case["id"]


def test_qwen_renders_as_the_reference(qwen):
    for case in shared_rows("reference/chat/qwen2.5_dev.jsonl.gz"):
        for suffix, generation in (("", False), ("_gen", True)):
            text = qwen.render(case["messages"], tools=case["tools"], add_generation_prompt=generation)
            assert text == case["text" + suffix], case["id"]
            assert qwen.encode(text) == case["ids" + suffix], case["id"]


def test_llama_renders_as_the_reference(tmp_path):
    directory = make_directory(tmp_path, config={"bos_token": {"content": "<|begin_of_text|>"}})
    shutil.copy(shared("reference/configs/Llama-3.1-8B-Instruct/chat_template.jinja"), directory)
    llama = load_tokenizer(directory)
    for case in shared_rows("reference/chat/llama3.1_text_dev.jsonl.gz"):
        if "error" in case:
            with pytest.raises(UserError, match=case["error"]):
                llama.render(case["messages"], tools=case["tools"])
            continue
        assert llama.render(case["messages"], tools=case["tools"]) == case["text"], case["id"]
        text = llama.render(case["messages"], tools=case["tools"], add_generation_prompt=True)
        assert text == case["text_gen"], case["id"]


def test_qwen_vocabulary_and_stop_ids(qwen, tmp_path):
    assert qwen.vocab_size == 151_665
    assert qwen.stop_ids == (151645,)  # the tokenizer's own eos_token: this directory has no generation_config.json
    shutil.copy(shared("reference/qwen2.5-tokenizer/tokenizer.json"), tmp_path)
    shutil.copy(shared("reference/configs/Qwen2.5-7B-Instruct/generation_config.json"), tmp_path)
    assert load_tokenizer(tmp_path).stop_ids == (151645, 151643)


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
    # Settings that a trainer may leave in the file, and that must not change a text.
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


def test_encode_adds_nothing_and_cuts_nothing(tmp_path):
    tokenizer = load_tokenizer(make_directory(tmp_path))
    ids = tokenizer.encode("the path<|end|><tool_call>")
    assert ids.count(256) == 2 and ids[-2:] == [257, 258] and len(ids) == 8
    assert tokenizer.decode(ids) == "the path<|end|><tool_call>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the path<tool_call>"
    assert tokenizer.vocab_size == 259
    assert tokenizer.encode("") == [] and tokenizer.decode([]) == ""


def test_every_text_can_be_encoded_and_every_id_decoded(tmp_path):
    tokenizer = load_tokenizer(make_directory(tmp_path))
    texts = {"é\0\n 😀": "é\0\n 😀", "a\ud800b": "a\ufffdb", "\ud83d\ude00": "😀", "\udc00": "\ufffd"}
    for text, decoded in texts.items():
        assert tokenizer.decode(tokenizer.encode(text)) == decoded
    ids = tokenizer.encode("a😀b")
    assert tokenizer.decode(ids[:3]) == "a\ufffd" and tokenizer.decode([*ids, 259, 100_000]) == "a😀b"


CHATML = (
    "{% for message in messages %}\n"
    "    {% if true %}\n"
    "<{{ message.role }}>{{ message.content }}{{ eos_token }}\n"
    "    {% endif %}\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize("where", ["tokenizer_config", "special_tokens_map"])
def test_render_trims_blocks_and_knows_the_special_tokens(tmp_path, where):
    tokenizer = load_tokenizer(make_directory(tmp_path, CHATML, **{where: '{"eos_token": "<|end|>"}'}))
    assert tokenizer.render(MESSAGES) == "<user>hi<|end|>\n"
    assert tokenizer.render(MESSAGES, add_generation_prompt=True) == "<user>hi<|end|>\n<assistant>"
    assert tokenizer.prompt_ids(MESSAGES) == tokenizer.encode("<user>hi<|end|>\n<assistant>")
    assert tokenizer.stop_ids == (257,)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ tools[0] | tojson }}{{ documents is defined }}", '{"b": "<é & \'>", "a": [1, null]}True'),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("a{% generation %}b{{ messages|length }}{% endgeneration %}c", "ab1c"),
    ],
)
def test_what_templates_may_use(tmp_path, template, expected):
    tools = [{"b": "<é & '>", "a": [1, None]}]
    assert load_tokenizer(make_directory(tmp_path, template)).render(MESSAGES, tools=tools) == expected


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ cycler.__init__.__globals__['os'].popen('id').read() }}", "unsafe"),
        ("{% include '/etc/hostname' %}", "no loader"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ],
)
def test_a_template_that_fails_names_the_directory_and_the_reason(tmp_path, template, reason):
    with pytest.raises(UserError, match=reason) as caught:
        load_tokenizer(make_directory(tmp_path, template)).render(MESSAGES)
    assert str(tmp_path) in str(caught.value)


# Each template asks for an object of Python, or changes the messages; none may succeed.
ESCAPES = {
    "class": "{{ ''.__class__ }}",
    "format": "{{ '{0.__class__}'.format('') }}",
    "sort": "{{ ['']|sort(attribute='__class__') }}",
    "self": "{{ self._TemplateReference__context.environment }}",
    "macro": "{% macro f() %}{% endmacro %}{{ f._func.__globals__ }}{{ f._environment }}",
    "function": "{{ raise_exception.__globals__ }}{{ raise_exception.__self__ }}{{ raise_exception.__func__ }}",
    "loop": "{% for x in [1] %}{{ loop._recurse }}{{ loop.__class__ }}{% endfor %}",
    "generator": "{{ ([1]|map('string')).gi_frame }}{{ ([1]|map('string')).gi_code }}",
    "type": "{{ dict.__base__ }}{{ dict.mro() }}",
    "change a message": "{{ messages[0].update(role='x') }}",
}


@pytest.mark.parametrize("name", ESCAPES)
def test_templates_reach_nothing_of_python(tmp_path, name):
    tokenizer = load_tokenizer(make_directory(tmp_path, ESCAPES[name]))
    messages = [dict(MESSAGES[0])]
    try:
        text = tokenizer.render(messages)
    except UserError:
        text = ""
    assert messages == MESSAGES
    for word in ("class", "module", "object", "function <", "frame", "code", "built-in", "globals", "0x"):
        assert word not in text


# What Qwen3's template is made of: it searches the last user turn from the end, and keeps thoughts only after it.
QWEN3_STYLE = """{%- set ns = namespace(last=-1) %}
{%- for m in messages[::-1] %}
    {%- if ns.last < 0 and m.role == "user" and not m.content.startswith("<tool_response>") %}
        {%- set ns.last = messages|length - 1 - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for m in messages %}
    {%- set thought, content = "", m.content %}
    {%- if m.reasoning_content is string %}
        {%- set thought = m.reasoning_content %}
    {%- elif "</think>" in content %}
        {%- set thought = content.split("</think>")[0].rstrip("\\n").split("<think>")[-1].lstrip("\\n") %}
        {%- set content = content.split("</think>")[-1].lstrip("\\n") %}
    {%- endif %}
    {{- "[" + m.role + (" thinks " + thought if loop.index0 > ns.last and thought else "") + "]" + content }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "[assistant]" }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- "<think></think>" }}{%- endif %}
{%- endif %}"""


def test_the_constructs_of_qwen3s_template_render(tmp_path):
    tokenizer = load_tokenizer(make_directory(tmp_path, QWEN3_STYLE))
    turns = ["a", "<think>\nx\n</think>\n\nb", "c", "<think>y</think>d", "<tool_response>e"]
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    text = tokenizer.render(messages, add_generation_prompt=True)
    assert text == "[user]a[assistant]b[user]c[assistant thinks y]d[user]<tool_response>e[assistant]"


def test_which_template_is_used(tmp_path):
    listed = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    tokenizer = load_tokenizer(make_directory(tmp_path, config={"chat_template": listed}))
    assert tokenizer.render(MESSAGES) == "plain" and tokenizer.render(MESSAGES, tools=[]) == "tools"
    make_directory(tmp_path, config={"chat_template": "text"})
    assert load_tokenizer(tmp_path).render(MESSAGES) == "text"
    make_directory(tmp_path, template="file")
    assert load_tokenizer(tmp_path).render(MESSAGES) == "file"


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


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", None),
        ("tokenizer.json", b"{"),
        ("tokenizer_config.json", b"{"),
        ("tokenizer_config.json", b'{"chat_template": 5}'),
        ("tokenizer_config.json", b'{"chat_template": "{% if %}"}'),
        ("chat_template.jinja", b"{{" + b"(" * 5000 + b"1" + b")" * 5000 + b"}}"),
        ("generation_config.json", b'{"eos_token_id": "<|end|>"}'),
        ("generation_config.json", b'{"eos_token_id": [257, 1000000000000000000000]}'),
        ("special_tokens_map.json", b'{"eos_token": '),
    ],
    ids=lambda value: value[:30].decode("latin-1") if isinstance(value, bytes) else value,
)
def test_broken_files_are_named(tmp_path, name, content):
    make_directory(tmp_path)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path / name) in str(caught.value)


def test_a_directory_goes_before_the_hub_and_a_hub_id_is_fetched_by_its_patterns(tmp_path, monkeypatch):
    def snapshot_download(name, allow_patterns):
        if (name, allow_patterns) != ("Qwen/Qwen2.5-7B-Instruct", ("*.json",)):
            raise OSError("401 gated")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    assert local_directory("Qwen/Qwen2.5-7B-Instruct", ("*.json",)) == tmp_path
    with pytest.raises(UserError, match="(?s)org/name.*401 gated.*hf auth login"):
        local_directory("org/name", ("*",))
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert local_directory("org/name", ("*",)).resolve() == tmp_path / "org" / "name"
