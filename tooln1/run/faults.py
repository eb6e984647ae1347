"""Faults of a run: optimizer steps that are not finite, and memory that runs out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from tooln1.batch import PackedBatch
from tooln1.data import Rollout
from tooln1.io.errors import UserError
from tooln1.io.files import atomic_write
from tooln1.run.memory import PASS_SETTINGS, ROLLOUT_SETTINGS, WEIGHT_SETTINGS, with_values
from tooln1.run.metrics import to_json
from tooln1.run.setup import Run

OUT_OF_MEMORY = ("out of memory", "ALLOC_FAILED", "not enough memory", "can't allocate memory")  # CUDA, cuBLAS, CPU


def save_skipped_batch(run: Run, step: int, batches: Sequence[PackedBatch], rollouts: Sequence[Rollout]) -> None:
    """Write this rank's share of a skipped mini-batch to run_dir/skipped, one JSON line per reply.

    Raises UserError when max_bad_steps optimizer steps in a row have been skipped.
    """
    folder = Path(run.config.run_dir) / "skipped"
    with atomic_write(folder / f"step-{step + 1:06d}-{run.bad_steps}.rank{run.world.rank}.jsonl") as file:
        for batch in batches:
            old, ref = _by_reply(batch.old_logprobs, batch.lengths), _by_reply(batch.ref_logprobs, batch.lengths)
            for i, row in enumerate(batch.rows):
                reply = {
                    "prompt": run.tokenizer.decode(rollouts[row].prompt),
                    "reply": run.tokenizer.decode(rollouts[row].reply),
                    "advantage": batch.advantages[i].item(),
                    "sampler_logprobs": rollouts[row].logprobs,
                    "old_logprobs": old[i],
                    "ref_logprobs": ref[i],
                }
                file.write(to_json(reply) + "\n")
    if run.bad_steps >= run.config.max_bad_steps:
        raise UserError(
            f"{run.bad_steps} optimizer steps in a row had a loss or gradient that is not finite; the run stops at "
            f"step {step + 1}. Their batches are in {folder}. Resume from a checkpoint before the first of them: "
            f"--resume DIR, learning_rate below {run.config.learning_rate}, --allow-changes learning_rate."
        )


def _by_reply(logprobs: Tensor | None, lengths: Sequence[int]) -> list[list[float] | None]:
    """Log-probs [N] as one list per reply; supervised training has none."""
    return [None] * len(lengths) if logprobs is None else [part.tolist() for part in logprobs.split(list(lengths))]


@contextmanager
def explain_oom(settings: Mapping[str, Any]) -> Iterator[Callable[[str], None]]:
    """Turn memory that runs out in the block, on the GPU or the host, into a UserError that names settings to lower.

    settings: those of the run by name. The block gets a function to call with what it starts ("step 3, update").
    """
    phases = ["loading"]
    try:
        yield phases.append
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in OUT_OF_MEMORY):
            raise
        sampling = phases[-1].endswith(("rollout", "eval"))
        change = with_values(ROLLOUT_SETTINGS if sampling else PASS_SETTINGS + WEIGHT_SETTINGS, settings)
        cause = str(error).split("\n")[0].split(". ")[0]
        raise UserError(
            f"out of memory ({phases[-1]}): {cause}. Change one of {change}, or use more processes."
        ) from error
