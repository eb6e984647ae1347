"""LoRA: the function and gradients of merged weights, one copy of the base, what is written, resumed, two processes."""

import json

import pytest
import tiny
import torch
from conftest import reference
from safetensors import safe_open
from torch.func import functional_call

from tooln1.attention import causal
from tooln1.distributed import copy_weights
from tooln1.lora import TARGETS, WithoutAdapters, add_adapters, merged_parameter
from tooln1.model import load_model, sequence_logits
from tooln1.run import lifecycle

IDS = [5, 3, 8, 1, 9, 2, 7]
LORA = dict(lora_rank=2, lora_alpha=16.0, learning_rate=1e-2, entropy_coef=0.3)  # all replies get the reward 0


def adapted(name="qwen_mha_tied_fp32", dtype=torch.float32):
    """A model with adapters that do something."""
    model = add_adapters(load_model(reference(f"models/dev/{name}"), dtype), 3, 6.0, TARGETS, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in (p for n, p in model.named_parameters() if n.endswith("lora_B")):
            parameter.normal_(0, 0.05, generator=generator)
    return model


def hidden(model):
    return model(torch.tensor(IDS), torch.arange(len(IDS)), causal)


@pytest.mark.parametrize("name", ["qwen_mha_tied_fp32", "qwen3_8x2_tied_fp32"])
def test_gradients_are_those_through_merged_weights(name):
    model, plain = adapted(name).double(), load_model(reference(f"models/dev/{name}"), torch.float64)
    ours, theirs = ({n: p for n, p in model.named_parameters() if p.requires_grad} for _ in range(2))
    assert len(ours) == 2 * len(TARGETS) * model.config.num_hidden_layers
    weights = {n: merged_parameter(model, n) for n, _ in plain.named_parameters()}
    out, wanted = hidden(model), functional_call(plain, weights, (torch.tensor(IDS), torch.arange(len(IDS)), causal))
    assert torch.allclose(out, wanted, rtol=0, atol=1e-11)
    pairs = [torch.autograd.grad(h.sin().sum(), list(p.values())) for h, p in ((out, ours), (wanted, theirs))]
    for one, other in zip(*pairs, strict=True):
        assert other.abs().max() > 1e-3
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-9)


def test_new_adapters_change_nothing_and_depend_on_the_seed_alone():
    plain = load_model(reference("models/dev/qwen_mha_tied_fp32"))
    first, again, other = (
        add_adapters(load_model(reference("models/dev/qwen_mha_tied_fp32")), 3, 6.0, ["o_proj"], s) for s in (1, 1, 2)
    )
    assert torch.equal(hidden(first), hidden(plain))
    states = [m.model.layers[1].self_attn.o_proj.lora_A for m in (first, again, other)]
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])
    assert 0.8 < states[0].abs().max() * plain.config.hidden_size**0.5 <= 1  # peft's bound
    names = {n.rsplit(".", 2)[1] for n, p in first.named_parameters() if p.requires_grad}
    assert names == {"o_proj"}


def test_the_base_is_the_model_with_its_adapters_off(monkeypatch):
    model, plain = adapted(), load_model(reference("models/dev/qwen_mha_tied_fp32"))
    base, before = WithoutAdapters(model), hidden(model)
    assert torch.equal(hidden(base), hidden(plain)) and not torch.allclose(before, hidden(plain), atol=0.1)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(model.model.norm, "forward", lambda x: 1 / 0)
        hidden(base)
    assert torch.equal(hidden(model), before)


