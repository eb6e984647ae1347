"""Safetensors directories in the Hugging Face layout: read strictly, written sharded, never unpickled."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tooln1.errors import UserError

SHARD_BYTES = 5 * 10**9
INDEX = "model.safetensors.index.json"


def read_weights(
    directory: Path,
    shapes: dict[str, tuple[int, ...]],
    unneeded: tuple[str, ...],
    dtype: torch.dtype,
    device: torch.device | str,
) -> dict[str, Tensor]:
    """The tensors of a model directory, which must be exactly those of `shapes` (name -> shape).

    Stored tensors whose name ends in one of `unneeded` are passed over. Each is cast to `dtype` on `device` as it
    is read, so the peak is the model plus one tensor. Raises UserError for missing or broken files, and one that
    lists all missing, unexpected and mis-shaped tensors together.
    """
    found: dict[str, tuple[Path, tuple[int, ...]]] = {}
    for file in weight_files(directory):
        for name, shape in _stored_shapes(file).items():
            if not name.endswith(unneeded):
                found[name] = (file, shape)
    _check_fit(directory, shapes, {name: shape for name, (_, shape) in found.items()})
    state: dict[str, Tensor] = {}
    for file in sorted({file for file, _ in found.values()}):
        with safe_open(file, framework="pt") as tensors:
            for name, (where, _) in found.items():
                if where == file:
                    state[name] = tensors.get_tensor(name).to(device=device, dtype=dtype)
    return state


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model directory: the one, or the shards that its index names."""
    index = directory / INDEX
    if not index.exists():
        single = directory / "model.safetensors"
        if not single.exists():
            raise UserError(
                f"{directory}: no model.safetensors and no index of shards; only safetensors weights are read "
                "(a .bin checkpoint is a pickle and is never opened: convert it first)."
            )
        return [single]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index}: not a readable shard index ({error!r}).") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(f"{index}: {name!r} is not the name of a safetensors file beside it.")
        if not (directory / name).exists():
            raise UserError(f"{index}: the shard {name!r} is missing; download it again.")
    return [directory / name for name in names]


def _stored_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(file, framework="pt") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{file}: not a readable safetensors file ({error}); download it again.") from error


def _check_fit(directory: Path, wanted: dict[str, tuple], found: dict[str, tuple]) -> None:
    missing = sorted(wanted.keys() - found.keys())
    unexpected = sorted(found.keys() - wanted.keys())
    shapes = sorted(name for name in wanted.keys() & found.keys() if wanted[name] != found[name])
    if not (missing or unexpected or shapes):
        return

    def some(names: list[str]) -> str:
        return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")

    parts = [f"missing: {some(missing)}"] * bool(missing) + [f"unexpected: {some(unexpected)}"] * bool(unexpected)
    if shapes:
        parts.append("wrong shape: " + some([f"{n} (file {found[n]}, config {wanted[n]})" for n in shapes]))
    raise UserError(f"{directory}: the weights do not fit config.json; {'; '.join(parts)}.")


def write_weights(state: dict[str, Tensor], directory: Path, dtype: torch.dtype) -> None:
    """Write `state` cast to `dtype` as model.safetensors, or as shards of at most 5 GB with their index."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in state.items():
        needed = tensor.numel() * dtype.itemsize
        if shards[-1] and size + needed > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += needed
    file_of: dict[str, str] = {}
    for number, members in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        tensors = {name: state[name].to("cpu", dtype).contiguous() for name in members}
        save_file(tensors, directory / file, metadata={"format": "pt"})
        file_of.update(dict.fromkeys(members, file))
    if len(shards) > 1:
        total = sum(tensor.numel() * dtype.itemsize for tensor in state.values())
        index = {"metadata": {"total_size": total}, "weight_map": file_of}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
