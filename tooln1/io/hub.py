"""The local directory of a model that the user names by directory or hub id."""

import re
from pathlib import Path

from tooln1.io.errors import UserError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

CONFIG_FILES = ("*.json", "*.jinja", "*.txt")  # of model, tokenizer and generation
WEIGHT_FILES = ("*.safetensors",)


def local_directory(path: str | Path, patterns: tuple[str, ...] = CONFIG_FILES + WEIGHT_FILES) -> Path:
    """`path` itself when it is a directory; else, when it looks like `org/name`, its copy from the hub.

    Of the hub's files, those that match one of `patterns` (shell style) are fetched, into its own cache;
    offline, the cache is used. Raises UserError when neither works.
    """
    name = str(path)
    if name and Path(name).is_dir():
        return Path(name)
    if not _HUB_ID.fullmatch(name):
        raise UserError(f"{name!r}: no such directory, and not a hub id of the form org/name.")
    from huggingface_hub import snapshot_download  # only a hub id needs it

    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # offline, gated, misspelled: the hub's own classes differ between versions
        reason = f"{type(error).__name__}: {error}".split(". ")[0].split("\n")[0][:200]
        raise UserError(
            f"{name!r}: no such directory here, and the hub did not give it ({reason}); check the spelling, log in "
            "with `hf auth login` if it is gated, or download it and name its directory."
        ) from error