def test_merged_weights_are_the_adapters_applied():
    model, plain = adapted(), load_model(reference("models/dev/qwen_mha_tied_fp32"))
    copy_weights(model, plain)
    assert (sequence_logits(plain, IDS) - sequence_logits(model, IDS)).abs().max() < 1e-5
    layer = adapted(dtype=torch.bfloat16).model.layers[0].mlp.up_proj
    assert layer.weight.dtype == torch.bfloat16 and layer.lora_A.dtype == torch.float32
    wanted = layer.weight.float() + 2 * layer.lora_B @ layer.lora_A  # 6 / 3
    assert torch.equal(layer.merged_weight(), wanted.bfloat16())  # rounded once


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model and data."""
    folder = tmp_path_factory.mktemp("lora")
    tiny.write_model(folder)
    tiny.write_data(folder)
    return folder


@pytest.fixture(scope="module")
def finished(place):
    """A run on one process: what it held, and its directory."""
    with pytest.MonkeyPatch.context() as patch:
        held, build = [], lifecycle.build
        patch.setattr(lifecycle, "build", lambda *how: held.append(build(*how)) or held[0])
        return tiny.run(place, "finished", eval_before_training=True, **LORA), held[0]


def test_a_run_on_one_process_has_one_base_and_leaves_it_as_it_was(place, finished):
    folder, run = finished
    assert run.sampler.model is run.policy is run.reference.policy
    base = load_model(place / "model").state_dict()
    trained = {name: tensor for name, tensor in run.policy.state_dict().items() if name not in base}
    assert all(torch.equal(run.policy.state_dict()[name], tensor) for name, tensor in base.items())
    assert all(tensor.abs().max() > 0 for name, tensor in trained.items() if name.endswith("lora_B"))
    rows = tiny.measured(folder)
    assert rows[-1]["kl"] > 0 and max(row["sampler_logprob_gap"] for row in rows[1:]) < 1e-4


def test_another_reference_model_is_loaded(place):
    tiny.write_model(place / "other", seed=1)
    other = str(place / "other/model")
    rows = tiny.measured(tiny.run(place, "other-reference", steps=1, reference_model=other, **LORA))
    assert rows[0]["kl"] > 1  # the base is near


def test_checkpoints_hold_adapters_and_the_export_both_forms(place, finished):
    folder, run = finished
    keys = set()
    for file in (folder / "checkpoints/step-000003").glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            keys |= set(tensors.keys())
    trained = {name for name, parameter in run.policy.named_parameters() if parameter.requires_grad}
    assert keys == {f"{kind}/{name}" for kind in ("model", "exp_avg", "exp_avg_sq") for name in trained}
    exported = sequence_logits(load_model(folder / "hf"), IDS)
    assert (exported - sequence_logits(run.policy, IDS)).abs().max() < 1e-5
    assert (exported - sequence_logits(load_model(place / "model"), IDS)).abs().max() > 1e-2
    config = json.loads((folder / "hf_adapter/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (2, 16.0, sorted(TARGETS))
    with safe_open(folder / "hf_adapter/adapter_model.safetensors", "pt") as tensors:
        found = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    assert "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight" in found and len(found) == 28
    for name, parameter in run.policy.named_parameters():
        assert not parameter.requires_grad or torch.equal(found[f"base_model.model.{name}.weight"], parameter)


def test_a_resumed_run_ends_bit_equal(place, finished):
    for steps in (2, 3):
        tiny.run(place, "resumed", steps=steps, resume="auto", eval_before_training=True, **LORA)
    tiny.assert_same_run(place / "resumed", finished[0])


@pytest.mark.slow
def test_two_processes_and_a_resume_give_the_same_losses(place):
    """Rank 1: one of the two processes has no row of A; the sampler's copy has merged weights."""
    how = LORA | {"lora_rank": 1}
    one, preset = tiny.run(place, "one", **how), tiny.write_preset(place, "two", **how)
    for steps in ("1", "3"):
        result = tiny.torchrun(2, "train.py", *preset, "--resume", "auto", "--steps", steps)
        assert result.returncode == 0, result.stderr[-3000:]
    rows, wanted = tiny.measured(place / "two"), tiny.measured(one)
    for name in ("loss", "kl", "grad_norm", "reward", "reply_tokens_mean"):
        values, expected = ([row[name] for row in log] for log in (rows, wanted))
        assert values == pytest.approx(expected, rel=1e-5), name
    assert rows[-1]["kl"] > 1e-3
    merged = (sequence_logits(load_model(place / run / "hf"), IDS) for run in ("one", "two"))
    assert torch.allclose(*merged, rtol=0, atol=1e-4)
    assert (place / "two/hf_adapter/adapter_model.safetensors").exists()


def test_supervised_training_lowers_the_loss(place):
    how = dict(mode="sft", steps=8, prompts_per_minibatch=4, eval_every=8)
    rows = tiny.measured(tiny.run(place, "sft", **LORA | how))
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
