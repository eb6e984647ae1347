"""The table of mistakes that test_mistakes.py makes, one after the other.

A row: what is wrong; the program's arguments, behind the usual ones; words of the sentence, between bars; and how the
usual files are broken: {file: its new text or bytes, None to remove it, or keys of its JSON to change}, or what is
done to pytest's monkeypatch.
"""

import fcntl
import json
import os
import sys
from collections import namedtuple

import tiny
import torch

from tooln1.run import checks, memory

ROW = vars(tiny.examples(1)[0])
NO_CALL = {"query": "q", "tools": "[]", "answers": "[]"}


def preset(text, **others):
    """A preset p.toml, and others by their names."""
    return {"p.toml": text} | {f"{name}.toml": text for name, text in others.items()}


def config(**changes):
    return {"model/config.json": changes}


def template(text):
    return {"model/tokenizer_config.json": {"chat_template": text}}


def line(**changes):
    """A row of training data; None leaves a key out."""
    return json.dumps({key: value for key, value in (ROW | changes).items() if value is not None}) + "\n"


def rows(text):
    return {"data.jsonl": text}


def reply(**changes):
    """A predictions file of one row."""
    return {"p.jsonl": json.dumps({"id": "a", "completion": ""} | changes)}


def checkpoints(file, content):
    """Every checkpoint of the finished run has another such file."""
    return {f"finished/checkpoints/step-00000{step}/{file}": content for step in (1, 2)}


def environment(**values):
    return lambda patch: [patch.setenv(name, value) for name, value in values.items()]


def lacking(module):
    """The package is not installed."""
    return lambda patch: patch.setitem(sys.modules, module, None)


def no_gpu(patch):
    patch.setattr(torch.cuda, "is_available", lambda: False)


def unwritable(patch):
    patch.setattr(os, "access", lambda path, mode: False)


def full_disk(patch):
    patch.setattr(checks.shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(1000))


def little_memory(patch):
    patch.setattr(memory, "available", lambda device: {"host": 1000})


def held(patch):
    """Another process has locked the run's directory."""

    def locked(*how):
        raise BlockingIOError

    patch.setattr(fcntl, "flock", locked)


