"""A model directory and data small enough for tests: random weights, a byte-level tokenizer with ChatML."""

import json
from pathlib import Path

import tokenizers
from tokenizers import AddedToken

from tooln1.data import Example, write_examples
from tooln1.io.errors import exit_on_user_error
from tooln1.io.model_config import parse_config
from tooln1.model import random_model, save_model
from tooln1.prompt import XLAM_SYSTEM

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "initializer_range": 0.3,  # wide, so that greedy choices are clear and ratios move
    "torch_dtype": "float32",
    "use_sliding_window": False,
    "max_position_embeddings": 4096,
}


def write_model(folder: Path, seed: int = 0, **changes) -> Path:
    """A random Qwen2 with its tokenizer in Hugging Face layout; `changes` override its config."""
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate(alphabet)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(token, special=True) for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    )
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": CHAT_TEMPLATE, "eos_token": "<|im_end|>"})
    )
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [258, 256]}))
    config = parse_config({**CONFIG, "vocab_size": 259, **changes})
    model = random_model(config, seed)
    model.source = folder
    save_model(model, folder / "model")
    return folder / "model"


def examples(count: int) -> list[Example]:
    """Examples of varying length with one tool each."""
    tool = {"name": "add", "description": "Adds.", "parameters": {"a": {"type": "int"}, "b": {"type": "int"}}}
    return [
        Example(
            id=f"tiny-{i}",
            source="tiny",
            system=XLAM_SYSTEM[:20],
            tools=[tool],
            messages=[{"role": "user", "content": f"Add {i} and {i * 37} " * (1 + i % 3)}],
            answer=[{"name": "add", "arguments": {"a": i, "b": i * 37}}],
        )
        for i in range(count)
    ]


def write_data(folder: Path, count: int = 12) -> Path:
    """`examples` as a JSONL file."""
    write_examples(examples(count), folder / "data.jsonl")
    return folder / "data.jsonl"


def run_eval(*arguments) -> int:
    """eval.py's exit code for these arguments, run in this process."""
    import eval as program

    try:
        exit_on_user_error(lambda: program.main([*map(str, arguments)]))
    except SystemExit as stop:
        return stop.code
    return 0


def read_rows(path: Path) -> list[dict]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_rows(path: Path, rows: list[dict]) -> Path:
    """A JSONL file of these rows."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
