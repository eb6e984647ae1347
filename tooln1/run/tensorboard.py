"""The optional log for TensorBoard; its package is needed only by a run that asks for it."""

from __future__ import annotations

import math
import os

from tooln1.io.errors import UserError


def tensorboard_writer() -> type:
    """torch's SummaryWriter. Raises UserError where the package that it needs is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError(
            "tensorboard is on, but the package is not installed; pip install -r requirements-extra.txt, "
            "or set tensorboard to false."
        ) from None
    return SummaryWriter


class TensorBoardLog:
    """The metrics as TensorBoard scalars in a folder; the package is needed only when one is made."""

    def __init__(self, folder: str | os.PathLike, first_step: int):
        """What the folder holds from `first_step` on is hidden. UserError where the package is missing."""
        self._writer = tensorboard_writer()(str(folder), purge_step=first_step)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Write the finite values of a step."""
        for name, value in values.items():
            if math.isfinite(value):
                self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the writer's files."""
        self._writer.close()
