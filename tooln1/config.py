"""Reading and writing the settings of a run: TOML presets, command-line overrides, a generated `--help`.

The settings themselves are the table in settings.py. A later source beats an earlier one: the default there, the
preset that a preset names as its `base`, the preset itself, the command line. Only train.py and eval.py see `Config`.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import shutil
import sys
import textwrap
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tooln1.io.errors import UserError
from tooln1.settings import KIND_WORDS, KINDS, MAY_CHANGE, PATHS, SECTION_OF, SETTINGS, Config, checked, shown, validate

REPOSITORY = Path(__file__).resolve().parents[1]


def load_config(argv: list[str], default_toml: str | Path) -> Config:
    """The settings that a command line asks for, checked.

    `argv`: what follows the program's name: `--config TOML` (else `default_toml` is read), `--key value` or
    `--key=value`. A true-or-false setting may stand alone (`--think`), and so may `--resume` (auto). Dashes
    and underscores are the same; of two equal options the later counts. `--help` prints all and exits with 0.

    Raises `UserError` for an unknown key (naming the nearest), a value of the wrong type or out of range
    (naming where it stood), settings that contradict each other, and a preset that cannot be read.
    """
    options = list(_options(argv))
    named_preset = [text for key, text in options if key == "config"]
    preset = Path(default_toml)
    if named_preset:
        if not named_preset[-1]:
            raise UserError("command line: --config needs the path of a TOML file.")
        preset = Path(_in_repository(named_preset[-1]))
    values = read_preset(preset)
    if any(key == "help" for key, _ in options):
        print(help_text(Config(**values), preset))
        raise SystemExit(0)
    for key, text in options:
        if key != "config":
            name = _known(key, "command line", extra=("config", "help"))
            values[name] = _from_text(name, text)
    config = Config(**values)
    validate(config)
    return config


def read_preset(path: str | Path) -> dict[str, Any]:
    """The settings in a TOML file and in the presets it builds on, checked one by one, with paths found.

    Settings stand at the top of the file or in the sections that `Config` names. `base = "other.toml"`
    (relative to the file) takes that preset's settings first. A relative path to a model or data file is
    meant from the current directory if it exists there, else from the repository.
    """
    return _read_preset(Path(path), ())


def _read_preset(path: Path, readers: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in readers:
        chain = " -> ".join(reader.name for reader in (*readers, path))
        raise UserError(f"{path}: the presets build on one another in a circle ({chain}); take one base out.")
    try:
        table = tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise UserError(f"cannot read the preset {path}: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid TOML: {error}.") from None
    values = {name: _in_repository(SETTINGS[name].default) for name in PATHS}
    if "base" in table:
        base = table.pop("base")
        if not isinstance(base, str) or "\0" in base:
            raise UserError(f"{path}: base takes the path of another preset, not {shown(base)}.")
        values = _read_preset(path.parent / base, (*readers, path.resolve()))
    own = {}
    for key, value, section in _entries(table, path):
        name = _known(key, str(path), extra=("base",))
        if section and SECTION_OF[name] != section:
            raise UserError(f"{path}: {name} belongs in [{SECTION_OF[name]}], not in [{section}].")
        if name in own:
            raise UserError(f"{path}: {name} is set twice; keep one of the two.")
        own[name] = checked(name, value, str(path))
        if name in PATHS:
            own[name] = _in_repository(own[name])
    return {**values, **own}


def _entries(table: dict[str, Any], path: Path) -> Iterator[tuple[str, Any, str]]:
    """(key, value, section or "") of each entry of a preset, flat or in sections."""
    known_sections = sorted(set(SECTION_OF.values()))
    for key, value in table.items():
        if not isinstance(value, dict):
            yield key, value, ""
        elif key in known_sections:
            yield from ((inner, inner_value, key) for inner, inner_value in value.items())
        else:
            raise UserError(f"{path}: there is no section [{key}].{_nearest(key, known_sections)}")


def _in_repository(path: str) -> str:
    """`path` as it stands, unless it exists only below the repository: then its place there."""
    if path and not Path(path).exists() and (REPOSITORY / path).exists():
        return str(REPOSITORY / path)
    return path


def _options(argv: list[str]) -> Iterator[tuple[str, str | None]]:
    """(key, text) of each `--key text`, `--key=text` or bare `--key` (text None) on the command line."""
    position = 0
    while position < len(argv):
        token = argv[position]
        position += 1
        if token == "-h":
            token = "--help"
        if not token.startswith("--") or token == "--":
            raise UserError(f"command line: {token!r} belongs to no option; write --key value (see --help).")
        key, equals, text = token[2:].partition("=")
        if equals:
            yield key, text
        elif position < len(argv) and not argv[position].startswith("--") and argv[position] != "-h":
            yield key, argv[position]
            position += 1
        else:
            yield key, None


def _from_text(name: str, text: str | None) -> Any:
    """The value of a command-line option, checked."""
    kind, where = KINDS[name], "command line"
    if text is None:
        alone = True if kind is bool else SETTINGS[name].metadata["alone"]
        if alone is None:
            raise UserError(f"{where}: --{name.replace('_', '-')} needs a value, {KIND_WORDS[kind]}.")
        return alone
    value: Any = text
    if kind is bool:
        value = {"true": True, "false": False}.get(text.lower(), text)
    elif kind is not str:
        try:
            value = kind(text)
        except ValueError:
            value = text  # refused below, with the same sentence as in a preset
    return checked(name, value, where)


def _known(key: str, where: str, extra: tuple[str, ...] = ()) -> str:
    """`key` as a setting's name."""
    name = key.replace("-", "_")
    if name not in SETTINGS:
        switch = name.removeprefix("no_")
        turned_off = switch != name and KINDS.get(switch) is bool
        hint = f" {switch} is turned off with --{switch.replace('_', '-')} false." if turned_off else ""
        raise UserError(f"{where}: there is no setting {key!r}.{hint or _nearest(name, (*SETTINGS, *extra))}")
    return name


