"""The choice of attention kernels: the first that works, on all ranks alike, and what a run says of it."""

import pytest
import torch
from tiny import CONFIG

from tooln1.distributed import World
from tooln1.io.errors import UserError
from tooln1.io.model_config import parse_config
from tooln1.model import random_model
from tooln1.run import kernels
from tooln1.run.faults import explain_oom
from tooln1.run.kernels import choose, choose_decode, choose_update_attention
from tooln1.sampler import sampler as sampler_module
from tooln1.sampler.sampler import Sampler

MODEL = parse_config({**CONFIG, "vocab_size": 259})
GPU = World(0, 1, torch.device("cuda"))  # only asked for its name here
LEVELS = ("graph", "eager", "gathered")


class OtherRank(World):
    """Gathers what a second rank failed at, too."""

    def gather(self, items):
        return [*items, ["graph (of the other rank)"]]


def attempts(failing, error):
    """An attempt that raises `error` at the levels `failing`, and the list of levels it was called with."""
    tried = []

    def attempt(level):
        tried.append(level)
        if level in failing:
            raise error

    return attempt, tried


@pytest.mark.parametrize(("failing", "level"), [([], "graph"), (["graph"], "eager"), (["graph", "eager"], "gathered")])
def test_the_first_level_that_works_and_one_warning(failing, level, capsys):
    attempt, tried = attempts(failing, RuntimeError("no capture:\n too bad"))
    assert choose("rollout_decode", "auto", LEVELS, attempt, GPU) == level
    assert tried == list(LEVELS[: len(failing) + 1])[:2]
    warning = capsys.readouterr().err
    assert warning.count("\n") == bool(failing) and warning.count("no capture: too bad") == len(failing)


def test_all_ranks_take_the_level_of_the_worst(capsys):
    attempt, _ = attempts([], None)
    assert choose("rollout_decode", "auto", LEVELS, attempt, OtherRank(0, 2, GPU.device)) == "eager"
    assert "of the other rank" in capsys.readouterr().err


def test_a_level_that_was_set_is_not_tried_and_lack_of_memory_is_no_reason():
    attempt, tried = attempts(["graph"], torch.OutOfMemoryError("CUDA out of memory"))
    assert choose("rollout_decode", "eager", LEVELS, attempt, GPU) == "eager" and not tried
    with pytest.raises(torch.OutOfMemoryError):
        choose("rollout_decode", "auto", LEVELS, attempt, GPU)
    cpu = World(0, 1, torch.device("cpu"))
    assert choose("rollout_decode", "auto", LEVELS, attempt, cpu) == "gathered"
    with pytest.raises(UserError, match="rollout_decode = 'graph' needs a GPU; take auto or gathered"):
        choose("rollout_decode", "graph", LEVELS, attempt, cpu)


def on_this_cpu(setting, chosen, levels, attempt, world):
    """`choose` as on a GPU, with attempts on the CPU."""
    return choose(setting, chosen, levels, attempt, GPU)


@pytest.mark.slow
def test_decode_is_compiled_captured_and_compared(monkeypatch, capsys):
    """The attempt on the CPU: FlexAttention works there, a capture does not, another result is refused."""
    monkeypatch.setattr(kernels, "choose", on_this_cpu)

    def chosen_decode():
        sampler = Sampler(random_model(MODEL, 0), [3], cache_tokens=4096)
        choose_decode(sampler, "auto", GPU)
        assert not sampler.graphs
        return sampler.decode

    assert chosen_decode() == "eager"
    assert "graph (" in capsys.readouterr().err
    monkeypatch.setattr(sampler_module._DecodeGraph, "_capture", lambda *args: None)
    assert chosen_decode() == "graph" and not capsys.readouterr().err
    flex = sampler_module.FlexDecode
    monkeypatch.setattr(sampler_module, "FlexDecode", lambda *args: lambda *qkv: 9 * flex(*args)(*qkv))
    assert chosen_decode() == "gathered"
    assert capsys.readouterr().err.count("from the plain ones") == 2


def test_update_attention_is_compared_with_its_gradients(monkeypatch, capsys):
    """The CPU has no gradients of FlexAttention, so plain attention stands in for it."""
    monkeypatch.setattr(kernels, "choose", on_this_cpu)
    plain, world = kernels.packed_attention, World(0, 1, torch.device("cpu"))

    def chosen(wrong):
        def packed_attention(segments, device, kernel):
            attend = plain(segments, device, "sdpa")
            return wrong(attend) if kernel == "flex" else attend

        monkeypatch.setattr(kernels, "packed_attention", packed_attention)
        return choose_update_attention(MODEL, "auto", 1024, world)

    assert chosen(lambda attend: attend) == "flex"

    def with_another_gradient(attend):
        return lambda layer, q, k, v: attend(layer, q, k, v + 0.1 * (v - v.detach()))

    assert chosen(with_another_gradient) == "sdpa" and "from the plain one" in capsys.readouterr().err
    monkeypatch.setattr(kernels, "packed_attention", lambda *args: 1 / 0)
    assert choose_update_attention(MODEL, "auto", 1024, world) == "sdpa"


def test_a_kernel_that_fails_later_names_the_settings():
    from torch._inductor.exc import InductorError

    with pytest.raises(InductorError) as caught, explain_oom({"rollout_decode": "graph", "update_attention": "auto"}):
        raise InductorError(RuntimeError("no shared memory"), None)
    assert "rollout_decode (graph), update_attention (auto)" in caught.value.__notes__[0]
