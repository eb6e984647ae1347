"""Qwen2.5, Qwen3 (dense) and LLaMA 3 by hand: decoder, loading and Hugging Face export.

The model knows nothing of caches, packing or sharding. It is called on a flat stream of tokens and is handed the
attention to use: `model(tokens, positions, attend)`. The stream may be one prompt, forty packed sequences, or one new
token for each of 320 replies: only `attend` knows (attention.py, sampler/paged_attention.py).

Shapes, here and everywhere else:
    T packed tokens   B rows   H query heads   K key/value heads   D head dim   C hidden   V vocabulary   G group size
"""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tooln1.attention import causal
from tooln1.io.errors import UserError
from tooln1.io.files import atomic_directory
from tooln1.io.hub import CONFIG_FILES, WEIGHT_FILES, local_directory
from tooln1.io.jsonl import parse_json, read_text
from tooln1.io.model_config import ModelConfig, parse_config
from tooln1.io.weights import INDEX, find_weights, read_weights, write_weights

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q [T, H, D], k [T, K, D], v [T, K, D]) -> [T, H, D]"""

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
    """Angle per position of each pair of head dimensions, fp32 [D/2]: theta^(-2i/D), with LLaMA 3.1's scaling."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    freq = 1.0 / config.rope_theta**exponent
    scaling = config.rope_scaling
    if scaling is None:
        return freq
    # A frequency that turns often within the original context is kept, a slow one is divided by `factor`; between the
    # two bounds the result is interpolated.
    turns = scaling.original_max_position_embeddings * freq / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - keep) * freq / scaling.factor + keep * freq


def rope_cos_sin(positions: Tensor, config: ModelConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and ∓sin (minus for the first half of a head) of every angle, [T, 1, D] in `dtype`; angles in ≥ fp32."""
    angle_dtype = torch.promote_types(dtype, torch.float32)
    angles = positions.to(angle_dtype)[:, None] * inverse_frequencies(config, positions.device).to(
        angle_dtype
    )  # [T, D/2]
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat((cos, cos), dim=-1)[:, None], torch.cat((-sin, sin), dim=-1)[:, None]


def apply_rotary_emb(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply RoPE to x [T, heads, D], the two halves of a head being the real and imaginary parts."""
    first, second = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat((second, first), dim=-1), sin)


class Attention(nn.Module):
    """The projections of grouped-query attention; the attention itself is the `attend` that the model is handed."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=config.qkv_bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [T, H, D], k and v [T, K, D] of x [T, C], q and k normalised per head (Qwen3), then rotated."""
        q = self.q_norm(self.q_proj(x).unflatten(-1, (-1, self.head_dim)))
        k = self.k_norm(self.k_proj(x).unflatten(-1, (-1, self.head_dim)))
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        return apply_rotary_emb(q, cos, sin), apply_rotary_emb(k, cos, sin), v


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
        q, k, v = self.project_qkv(x, cos, sin)  # [T, H, D], [T, K, D], [T, K, D]
        return self.add_outputs(x, attend(self.self_attn.layer, q, k, v))

    def project_qkv(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [T, H, D], k and v [T, K, D] of the normalised x [T, C], q and k rotated."""
        return self.self_attn.project(self.input_layernorm(x), cos, sin)

    def add_outputs(self, x: Tensor, attended: Tensor) -> Tensor:
        """The residual stream x [T, C] plus the projected attention output [T, H, D] plus the MLP of that."""
        x = x + self.self_attn.o_proj(attended.flatten(-2))
        return x + self.mlp(self.post_attention_layernorm(x))

    def compile_parts(self) -> None:
        """torch.compile the two parts around the attention, for any number of tokens."""
        self.project_qkv = torch.compile(self.project_qkv, dynamic=True)
        self.add_outputs = torch.compile(self.add_outputs, dynamic=True)


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
        # Number of ids that can occur: those of the tokenizer, where it is known. Qwen2.5 pads the head with ids that
        # no tokenizer has; they are never sampled, so they must not take part in the log-probabilities either.
        self.vocabulary = config.vocab_size
        self.model = Decoder(config)
        self.lm_head = None if config.tie_word_embeddings else _head(config)

    @property
    def head(self) -> Tensor:
        """The output matrix [V, C]: logits = hidden @ head.T (the embedding itself where the two are tied)."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def forward(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Hidden states after the final norm, [T, C], of the flat stream `tokens` [T] at `positions` [T].

        The head is not applied: the caller picks the few places where logits are wanted (see
        `grpo.token_logprobs`), because [T, V] of them rarely fit.
        """
        x = self.model.embed_tokens(tokens)  # [T, C]
        cos, sin = rope_cos_sin(positions, self.config, x.dtype)
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
    return F.linear(hidden, model.head[: model.vocabulary]).float()


# ---------------------------------------------------------------------------------------------- files


def read_config(path: str | Path) -> ModelConfig:
    """The configuration of a model directory or hub id."""
    file = local_directory(path, CONFIG_FILES) / "config.json"
    return parse_config(parse_json(read_text(file), str(file), constants=True), str(file))


def load_model(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    vocabulary: int | None = None,
) -> Transformer:
    """The model of a Hugging Face directory or hub id, every weight cast to `dtype` on `device`.

    Reads config.json and model.safetensors or its shards. Raises UserError as `meta_model` and `load_weights` do.
    """
    return load_weights(meta_model(path, dtype, vocabulary), device)


def meta_model(path: str | Path, dtype: torch.dtype = torch.float32, vocabulary: int | None = None) -> Transformer:
    """The model of a Hugging Face directory or hub id without its weights, to shard or adapt before `load_weights`.

    `vocabulary` is how many ids the tokenizer has (None: all that the model has). Raises UserError for files that are
    missing or broken, and for a tokenizer with more ids than the model.
    """
    config = read_config(path)
    if vocabulary is not None and vocabulary > config.vocab_size:
        raise UserError(
            f"{path}: its tokenizer has {vocabulary} ids, the model {config.vocab_size}; they do not belong together."
        )
    with torch.device("meta"):
        model = Transformer(config).to(dtype)
    model.source, model.vocabulary = local_directory(path), vocabulary or config.vocab_size
    return model


def load_weights(model: Transformer, device: torch.device | str) -> Transformer:
    """Give a `meta_model` its weights on `device`, in place; those of adapters are left unset.

    Of a sharded model each process reads its own shards, and has no more than these and one tensor in memory. Raises
    UserError for files that are missing or broken, and one that lists all missing, unexpected and mis-shaped tensors
    together when they do not fit the config.
    """
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters() if ".lora_" not in name}
    unneeded = ("rotary_emb.inv_freq", "lm_head.weight")[: 1 + model.config.tie_word_embeddings]
    files = find_weights(model.source, shapes, unneeded)
    model.to_empty(device=device)
    read_weights(files, {name: model.get_parameter(name) for name in shapes})
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
        for file in matching_files(model.source, CONFIG_FILES) if model.source else ():
            if file.name not in ("config.json", INDEX):
                shutil.copyfile(file, directory / file.name)


def model_files(path: str | Path) -> list[Path]:
    """The files of a model directory or hub id that make the model and its tokenizer."""
    return matching_files(local_directory(path), CONFIG_FILES + WEIGHT_FILES)


def matching_files(directory: Path, patterns: tuple[str, ...]) -> list[Path]:
    """The files of a directory that match one of the patterns, sorted."""
    return sorted(file for pattern in patterns for file in directory.glob(pattern))
