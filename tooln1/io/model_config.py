"""What config.json says of an architecture, checked: sizes, RoPE, and the refusal of what would be computed wrongly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tooln1.io.errors import UserError
from tooln1.io.jsonl import shown

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
MAX_SIZE = 2**24  # of each; a matrix of two of them still has a size that 64 bits can count


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
        queries, keys = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        layer = self.hidden_size * (2 * queries + 2 * keys + 3 * self.intermediate_size + 2)
        layer += (queries + 2 * keys) * self.qkv_bias
        tables = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return tables + self.num_hidden_layers * layer + self.hidden_size


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
    needed = (
        "rope_theta",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "rms_norm_eps",
    )
    for key in needed:
        if values.get(key) is None:
            raise UserError(f"{where}: '{key}' is missing; the model cannot be built without it.")
    sizes = {key: _number(raw, key, int, where) for key in SIZES if raw.get(key) is not None}
    if raw.get("max_position_embeddings") is not None:
        _number(raw, "max_position_embeddings", int, where)  # evaluation reads it there
    heads = sizes["num_attention_heads"]
    config = ModelConfig(
        **{"num_key_value_heads": heads, "head_dim": sizes["hidden_size"] // heads} | sizes,
        rms_norm_eps=_number(raw, "rms_norm_eps", float, where),
        rope_theta=_number(values, "rope_theta", float, where),
        rope_scaling=_llama3_scaling(scaling, where) if rope_type == "llama3" else None,
        tie_word_embeddings=_flag(raw, "tie_word_embeddings", where),
        qkv_bias=raw["model_type"] == "qwen2",
        initializer_range=_number({"initializer_range": 0.02} | raw, "initializer_range", float, where),
        raw=raw,
    )
    if config.num_attention_heads % config.num_key_value_heads or config.head_dim % 2 or config.head_dim < 2:
        raise UserError(f"{where}: num_attention_heads must be a multiple of num_key_value_heads, head_dim even.")
    return config


def _number(raw: dict[str, Any], key: str, kind: type[int] | type[float], where: str) -> Any:
    """A positive number of the config: an integer up to MAX_SIZE, or a float; not what only passes for one."""
    value = raw.get(key)
    if type(value) not in (int, kind) or not 0 < value <= (MAX_SIZE if kind is int else 1e300):
        wanted = f"an integer from 1 to {MAX_SIZE}" if kind is int else "a number above 0"
        raise UserError(f"{where}: '{key}' must be {wanted}, found {shown(str(value))}.")
    return kind(value)


def _flag(raw: dict[str, Any], key: str, where: str) -> bool:
    value = raw.get(key)
    if value is not None and type(value) is not bool:
        raise UserError(f"{where}: '{key}' must be true or false, found {shown(str(value))}.")
    return bool(value)


def _refuse_unsupported(raw: dict[str, Any], rope_type: Any, where: str) -> None:
    """Another architecture, sliding windows in use, an unknown RoPE, quantised weights, biases elsewhere."""
    model_type, llama = raw.get("model_type"), raw.get("model_type") == "llama"
    for wrong, what in (
        (model_type not in ("qwen2", "llama"), f"model_type {shown(str(model_type))}"),
        (raw.get("quantization_config"), "a quantised checkpoint (quantization_config)"),
        (raw.get("hidden_act", "silu") != "silu", f"hidden_act {shown(str(raw.get('hidden_act')))}"),
        (raw.get("use_sliding_window"), "sliding-window attention (use_sliding_window)"),
        ("sliding_attention" in (raw.get("layer_types") or []), "sliding-window attention (layer_types)"),
        (llama and (raw.get("attention_bias") or raw.get("mlp_bias")), "a LLaMA with biases"),
        (rope_type not in ("default", "llama3"), f"RoPE type {shown(str(rope_type))}"),
    ):
        if wrong:
            raise UserError(f"{where}: {what} is not supported; Qwen2, Qwen2.5 and LLaMA 3 checkpoints are.")


def _llama3_scaling(scaling: dict[str, Any], where: str) -> Llama3Scaling:
    scaled = Llama3Scaling(
        *(_number(scaling, key, float, where) for key in ("factor", "low_freq_factor", "high_freq_factor")),
        _number(scaling, "original_max_position_embeddings", int, where),
    )
    if scaled.low_freq_factor >= scaled.high_freq_factor:
        raise UserError(f"{where}: 'low_freq_factor' must be below 'high_freq_factor'.")
    return scaled


def pair_cost(config: ModelConfig) -> float:
    """What a (query, key) pair costs beside a token: 4·H·D FLOPs over 2 a weight of the blocks, in every layer."""
    queries, keys = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    weights = config.hidden_size * (2 * queries + 2 * keys + 3 * config.intermediate_size)
    return 2 * queries / weights
