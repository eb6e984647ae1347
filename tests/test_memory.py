"""The memory of a run: counted parts against real tensors, Qwen2.5-7B by hand, peaks against the profiler's; plans."""

import contextlib
import json
import re
from dataclasses import asdict

import pytest
import tiny
import torch
import torch.distributed as dist
from conftest import shared

from tooln1.batch import pack
from tooln1.config import Config, read_preset
from tooln1.data import Rollout
from tooln1.io.model_config import parse_config
from tooln1.lora import add_adapters
from tooln1.model import random_model
from tooln1.run import memory, plan, trace
from tooln1.run.memory import estimate, table
from tooln1.run.setup import resolved
from tooln1.sampler.kv_cache import kv_bytes_per_token
from tooln1.sampler.sampler import Sampler
from tooln1.update import PolicyLoss, add_logprobs, optimizer_step

GIB = 1 << 30
LLAMA_3B = {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24}
LLAMA_3B |= {"head_dim": 128, "tie_word_embeddings": True}  # LLaMA-3.2-3B, beside 3.1-8B
SETTINGS = asdict(
    Config(tokens_per_microbatch=100, logprob_chunk_tokens=64, prompts_per_step=4, prompts_per_minibatch=4)
)
SETTINGS |= {"activation_checkpointing": False, "accumulate_unsharded": False}  # "auto" in a Config


def config(**changes):
    return parse_config({**tiny.CONFIG, "vocab_size": 259, **changes})


@contextlib.contextmanager
def process_group(size):
    """This process as rank 0 of so many, the others imagined."""
    dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def on_cpu(model, host=GIB, **changes):
    return estimate(model, model, SETTINGS | changes, {"host": host}, 1, prompt=24, reply=8)


def sizes(needed, phase="update", sources=("counted", "traced", "formula")):
    column = memory.PHASES.index(phase)
    return {part.name: part.phases[column] for part in needed.parts if part.phases[column] and part.source in sources}


def rollouts(prompt=40, reply=10):
    return [Rollout(0, sample, [1] * prompt, [2] * reply, [0.0] * reply, True) for sample in range(3)]


def count_bytes(tensors):
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False, "model_type": "llama"}, tiny.QWEN3])
def test_counted_parts_are_the_bytes_of_real_tensors(changes):
    model, reference = (random_model(config(**changes), seed) for seed in (0, 1))
    reference.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batches, _ = add_logprobs([pack(rollouts(), [0, 1, 2], torch.ones(3))], model, reference, 1.0, 64)
    optimizer_step(model, optimizer, batches, PolicyLoss(1.0), 30, 1.0, 1e-3)
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    needed = on_cpu(config(**changes))
    assert sizes(needed, sources=["counted"]) == {
        "weights (fp32)": count_bytes(model.parameters()),
        "reference": count_bytes(reference.parameters()),
        "sampling copy": count_bytes(model.parameters()),
        "gradients (fp32)": count_bytes(parameter.grad for parameter in model.parameters()),
        "Adam's moments (fp32)": count_bytes(moments),
    }
    assert needed.total("host", ["counted"]) == 6 * count_bytes(model.parameters())
    assert needed.total("host") > 6 * count_bytes(model.parameters())


