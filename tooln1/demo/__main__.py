"""The embedded demo: a synthetic tool-calling set, a small tokenizer and an untrained tiny model, all seeded.

    python -m tooln1.demo data --out DIR          pretrain.jsonl, warmstart.jsonl, train.jsonl, heldout.jsonl
    python -m tooln1.demo tokenizer --out DIR     tokenizer files, trained on that data
    python -m tooln1.demo init-model --tokenizer DIR --out DIR    a random model beside a copy of its tokenizer
    python -m tooln1.demo parts --out DIR         one_call.jsonl, two_calls.jsonl: the parts of train.jsonl

docs/demo.md has the whole recipe. A model learns the task from right replies (`pretrain`), then a second teacher's bad
habits (`warmstart`: numbers written as strings, the second of two calls and what is optional forgotten); the reward
alone undoes them (`train`). No combination of tool and values in `heldout` occurs in any other file.
"""

import argparse
import json
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, pre_tokenizers

from tooln1.data import read_examples, write_examples
from tooln1.demo.requests import ASSETS, examples_of, reply_with, write_data
from tooln1.io.errors import exit_on_user_error
from tooln1.io.files import atomic_write, check_writable
from tooln1.io.model_config import parse_config
from tooln1.model import random_model, save_model
from tooln1.prompt import THINK_INSTRUCTION, TOOLS_SECTION, XLAM_SYSTEM
from tooln1.tokenizer import load_tokenizer

CHAT_TEMPLATE = (
    "{%- for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tools>", "</tools>")
# The training template says the same 350 words in every prompt. Each piece of it is one token here, so that a laptop
# spends its time on what differs.
PIECES = (
    XLAM_SYSTEM + TOOLS_SECTION[: TOOLS_SECTION.index("<tools>")],
    THINK_INSTRUCTION,
    '{"type": "function", "function": {"name": "',
    '", "description": "',
    '", "parameters": {"',
    '": {"description": "',
    '", "type": "',
    ', optional", "default": ',
    '"}, "',
    '}, "',
    '"}}}}\n',
    "}}}}\n",
    '[{"name": "',
    ', {"name": "',
    '", "arguments": {"',
)


# Qwen2's own split into words. transformers takes it for every model of type qwen2, whatever tokenizer.json says.
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEMO_WORDS = "[A-Za-z_]+|[0-9]|[^A-Za-z0-9_]+"


def split_into_words(pattern: str) -> pre_tokenizers.PreTokenizer:
    """The pre-tokenizer that splits at a pattern and writes bytes as letters."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level])


def write_tokenizer(folder: Path, seed: int = 0, vocab_size: int = 2048) -> None:
    """A byte-level BPE tokenizer in Hugging Face layout, trained on the demo's prompts and replies.

    It is trained on words, single digits and everything between, spaces standing alone, so that a word in a request
    and the same word in JSON are the same token: what the model has to learn is to copy. It then splits as Qwen2's
    tokenizer does; the tokens that such a split would cut become added tokens, which are found before it. So
    transformers' AutoTokenizer, which puts Qwen2's split into the place of any other, gives the same ids.
    """
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = split_into_words(DEMO_WORDS)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    texts = [
        text
        for example in examples_of("train", seed)
        for text in (example.messages[0]["content"], reply_with(example.answer), *map(json.dumps, example.tools))
    ] + ["system\n", "user\n", "assistant\n"] * 10
    for piece in (*TAGS, *sorted(PIECES, key=len, reverse=True)):
        texts = [part for text in texts for part in text.split(piece)]
    backend.train_from_iterator(texts, trainer)
    used = {backend.decode([token]) for encoding in backend.encode_batch(texts) for token in encoding.ids}
    qwen2 = split_into_words(QWEN2_WORDS)
    cut = sorted(word for word in used if len(qwen2.pre_tokenize_str(word)) > 1)
    backend.normalizer, backend.pre_tokenizer = tokenizers.normalizers.NFC(), qwen2
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    backend.add_tokens([AddedToken(token, normalized=False) for token in (*TAGS, *PIECES, *cut)])
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / "tokenizer.json") as file:
        file.write(backend.to_str())
    settings = {
        "chat_template": CHAT_TEMPLATE,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "Qwen2Tokenizer",
        "model_max_length": 1024,
    }
    stops = [backend.token_to_id("<|im_end|>"), backend.token_to_id("<|endoftext|>")]
    generation = {"eos_token_id": stops, "pad_token_id": stops[1], "do_sample": True, "temperature": 1.0}
    for name, value in (("tokenizer_config.json", settings), ("generation_config.json", generation)):
        with atomic_write(folder / name) as file:
            file.write(json.dumps(value, indent=2) + "\n")


def write_model(folder: Path, tokenizer_folder: Path, width: int = 128, layers: int = 4, seed: int = 0) -> None:
    """A random model in the style of the committed demo's, with the tokenizer of `tokenizer_folder` beside it."""
    vocab_size = -(-load_tokenizer(tokenizer_folder).vocab_size // 64) * 64
    shape = json.loads((ASSETS / "model" / "config.json").read_text(encoding="utf-8")) | {"vocab_size": vocab_size}
    shape |= {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers}
    model = random_model(parse_config(shape), seed)
    model.source = tokenizer_folder
    save_model(model, folder)


def write_parts(folder: Path) -> None:
    """The training requests for one call, and those for two: the data of studies/demo_table5.toml."""
    examples = read_examples(ASSETS / "train.jsonl")
    parts = {
        "one_call": [e for e in examples if len(e.answer) == 1],
        "two_calls": [e for e in examples if e.answer[1:]],
    }
    for name, part in parts.items():
        write_examples(part, folder / f"{name}.jsonl")
    with atomic_write(folder / "report.json") as file:
        file.write(json.dumps({name: len(part) for name, part in parts.items()}) + "\n")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tooln1.demo", description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("data", "tokenizer", "init-model", "parts"))
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    parser.add_argument("--tokenizer", type=Path, default=ASSETS / "model", help="init-model: the tokenizer's folder")
    parser.add_argument("--width", type=int, default=128, help="init-model: the hidden size")
    parser.add_argument("--layers", type=int, default=4, help="init-model: the number of layers")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    check_writable(args.out, "--out")
    if args.what == "data":
        write_data(args.out, args.seed)
    elif args.what == "tokenizer":
        write_tokenizer(args.out, args.seed)
    elif args.what == "parts":
        write_parts(args.out)
    else:
        write_model(args.out, args.tokenizer, args.width, args.layers, args.seed)
    print(f"written: {args.out}")


if __name__ == "__main__":
    exit_on_user_error(main)
