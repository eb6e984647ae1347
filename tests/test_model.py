"""The model against transformers' logits on tiny configurations, and its files."""

import json
import os
import pickle
import struct
from dataclasses import replace

import pytest
import torch
from conftest import MODELS, reference, shared
from safetensors.torch import load_file, save_file

from tooln1.attention import PackedAttention, Segment
from tooln1.io.errors import UserError
from tooln1.io.model_config import parse_config
from tooln1.io.weights import weight_files
from tooln1.model import Transformer, load_model, save_model, sequence_logits

ATOL = 5e-5
QWEN3 = "qwen3_4x2_tied_bf16"


def expected(name):
    return load_file(reference(f"models/dev/{name}/expected.safetensors"))


def tiny_config(**changes):
    raw = json.loads((reference("models/dev/qwen_mha_tied_fp32") / "config.json").read_text())
    return {**raw, **changes}


def header(length, text=b"{}"):
    return struct.pack("<Q", length) + text


HUGE = header(77, b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,8]}}   ')


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers(name):
    model, want = load_model(reference(f"models/dev/{name}")), expected(name)
    logits = sequence_logits(model, want["single.input_ids"].flatten().tolist())
    torch.testing.assert_close(logits, want["single.logits"].squeeze(0), atol=ATOL, rtol=0)
    long = sequence_logits(model, want["long.input_ids"].flatten().tolist())
    torch.testing.assert_close(long[-32:], want["long.logits_last32"].squeeze(0), atol=ATOL, rtol=0)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("side", ["right", "left"])
@torch.no_grad()
def test_packed_rows_equal_transformers_padded_ones(name, side):
    """The ragged batch as one unpadded stream gives the logits of the padded batch."""
    model, want = load_model(reference(f"models/dev/{name}")), expected(name)
    mask = want[f"ragged_{side}.attention_mask"].bool()
    rows = [ids[keep] for ids, keep in zip(want[f"ragged_{side}.input_ids"], mask, strict=True)]
    starts = [sum(map(len, rows[:i])) for i in range(len(rows))]
    segments = tuple(Segment(start, len(row), ()) for start, row in zip(starts, rows, strict=True))
    positions = torch.cat([torch.arange(len(row)) for row in rows])
    hidden = model(torch.cat(rows), positions, PackedAttention(segments, "cpu"))
    torch.testing.assert_close(hidden @ model.head.T, want[f"ragged_{side}.logits"][mask], atol=ATOL, rtol=0)


@pytest.mark.parametrize("name", ["qwen1p5b_12x2_tied_bf16_sharded", "llama31_orig64_untied_fp32", QWEN3])
def test_saved_directory_loads_back_equal(name, tmp_path):
    model = load_model(reference(f"models/dev/{name}"))
    save_model(model, tmp_path / "out")
    again = load_model(tmp_path / "out")
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[key]), key
    assert (tmp_path / "out" / "generation_config.json").exists()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == "float32" and config.get("head_dim") == model.config.raw.get("head_dim")
    names = load_file(tmp_path / "out" / "model.safetensors")
    assert ("model.layers.1.self_attn.q_norm.weight" in names) == (name == QWEN3)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # nothing half-written beside it
    save_model(model, tmp_path / "out", torch.bfloat16)  # over the old one
    assert load_model(tmp_path / "out", torch.bfloat16).head.dtype == torch.bfloat16


def test_large_weights_are_sharded(tmp_path, monkeypatch):
    monkeypatch.setattr("tooln1.io.weights.SHARD_BYTES", 100_000)
    model = load_model(reference("models/dev/qwen_mha_tied_fp32"))
    save_model(model, tmp_path / "out")
    assert len(weight_files(tmp_path / "out")) > 2
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * sum(p.numel() for p in model.parameters())
    again = load_model(tmp_path / "out").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", ["qwen_mha_tied_fp32", QWEN3])
