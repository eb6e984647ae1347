"""Qwen2.5 (and LLaMA 3) by hand: configuration, decoder, loading and Hugging Face export.

The model knows nothing of caches, packing or sharding. It is called on a flat stream of tokens and is handed the
attention to use: `model(tokens, positions, attend)`. Whether the stream is one prompt, forty packed sequences or one
new token for each of 320 rows is the business of `attend` (see attention.py).

Shapes, here and everywhere else:
    T packed tokens   B rows   H query heads   K key/value heads   D head dim   C hidden   V vocabulary   G group size
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tooln1.attention import causal
from tooln1.errors import UserError, atomic_directory
from tooln1.hub import local_directory
from tooln1.weights import read_weights, write_weights

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q [T, H, D], k [T, K, D], v [T, K, D]) -> [T, H, D]"""

TOKENIZER_FILES = [
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json", "vocab.json",
    "merges.txt", "added_tokens.json",
]  # fmt: skip
MODEL_FILES = ["config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", *TOKENIZER_FILES]


# ---------------------------------------------------------------------------------------------- configuration


@dataclass(frozen=True)
class Llama3Scaling:
    """LLaMA 3.1's stretching of the slow RoPE frequencies (transformers' rope_type "llama3")."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class ModelConfig:
    """What the architecture needs to know, under transformers' names; `raw` is config.json as it was read."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: Llama3Scaling | None
    tie_word_embeddings: bool
    qkv_bias: bool
    initializer_range: float
    raw: dict[str, Any]

    @property
    def num_parameters(self) -> int:
        """Parameters in all, a tied embedding counted once."""
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in Transformer(self).parameters())


def parse_config(raw: dict[str, Any], where: str = "config.json") -> ModelConfig:
    """config.json, in its published or its transformers-5 style, as a `ModelConfig`.

    Raises UserError for a missing or mistyped key, and for what this implementation would compute wrongly (see
    `_refuse_unsupported`). A missing RoPE theta is an error: a guessed one would give a wrong model silently.
    """
    if not isinstance(raw, dict):
        raise UserError(f"{where}: expected a JSON object.")
    for key, kind in (("rope_parameters", dict), ("rope_scaling", dict), ("layer_types", list)):
        if raw.get(key) is not None and not isinstance(raw[key], kind):
            raise UserError(f"{where}: '{key}' must be {'an object' if kind is dict else 'a list'}.")
    rope = raw.get("rope_parameters") or {}  # transformers 5 keeps theta and scaling together
    scaling = rope or raw.get("rope_scaling") or {}
    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    _refuse_unsupported(raw, rope_type, where)
    values = raw | {"rope_theta": rope.get("rope_theta", raw.get("rope_theta"))}
    needed = ("rope_theta", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
              "num_attention_heads", "rms_norm_eps")  # fmt: skip
    for key in needed:
        if values.get(key) is None:
            raise UserError(f"{where}: '{key}' is missing; the model cannot be built without it.")
    try:
        heads = int(raw["num_attention_heads"])
        config = ModelConfig(
            vocab_size=int(raw["vocab_size"]),
            hidden_size=int(raw["hidden_size"]),
            intermediate_size=int(raw["intermediate_size"]),
            num_hidden_layers=int(raw["num_hidden_layers"]),
            num_attention_heads=heads,
            num_key_value_heads=int(raw.get("num_key_value_heads") or heads),
            head_dim=int(raw.get("head_dim") or raw["hidden_size"] // heads),
            rms_norm_eps=float(raw["rms_norm_eps"]),
            rope_theta=float(values["rope_theta"]),
            rope_scaling=_llama3_scaling(scaling) if rope_type == "llama3" else None,
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            qkv_bias=raw["model_type"] == "qwen2",
            initializer_range=float(raw.get("initializer_range", 0.02)),
            raw=raw,
        )
    except (TypeError, ValueError, KeyError, ZeroDivisionError) as error:
        raise UserError(f"{where}: a value has the wrong type or is missing ({error}).") from error
    _check_sizes(config, where)
    return config


def _refuse_unsupported(raw: dict[str, Any], rope_type: Any, where: str) -> None:
    """Another architecture, sliding windows in use, an unknown RoPE, quantised weights, biases elsewhere."""
    model_type, llama = raw.get("model_type"), raw.get("model_type") == "llama"
    for wrong, what in (
        (model_type not in ("qwen2", "llama"), f"model_type {model_type!r}"),
        (raw.get("quantization_config"), "a quantised checkpoint (quantization_config)"),
        (raw.get("hidden_act", "silu") != "silu", f"hidden_act {raw.get('hidden_act')!r}"),
        (raw.get("use_sliding_window"), "sliding-window attention (use_sliding_window)"),
        ("sliding_attention" in (raw.get("layer_types") or []), "sliding-window attention (layer_types)"),
        (llama and (raw.get("attention_bias") or raw.get("mlp_bias")), "a LLaMA with biases"),
        (rope_type not in ("default", "llama3"), f"RoPE type {rope_type!r}"),
    ):
        if wrong:
            raise UserError(f"{where}: {what} is not supported; Qwen2, Qwen2.5 and LLaMA 3 checkpoints are.")


def _check_sizes(config: ModelConfig, where: str) -> None:
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "head_dim")  # fmt: skip
    if wrong := [name for name in sizes if getattr(config, name) < 1]:
        raise UserError(f"{where}: '{wrong[0]}' must be at least 1.")
    if config.num_attention_heads % config.num_key_value_heads or config.head_dim % 2:
        raise UserError(f"{where}: num_attention_heads must be a multiple of num_key_value_heads, head_dim even.")


