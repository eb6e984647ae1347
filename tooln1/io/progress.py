"""Progress bars."""

from __future__ import annotations

from collections.abc import Iterable

from tqdm import tqdm


def progress(work: Iterable | int, description: str, unit: str = "", show: bool = True) -> tqdm:
    """A progress bar: wraps an iterable, or counts `.update(n)` up to a number. It leaves no line behind.

    Nothing is drawn where `show` is False (every rank but the first) or stderr is not a terminal.
    """
    ends = {"total": work} if isinstance(work, int) else {"iterable": work}
    unit = f" {unit}" if unit else "it"
    return tqdm(**ends, desc=description, unit=unit, leave=False, disable=None if show else True)
