"""Model shapes, workloads and clocks that the benchmarks share."""

from __future__ import annotations

import contextlib
import math
import platform
import random
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from tooln1.io.model_config import ModelConfig, parse_config

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "assets" / "demo" / "model"
DISTURBED = 0.05  # of a turn's wall-clock time: more waiting for a core than this, and the turn says little

T = TypeVar("T")


def qwen2(hidden: int, layers: int, heads: int, kv_heads: int, inner: int, vocab: int, tied: bool) -> ModelConfig:
    """A Qwen2 of this shape, as transformers would write its config."""
    return parse_config(
        {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "hidden_act": "silu",
            "vocab_size": vocab,
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "tie_word_embeddings": tied,
            "max_position_embeddings": 32768,
            "use_sliding_window": False,
            "torch_dtype": "float32",
        },
        "perf",
    )


def small() -> ModelConfig:
    """About 25M parameters with a vocabulary of 8k: what two CPU cores can move."""
    return qwen2(512, 8, 8, 2, 1408, 8192, True)


def qwen2p5(size: str) -> ModelConfig:
    """The published shapes of Qwen2.5: 0.5B, 1.5B, 3B, 7B, 14B."""
    return {
        "0.5B": lambda: qwen2(896, 24, 14, 2, 4864, 151936, True),
        "1.5B": lambda: qwen2(1536, 28, 12, 2, 8960, 151936, True),
        "3B": lambda: qwen2(2048, 36, 16, 2, 11008, 151936, True),
        "7B": lambda: qwen2(3584, 28, 28, 4, 18944, 152064, False),
        "14B": lambda: qwen2(5120, 48, 40, 8, 13824, 152064, False),
    }[size]()


def lognormal_lengths(rng: random.Random, count: int, mean: float, sigma: float, most: int) -> list[int]:
    """`count` lengths, lognormal around `mean`, at least 8 and at most `most`."""
    mu = math.log(mean) - sigma**2 / 2
    return [min(most, max(8, round(rng.lognormvariate(mu, sigma)))) for _ in range(count)]


def random_prompts(rng: random.Random, lengths: list[int], vocab: int) -> list[list[int]]:
    """Prompts of random token ids."""
    return [[rng.randrange(vocab) for _ in range(length)] for length in lengths]


def machine() -> str:
    """The name of the GPU, or of the processor and its threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall("model name.*: (.*)", cpuinfo.read_text(encoding="utf-8")) if cpuinfo.exists() else []
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def timed(seconds: dict[str, float], phase: str, work: Callable, *args, **kwargs):
    """`work(...)`; the time it took is added to seconds[phase]."""
    start = time.perf_counter()
    result = work(*args, **kwargs)
    seconds[phase] += time.perf_counter() - start
    return result


def synchronize() -> None:
    """Wait until the GPU, if there is one, has finished."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(work: Callable[[], object]) -> float:
    """Wall-clock of one call, on CUDA until the device has finished."""
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def median_seconds(work: Callable[[], object], repeats: int = 3) -> float:
    """Median of several calls, after one that warms up."""
    work()
    return statistics.median(seconds_of(work) for _ in range(repeats))


def run_queue_seconds() -> float:
    """What this process's threads have waited for a core so far, added up; 0 on a system that does not tell."""
    waited = 0
    for file in Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):  # a thread that has just ended
            waited += int(file.read_text(encoding="ascii").split()[1])
    return waited / 1e9


def quiet_turns(work: Callable[[int], T], count: int) -> tuple[list[T], list[float]]:
    """`work(turn)` of the turns whose threads hardly waited for a core, and what share of its time each turn waited.

    The other turns are named and left out; if that is all of them, they are kept, and that is said.
    """
    results, shares = [], []
    for turn in range(count):
        start, waited = time.perf_counter(), run_queue_seconds()
        results.append(work(turn))
        shares.append((run_queue_seconds() - waited) / (time.perf_counter() - start))
        if shares[-1] > DISTURBED:
            print(f"turn {turn + 1} was disturbed: its threads waited {shares[-1]:.0%} of the time for a core")
    quiet = [result for result, share in zip(results, shares, strict=True) if share <= DISTURBED]
    if not quiet:
        print("all turns were disturbed: the figures are of disturbed turns")
    return quiet or results, shares


def print_table(rows: list[tuple]) -> None:
    """Rows of strings and numbers in columns; the first row is the head."""
    words = [[f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in words) for i in range(len(words[0]))]
    for row in words:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        print("  " + "  ".join([row[0].ljust(widths[0]), *cells[1:]]))
