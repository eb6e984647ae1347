"""One H100, 25 minutes: is the CUDA path correct, and where does the time go?  python perf/gpu.py | tee gpu.log

Each part runs in a process of its own with a limit; a part that fails does not stop the others. The last line is JSON.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PARTS = [  # name, seconds at most, arguments of python
    ("environment", 60, "perf/gpu.py environment"),
    ("tests", 360, "-m pytest -q -x -m 'slow or not slow' tests/test_cuda.py tests/test_paged_attention.py"),
    ("demo run", 120, "train.py --device cuda --steps 3 --run_dir runs/gpu_demo"),
    ("engine checks", 150, "perf/rollout.py --device cuda --only check"),
    ("breakdown 7B", 200, "perf/gpu.py breakdown"),
    ("rollout 1.5B", 150, "perf/rollout.py --device cuda --only time --sizes 1.5B --prompts 64"),
    ("rollout 7B", 200, "perf/rollout.py --device cuda --only time --sizes 7B --prompts 256"),
    ("update 1.5B", 150, "perf/update.py --device cuda --sizes 1.5B"),
    ("update 3B", 150, "perf/update.py --device cuda --sizes 3B --budget 16384"),
]


def environment() -> None:
    """Versions, and whether memory can be pinned."""
    import torch
    import triton

    print(torch.__version__, triton.__version__, torch.cuda.get_device_name(), torch.backends.cudnn.version())
    torch.zeros(1).pin_memory()


def breakdown() -> None:
    """7B: first and second prefill of new lengths (plans? compilation?), a decode step by kind of kernel, sampling."""
    sys.path[:0] = [str(ROOT), str(ROOT / "perf")]
    import random

    import torch
    from shapes import lognormal_lengths, qwen2p5, random_prompts, seconds_of
    from torch.profiler import ProfilerActivity, profile

    from tooln1.model import random_model
    from tooln1.sampler.sampler import Sampler
    from tooln1.sampler.sampling import sample_tokens

    config, rng = qwen2p5("7B"), random.Random(0)
    model = random_model(config, 0, torch.bfloat16, "cuda")
    model.vocabulary = 151_665
    sampler = Sampler(model, [])
    for _ in range(3):  # every time other lengths: the second and third must be as fast as a repeated one
        prompts = random_prompts(rng, lognormal_lengths(rng, 64, 728, 0.5, 2184), 150_000)
        print("prefill of 64 new lengths", seconds_of(lambda prompts=prompts: sampler.generate(prompts, 1, 0.7, 1)))
    print("the same lengths again   ", seconds_of(lambda prompts=prompts: sampler.generate(prompts, 1, 0.7, 1)))
    print("first decode, 320 rows   ", seconds_of(lambda prompts=prompts: sampler.generate(prompts, 5, 0.7, 48)))
    print("again                    ", seconds_of(lambda prompts=prompts: sampler.generate(prompts, 5, 0.7, 48)))
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as record:
        sampler.generate(prompts, 5, 0.7, 48)
    print(record.key_averages().table(sort_by="cuda_time_total", row_limit=40, max_name_column_width=70))
    logits, uniform = torch.randn(320, config.vocab_size, device="cuda"), torch.rand(320, device="cuda")
    sample_tokens(logits, uniform, 0.7, 0, 1.0)
    ten = seconds_of(lambda: [sample_tokens(logits, uniform, 0.7, 0, 1.0) for _ in range(10)])
    print("sample_tokens, 320 rows, ms", 100 * ten)
    print("peak GiB", torch.cuda.max_memory_reserved() / 2**30, "graphs", len(sampler.graphs))
    print("compilations", torch._dynamo.utils.counters["stats"]["unique_graphs"])


def main() -> None:
    done = {}
    for name, limit, arguments in PARTS:
        print(f"\n===== {name}: {arguments}", flush=True)
        start = time.perf_counter()
        try:
            code = subprocess.run([sys.executable, *shlex.split(arguments)], cwd=ROOT, timeout=limit).returncode
        except subprocess.TimeoutExpired:
            code = "too slow"
        done[name] = [code, round(time.perf_counter() - start)]
    print(json.dumps(done))


if __name__ == "__main__":
    {"breakdown": breakdown, "environment": environment}.get(sys.argv[-1], main)()
