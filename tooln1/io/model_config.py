"""The architecture in config.json: sizes and RoPE; what would be computed wrongly is refused."""

from dataclasses import dataclass, fields
from typing import Any

from tooln1.io.errors import UserError
from tooln1.io.jsonl import shown


@dataclass(frozen=True)
class Llama3Scaling:
    """LLaMA 3.1's scaling of the low RoPE frequencies (transformers' rope_type "llama3")."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class ModelConfig:
    """The parameters of the architecture, under transformers' names; `raw` is config.json as it was read."""

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
    qk_norm: bool
    initializer_range: float
    raw: dict[str, Any]

    @property
    def num_parameters(self) -> int:
        """Parameters in all, a tied embedding counted once."""
        queries, keys = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        layer = self.hidden_size * (2 * queries + 2 * keys + 3 * self.intermediate_size + 2)
        layer += (queries + 2 * keys) * self.qkv_bias + 2 * self.head_dim * self.qk_norm
        tables = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return tables + self.num_hidden_layers * layer + self.hidden_size


def parse_config(raw: dict[str, Any], where: str = "config.json") -> ModelConfig:
    """config.json, in its published or its transformers-5 style, as a `ModelConfig`.

    Raises UserError for a missing or mistyped key, and for what this implementation would compute wrongly (see
    `_refuse_unsupported`). A missing RoPE theta is an error: a guessed one would give a wrong model silently.
    """
    if not isinstance(raw, dict):
        raise UserError(f"{where}: expected a JSON object.")
    rope = raw.get("rope_parameters") or {}  # transformers 5 keeps theta and scaling together
    scaling = rope or raw.get("rope_scaling") or {}
    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    _refuse_unsupported(raw, rope_type, where)
    given = {key: value for key, value in raw.items() if value is not None}
    hidden, heads = (_number(given, key, int, where) for key in ("hidden_size", "num_attention_heads"))
    given = {"num_key_value_heads": heads, "head_dim": hidden // heads, "initializer_range": 0.02} | given
    config = ModelConfig(
        **_numbers(ModelConfig, given | rope, where),
        rope_scaling=Llama3Scaling(**_numbers(Llama3Scaling, scaling, where)) if rope_type == "llama3" else None,
        tie_word_embeddings=bool(raw.get("tie_word_embeddings")),
        qkv_bias=raw["model_type"] == "qwen2",
        qk_norm=raw["model_type"] == "qwen3",
        raw=raw,
    )
    if config.num_attention_heads % config.num_key_value_heads or config.head_dim % 2:
        raise UserError(f"{where}: num_attention_heads must be a multiple of num_key_value_heads, head_dim even.")
    return config


def _numbers(kind: type, raw: dict[str, Any], where: str) -> dict[str, Any]:
    """The fields of the dataclass `kind` that are numbers."""
    return {part.name: _number(raw, part.name, part.type, where) for part in fields(kind) if part.type in (int, float)}


def _number(raw: dict[str, Any], key: str, kind: type[int] | type[float], where: str) -> Any:
    """A positive int or float of the config; an int counts as a float."""
    value = raw.get(key)
    if value is None:
        raise UserError(f"{where}: '{key}' is missing; the model cannot be built without it.")
    if type(value) not in (int, kind) or not value > 0:
        raise UserError(f"{where}: '{key}' must be a positive {kind.__name__}, found {value!r}.")
    return kind(value)


def _refuse_unsupported(raw: dict[str, Any], rope_type: Any, where: str) -> None:
    """Raise UserError for another architecture, sliding windows, an unknown RoPE, quantised weights, other biases."""
    model_type, biases = raw.get("model_type"), raw.get("attention_bias") or raw.get("mlp_bias")
    for wrong, what in (
        (model_type not in ("qwen2", "qwen3", "llama"), f"model_type {shown(str(model_type))}"),
        (raw.get("quantization_config"), "a quantised checkpoint (quantization_config)"),
        (raw.get("hidden_act", "silu") != "silu", f"hidden_act {shown(str(raw.get('hidden_act')))}"),
        (raw.get("use_sliding_window"), "sliding-window attention (use_sliding_window)"),
        ("sliding_attention" in (raw.get("layer_types") or []), "sliding-window attention (layer_types)"),
        (model_type != "qwen2" and biases, f"{model_type} with biases (attention_bias, mlp_bias)"),
        (rope_type not in ("default", "llama3"), f"RoPE type {shown(str(rope_type))}"),
    ):
        if wrong:
            raise UserError(f"{where}: {what} is not supported; Qwen2.5, dense Qwen3 and LLaMA 3 checkpoints are.")


def pair_cost(config: ModelConfig) -> float:
    """FLOPs of a (query, key) pair, 4·H·D, over those of a token, 2 for each weight of a layer."""
    queries, keys = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    weights = config.hidden_size * (2 * queries + 2 * keys + 3 * config.intermediate_size)
    return 2 * queries / weights
