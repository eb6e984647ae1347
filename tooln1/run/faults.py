"""Faults of a run: optimizer steps that are not finite, and memory that runs out."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tooln1.batch import PackedBatch
from tooln1.data import Rollout
from tooln1.io.errors import UserError
from tooln1.io.files import atomic_write
from tooln1.run.memory import KERNEL_SETTINGS, PASS_SETTINGS, ROLLOUT_SETTINGS, WEIGHT_SETTINGS, with_values
from tooln1.run.metrics import to_json
from tooln1.run.setup import Run

OUT_OF_MEMORY = ("out of memory", "ALLOC_FAILED", "not enough memory", "can't allocate memory")  # CUDA, cuBLAS, CPU
KERNEL_ERRORS = ("torch._dynamo", "torch._inductor")  # modules of the compiler's errors, which import for a second


def save_skipped_batch(run: Run, step: int, batches: Sequence[PackedBatch], rollouts: Sequence[Rollout]) -> None:
    """Write this rank's share of a skipped mini-batch to run_dir/skipped, one JSON line per reply.

    Raises UserError when max_bad_steps optimizer steps in a row have been skipped.
    """
    folder = Path(run.config.run_dir) / "skipped"
    number = 1 + len(list(folder.glob(f"step-{step + 1:06d}-*.rank{run.world.rank}.jsonl")))
    with atomic_write(folder / f"step-{step + 1:06d}-{number}.rank{run.world.rank}.jsonl") as file:
        for batch in batches:
            nothing = [None] * len(batch.rows)  # nor have a step's first mini-batch and supervised training
            old = nothing if batch.old_logprobs is None else batch.old_logprobs.split(list(batch.lengths))
            for row, advantage, logprobs in zip(batch.rows, batch.advantages.tolist(), old, strict=True):
                reply = {
                    "prompt": run.tokenizer.decode(rollouts[row].prompt),
                    "reply": run.tokenizer.decode(rollouts[row].reply),
                    "advantage": advantage,
                    "sampler_logprobs": rollouts[row].logprobs,
                    "old_logprobs": None if logprobs is None else logprobs.tolist(),
                }
                file.write(to_json(reply) + "\n")
    if run.bad_steps >= run.config.max_bad_steps:
        raise UserError(
            f"{run.bad_steps} optimizer steps in a row had a loss or gradient that is not finite; the run stops at "
            f"step {step + 1}. Their batches are in {folder}. Resume from a checkpoint before the first of them: "
            f"--resume DIR, learning_rate below {run.config.learning_rate}, --allow-changes learning_rate."
        )


@contextmanager
def explain_oom(settings: Mapping[str, Any]) -> Iterator[Callable[[str], None]]:
    """Turn memory that runs out in the block, on the GPU or the host, into a UserError that names settings to lower.

    settings: those of the run by name. The block gets a function to call with what it starts ("step 3, update").
    """
    phases = ["loading"]
    try:
        yield phases.append
    except Exception as error:
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in OUT_OF_MEMORY):
            if isinstance(error, torch.AcceleratorError) or type(error).__module__.startswith(KERNEL_ERRORS):
                error.add_note(f"Plainer kernels may work: {with_values(KERNEL_SETTINGS, settings)}; see --help.")
            raise
        sampling = phases[-1].endswith(("rollout", "eval"))
        change = with_values(ROLLOUT_SETTINGS if sampling else PASS_SETTINGS + WEIGHT_SETTINGS, settings)
        cause = str(error).split("\n")[0].split(". ")[0]
        raise UserError(
            f"out of memory ({phases[-1]}): {cause}. Change one of {change}, or use more processes."
        ) from error
