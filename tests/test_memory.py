"""The estimate of a run's memory: its exact parts against real tensors, Qwen2.5-7B by hand, the rest roughly."""

import json

import pytest
import tiny
import torch
from conftest import shared

from tooln1.attention import packed_attention
from tooln1.batch import pack
from tooln1.data import Rollout
from tooln1.io.model_config import parse_config
from tooln1.model import random_model
from tooln1.run import memory
from tooln1.run.memory import estimate, kept_activations, shown, table
from tooln1.sampler.sampler import Sampler
from tooln1.update import PolicyLoss, add_logprobs, optimizer_step

GIB = 1 << 30


def config(**changes):
    return parse_config({**tiny.CONFIG, "vocab_size": 259, **changes})


def asked(model, **changes):
    settings = dict(
        cuda=False,
        processes=1,
        available=GIB,
        reference=model,
        tokens_per_microbatch=100,
        logprob_chunk_tokens=64,
        activation_checkpointing=False,
        accumulate_whole=False,
        offload_reference=False,
        offload_optimizer=False,
        cache_tokens=0,
        most_cache_tokens=1000,
    )
    return estimate(model, **settings | changes)


def sizes(found):
    return {part.name: part.bytes for part in found.parts}


def rollouts(prompt=40, reply=10):
    return [Rollout(0, sample, [1] * prompt, [2] * reply, [0.0] * reply, True) for sample in range(3)]


