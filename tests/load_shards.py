"""Run by test_distributed.py under torchrun: host memory of each rank while a run loads a model's shards, in MB.

    torchrun --standalone --nproc-per-node 4 tests/load_shards.py MODEL [full | hybrid]

"peak" is the most of RssAnon over what it was before: pages of the mapped files, which safetensors reads and the
kernel can drop at any time, count as RssFile. Hybrid takes the ranks for nodes of two.
"""

import json
import os
import re
import sys
import threading
import time
from pathlib import Path

import torch

from tooln1.config import Config
from tooln1.distributed import full_tensor, launch
from tooln1.model import load_model
from tooln1.run.setup import load_models

DEMO = Path(__file__).resolve().parents[1] / "assets/demo/model"


def anonymous_bytes() -> int:
    return int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) << 10


def watch(readings: list[int], stop: threading.Event) -> None:
    while not stop.is_set():
        readings.append(anonymous_bytes())
        time.sleep(0.002)


def main() -> None:
    model, sharding = sys.argv[1], (sys.argv[2:] or ["full"])[0]
    if sharding == "hybrid":
        os.environ["LOCAL_WORLD_SIZE"] = "2"
    with launch("cpu") as world:
        load_models(Config(model=str(DEMO)), world, None)  # imports what torch imports at the first time
        before, readings, stop = anonymous_bytes(), [], threading.Event()
        watcher = threading.Thread(target=watch, args=(readings, stop))
        watcher.start()
        policy, reference, _ = load_models(Config(model=model, sharding=sharding), world, None)
        after = anonymous_bytes()
        stop.set()
        watcher.join()
        parameters = [*policy.parameters(), *reference.parameters()]
        sizes = {
            "weights": sum(parameter.nbytes for parameter in parameters),
            "shards": sum(parameter.to_local().nbytes for parameter in parameters),
            "largest": max(parameter.nbytes for parameter in parameters),
            "after": after - before,
            "peak": max(readings) - before,
        }
        print(
            json.dumps({"rank": world.rank} | {name: round(size / 1e6, 1) for name, size in sizes.items()}), flush=True
        )
        whole = load_model(model)
        for loaded in (policy, reference):
            for name, parameter in loaded.named_parameters():
                assert parameter.dtype == torch.float32
                assert torch.equal(full_tensor(parameter), whole.get_parameter(name)), name


if __name__ == "__main__":
    main()