def _llama3_scaling(scaling: dict[str, Any]) -> Llama3Scaling:
    return Llama3Scaling(
        factor=float(scaling["factor"]),
        low_freq_factor=float(scaling["low_freq_factor"]),
        high_freq_factor=float(scaling["high_freq_factor"]),
        original_max_position_embeddings=int(scaling["original_max_position_embeddings"]),
    )


# ---------------------------------------------------------------------------------------------- architecture


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight, the mean taken in at least fp32."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def inverse_frequencies(config: ModelConfig, device: torch.device | str) -> Tensor:
    """Angle per position of each pair of head dimensions, fp32 [D/2]: theta^(-2i/D), LLaMA 3.1 stretched."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    freq = 1.0 / config.rope_theta**exponent
    scaling = config.rope_scaling
    if scaling is None:
        return freq
    # A frequency that turns often within the original context stays, a slow one is divided by `factor`, between
    # the two bounds the answer is interpolated.
    turns = scaling.original_max_position_embeddings * freq / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - keep) * freq / scaling.factor + keep * freq


def rotation(positions: Tensor, config: ModelConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and ∓sin (minus for the first half of a head) of every angle, [T, 1, D] in `dtype`; angles in ≥ fp32."""
    wide = torch.promote_types(dtype, torch.float32)
    angles = positions.to(wide)[:, None] * inverse_frequencies(config, positions.device).to(wide)  # [T, D/2]
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat((cos, cos), dim=-1)[:, None], torch.cat((-sin, sin), dim=-1)[:, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply RoPE to x [T, heads, D], the two halves of a head being the real and imaginary parts."""
    first, second = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat((second, first), dim=-1), sin)


class Attention(nn.Module):
    """Grouped-query attention; what a token may look at is decided by `attend`."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=config.qkv_bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))  # [T, H, D]
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))  # [T, K, D]
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))  # [T, K, D]
        mixed = attend(self.layer, rotate(q, cos, sin), rotate(k, cos, sin), v)  # [T, H, D]
        return self.o_proj(mixed.flatten(-2))  # [T, C]


