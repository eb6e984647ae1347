"""Text to token ids and back, and chat messages to text by the model's own template.

`tokenizers` does the first, chat_template.py the second. Sources: the model's tokenizer.json,
tokenizer_config.json (or chat_template.jinja) and generation_config.json.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tokenizers

from tooln1.chat_template import compile_template
from tooln1.io.errors import UserError
from tooln1.io.hub import local_directory
from tooln1.io.jsonl import parse_json, read_text, shown

TOKENIZER_FILES = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
]
MAX_GROWTH = 64  # of a text by normalizers; published ones at most double it


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """The tokenizer of a Hugging Face directory, a tokenizer-only directory or a hub id such as org/name.

    Needs tokenizer.json; the other TOKENIZER_FILES are read where they exist. A chat_template.jinja goes
    before the template in tokenizer_config.json. Raises UserError, naming the file, where one is missing or
    malformed.
    """
    directory = local_directory(os.fspath(path), TOKENIZER_FILES)
    config = _read_json_object(directory / "tokenizer_config.json")
    special_tokens = _special_tokens(_read_json_object(directory / "special_tokens_map.json") | config)
    backend = _read_backend(directory / "tokenizer.json")
    return Tokenizer(
        backend=backend,
        templates=_read_templates(directory, config),
        special_tokens=special_tokens,
        stop_ids=_read_stop_ids(directory, backend, special_tokens),
        directory=directory,
    )


class Tokenizer:
    """A tokenizer, its chat templates and its stop ids. Made by `load_tokenizer`; never changes."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        templates: dict[str, Callable[..., str]],  # "default", perhaps "tool_use"; empty where there is none
        special_tokens: dict[str, str],  # "eos_token" -> "<|im_end|>", ...; what templates may name
        stop_ids: tuple[int, ...],  # empty where the files name none
        directory: Path,  # for error texts
    ):
        self._backend = backend
        self._templates = templates
        self._special_tokens = special_tokens
        self._stop_ids = stop_ids
        self._directory = directory

    @property
    def vocab_size(self) -> int:
        """One more than the largest id the tokenizer knows, added tokens included; a model's table may be longer."""
        return 1 + max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids that end a reply: `eos_token_id` of generation_config.json, else the tokenizer's eos_token.

        Raises UserError where neither is given.
        """
        if not self._stop_ids:
            raise UserError(
                f'{self._directory}: nothing says which token ends a reply. Give "eos_token_id" in '
                'generation_config.json, or "eos_token" in tokenizer_config.json.'
            )
        return self._stop_ids

    def encode(self, text: str) -> list[int]:
        """The token ids of `text`; special tokens written out in it are recognised, none is added.

        A lone surrogate, which no UTF-8 text can hold, counts as U+FFFD. Raises UserError where tokenizer.json
        cannot encode the text.
        """
        with _told(f"{self._directory}: the tokenizer cannot encode a text"):
            try:
                return self._backend.encode(text, add_special_tokens=False).ids
            except TypeError:  # how `tokenizers` refuses a str that is not valid Unicode
                text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
                return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """The text of token ids. Broken UTF-8 becomes U+FFFD; ids beyond the vocabulary become nothing."""
        with _told(f"{self._directory}: the tokenizer cannot decode"):
            return self._backend.decode([int(token) for token in ids], skip_special_tokens=skip_special_tokens)

    def prompt_ids(self, messages: list[dict]) -> list[int]:
        """The token ids that ask for a reply to the messages."""
        return self.encode(self.render(messages, add_generation_prompt=True))

    def render(self, messages: list[dict], tools: list[dict] | None = None, add_generation_prompt: bool = False) -> str:
        """Chat messages as the one text the model was trained on.

        messages: [{"role", "content", ...}, ...] as the model's template expects them.
        tools:    handed to the template, for models that describe tools by themselves; Tool-N1's own prompt
                  has its tools in the system message and leaves this None.
        add_generation_prompt: end with the opening of an assistant turn, for the model to go on from.
        Raises UserError where there is no template, with the template's own words where it refuses, and where it
        takes more time or memory than a chat template may.
        """
        # The order in which transformers chooses among named templates.
        wanted = "tool_use" if tools is not None and "tool_use" in self._templates else "default"
        if wanted not in self._templates:
            raise UserError(
                f"{self._directory}: no chat template. Give one as chat_template.jinja, or under "
                '"chat_template" in tokenizer_config.json (of several, the one named "default" is used).'
            )
        context = {"messages": messages, "tools": tools, "documents": None} | self._special_tokens
        try:
            return self._templates[wanted](**context, add_generation_prompt=add_generation_prompt)
        except Exception as error:  # a template is a program of the model's maker: it may fail in any way
            raise UserError(
                f"{self._directory}: the chat template does not accept these messages: {_words(error)}"
            ) from error


# ---- files ----


def _read_json_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file; {} where the file does not exist."""
    if not os.path.lexists(file):
        return {}
    value = parse_json(read_text(file), str(file), constants=True)
    if not isinstance(value, dict):
        raise UserError(f"{file}: holds {type(value).__name__}, not a JSON object")
    return value


