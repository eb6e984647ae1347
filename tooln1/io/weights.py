"""Weights in the Hugging Face layout: safetensors files, read strictly, written in shards."""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from tooln1.io.errors import UserError
from tooln1.io.jsonl import parse_json, read_text, shown

SHARD_BYTES = 5 * 10**9
BLOCK, BLOCKS = 1 << 16, 256  # bytes, and how many such blocks of a file its fingerprint reads
INDEX = "model.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")  # integers, and floats of 8 bits, mean something only with scales


def find_weights(
    directory: Path, shapes: dict[str, tuple[int, ...]], unneeded: tuple[str, ...] = ()
) -> dict[str, Path]:
    """The file of each tensor of a model directory, which must have exactly those of `shapes` (name -> shape).

    Names that end in `unneeded` are ignored. Raises UserError for missing or broken files, a tensor that is in two
    files, and one error that lists all missing, unexpected, mis-shaped and non-float tensors together.
    """
    stored: dict[str, tuple[Path, tuple[int, ...], str]] = {}  # name -> (file, shape, safetensors' name of the type)
    for file in weight_files(directory):
        with _open(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118  it is no dict
                if name in stored:
                    raise UserError(f"{file}: {shown(name)} is in {stored[name][0].name} too.")
                part = tensors.get_slice(name)
                stored[name] = file, tuple(part.get_shape()), part.get_dtype()
    stored = {name: entry for name, entry in stored.items() if not name.endswith(unneeded)}
    _check_fit(directory, shapes, stored)
    return {name: file for name, (file, _, _) in stored.items()}


def read_weights(files: dict[str, Path], targets: dict[str, Tensor]) -> None:
    """Overwrite each target by the tensor of its name in one of `files`, cast to the target's dtype.

    Of a DTensor only the bytes of this process's shard are read. One tensor at a time is in memory besides.
    """
    for path in sorted(set(files.values())):
        with _open(path) as tensors:
            for name in [name for name, file in files.items() if file == path]:
                overwrite(targets[name], tensors.get_slice(name))


@torch.no_grad()
def overwrite(target: Tensor, source: Any) -> None:
    """Overwrite `target`, or this process's shard of it, by its part of a full tensor or a slice of safetensors."""
    rows = slice(None)
    if isinstance(target, DTensor):  # FSDP2 shards the first dimension; shards may be uneven, and empty
        shape, start = compute_local_shape_and_global_offset(target.shape, target.device_mesh, target.placements)
        rows, target = slice(start[0], start[0] + shape[0]), target.to_local()
    target.copy_(source[rows])


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model directory: model.safetensors, or the shards that its index names."""
    index = directory / INDEX
    if not index.exists():
        single = directory / "model.safetensors"
        if not single.is_file():
            raise UserError(
                f"{directory}: no model.safetensors and no index of shards; only safetensors weights are read "
                "(a .bin checkpoint is a pickle and is never opened: convert it first)."
            )
        return [single]
    raw = parse_json(read_text(index), str(index))
    names = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(names, dict) or not names:
        raise UserError(f'{index}: no "weight_map" of tensor names and files.')
    for name in map(str, names.values()):
        if Path(name).name != name or not name.endswith(".safetensors") or not (directory / name).is_file():
            raise UserError(f"{index}: {shown(name)} is not the name of a safetensors file beside it.")
    return [directory / name for name in sorted(set(names.values()))]


@contextmanager
def _open(file: Path) -> Iterator[Any]:
    """Open a safetensors file; an error of its reader, then or later, becomes a UserError."""
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a readable safetensors file ({error}); download it again.") from error


def _check_fit(directory: Path, wanted: dict[str, tuple], stored: dict[str, tuple]) -> None:
    missing = sorted(wanted.keys() - stored.keys())
    unexpected = sorted(stored.keys() - wanted.keys())
    both = sorted(wanted.keys() & stored.keys())
    shapes = [f"{n} (file {stored[n][1]}, config {wanted[n]})" for n in both if stored[n][1] != wanted[n]]
    types = [f"{n} ({stored[n][2]})" for n in both if stored[n][2] not in FLOATS]
    faults = {"missing": missing, "unexpected": unexpected, "wrong shape": shapes, "no floating-point type": types}
    parts = [
        f"{fault}: {', '.join(names[:8])}" + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        for fault, names in faults.items()
        if names
    ]
    if parts:
        raise UserError(f"{directory}: the weights do not fit config.json; {'; '.join(parts)}.")


def write_weights(state: dict[str, Tensor], directory: Path, dtype: torch.dtype) -> None:
    """Write `state` cast to `dtype` as model.safetensors, or as shards of at most 5 GB with their index."""
    from huggingface_hub import save_torch_state_dict  # only an export needs it

    state = {name: tensor.to(dtype) for name, tensor in state.items()}
    save_torch_state_dict(state, directory, max_shard_size=SHARD_BYTES)


def fingerprint(files: Iterable[Path]) -> str:
    """A hash of a model's files, where they exist: all of small ones, blocks of large ones."""
    digest = hashlib.sha256()
    for file in sorted(files):
        if not file.is_file():
            continue
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with open(file, "rb") as handle:
            for start in range(0, size, max(BLOCK, size // BLOCKS)):
                handle.seek(start)
                digest.update(handle.read(BLOCK))
    return digest.hexdigest()[:16]
