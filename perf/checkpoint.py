"""Seconds and rates of saving, verifying and loading a checkpoint, and what a save adds to the memory.

    python perf/checkpoint.py                          # a 100M-parameter model, 1.2 GB of weights and moments
    torchrun --standalone --nproc-per-node 2 perf/checkpoint.py --folder DIR

The disk's own rate stands beside it: writing and flushing as many bytes in one go.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from tooln1.distributed import launch, shard
from tooln1.io.model_config import parse_config
from tooln1.model import random_model
from tooln1.run.checkpoint import choose, load_checkpoint, save_checkpoint

SHAPE = {
    "model_type": "qwen2",
    "vocab_size": 32768,
    "hidden_size": 640,
    "intermediate_size": 2560,
    "num_hidden_layers": 12,
    "num_attention_heads": 10,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "tie_word_embeddings": True,
}


def seconds(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def plain_write(file: Path, count: int) -> None:
    """What the disk can do: the same number of bytes, written and flushed."""
    block = os.urandom(1 << 24)
    with open(file, "wb") as handle:
        for _ in range(-(-count // len(block))):
            handle.write(block)
        handle.flush()
        os.fsync(handle.fileno())
    file.unlink()


def peak() -> int:
    """Most bytes this process has held."""
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", help="where to write (default: a temporary folder)")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with launch("auto") as world:
        folder = Path(world.broadcast(tempfile.mkdtemp(dir=options.folder)))
        model = random_model(parse_config(SHAPE), 0, device=world.device)
        count = sum(parameter.numel() for parameter in model.parameters())
        policy = shard(model, world)
        optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6)
        for parameter in policy.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        size = 12 * count
        times: dict[str, list[float]] = {"plain write": [], "save": [], "verify": [], "load": []}
        before = peak()
        for step in range(options.rounds):
            world.barrier()
            if world.is_main:
                times["plain write"].append(seconds(lambda: plain_write(folder / "plain", size)))
            world.barrier()
            save = seconds(lambda step=step: save_checkpoint(folder, step, policy, optimizer, world, {}, keep=1))
            if step == 0:
                grown = peak() - before
            times["save"].append(save)
            times["verify"].append(seconds(lambda: choose(folder, world)))
            newest = choose(folder, world)[0]
            times["load"].append(seconds(lambda newest=newest: load_checkpoint(newest, policy, optimizer, world)))
        if world.is_main:
            shutil.rmtree(folder)
            medians = {name: statistics.median(values) for name, values in times.items()}
            print(f"{count / 1e6:.0f}M parameters, {size / 1e9:.2f} GB, {world.size} process(es), {world.device.type}")
            for name, value in medians.items():
                print(f"{name:<12} {value:6.2f} s   {size / value / 1e9:6.2f} GB/s")
            print(f"a save added {grown / 1e6:.0f} MB to the peak memory of a process")
            print(
                json.dumps(
                    {
                        "parameters": count,
                        "bytes": size,
                        "processes": world.size,
                        "seconds": medians,
                        "save_memory_bytes": grown,
                    }
                )
            )


if __name__ == "__main__":
    main()