def test_lora_has_one_copy_of_the_frozen_weights_on_one_process():
    lora = {"lora_rank": 4, "lora_targets": "q_proj,down_proj"}
    model = random_model(config(), 0)
    frozen = count_bytes(model.parameters())
    add_adapters(model, 4, 8.0, ["q_proj", "down_proj"], 0)
    adapters = count_bytes(p for p in model.parameters() if p.requires_grad)
    alone = {"weights (fp32)": adapters, "gradients (fp32)": adapters, "Adam's moments (fp32)": 2 * adapters}
    needed = estimate(config(), None, SETTINGS | lora, {"host": GIB}, 1, prompt=24, reply=8)
    assert sizes(needed, sources=["counted"]) == {"frozen weights": frozen} | alone
    with process_group(2):
        two = estimate(config(), None, SETTINGS | lora, {"host": GIB}, 2, prompt=24, reply=8)
    embedding = 259 * 32 * 4  # of whose 259 rows the first of two ranks has 130
    share = {"frozen weights": frozen // 2 + embedding // 259 // 2, "sampling copy": frozen}
    assert sizes(two, sources=["counted"]) == share | {name: size // 2 for name, size in alone.items()}


def test_the_cache_is_that_of_the_sampler():
    model = random_model(config(), 0)
    sampler = Sampler(model, [258], cache_tokens=640)
    sampler.generate([[1, 2, 3]], max_new_tokens=1)
    real = sampler.cache.data.nbytes - sampler.cache.data[:, :1].nbytes  # without the scratch page
    assert sizes(on_cpu(model.config, rollout_cache_tokens=640))["KV cache"] == real
    assert sizes(on_cpu(model.config))["KV cache"] == real  # 4 prompts x 5 replies x (24 + 8) tokens


def test_qwen_7b_on_eight_gpus_by_hand(monkeypatch):
    model = parse_config(json.loads(shared("reference/configs/Qwen2.5-7B-Instruct/config.json").read_text()))
    size, tokens = 7_615_616_512, 30720
    settings = SETTINGS | {"tokens_per_microbatch": tokens, "activation_checkpointing": True}

    def on_gpus(reference=model, **changes):
        places = {"GPU": 80 * GIB, "host": 1024 * GIB}
        return estimate(model, reference, settings | changes, places, 8, prompt=4096, reply=8192)

    with process_group(8):
        traced = trace.passes(model, settings, cuda=True)
        monkeypatch.setattr(trace, "passes", lambda *_: traced)  # which takes a second
        needed, alone = on_gpus(), on_gpus(reference=None, accumulate_unsharded=True)
        offloaded = on_gpus(offload_optimizer=True, offload_reference=True)
        released = on_gpus(sampler_weights="release")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with process_group(64):
        places = {"GPU": 80 * GIB, "host": 1024 * GIB}
        hybrid = estimate(model, model, settings | {"sharding": "hybrid"}, places, 64, prompt=4096, reply=8192)
    assert sizes(hybrid) | {"KV cache": 0} == sizes(needed) | {"KV cache": 0}
    assert "sampling copy" not in sizes(released) and sizes(released, "rollout")["sampling copy"] == 2 * size
    counted = {
        "weights (fp32)": 4 * size // 8,
        "gradients (fp32)": 4 * size // 8,
        "Adam's moments (fp32)": 8 * size // 8,
        "reference": 2 * size // 8,
        "sampling copy": 2 * size,
    }
    assert sizes(needed, sources=["counted"]) == counted and "reference" not in sizes(alone)
    loaded = ("weights (fp32)", "reference", "sampling copy")
    assert sizes(needed, "load", ["counted"]) == {name: counted[name] for name in loaded}
    tables, table_size = 2 * 152064 * 3584 + 3584, 152064 * 3584
    layer = (size - tables) // 28
    gathered, stream = "gathered weights, gradients", tokens * 3584 * 2  # bytes of the residual stream
    assert sizes(needed, "log-probs")[gathered] == 2 * tables + 2 * 2 * layer  # a block's, and what it is copied from
    in_blocks = 2 * tables + (2 + 2 + 4) * layer  # and the fp32 gradients of the block before
    assert sizes(needed)[gathered] == in_blocks
    assert sizes(alone)[gathered] == 6 * size + 4 * layer  # all of them, and those being reduced
    assert 29 * stream < sizes(needed)["activations"] < 31 * stream  # a block's input each, the last norm's, replies
    # in a block the MLP's four tensors of 18,944 numbers a token, q, k, v, norms; at the head the fp32 gradient of it,
    # the logits of 1,024 tokens five times
    assert 2 * tokens * 106_496 < sizes(needed)["working memory"] < 1.35 * 2 * tokens * 106_496 + 2 * table_size
    free = 80 * GIB - sum(sizes(needed).values()) + sizes(needed)["KV cache"]
    token = 57344  # bytes of a token in the cache: 2 x 28 x 4 x 128 numbers of 2 bytes; blocks of 128, 64 at a time
    assert sizes(needed)["KV cache"] == free // 2 // token // 8192 * 8192 * token and needed.free_bytes == free
    # pinned memory comes in powers of two: q and o, k and v, the MLP; biases of q, k and v; two norms
    pinned = 28 * (2 * 2**23 + 2 * 2**20 + 3 * 2**26 // 2 * 2 + 2**11 + 2 * 2**8 + 2 * 2**11) + 2 * 2**29 + 2**11
    assert offloaded.total("host", ["counted"]) == 2 * pinned + pinned // 2 + 8 * size // 8
    lines = table(offloaded).splitlines()
    assert lines[0].split() == list(memory.PHASES)
    assert lines[-1].split()[:3] == ["on", "the", "host"] and len(lines) == len(offloaded.parts) + 3


def presets():
    """The presets of docs/training.md's table, and the cells of their columns; None where there is no column."""
    text = (
        (tiny.ROOT / "docs/training.md")
        .read_text(encoding="utf-8")
        .split("## Memory of one process")[1]
        .split("\n## ")[0]
    )
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    names = [name.strip("`").replace("`, ", " x ").split(" x ") for name in rows[0][1:]]
    columns = {name: (int(gpus), int(size), column) for column, (name, gpus, size) in enumerate(names, 1)}
    for name, (gpus, size, column) in columns.items():
        yield name, gpus, size, {row[0]: row[column] for row in rows[2:]}
    yield from (("7b_lora", 1, 80, None), ("1.5b_lora", 1, 24, None))


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "gpus", "gigabytes", "cells"), [*presets()])
def test_presets_fit_and_are_in_the_documentation(preset, gpus, gigabytes, cells):
    run = Config(**asdict(Config()) | read_preset(f"configs/tool_n1_{preset}.toml"))
    name = run.model.split("/")[1].replace("3.2-3B", "3.1-8B")
    changes = LLAMA_3B if "3.2-3B" in run.model else {}
    model = parse_config(json.loads(shared(f"reference/configs/{name}/config.json").read_text()) | changes)
    assert not changes or model.num_parameters == 3_212_749_824
    settings, frozen = resolved(run, model.num_parameters), None if run.lora_rank else model
    with process_group(gpus):
        needed = estimate(model, frozen, settings, {"GPU": gigabytes * 10**9, "host": 10**12}, gpus, 4096, 8192)
    assert needed.total("GPU") < 0.95 * gigabytes * 10**9
    assert needed.total("host") * min(gpus, 8) < 330 * 10**9
    assert sizes(needed)["KV cache"] >= 24576 * kv_bytes_per_token(model, 2), "fewer than two of the longest replies"
    if cells:
        places = {part.name: "*" * (part.place == "host") for part in needed.parts}
        now = {name: f"{size / 1e9:.1f}{places[name]}" for name, size in sizes(needed).items()}
        now |= {f"on the GPU, {phase}": f"{on_gpu(needed, phase) / 1e9:.1f}" for phase in memory.PHASES}
        assert {name: cell for name, cell in cells.items() if cell} == now


def on_gpu(needed, phase):
    return sum(part.phases[memory.PHASES.index(phase)] for part in needed.parts if part.place == "GPU")


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "options"), [(1, ""), (2, "checkpointing"), (4, "accumulate")])
def test_the_peak_is_what_the_profiler_sees(processes, options):
    result = tiny.torchrun(processes, "tests/peak_memory.py", "cpu", *options.split())
    assert result.returncode == 0, result.stderr[-3000:]
    seen = json.loads(next(line for line in result.stdout.splitlines() if line.startswith("{")))
    assert 0.9 < seen["peak"] / seen["expected"] < 1.1, seen