P, FINISHED, RANK_FILE = (
    "--config p.toml",
    "--run-dir finished --resume",
    "shard-00001-model-00001-of-00004.safetensors",
)
SETTINGS = [
    ("unknown", "--learning-rat 1", "command line: there is no setting 'learning-rat'. Did you mean 'learning_rate'?"),
    ("like nothing", "--zzzzqqqq 1", "'zzzzqqqq'. --help lists"),
    ("a switch turned off", "--no-think", "no setting 'no-think'. think is turned off with --think false."),
    ("turned off, and no switch", "--no-steps", "there is no setting 'no-steps'. Did you mean 'steps'?"),
    ("words", "--steps many", "command line: steps takes a whole number, not 'many'"),
    ("a fraction", "--steps 4.0", "a whole number, not '4.0'"),
    ("no value", "--steps --think", "--steps needs a value, a whole number"),
    ("no value at the end", "--kl-coef", "--kl-coef needs a value, a number"),
    ("no number", "--kl-coef high", "kl_coef takes a number, not 'high'"),
    ("NaN", "--kl-coef nan", "kl_coef must be at least 0 and finite, not nan"),
    ("infinity", "--kl-coef inf", "kl_coef must be at least 0 and finite, not inf"),
    ("negative", "--kl-coef -1", "kl_coef must be at least 0 and finite, not -1.0"),
    ("neither true nor false", "--think maybe", "think takes true or false, not 'maybe'"),
    ("below an open end", "--top-p 0", "top_p must be above 0 and at most 1"),
    ("above a closed end", "--top-p 1.01", "top_p must be above 0 and at most 1"),
    ("at an open end", "--adam-beta2 1", "adam_beta2 must be at least 0 and below 1"),
    ("no temperature", "--temperature 0", "temperature must be above 0"),
    ("too small", "--group-size 0", "group_size must be at least 1"),
    ("large seed", f"--seed {2**63}", "seed must be at least 0 and at most 9e18"),
    ("many digits", f"--seed {'9' * 5000}", "seed takes a whole number, not '999"),
    ("endless", f"--steps {2**70}", "steps must be at least 0 and at most 1e6"),
    ("many epochs", f"--steps 0 --epochs {2**70}", "epochs must be at least 0 and at most 1e6"),
    ("many threads", "--threads 100000", "threads must be at least 0 and at most 4096"),
    ("large group", f"--group-size {2**70}", "group_size must be at least 1 and at most 1e9"),
    ("long replies", f"--max-reply-tokens {2**70}", "max_reply_tokens must be at least 1 and at most 1e9"),
    ("no choice", "--mode dpo", "mode is one of rl, sft, not 'dpo'"),
    ("misspelt choice", "--reward binry", "reward is one of | strict | not 'binry'. Did you mean 'binary'?"),
    ("no option", "steps=3", "'steps=3' belongs to no option; write --key value"),
    ("two dashes", "-- x", "'--' belongs to no option"),
    ("one dash", "-x", "'-x' belongs to no option"),
    ("no key", "--=3", "there is no setting ''"),
    ("empty path", "--model ''", "model is empty"),
    ("no data at all", "--train-data=", "train_data is empty"),
    ("no text", "--model bad\udcff", r"model is not readable text: 'bad\udcff'"),
    ("no text in a key", "--bad\udcff 1", r"there is no setting 'bad\udcff'"),
    ("mini-batches", "--prompts-per-minibatch 3", "prompts_per_minibatch (3) must divide prompts_per_step (4)"),
    ("mini-batch above the step", "--prompts-per-minibatch 8", "prompts_per_minibatch (8) must divide"),
    ("nothing to do", "--epochs 0 --steps 0", "epochs and steps are both 0"),
    ("dual clip", "--dual-clip 1", "dual_clip must be 0 (off) or above 1, not 1.0"),
    ("group of one", "--group-size 1", "group_size is 1 | take 2 or more"),
    ("reward without reasoning", "--think false", "reward binary | set reward to binary_no_think"),
    # --- presets
    ("no name", "--config", "--config needs the path of a TOML file"),
    ("missing", "--config no/such.toml", "cannot read the preset no/such.toml: No such file"),
    ("name that is no text", "--config bad\udcff", "cannot read the preset bad"),
    ("folder", "--config model", "cannot read the preset model: Is a directory"),
    ("not TOML", P, "p.toml is not valid TOML | line 1", preset("steps = \nseed = 1")),
    ("key twice", P, "p.toml is not valid TOML", preset("steps = 1\nsteps = 2")),
    ("not UTF-8", P, "p.toml is not valid TOML", preset(b"model = '\xff'")),
    ("deep", P, "p.toml is not valid TOML", preset("a = " + "[" * 9999)),
    ("unknown key", P, "p.toml: there is no setting 'groupsize'. Did you mean 'group_size'?", preset("groupsize = 4")),
    ("unknown in a base", P, "b.toml: there is no setting 'kl'", preset("base = 'b.toml'", b="kl = 1")),
    (
        "circle",
        P,
        "p.toml: | in a circle (p.toml -> b.toml -> p.toml); take one base out",
        preset("base = 'b.toml'", b="base = './p.toml'"),
    ),
    ("base missing", P, "cannot read the preset gone.toml", preset("base = 'gone.toml'")),
    ("base of another type", P, "p.toml: base takes the path of another preset, not 3", preset("base = 3")),
    ("base with a NUL", P, r"p.toml: base takes the path of another preset, not 'a\x00'", preset('base = "a\\u0000"')),
    ("fraction", P, "p.toml: steps takes a whole number, not 4.5", preset("steps = 4.5")),
    ("true is no number", P, "steps takes a whole number, not True", preset("steps = true")),
    ("1 is not true", P, "think takes true or false, not 1", preset("think = 1")),
    ("text is no number", P, "kl_coef takes a number, not '0.1'", preset("kl_coef = '0.1'")),
    ("list", P, "model takes text, not ['a']", preset("model = ['a']")),
    ("NaN in a preset", P, "kl_coef must be at least 0", preset("kl_coef = nan")),
    ("NUL", P, "p.toml: model is not readable text", preset('model = "a\\u0000"')),
    ("wrong section", P, "temperature belongs in [rollout], not in [loss]", preset("[loss]\ntemperature = 1.0")),
    ("unknown section", P, "no section [optimiser]. Did you mean 'optimizer'?", preset("[optimiser]\nseed = 1")),
    ("flat and in a section", P, "steps is set twice; keep one", preset("steps = 1\n[schedule]\nsteps = 2")),
    ("two spellings", P, "group_size is set twice", preset("group_size = 2\ngroup-size = 3")),
]
MODEL = [
    ("missing", "--model nowhere/at/all", "'nowhere/at/all': no such directory, and not a hub id"),
    ("file", "--model data.jsonl", "'data.jsonl': no such directory"),
    ("hub id, offline", "--model org/name", "'org/name': | the hub did not give it (LocalEntryNotFoundError | hf auth"),
    ("no config.json", "", "cannot read model/config.json", {"model/config.json": None}),
    ("config.json is no JSON", "", "model/config.json: not valid JSON", {"model/config.json": "{"}),
    ("config.json is a list", "", "model/config.json: expected a JSON object", {"model/config.json": "[]"}),
    ("another architecture", "", "model_type 'mamba' is not supported; Qwen2", config(model_type="mamba")),
    ("quantised", "", "a quantised checkpoint | not supported", config(quantization_config={"bits": 4})),
    ("size missing", "", "'hidden_size' is missing", config(hidden_size=None)),
    ("no weights", "", "only safetensors weights are read", {"model/model.safetensors": None}),
    ("pickle", "", "a .bin checkpoint is a pickle", {"model/model.safetensors": None, "model/pytorch_model.bin": b"x"}),
    ("cut off", "", "model.safetensors: not a readable | download it again", {"model/model.safetensors": b"\x08{}"}),
    ("another shape", "", "do not fit config.json; wrong shape: ", config(intermediate_size=32)),
    ("another depth", "", "do not fit config.json; missing: model.layers.2", config(num_hidden_layers=3)),
    (
        "shard missing",
        "",
        "model.safetensors.index.json: the shard 'a.safetensors' is missing",
        {"model/model.safetensors.index.json": '{"weight_map": {"x": "a.safetensors"}}'},
    ),
    ("reference missing", "--reference-model nowhere/at/all", "'nowhere/at/all': no such directory"),
    (
        "reference of few ids",
        "--reference-model other",
        "other: its tokenizer has 259 ids, the model 200",
        {"other/config.json": {"vocab_size": 200}},
    ),
    ("no tokenizer", "", "model/tokenizer.json: no such file", {"model/tokenizer.json": None}),
    ("tokenizer.json is no JSON", "", "model/tokenizer.json: not a tokenizer", {"model/tokenizer.json": "{"}),
    ("no tokenizer in it", "", "model/tokenizer.json: not a tokenizer", {"model/tokenizer.json": '{"model": 1}'}),
    ("few ids", "", "the tokenizer has 259 ids, the model 200; use the", config(vocab_size=200)),
    ("no template", "", "no chat template. Give one as", {"model/tokenizer_config.json": "{}"}),
    ("broken template", "", "the chat template must be a text", template("{% if %}")),
    ("template that raises", "", "does not accept these messages: no tool", template("{{raise_exception('no tool')}}")),
    ("template without words", "", "omits or changes system messages; use another", template("x")),
    (
        "endless template",
        "",
        "does not accept these messages: Range too big",
        template("{% for i in range(9**9) %}{% endfor %}"),
    ),
    (
        "no stop id",
        "",
        'which token ends a reply. Give "eos_token_id"',
        {"model/generation_config.json": None, "model/tokenizer_config.json": {"eos_token": None}},
    ),
    (
        "unknown stop id",
        "",
        "eos_token_id is '999'; it must be an id",
        {"model/generation_config.json": {"eos_token_id": 999}},
    ),
]
DATA = [
    ("missing", "--train-data gone.jsonl", "cannot read gone.jsonl: No such file"),
    ("held-out missing", "--eval-data gone.jsonl", "cannot read gone.jsonl: No such file"),
    ("folder", "--train-data model", "cannot read model: it is a folder"),
    ("empty", "", "data.jsonl holds no rows", rows("")),
    ("not UTF-8", "", "data.jsonl, line 1: the bytes at offset 2 are not UTF-8", rows(b'{"\xff": 1}')),
    ("not JSON", "", "data.jsonl, line 2: not valid JSON | is it complete?", rows(line() + '{"id": "x"')),
    ("no object", "", "data.jsonl, line 1: expected a JSON object, found a number", rows("5")),
    ("key missing", "", 'data.jsonl, line 1: the key "answer" is missing', rows(line(answer=None))),
    ("unknown key", "", "data.jsonl, line 1: unknown key 'extra'", rows(line(extra=1))),
    ("wrong type", "", 'data.jsonl, line 1: "answer" must be a list, found an object', rows(line(answer={}))),
    ("id twice", "", 'data.jsonl, line 2: the id "tiny-0" was given before', rows(line() * 2)),
    ("no messages", "", "data.jsonl, line 1: messages must end with a user or tool turn", rows(line(messages=[]))),
    ("no role", "", 'line 1, messages[0]: the key "role" is missing', rows(line(messages=[{"content": ""}]))),
    ("not converted", "", "data.jsonl, line 1: unknown key 'answers'", rows(json.dumps(NO_CALL))),
    ("all too long", "--max-prompt-tokens 5", "data.jsonl: all prompts are over max_prompt_tokens (5)"),
    ("too few", "", "prompts_per_step is 4, but there are only 1 training", rows(line())),
    (
        "beyond the context",
        "",
        "the model's context is 20: lower max_prompt_tokens",
        config(max_position_embeddings=20),
    ),
    ("beyond the cache", "--rollout-cache-tokens 99", "rollout_cache_tokens is 99: raise it"),
    ("reply of no text", "--mode sft", 'data.jsonl, line 1: "reply" must be a string', rows(line(reply=5))),
    ("reply, but no sft", "", "data.jsonl, line 1: unknown key 'reply'", rows(line(reply="x"))),
    ("unknown benchmark", "--eval-bench nope=x", "there is no benchmark 'nope'; --bench takes NAME=PATH"),
    ("benchmark without path", "--eval-bench bfcl", "NAME=PATH, such as examples=heldout.jsonl; found 'bfcl'"),
    ("another's path", "--eval-bench bfcl=model", "model holds no BFCL data: expected BFCL_v4_<category>.json"),
]
RUN = [
    ("file", "--run-dir data.jsonl", "run_dir data.jsonl: data.jsonl is not a folder that can be written to"),
    ("below a file", "--run-dir data.jsonl/run", "run_dir data.jsonl/run: | data.jsonl is not a folder"),
    ("below a file, checked", "--check --run-dir data.jsonl/run", "data.jsonl is not a folder"),
    ("not writable", "", "run_dir run: | is not a folder that can be written to; name another", unwritable),
    ("holds a run", "--run-dir finished", "finished already holds a run: go on with --resume auto"),
    ("held by another", FINISHED, "finished: another process is writing there; wait for it, or end it", held),
    ("no such checkpoint", f"{FINISHED} no/such", "no/such cannot be resumed from: | No such file"),
    ("another run's", f"{FINISHED} moved/step-000002", "finished already holds another run than moved/step-000002"),
    ("no checkpoint", "--resume model", "model cannot be resumed from: | No such file"),
    (
        "broken",
        f"{FINISHED} finished/checkpoints/step-000002",
        f"step-000002 cannot be resumed from: {RANK_FILE} has 1 bytes, not",
        checkpoints(RANK_FILE, "x"),
    ),
    ("all broken", FINISHED, f"step-000001 cannot be resumed from: {RANK_FILE}", checkpoints(RANK_FILE, "x")),
    ("all indices broken", FINISHED, "step-000001 cannot be resumed from", checkpoints("index.json", "{")),
    ("old format", FINISHED, "its format is 1, not 2", checkpoints("index.json", '{"format": 1, "step": 1}')),
    ("other settings", f"{FINISHED} --seed 1", "other settings: seed 0 (now 1). Set them back | --allow-changes seed"),
    ("unknown change", f"{FINISHED} --seed 1 --allow-changes sed", "allow_changes: there is no setting 'sed' | 'seed'"),
    (
        "other data",
        FINISHED,
        "data.jsonl does not hold what | step-000002 | --allow-changes train_data",
        rows("".join(line(id=name) for name in "abcd")),
    ),
    ("other model", f"{FINISHED} --model other", "other does not hold what | --allow-changes model"),
    (
        "other shape",
        f"{FINISHED} --model other --allow-changes",
        "step-000002 cannot be loaded into this model: | Size mismatch",
    ),
    ("broken log", FINISHED, "finished/metrics.jsonl, line 1 is not JSON", {"finished/metrics.jsonl": "{\n"}),
    ("warning, checked", "--check --tokens-per-microbatch 9", "1 of 8 findings, | need a change: lengths"),
    ("leak, checked", "--check --eval-data data.jsonl", "need a change: train_eval_overlap"),
    ("full disk", "", "disk: 1.0 KiB free, a checkpoint takes | free space", full_disk),
    ("little memory", "", "memory: | the host has 1.0 KiB: change one of", little_memory),
    ("no GPU", "--device cuda", "torch finds no GPU; use --device cpu", no_gpu),
    ("no tensorboard", "--tensorboard", "on | requirements-extra.txt", lacking("torch.utils.tensorboard")),
    ("no world size", "", "WORLD_SIZE is not set | start with torchrun", environment(RANK="0")),
    ("no address", "", "MASTER_ADDR is not set | start with torchrun", environment(RANK="0", WORLD_SIZE="1")),
]
EVAL = [
    ("unknown option", "--model x --tempreture 1", "unrecognized arguments: --tempreture"),
    ("nothing to score", "", "one of the arguments --model --predictions is required"),
    ("two sources", "--model x --predictions y", "not allowed with argument"),
    ("no use for a temperature", "--predictions x --temperature 1", "--temperature is of no use"),
    ("no use for a base model", "--predictions x --base-model y", "--base-model is of no use"),
    ("greedy samples", "--model x --samples 2", "--samples needs a --temperature above 0"),
    ("negative rows", "--model x --rows -1", "--limit and --rows at least 0"),
    ("no samples", "--model x --samples 0", "--samples and --max-reply-tokens must be at least 1"),
    ("words", "--model x --limit ten", "argument --limit: invalid int value: 'ten'"),
    ("NaN", "--model x --temperature nan", "--temperature must be a number of at least 0, not nan"),
    ("infinity", "--model x --temperature inf", "--temperature must be a number of at least 0, not inf"),
    ("no choice", "--model x --bfcl-changed maybe", "argument --bfcl-changed: invalid choice: 'maybe'"),
    ("unknown benchmark", "--model x --bench no_such=x", "no benchmark 'no_such'; | with NAME one of examples"),
    ("no path", "--model x --bench bfcl", "such as examples=heldout.jsonl; found 'bfcl'"),
    ("twice", "--model x --bench examples=data.jsonl", "--bench names examples twice"),
    ("bfcl missing", "--model x --bench bfcl=gone", "gone holds no BFCL data: expected"),
    ("another's path", "--model x --bench bfcl=data.jsonl", "data.jsonl holds no BFCL data: expected"),
    ("no acebench", "--model x --bench acebench=model", "model holds no ACEBench data: expected"),
    ("no api_bank", "--model x --bench api_bank=gone", "gone holds no API-Bank dialogues: expected"),
    ("path of no text", "--model x --bench bfcl=a\udcff", "holds no BFCL data"),
    ("out is a file", "--model model --out data.jsonl", "--out data.jsonl: data.jsonl is not a folder"),
    ("out below a file", "--model model --out data.jsonl/out", "data.jsonl is not a folder"),
    ("no model", "--model nowhere/at/all", "'nowhere/at/all': no such directory"),
    ("model of no text", "--model x\udcff", r"'x\udcff': no such directory"),
    ("no weights", "--model model", "only safetensors weights are read", {"model/model.safetensors": None}),
    ("few ids", "--model model", "model: its tokenizer has 259 ids, the model 200", config(vocab_size=200)),
    ("no template", "--model model", "no chat template. Give one as", {"model/tokenizer_config.json": "{}"}),
    (
        "no stop id",
        "--model model",
        "which token ends a reply",
        {"model/generation_config.json": None, "model/tokenizer_config.json": {"eos_token": None}},
    ),
    (
        "no template in the base",
        "--model model --base-model other",
        "other: no chat template. Give one as",
        {"other/tokenizer_config.json": "{}"},
    ),
    ("no base model", "--model model --base-model nowhere/at/all", "'nowhere/at/all': no such directory"),
    (
        "base without tokenizer",
        "--model model --base-model other",
        "other/tokenizer.json: no such file",
        {"other/tokenizer.json": None},
    ),
    ("no GPU", "--model model --device cuda", "torch finds no GPU; use --device cpu", no_gpu),
    ("no predictions", "--predictions gone.jsonl", "cannot read gone.jsonl"),
    ("predictions of no text", "--predictions x\udcff", "cannot read x"),
    ("predictions in a folder", "--predictions model", "cannot read model: it is a folder"),
    ("cut off", "--predictions p.jsonl", "p.jsonl, line 1: not valid JSON", {"p.jsonl": '{"id": "a", "comple'}),
    ("no completion", "--predictions p.jsonl", 'line 1: the key "completion" is missing', {"p.jsonl": '{"id": "a"}'}),
    ("id of a number", "--predictions p.jsonl", '"id" must be a string, found a number', reply(id=7)),
    ("negative sample", "--predictions p.jsonl", "line 1: | from 0 to 9999, found -1", reply(sample=-1)),
    ("large sample", "--predictions p.jsonl", "line 1: | from 0 to 9999, found 10000", reply(sample=10000)),
    ("other predictions there", "--predictions p.jsonl --out evaluated", "choose another --out for p.jsonl", reply()),
    (
        "other settings there",
        "--model model --out evaluated --max-reply-tokens 3",
        "evaluated holds predictions made with other settings: max_reply_tokens was 2 and is 3. Choose another --out",
    ),
    (
        "unknown settings there",
        "--model model --out evaluated --max-reply-tokens 2",
        "cannot read evaluated/settings.json",
        {"evaluated/settings.json": None},
    ),
    (
        "broken settings there",
        "--model model --out evaluated",
        "evaluated/settings.json: JSON nested too deeply",
        {"evaluated/settings.json": "[" * 99999},
    ),
    (
        "broken predictions there",
        "--model model --out evaluated --max-reply-tokens 2",
        "line 1: not valid JSON",
        {"evaluated/predictions.jsonl": "{\n"},
    ),
]
CONVERT = [
    ("nothing to convert", "", "nothing to convert: pass --xlam FILE"),
    ("xlam missing", "--xlam gone.json", "cannot read gone.json: No such file"),
    ("toolace missing", "--toolace gone.json", "cannot read gone.json: No such file"),
    ("key missing", "--xlam x.json", 'x.json, line 1: the key "tools" is missing', {"x.json": '{"query": "q"}'}),
    ("the other's rows", "--toolace xlam.json", 'xlam.json, row 0: the key "conversations" is missing'),
    ("no call", "--xlam x.json", "nothing was written (no call: 1; too long: 0)", {"x.json": json.dumps(NO_CALL)}),
    ("all too long", "--xlam xlam.json --tokenizer model --max-prompt-tokens 1", "nothing was written (too long: 4)"),
    ("share above 1", "--xlam xlam.json --held-out 2", "held-out share must be at least 0 and below 1, got 2"),
    ("share NaN", "--xlam xlam.json --held-out nan", "held-out share must be at least 0 and below 1, got nan"),
    ("fraction", "--xlam xlam.json --irrelevance -1", "irrelevance fraction must be between 0 and 1, got -1"),
    ("seed of words", "--xlam xlam.json --seed x", "argument --seed: invalid int value: 'x'"),
    (
        "no template",
        "--xlam xlam.json --tokenizer model --max-prompt-tokens 9",
        "model: no chat template. Give one as",
        {"model/tokenizer_config.json": "{}"},
    ),
    ("no tokenizer", "--xlam xlam.json --tokenizer nowhere/at/all", "'nowhere/at/all': no such directory"),
    ("out is a file", "--xlam xlam.json --out data.jsonl", "--out data.jsonl: data.jsonl is not a folder"),
    ("out below a file", "--xlam xlam.json --out data.jsonl/a", "data.jsonl is not a folder"),
]
DEMO = [
    ("no out", "data", "the following arguments are required: --out"),
    ("no such thing", "weights --out out", "invalid choice: 'weights'"),
    ("no tokenizer named", "init-model --out out", "init-model needs --tokenizer FOLDER"),
    ("no tokenizer", "init-model --out out --tokenizer nowhere/at/all", "'nowhere/at/all': no such directory"),
    ("data into a file", "data --out data.jsonl", "--out data.jsonl: data.jsonl is not a folder"),
    ("model below a file", "init-model --tokenizer model --out data.jsonl/a", "data.jsonl is not a folder"),
    ("large seed", f"init-model --tokenizer model --out out --seed {2**63}", "--seed must be at least 0 and below"),
]
PLOT = [
    ("no run", "", "the following arguments are required: RUN"),
    ("missing", "gone", "cannot read gone/metrics.jsonl: No such file"),
    ("no text", "gone\udcff", "cannot read gone"),
    ("no metrics", "model", "cannot read model/metrics.jsonl: No such file"),
    ("not JSON", "finished", "finished/metrics.jsonl, line 1 is not JSON", {"finished/metrics.jsonl": "{\n"}),
    ("no object", "finished", "line 1 is not a JSON object", {"finished/metrics.jsonl": "5\n"}),
    ("not UTF-8", "finished", "finished/metrics.jsonl is not UTF-8", {"finished/metrics.jsonl": b"\xff\n"}),
    ("deep", "finished", "finished/metrics.jsonl, line 1 is not JSON", {"finished/metrics.jsonl": "[" * 99999 + "\n"}),
    ("nothing yet", "finished", "has no metric to draw yet", {"finished/metrics.jsonl": ""}),
    ("text and picture", "finished --text --out a.png", "argument --out: not allowed with argument --text"),
    ("no matplotlib", "finished", "requirements-extra.txt, or pass --text", lacking("matplotlib.figure")),
]
WITH_MATPLOTLIB = [
    ("another format", "finished --out a.doc", "--out a.doc: .doc is not an image format; use .png or .svg"),
    ("no ending", "finished --out a", "--out a: no ending is not an image format"),
    ("below a file", "finished --out data.jsonl/a.png", "--out data.jsonl/a.png cannot be written"),
    ("onto a folder", "finished --out f.png", "--out f.png cannot be written", {"f.png/x": ""}),
]
