"""What a run does with an optimizer step that is not finite, and with memory that does not suffice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tooln1.batch import PackedBatch
from tooln1.data import Rollout
from tooln1.distributed import World
from tooln1.io.errors import UserError
from tooln1.io.files import atomic_write
from tooln1.run.metrics import to_json
from tooln1.tokenizer import Tokenizer

ROLLOUT_KNOBS = ("rollout_rows", "rollout_cache_tokens", "max_reply_tokens")
UPDATE_KNOBS = (
    "tokens_per_microbatch",
    "logprob_chunk_tokens",
    "activation_checkpointing",
    "accumulate_whole",
    "kl_coef",
    "offload_reference",
    "offload_optimizer",
)


def keep_batch(
    folder: Path,
    name: str,
    batches: Sequence[PackedBatch],
    rollouts: Sequence[Rollout],
    tokenizer: Tokenizer,
    world: World,
    newest: int,
) -> None:
    """Write the replies of a mini-batch, of all ranks, as `folder`/`name`.jsonl, and keep the `newest` such files.

    One line a reply: its text, tokens and advantage, and the log-prob of each token under the sampler, the policy
    before the update and the reference. A collective; raises UserError where the file cannot be written.
    """
    rows = world.gather([row for batch in batches for row in _rows(batch, rollouts, tokenizer)])
    file = folder / f"{name}.jsonl"

    def write() -> None:
        with atomic_write(file) as lines:
            lines.writelines(to_json(row) + "\n" for row in rows)
        for old in sorted(folder.glob("*.jsonl"))[:-newest]:
            old.unlink()

    world.run_on_all_ranks(write if world.is_main else lambda: None, f"{file} could not be written")


def ruined(count: int, step: int, folder: Path, learning_rate: float) -> UserError:
    """The error of a run whose last `count` optimizer steps, up to one in `step` (from 1), were not finite."""
    return UserError(
        f"{count} optimizer steps in a row had a loss or gradient that is not finite; the run stops at step {step}. "
        f"Their batches are in {folder}. If the weights were ruined before, go on from a checkpoint before the first "
        f"of them: --resume DIR, learning_rate below {learning_rate}, --allow-changes learning_rate."
    )


def _rows(batch: PackedBatch, rollouts: Sequence[Rollout], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """What there is to see of each reply of a batch; the log-probs are null in supervised training."""
    lengths = list(batch.lengths)

    def by_reply(values: torch.Tensor | None) -> list:
        return [None] * len(lengths) if values is None else [part.tolist() for part in values.cpu().split(lengths)]

    old, reference = by_reply(batch.old_logprobs), by_reply(batch.ref_logprobs)
    return [
        {
            "prompt": tokenizer.decode(rollouts[row].prompt),
            "reply": tokenizer.decode(rollouts[row].reply),
            "advantage": advantage,
            "reply_tokens": rollouts[row].reply,
            "sampler_logprobs": rollouts[row].logprobs,
            "old_logprobs": old[i],
            "ref_logprobs": reference[i],
        }
        for i, (row, advantage) in enumerate(zip(batch.rows, batch.advantages.tolist(), strict=True))
    ]


def is_out_of_memory(error: Exception) -> bool:
    """Whether an exception means that memory, of the GPU or of the host, did not suffice."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    words = ("out of memory", "ALLOC_FAILED", "not enough memory", "can't allocate memory")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


@contextmanager
def explain_oom(settings: Mapping[str, Any]) -> Iterator[Callable[[str], None]]:
    """A block in which memory that runs out is a UserError: what was being done, and the knobs with their values.

    settings: the run's settings by name. The block is handed a function to say what it turns to ("step 3, update").
    """
    doing = "loading"

    def turn_to(what: str) -> None:
        nonlocal doing
        doing = what

    try:
        yield turn_to
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        knobs = ROLLOUT_KNOBS if doing.endswith(("rollout", "eval")) else UPDATE_KNOBS
        present = ", ".join(f"{name} ({settings[name]})" for name in knobs)
        said = str(error).split("\n")[0].split(". ")[0] or type(error).__name__
        raise UserError(
            f"out of memory ({doing}): {said}. Lower or switch one of {present}; or use more processes."
        ) from error
