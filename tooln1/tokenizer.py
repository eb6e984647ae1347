"""Text to token ids and back, and chat messages to text by the model's own chat template.

`tokenizers` does the first, jinja2 the second, set up as transformers sets it up (utils/chat_template_utils.py), so
that the same messages become the same text. Files: the model's tokenizer.json, tokenizer_config.json (or
chat_template.jinja), special_tokens_map.json and generation_config.json.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import tokenizers
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tooln1.io.errors import UserError
from tooln1.io.hub import CONFIG_FILES, local_directory
from tooln1.io.jsonl import parse_json, read_text, shown


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """The tokenizer of a Hugging Face directory, a tokenizer-only directory or a hub id such as org/name.

    Needs tokenizer.json; the other files of its kind are read where they exist. A chat_template.jinja goes
    before the template in tokenizer_config.json. Raises UserError, naming the file, where one is missing or
    malformed.
    """
    directory = local_directory(path, CONFIG_FILES)
    config = _read_json_object(directory / "tokenizer_config.json")
    special_tokens = _special_tokens(_read_json_object(directory / "special_tokens_map.json") | config)
    backend = _read_backend(directory / "tokenizer.json")
    return Tokenizer(
        backend=backend,
        templates=_read_templates(directory, config),
        special_tokens=special_tokens,
        stop_ids=_read_stop_ids(directory / "generation_config.json", backend, special_tokens),
        directory=directory,
    )


class Tokenizer:
    """A tokenizer, its chat templates and its stop ids. Made by `load_tokenizer`; never changes."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        templates: dict[str, jinja2.Template],  # "default", perhaps "tool_use"; empty where there is none
        special_tokens: dict[str, str],  # "eos_token" -> "<|im_end|>", ...; variables of the templates
        stop_ids: tuple[int, ...],  # empty where the files name none
        directory: Path,  # for error messages
    ):
        self._backend = backend
        self._templates = templates
        self._special_tokens = special_tokens
        self._stop_ids = stop_ids
        self._directory = directory

    @property
    def vocab_size(self) -> int:
        """One more than the largest id of the tokenizer, added tokens included; a model's table may be longer."""
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
        """The token ids of `text`. Special tokens written in the text are recognised; none is added.

        A lone surrogate, which no UTF-8 text can hold, is encoded as U+FFFD.
        """
        try:
            return self._backend.encode(text, add_special_tokens=False).ids
        except TypeError:  # raised by `tokenizers` for a str that is not valid Unicode
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """The text of token ids. Broken UTF-8 becomes U+FFFD; ids beyond the vocabulary become nothing."""
        return self._backend.decode([int(token) for token in ids], skip_special_tokens=skip_special_tokens)

    def prompt_ids(self, messages: list[dict]) -> list[int]:
        """The token ids of the messages, followed by the opening of the assistant's reply."""
        return self.encode(self.render(messages, add_generation_prompt=True))

    def render(self, messages: list[dict], tools: list[dict] | None = None, add_generation_prompt: bool = False) -> str:
        """Chat messages as the text that the model was trained on.

        messages: [{"role", "content", ...}, ...] as the model's template expects them.
        tools:    given to the template, for models that describe tools by themselves; Tool-N1's own prompt
                  has its tools in the system message and leaves this None.
        add_generation_prompt: end with the opening of an assistant message, for the model to continue.
        Raises UserError where there is no template, and with the template's own message where it fails.
        """
        # transformers chooses among named templates in this order.
        wanted = "tool_use" if tools is not None and "tool_use" in self._templates else "default"
        if wanted not in self._templates:
            raise UserError(
                f"{self._directory}: no chat template. Give one as chat_template.jinja, or under "
                '"chat_template" in tokenizer_config.json (of several, the one named "default" is used).'
            )
        context = {"messages": messages, "tools": tools, "documents": None} | self._special_tokens
        try:
            return self._templates[wanted].render(context, add_generation_prompt=add_generation_prompt)
        except Exception as error:  # a template is a program by the model's maker: it may fail in any way
            reason = str(error) or type(error).__name__
            raise UserError(f"{self._directory}: the chat template does not accept these messages: {reason}") from error


def _read_json_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file; {} where the file does not exist."""
    if not file.exists():
        return {}
    value = parse_json(read_text(file), str(file), constants=True)
    if not isinstance(value, dict):
        raise UserError(f"{file}: holds {type(value).__name__}, not a JSON object")
    return value


def _read_backend(file: Path) -> tokenizers.Tokenizer:
    if not file.is_file():
        raise UserError(f"{file}: no such file; a tokenizer is read from tokenizer.json (the fast format)")
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # `tokenizers` raises plain Exceptions
        raise UserError(f"{file}: not a tokenizer that can be read: {error}") from error
    # Settings of whoever saved the file would cut or pad every text.
    backend.no_truncation()
    backend.no_padding()
    return backend


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """The named special tokens ("bos_token", ...) that are set, given as text or as {"content": text}."""
    texts = {key: value.get("content") if isinstance(value, dict) else value for key, value in config.items()}
    return {key: text for key, text in texts.items() if key.endswith("_token") and isinstance(text, str)}


def _read_stop_ids(file: Path, backend: tokenizers.Tokenizer, special_tokens: dict[str, str]) -> tuple[int, ...]:
    given = _read_json_object(file).get("eos_token_id")
    if given is None:
        eos = backend.token_to_id(special_tokens.get("eos_token", ""))
        return () if eos is None else (eos,)
    ids = given if isinstance(given, list) else [given]
    known = (type(token) is int and 0 <= token < 2**32 and backend.id_to_token(token) is not None for token in ids)
    if not ids or not all(known):
        raise UserError(f"{file}: eos_token_id is {shown(str(given))}; it must be an id of the tokenizer, or several")
    return tuple(ids)


def _read_templates(directory: Path, config: dict[str, Any]) -> dict[str, jinja2.Template]:
    """The chat templates by name; a single one is "default"."""
    file, given = directory / "tokenizer_config.json", config.get("chat_template") or []
    if (separate := directory / "chat_template.jinja").exists():
        file, given = separate, read_text(separate)
    listed = [{"name": "default", "template": given}] if isinstance(given, str) else given
    try:
        return {entry["name"]: compile_template(entry["template"]) for entry in listed}
    except Exception as error:  # neither text nor a list, a syntax error, nesting beyond Python's limits
        raise UserError(
            f"{file}: the chat template must be a text that jinja2 can compile, or a list of "
            f'{{"name", "template"}} objects: {str(error) or type(error).__name__}'
        ) from error


class GenerationTag(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %} marks an assistant's text for training; here it is just rendered."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def compile_template(source: str) -> jinja2.Template:
    """A chat template in jinja2's sandbox, with transformers' settings. It reaches neither Python nor files.

    Raises what jinja2 raises for a `source` that is not a template.
    """
    extensions = [GenerationTag, jinja2.ext.loopcontrols]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment.from_string(source)


def _to_json(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    # jinja2's own `tojson` would escape <, > and & for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