class MLP(nn.Module):
    """SwiGLU: down(silu(gate x) · up x)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)
        self.recompute = False  # activation checkpointing: keep only the block's input for the backward pass

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._compute, x, cos, sin, attend, use_reentrant=False)
        return self._compute(x, cos, sin, attend)

    def _compute(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, blocks and final norm: everything below the head, under transformers' name `model.`"""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Transformer(nn.Module):
    """The language model; parameter names are those of the Hugging Face checkpoint."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.source: Path | None = None  # where it was loaded from; export copies the tokenizer from there
        self.vocabulary = config.vocab_size  # ids that can occur: those of the tokenizer, where that is known
        self.model = Decoder(config)
        self.lm_head = None if config.tie_word_embeddings else _head(config)

    @property
    def head(self) -> Tensor:
        """The output matrix [V, C]: logits = hidden @ head.T (the embedding itself where the two are tied).

        Its rows beyond `vocabulary` are left out: Qwen2.5 pads the matrix with ids that no tokenizer has, and what
        is never drawn must not have a share in the log-probabilities either.
        """
        weight = self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        return weight if self.vocabulary == self.config.vocab_size else weight[: self.vocabulary]

    def forward(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Hidden states after the final norm, [T, C], of the flat stream `tokens` [T] at `positions` [T].

        The head is not applied: the caller picks the few places where logits are wanted (see
        `grpo.token_logprobs`), because [T, V] of them rarely fit.
        """
        x = self.model.embed_tokens(tokens)  # [T, C]
        cos, sin = rotation(positions, self.config, x.dtype)
        for block in self.model.layers:
            x = block(x, cos, sin, attend)
        return self.model.norm(x)


def _head(config: ModelConfig) -> nn.Linear:
    return nn.Linear(config.hidden_size, config.vocab_size, bias=False)


@torch.no_grad()
def sequence_logits(model: Transformer, ids: list[int]) -> Tensor:
    """fp32 logits [T, V] of one sequence, causal: the slow, readable reference that the fast paths must equal."""
    device = model.head.device
    hidden = model(torch.tensor(ids, device=device), torch.arange(len(ids), device=device), causal)
    return F.linear(hidden, model.head).float()


# ---------------------------------------------------------------------------------------------- files


def read_config(path: str | Path) -> ModelConfig:
    """The configuration of a model directory or hub id."""
    file = local_directory(path, MODEL_FILES) / "config.json"
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read as a model configuration ({error}).") from error
    return parse_config(raw, str(file))


def load_model(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    vocabulary: int | None = None,
) -> Transformer:
    """The model of a Hugging Face directory or hub id, every weight cast to `dtype` on `device`.

    Reads config.json and model.safetensors or its shards. `vocabulary` is how many ids the tokenizer has (None: all
    that the model has). Raises UserError for files that are missing or broken, for a tokenizer with more ids than the
    model, and one that lists all missing, unexpected and mis-shaped tensors together when they do not fit the config.
    """
    config = read_config(path)
    if vocabulary is not None and vocabulary > config.vocab_size:
        raise UserError(
            f"{path}: its tokenizer has {vocabulary} ids, the model {config.vocab_size}; they do not belong together."
        )
    directory = local_directory(path, MODEL_FILES)
    with torch.device("meta"):
        model = Transformer(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    unneeded = ("rotary_emb.inv_freq",) + (("lm_head.weight",) if config.tie_word_embeddings else ())
    state = read_weights(directory, shapes, unneeded, dtype, device)
    model.load_state_dict(state, strict=True, assign=True)
    model.source, model.vocabulary = directory, vocabulary or config.vocab_size
    return model


def random_model(
    config: ModelConfig, seed: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Transformer:
    """A freshly initialised model: normal weights of `initializer_range`, zero biases, unit norms; seeded."""
    with torch.device("meta"):
        model = Transformer(config)
    model = model.to(dtype).to_empty(device=device)
    generator = torch.Generator(device=device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                parameter.normal_(0.0, config.initializer_range, generator=generator)
    return model


def save_model(model: Transformer, path: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write `model` as a Hugging Face directory that transformers and vLLM load.

    config.json, weights in safetensors (sharded over 5 GB) cast to `dtype` (None: as they are), and the tokenizer
    and generation files of the directory the model was loaded from. The directory appears whole or not at all.
    """
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    dtype = dtype or next(iter(state.values())).dtype
    raw = {key: value for key, value in model.config.raw.items() if key not in ("dtype", "torch_dtype")}
    raw["dtype" if "rope_parameters" in raw else "torch_dtype"] = str(dtype).removeprefix("torch.")
    with atomic_directory(path) as directory:
        (directory / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
        write_weights(state, directory, dtype)
        for name in ["generation_config.json", *TOKENIZER_FILES]:
            if model.source is not None and (model.source / name).exists():
                shutil.copyfile(model.source / name, directory / name)
