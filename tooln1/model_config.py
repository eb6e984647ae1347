"""What config.json says of an architecture, checked: sizes, RoPE, and the refusal of what would be computed wrongly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tooln1.errors import UserError


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


def pair_cost(config: ModelConfig) -> float:
    """What a (query, key) pair costs beside a token: 4·H·D FLOPs over 2 a weight of the blocks, in every layer."""
    queries, keys = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    weights = config.hidden_size * (2 * queries + 2 * keys + 3 * config.intermediate_size)
    return 2 * queries / weights
