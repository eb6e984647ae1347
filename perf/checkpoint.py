"""Seconds and rates of saving and loading a checkpoint, and what each adds to a process's peak memory.

    python perf/checkpoint.py                          # a 100M-parameter model, 1.2 GB of weights and moments
    torchrun --standalone --nproc-per-node 2 perf/checkpoint.py --folder DIR --layers 40

For comparison, the disk's own rate: writing and flushing as many bytes at once.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from shapes import qwen2

from tooln1.distributed import launch, shard
from tooln1.model import random_model
from tooln1.run.checkpoint import load_checkpoint, save_checkpoint


def plain_write(file: Path, count: int) -> None:
    """Write and flush `count` bytes."""
    block = os.urandom(1 << 24)
    with open(file, "wb") as handle:
        for _ in range(-(-count // len(block))):
            handle.write(block)
        handle.flush()
        os.fsync(handle.fileno())
    file.unlink()


def memory(name: str) -> int:
    """Bytes of this process: VmRSS, or VmHWM for their peak since the last reset."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{name}:")[2].split()[0]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", help="where to write (default: a temporary folder)")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    measured = defaultdict(list)

    def measure(name: str, work) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        before, start = memory("VmRSS"), time.perf_counter()
        work()
        measured[name].append((time.perf_counter() - start, memory("VmHWM") - before))

    with launch("auto") as world:
        folder = Path(world.broadcast(tempfile.mkdtemp(dir=options.folder) if world.is_main else ""))
        model = random_model(qwen2(640, options.layers, 10, 2, 2560, 32768, True), 0, device=world.device)
        size = 12 * sum(parameter.numel() for parameter in model.parameters())
        policy = shard(model, world)
        optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6)
        for parameter in policy.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        for step in range(options.rounds):
            if world.is_main:
                measure("plain write", lambda: plain_write(folder / "plain", size))
            torch.distributed.barrier()
            measure("save", lambda step=step: save_checkpoint(folder, step, policy, optimizer, world, {}))
            optimizer.state.clear()  # as when a run resumes
            measure("load", lambda step=step: load_checkpoint(folder / f"step-{step:06d}", policy, optimizer))
        if world.is_main:
            shutil.rmtree(folder)
            print(f"{size / 12e6:.0f}M parameters, {size / 1e9:.2f} GB, {world.size} process(es), {world.device.type}")
            for name, values in measured.items():
                seconds, peak = statistics.median(pair[0] for pair in values), max(pair[1] for pair in values) / 1e6
                print(f"{name:<12} {seconds:6.2f} s   {size / seconds / 1e9:6.2f} GB/s   {peak:6.0f} MB more memory")


if __name__ == "__main__":
    main()
