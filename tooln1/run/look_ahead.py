"""Before the first step: every check of preflight.py on a run, and what follows from them."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tooln1.data import Example
from tooln1.distributed import World
from tooln1.io.errors import UserError
from tooln1.io.model_config import ModelConfig
from tooln1.run.checkpoint import complete_checkpoints, step_of
from tooln1.run.memory import device_bytes, estimate, host_bytes, table
from tooln1.run.preflight import (
    Finding,
    disk,
    lengths,
    longest_prompt,
    memory,
    report,
    sample,
    schedule,
    stop_ids,
    template,
    train_eval_overlap,
)
from tooln1.run.run_dir import CHECKPOINTS
from tooln1.run.metrics import tensorboard_writer
from tooln1.sft import target_text
from tooln1.tokenizer import Tokenizer


def look_ahead(
    settings: Mapping[str, Any],
    world: World,
    config: ModelConfig,
    reference: ModelConfig | None,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    held_out: Sequence[Example],
) -> None:
    """Ask all that can be known of a run, and show a prompt. UserError for what cannot work, with `check` for warnings.

    settings: the run's settings by name, what may be "auto" resolved. Rank 0 looks, all ranks learn what it saw.
    """

    def look() -> list[Finding]:
        return _seen(settings, world, config, reference, tokenizer, examples, held_out)

    check = settings["check"]
    found = world.broadcast(world.run_on_all_ranks(look if world.is_main else list, "looking ahead"))
    wrong = [finding for finding in found if finding.level == "error" or (check and finding.level != "ok")]
    if world.is_main and not check:
        for finding in found:
            if finding.level == "warning":
                print(f"warning: {finding.about}: {finding.text}", file=sys.stderr)
    if wrong and check:
        abouts = ", ".join(finding.about for finding in wrong)
        raise UserError(f"{len(wrong)} of {len(found)} findings, listed above, are to be mended: {abouts}.")
    if wrong:
        more = f" ({len(wrong) - 1} more: train.py --check lists all)" if len(wrong) > 1 else ""
        raise UserError(f"{wrong[0].about}: {wrong[0].text}{more}")
    if check and world.is_main:
        print("\nnothing to mend: this run can start")


def _seen(
    settings: Mapping[str, Any],
    world: World,
    config: ModelConfig,
    reference: ModelConfig | None,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    held_out: Sequence[Example],
) -> list[Finding]:
    """The findings of all checks; prints a prompt, and with `check` the memory table and the findings."""
    supervised, cuda, think = settings["mode"] == "sft", world.device.type == "cuda", settings["think"]
    if settings["tensorboard"]:
        tensorboard_writer()
    replies = (
        [len(tokenizer.encode(target_text(example))) for example in examples]
        if supervised
        else [settings["max_reply_tokens"]]
    )
    group, context = 1 if supervised else settings["group_size"], config.raw.get("max_position_embeddings")
    longest = longest_prompt(tokenizer, examples, think)
    rows = -(-settings["prompts_per_step"] // world.size) * group
    cache = (settings["rollout_rows"] or 512) * (context or 32768) if cuda else rows * (longest + max(replies))

    def some(*names: str) -> dict[str, Any]:
        return {name: settings[name] for name in names}

    needed = estimate(
        config,
        cuda=cuda,
        processes=world.size,
        available=device_bytes(world.device),
        reference=reference,
        cache_tokens=settings["rollout_cache_tokens"],
        most_cache_tokens=cache,
        **some(
            "tokens_per_microbatch",
            "logprob_chunk_tokens",
            "activation_checkpointing",
            "accumulate_whole",
            "offload_reference",
            "offload_optimizer",
        ),
    )
    present = [step_of(path) for path in complete_checkpoints(Path(settings["run_dir"]) / CHECKPOINTS)]
    steps = settings["steps"] or settings["epochs"] * (len(examples) // settings["prompts_per_step"])
    found = [
        *schedule(
            len(examples), processes=world.size, **some("prompts_per_step", "prompts_per_minibatch", "epochs", "steps")
        ),
        *lengths(
            longest,
            max(replies),
            group,
            settings["tokens_per_microbatch"],
            context,
            0 if supervised else settings["rollout_cache_tokens"],
        ),
        *stop_ids(tokenizer, config.vocab_size),
        *template(tokenizer, examples, think, settings["reward"], supervised),
        *train_eval_overlap(examples, held_out),
        *memory(
            needed,
            cuda=cuda,
            device_bytes=device_bytes(world.device),
            host_bytes=host_bytes(),
            local_processes=int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
        ),
        *disk(
            settings["run_dir"],
            config.num_parameters,
            present=present,
            **some("save_every", "keep_checkpoints", "keep_every"),
            steps=steps,
            export_bytes=2 if cuda else 4,
        ),
    ]
    head, *prompt = sample(tokenizer, examples[0], think).split("\n")
    if settings["check"]:
        print(head, *prompt, "", "memory of one process:", table(needed), "", report(found), sep="\n")
    else:
        print(f"{head.split(',')[0]}; it ends (--check shows all):", *prompt[-4:], sep="\n")
    return found