def _read_backend(file: Path) -> tokenizers.Tokenizer:
    if not file.is_file():
        raise UserError(f"{file}: no such file; a tokenizer is read from tokenizer.json (the fast format)")
    text = read_text(file)
    raw = parse_json(text, f"{file}: not a tokenizer that can be read", constants=True)
    parts = [raw.get("normalizer"), raw.get("pre_tokenizer")] if isinstance(raw, dict) else []
    if (growth := _growth(parts)) > MAX_GROWTH:  # told before any text, a special token say, goes through them
        raise UserError(f"{file}: its normalizers would make a text up to {growth:.0f} times as long, which none needs")
    with _told(f"{file}: not a tokenizer that can be read"):
        backend = tokenizers.Tokenizer.from_str(text)
    # Settings of whoever saved the file would cut or pad every text.
    backend.no_truncation()
    backend.no_padding()
    return backend


def _growth(part: Any) -> float:
    """How many times as long a text may become by normalizers, given as their JSON: in a chain they multiply."""
    if isinstance(part, list):
        return math.prod(map(_growth, part))
    if not isinstance(part, dict):
        return 1.0
    own = {"ByteLevel": 2.0, "Precompiled": 4.0}.get(str(part.get("type")), 1.0)
    if isinstance(content := part.get("content"), str):  # of Replace; a regular expression may match one character
        pattern = part.get("pattern")
        text = pattern.get("String") if isinstance(pattern, dict) else None
        own = max(1.0, len(content) / max(1, len(text) if isinstance(text, str) else 1))
    return min(own * _growth(list(part.values())), 1e9)


@contextmanager
def _told(what: str) -> Iterator[None]:
    """What `tokenizers` raises, as a UserError that begins with `what`."""
    try:
        yield
    except BaseException as error:  # its errors are plain Exceptions; a panic in Rust is not even one of those
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{what}: {_words(error)}") from error


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """The named special tokens ("bos_token", ...) that are set, given as text or as {"content": text}."""
    named = {}
    for key, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(text, str):
            named[key] = text.encode("utf-8", "replace").decode()  # half a surrogate pair is no token
    return named


def _read_stop_ids(directory: Path, backend: tokenizers.Tokenizer, special_tokens: dict[str, str]) -> tuple[int, ...]:
    file = directory / "generation_config.json"
    given = _read_json_object(file).get("eos_token_id")
    if given is not None:
        ids = given if isinstance(given, list) else [given]
        if not ids or not all(type(token) is int and 0 <= token < 2**32 for token in ids):
            raise UserError(f"{file}: eos_token_id is {shown(str(given))}; it must be a token id or a list of them")
        if unknown := [token for token in ids if backend.id_to_token(token) is None]:
            raise UserError(f"{file}: eos_token_id {unknown[0]} is no token of the tokenizer beside it")
        return tuple(ids)
    eos = backend.token_to_id(special_tokens.get("eos_token", ""))
    return () if eos is None else (eos,)


# ---- templates ----


def _read_templates(directory: Path, config: dict[str, Any]) -> dict[str, Callable[..., str]]:
    """The chat templates by name; a single one is "default". Nothing in them can reach Python or a file."""
    file = directory / "chat_template.jinja"
    if os.path.lexists(file):
        sources = {"default": read_text(file)}
    else:
        file = directory / "tokenizer_config.json"
        given = config.get("chat_template") or []
        try:
            listed = [{"name": "default", "template": given}] if isinstance(given, str) else given
            sources = {entry["name"]: entry["template"] for entry in listed}
        except (TypeError, KeyError) as error:
            raise UserError(
                f'{file}: chat_template must be a text, or a list of {{"name", "template"}} objects'
            ) from error
    templates = {}
    for name, source in sources.items():
        try:
            templates[name] = compile_template(source)
        except Exception as error:  # not text, a syntax error, nesting beyond Python's limits
            raise UserError(f"{file}: the chat template {shown(str(name))} is not valid: {_words(error)}") from error
    return templates


def _words(error: BaseException) -> str:
    """An error's text, shortened, or its name where it has none."""
    return str(error)[:500] or type(error).__name__