def _nearest(key: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(key, names, n=1, cutoff=0.4)
    return f" Did you mean {close[0]!r}?" if close else " --help lists what there is."


def to_toml(config: Config) -> str:
    """The config as a TOML text that `read_preset` reads back to an equal one (floats to the last bit)."""
    lines, section = ["# Every setting of a run; `train.py --help` explains them."], ""
    for name, value in dataclasses.asdict(config).items():
        if SECTION_OF[name] != section:
            section = SECTION_OF[name]
            lines += ["", f"[{section}]"]
        lines.append(f"{name} = {_toml_value(value)}")
    return "\n".join(lines) + "\n"


def _toml_value(value: Any) -> str:
    if isinstance(value, str):  # JSON's escapes are TOML's, except that TOML wants DEL escaped too
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower() if isinstance(value, bool) else repr(value)


def differences(a: Config, b: Config) -> dict[str, tuple[Any, Any]]:
    """The settings in which two configs differ: name -> (value in a, value in b).

    Two spellings of one existing file or folder (relative, absolute, a link) do not count as different.
    """
    found = {}
    for name in SETTINGS:
        left, right = getattr(a, name), getattr(b, name)
        both_paths = name in PATHS and left and right
        if left != right and not (both_paths and os.path.realpath(left) == os.path.realpath(right)):
            found[name] = (left, right)
    return found


def allowed_changes(config: Config) -> set[str]:
    """The settings that `allow_changes` names; raises UserError for a name that is none."""
    if config.allow_changes == "all":
        return set(SETTINGS)
    return {_known(name.strip(), "allow_changes") for name in config.allow_changes.split(",") if name.strip()}


def refuse_changes(
    before: Any, now: Config, where: str, processes: tuple[int, int], say: Callable[[str], None] = print
) -> None:
    """Raise UserError where a run that goes on has other settings than before, of those that shape its weights.

    before: settings by name, as `where` holds them; names that this version lacks do not count. `now.allow_changes`
    names the settings that may differ; `say` is told what does. processes: how many there were, and are.
    """
    before = before if isinstance(before, dict) else {}
    free = MAY_CHANGE - ({"steps", "epochs"} if now.lr_schedule != "constant" or now.warmup_ratio else set())
    free -= {"tokens_per_microbatch"} if now.loss_aggregation == "microbatch_token_mean" else set()
    known = {name: checked(name, value, where) for name, value in before.items() if name in SETTINGS}
    changed = differences(dataclasses.replace(now, **known), now)
    refused = {name: values for name, values in changed.items() if name not in free | allowed_changes(now)}

    def words(settings: dict[str, tuple[Any, Any]]) -> str:
        return ", ".join(f"{name} {shown(old)} (now {shown(new)})" for name, (old, new) in settings.items())

    if allowed := {name: values for name, values in changed.items() if name not in free | refused.keys()}:
        say(f"changed, as allowed: {words(allowed)}")
    if refused:
        listed = words(refused)
        raise UserError(
            f"{where} was written with other settings: {listed}. Set them back, or allow the change with "
            f"--allow-changes {','.join(refused)}."
        )
    packed = now.loss_aggregation == "microbatch_token_mean" and "loss_aggregation" not in allowed_changes(now)
    if packed and processes[0] != processes[1]:
        raise UserError(
            f"{where} was written by {processes[0]} processes (now {processes[1]}), which changes what "
            "loss_aggregation microbatch_token_mean gives; use as many, or --allow-changes loss_aggregation."
        )


def help_text(config: Config, preset: str | Path) -> str:
    """The text of `--help`: each setting, its value in `config` (as in `preset`), the paper's, its unit."""
    width = max(80, min(120, shutil.get_terminal_size((110, 24)).columns))
    indent = " " * 59
    lines = [
        f"usage: {Path(sys.argv[0]).name} [--config FILE.toml] [--key value | --key=value ...]",
        "",
        *textwrap.wrap(
            "Settings come from a TOML preset and from the command line, which is the stronger. A true-or-"
            "false setting may stand alone: --think is --think true. The values below are the preset's.",
            width,
            break_on_hyphens=False,
        ),
        "",
        f"preset: {preset}",
        "",
        f"  {'option':<27} {'value':<13} {'paper':<14} meaning [unit]",
    ]
    section = ""
    for name, entry in SETTINGS.items():
        if SECTION_OF[name] != section:
            section = SECTION_OF[name]
            lines += ["", section.replace("_", " ")]
        about, value = entry.metadata, getattr(config, name)
        meaning = about["help"]
        meaning += f" ({' | '.join(about['choices'])})" if about["choices"] else ""
        meaning += f" [{about['unit']}]" if about["unit"] else ""
        shown = value if isinstance(value, str) and value else _toml_value(value)
        head = f"  {'--' + name.replace('_', '-'):<27} {shown:<13} "
        if len(head) > 44:  # a long path: the columns behind it start on the next line
            lines.append(head.rstrip())
            head = " " * 44
        head += f"{about['paper'] or '-':<14} "
        lines += textwrap.wrap(meaning, width, initial_indent=head, subsequent_indent=indent)
    return "\n".join(lines)