def test_both_config_styles_mean_the_same(name):
    old = json.loads((reference(f"models/dev/{name}") / "config.json").read_text())
    new = {key: value for key, value in old.items() if key not in ("rope_theta", "torch_dtype")}
    new |= {"rope_parameters": {"rope_type": "default", "rope_theta": old["rope_theta"]}, "dtype": "float32"}
    assert replace(parse_config(new), raw=old) == parse_config(old)
    llama = json.loads((reference("models/dev/llama31_orig64_untied_fp32") / "config.json").read_text())
    scaling = {**llama.pop("rope_scaling"), "rope_theta": llama.pop("rope_theta")}
    assert parse_config({**llama, "rope_parameters": scaling}).rope_scaling.factor == 8.0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_theta": None}, "'rope_theta' is missing"),
        ({"model_type": "mistral"}, "model_type 'mistral'"),
        ({"model_type": "qwen3_moe"}, "model_type 'qwen3_moe' is not supported; .* dense Qwen3"),
        ({"model_type": "qwen3_5", "text_config": {}}, "model_type 'qwen3_5' is not supported; .* dense Qwen3"),
        ({"model_type": "qwen3", "attention_bias": True}, "qwen3 with biases"),
        ({"use_sliding_window": True}, "sliding-window"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "RoPE type 'yarn'"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"model_type": "llama", "attention_bias": True}, "biases"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"vocab_size": None}, "'vocab_size' is missing"),
        ({"hidden_size": "large"}, "'hidden_size'"),
        ({"num_attention_heads": 0}, "'num_attention_heads'"),
        ({"num_key_value_heads": 3}, "multiple of num_key_value_heads"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(changes, words):
    with pytest.raises(UserError, match=words):
        parse_config(tiny_config(**changes))


def test_misfits_are_listed_together(tmp_path):
    model = load_model(reference("models/dev/qwen_mha_tied_fp32"))
    save_model(model, tmp_path / "m")
    state = load_file(tmp_path / "m" / "model.safetensors")
    del state["model.norm.weight"]
    state["model.extra"] = torch.zeros(2)
    state["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 3)
    save_file(state, tmp_path / "m" / "model.safetensors")
    with pytest.raises(UserError) as error:
        load_model(tmp_path / "m")
    for word in ("missing: model.norm.weight", "unexpected: model.extra", "up_proj.weight (file (3, 3)"):
        assert word in str(error.value)


@pytest.mark.parametrize(
    "weight_map", [{"a": "../evil.safetensors"}, {"a": "/etc/passwd"}, {"a": "gone.safetensors"}, {"a": 3}, []]
)
def test_a_hostile_shard_index_is_refused(tmp_path, weight_map):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match="index"):
        weight_files(tmp_path)


def test_half_precision_stays_near_full_and_double_is_never_cast_down():
    path = reference("models/dev/qwen_mha_tied_fp32")
    ids = list(range(40))
    full = sequence_logits(load_model(path), ids)
    half = sequence_logits(load_model(path, torch.bfloat16), ids)
    assert (half - full).norm() / full.norm() < 2e-2
    double = load_model(path, torch.float64)
    positions = torch.arange(40)
    hidden = double(torch.tensor(ids), positions, PackedAttention((Segment(0, 40, ()),), "cpu"))
    assert hidden.dtype == torch.float64
    assert (hidden @ double.head.T - full).abs().max() < ATOL


PUBLISHED = [*(f"Qwen2.5-{size}B-Instruct" for size in ("0.5", "1.5", "3", "7", "14")), "Llama-3.1-8B-Instruct"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_give_the_published_parameters(name):
    folder = shared(f"reference/configs/{name}")
    config = parse_config(json.loads((folder / "config.json").read_text()))
    manifest = json.loads((folder / "param_manifest.json").read_text())
    with torch.device("meta"):
        ours = {key: list(value.shape) for key, value in Transformer(config).named_parameters()}
    assert ours == manifest["shapes"]


# Published config.json and parameter counts: hidden, MLP, layers, query heads, key heads, tied, parameters.
QWEN3_SIZES = {
    "0.6B": (1024, 3072, 28, 16, 8, True, 596_049_920),
    "4B": (2560, 9728, 36, 32, 8, True, 4_022_468_096),
    "8B": (4096, 12288, 36, 32, 8, False, 8_190_735_360),
    "32B": (5120, 25600, 64, 64, 8, False, 32_762_123_264),
}


@pytest.mark.parametrize("size", QWEN3_SIZES)
def test_published_qwen3_sizes_give_the_published_counts(size):
    *sizes, tied, parameters = QWEN3_SIZES[size]
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    raw = {"model_type": "qwen3", "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": tied}
    config = parse_config(tiny_config(**raw, **dict(zip(names, sizes, strict=True))))
    with torch.device("meta"):
        assert sum(p.numel() for p in Transformer(config).parameters()) == config.num_parameters == parameters


# ---- files that are not to be trusted


def saved(folder):
    save_model(load_model(reference("models/dev/qwen_mha_tied_fp32")), folder)
    return folder


@pytest.mark.parametrize("dtype", [torch.int64, torch.float8_e4m3fn])
def test_weights_that_are_no_floats_are_refused(tmp_path, dtype):
    file = saved(tmp_path / "m") / "model.safetensors"
    state = load_file(file)
    state["model.norm.weight"] = state["model.norm.weight"].to(dtype)
    save_file(state, file)
    with pytest.raises(UserError, match="model.norm.weight"):
        load_model(tmp_path / "m")


@pytest.mark.parametrize("data", [b"", header(2**63), header(50), header(4, b"null"), pickle.dumps({"a": 1}), HUGE])
def test_broken_headers_are_sentences(tmp_path, data):
    (saved(tmp_path / "m") / "model.safetensors").write_bytes(data)
    with pytest.raises(UserError, match="model.safetensors|do not fit"):
        load_model(tmp_path / "m")


def test_links_as_in_the_cache_of_the_hub(tmp_path):
    """There a snapshot's files are links to blobs elsewhere."""
    (tmp_path / "snapshot").mkdir()
    for file in saved(tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    assert torch.equal(load_model(tmp_path / "snapshot").head, load_model(tmp_path / "blobs").head)


def test_a_pickle_is_never_opened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "opened"),))

    (saved(tmp_path / "m") / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "model.safetensors.bin", "model.pt"):
        (tmp_path / "m" / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match="only safetensors"):
        load_model(tmp_path / "m")
    assert not (tmp_path / "opened").exists()