def stepped(model, reference):
    """A model after one optimizer step, with its optimizer."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    replies = rollouts()
    batches, _ = add_logprobs([pack(replies, [0, 1, 2], torch.ones(3))], model, reference, 1.0, 64)
    optimizer_step(model, optimizer, batches, PolicyLoss(1.0), 30, 1.0, 1e-3)
    return optimizer


def held(tensors):
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False, "model_type": "llama"}])
def test_certain_parts_are_the_bytes_of_real_tensors(changes):
    shape = config(**changes)
    model, reference = random_model(shape, 0), random_model(shape, 1).requires_grad_(False)
    optimizer = stepped(model, reference)
    found = asked(shape)
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert sizes(found) | {"key/value cache": 0, "activations": 0, "passes": 0} == {
        "weights (fp32)": held(model.parameters()),
        "gradients (fp32)": held(parameter.grad for parameter in model.parameters()),
        "Adam's moments (fp32)": held(moments),
        "reference": held(reference.parameters()),
        "sampling copy": held(random_model(shape, 0).parameters()),
        "key/value cache": 0,
        "activations": 0,
        "passes": 0,
    }
    assert found.certain() == 6 * held(model.parameters()) and found.loading == 0


def test_the_cache_is_that_of_the_sampler():
    model = random_model(config(), 0)
    sampler = Sampler(model, [258], cache_tokens=640)
    sampler.generate([[1, 2, 3]], max_new_tokens=1)
    scratch = sampler.cache.data[:, :1].nbytes
    assert sizes(asked(model.config, cache_tokens=640))["key/value cache"] == sampler.cache.data.nbytes - scratch
    assert sizes(asked(model.config, most_cache_tokens=640))["key/value cache"] == sampler.cache.data.nbytes - scratch
    # no more than a third of what weights and copies leave
    parameters = 4 * model.config.num_parameters
    bound = sizes(asked(model.config, available=3 * parameters + 3 * 64 * 1024))["key/value cache"]
    assert 63 * 1024 <= bound <= 64 * 1024


def test_processes_share_all_but_the_copy():
    shape = config()
    one, four = asked(shape), asked(shape, processes=4)
    for name in ("weights (fp32)", "gradients (fp32)", "Adam's moments (fp32)", "reference"):
        assert sizes(four)[name] == pytest.approx(sizes(one)[name] / 4, abs=4)
    assert sizes(four)["sampling copy"] == sizes(one)["sampling copy"]
    assert four.loading == sizes(one)["weights (fp32)"]  # whole until it is sharded
    assert four.certain() >= four.loading and sizes(four)["passes"] > sizes(one)["passes"]  # gathered layers
    assert sizes(asked(shape, processes=4, accumulate_whole=True))["weights and gradients kept whole"] == (
        8 * shape.num_parameters
    )
    assert "weights and gradients kept whole" not in sizes(asked(shape, accumulate_whole=True))  # alone on a CPU


def seven_billion():
    raw = json.loads(shared("reference/configs/Qwen2.5-7B-Instruct/config.json").read_text())
    return parse_config(raw)


def on_gpus(model, **changes):
    return asked(
        model,
        **dict(
            cuda=True,
            processes=8,
            available=80 * GIB,
            tokens_per_microbatch=30720,
            logprob_chunk_tokens=1024,
            activation_checkpointing=True,
            most_cache_tokens=512 * 32768,
        )
        | changes,
    )


def test_qwen_7b_on_eight_gpus_by_hand():
    model = seven_billion()
    size = 7_615_616_512
    assert model.num_parameters == size
    found = on_gpus(model)
    free = 80 * GIB - (4 * size / 8 + 2 * size / 8 + 2 * size)
    # 28 layers of a residual stream of 3584; a layer: 6 x 3584 + 2 x 3584 + 4 x 512 + 4 x 18944 = 106,496 numbers
    layer = 3584 * (3584 + 512 + 512 + 3584 + 3 * 18944 + 2) + 3584 + 2 * 512
    table = 152064 * 3584
    assert sizes(found) == {
        "weights (fp32)": 4 * size // 8,
        "gradients (fp32)": 4 * size // 8,
        "Adam's moments (fp32)": 8 * size // 8,
        "reference": 2 * size // 8,
        "sampling copy": 2 * size,
        "key/value cache": int(free // 3 // 57344) * 57344,  # a token: 2 x 28 x 4 x 128 numbers of 2 bytes
        "activations": 30720 * 28 * 3584 * 2,
        # in a layer: its activations twice, both tables and the head's gradient, two layers and their gradients
        "passes": pytest.approx(30720 * 2 * 106_496 * 2 + 2 * 3 * table + 8 * 2 * layer, rel=1e-6),
    }
    assert found.certain() == 2 * size + 18 * size // 8
    assert 70 * GIB < found.total() < 80 * GIB
    assert sizes(on_gpus(model, accumulate_whole=True))["weights and gradients kept whole"] == 6 * size
    assert "reference" not in sizes(on_gpus(model, reference=None))
    assert on_gpus(model, processes=64).certain() == 4 * size  # to load it is then the most
    assert on_gpus(model, processes=1).certain() == 20 * size


def test_offloaded_parts_are_the_hosts():
    model = config()
    found = on_gpus(model, offload_optimizer=True, offload_reference=True)
    share = -(-model.num_parameters // 8)
    assert found.certain(offloaded=True) == found.total(offloaded=True) == 18 * share
    assert found.certain() == max(2, 4) * model.num_parameters  # while it is loaded; afterwards the copy alone
    assert not any("offload" in way for way in found.ways_out)
    on_cpu = asked(model, offload_optimizer=True, offload_reference=True)
    assert on_cpu == asked(model) and on_cpu.total(offloaded=True) == 0


def test_ways_out_name_what_would_help_with_its_present_value():
    found = on_gpus(config(), activation_checkpointing=False, accumulate_whole=True, cache_tokens=12800)
    for word in (
        "offload_optimizer true",
        "offload_reference true",
        "kl_coef 0",
        "accumulate_whole off",
        "rollout_cache_tokens (now 12800)",
        "more processes (now 8)",
    ):
        assert word in "; ".join(found.ways_out)
    for word in ("activation_checkpointing on", "tokens_per_microbatch (now 30720)", "chunk_tokens (now 1024)"):
        assert word in "; ".join(found.more_ways_out)
    found = asked(config(), activation_checkpointing=True, reference=None, processes=2)
    words = "; ".join(found.ways_out + found.more_ways_out)
    for word in ("offload", "kl_coef", "accumulate", "more processes", "activation_checkpointing"):
        assert word not in words
    assert "fewer processes (now 2)" in words
    assert not any("processes" in way for way in asked(config()).ways_out)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_kept_activations_are_about_what_autograd_keeps(checkpointing):
    shape = config(hidden_size=256, intermediate_size=704, num_hidden_layers=4)
    model, kept = random_model(shape, 0), {}
    for block in model.model.layers:
        block.recompute = checkpointing
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # as a value it stays alive, and its address its own
        return tensor

    batch = pack(rollouts(200, 40), [0, 1, 2], torch.ones(3))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(batch.tokens, batch.positions, packed_attention(batch.segments, torch.device("cpu")))
    measured = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    expected = 4 * kept_activations(shape, len(batch.tokens), checkpointing)
    assert 0.9 < measured / expected < (1.7 if checkpointing else 1.15)  # the last norm is a fifth layer, nearly


def test_the_table_has_every_part_and_the_sum():
    found = on_gpus(config(), offload_optimizer=True)
    lines = table(found).splitlines()
    assert [line.split("  ")[1] for line in lines] == [*sizes(found), "at the peak, where it computes"]
    assert [line.rsplit("  ", 1)[1] for line in lines if "moments" in line or "cache" in line or "peak" in line] == [
        "on the host",
        "estimated",
        shown(found.total()),
    ]


def test_bytes_in_words():
    words = [shown(count) for count in (0, 999, 1536, 3 << 20, 1000 << 20, 28.37 * GIB, 1 << 50)]
    assert words == ["0 bytes", "999 bytes", "1.5 KiB", "3.0 MiB", "1.0 GiB", "28.4 GiB", "1024.0 TiB"]


def test_a_container_has_what_its_group_is_limited_to(tmp_path, monkeypatch):
    assert memory.device_bytes(torch.device("cpu")) == memory.host_bytes() > 1 << 28
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(memory, "CGROUP_LIMITS", (str(tmp_path / "nowhere"), str(limit)))
    machine = memory.host_bytes()
    for text, expected in (("max\n", machine), ("123456\n", 123456), (f"{machine * 4}\n", machine)):
        limit.write_text(text)
        assert memory.host_bytes() == expected