def test_a_large_vocabulary_is_reduced_at_the_end():
    """Embedding and head: gradients in bf16 and these in fp32; a second fp32 copy on a single process."""
    shape = config(vocab_size=100_000, tie_word_embeddings=False)
    tables, settings = 2 * 100_000 * shape.hidden_size + shape.hidden_size, SETTINGS | {"logprob_chunk_tokens": 1}
    for processes, numbers in ((1, 2 + 4 + 4), (2, 2 + 4)):
        with process_group(processes):
            needed = estimate(shape, None, settings, {"GPU": GIB, "host": GIB}, processes, 24, 8)
        assert sizes(needed)["gathered weights, gradients"] == numbers * tables


@pytest.mark.slow
def test_the_plans_in_the_documentation_are_those_of_the_program(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")  # which a plan sets
    text = (tiny.ROOT / "docs/scale.md").read_text(encoding="utf-8")
    plans = re.findall(r"`python -m tooln1.run.plan ([^`]*)`\n\n```\n(.*?)```\n", text, re.S)
    assert len(plans) == 3
    for options, printed in plans:
        model = shared(f"reference/configs/Qwen2.5-{14 if '14b' in options else 7}B-Instruct")
        monkeypatch.setattr("sys.argv", ["plan", *options.split(), "--model", str(model)])
        assert tiny.exit_code(plan.main) == 0
        assert capsys.readouterr().out.split() == printed.split()


def test_a_plan_says_what_to_change(tmp_path, monkeypatch, capsys):
    model = tiny.write_model(tmp_path, vocab_size=100_000)
    options = ["--model", str(model), "--accumulate-unsharded", "on", "--prompts-per-step", "64", "--gpus", "4"]
    options += ["--tokens-per-microbatch", "256", "--logprob-chunk-tokens", "64"]

    def run(*more):
        monkeypatch.setattr("sys.argv", ["plan", *options, "--prompts-per-minibatch", "32", *more])
        return tiny.exit_code(plan.main), capsys.readouterr().out

    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")  # which a plan sets
    code, text = run("--gpu-memory", "80")
    assert code == 0 and "changed to" not in text and "decode steps of" in text
    code, text = run("--gpu-memory", "4")  # CUDA alone takes more
    assert code == 2 and text.index("accumulate_unsharded = False") < text.index("offload_optimizer = True")
    assert "tokens_per_microbatch = 8192" not in text


def test_a_container_has_what_its_control_group_is_limited_to(tmp_path, monkeypatch):
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(memory, "CGROUP_LIMITS", (str(tmp_path / "nowhere"), str(limit)))
    machine = memory.available(torch.device("cpu"))["host"]
    assert machine > 1 << 28
    for text, expected in (("max\n", machine), ("123456\n", 123456), (f"{machine * 4}\n", machine)):
        limit.write_text(text)
        assert memory.available(torch.device("cpu")) == {"host": expected}
