"""What a run holds, and how it is put together from its settings: data, tokenizer, models, sampler, optimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from tooln1.benchmarks.runner import LoadedBenchmark, held_out_benchmark, load_benchmarks
from tooln1.config import SECTION_OF, SETTINGS, Config, checked, known_setting
from tooln1.data import EpochOrder, Example, fingerprint, read_examples
from tooln1.distributed import World, load_models
from tooln1.io import weights
from tooln1.io.errors import UserError
from tooln1.model import Transformer, model_files, read_config
from tooln1.prompt import drop_long
from tooln1.run.checkpoint import Checkpoint
from tooln1.run.checks import check_run
from tooln1.run.metrics import RunLog
from tooln1.run.signals import StopRequest
from tooln1.sampler.sampler import Sampler
from tooln1.tokenizer import Tokenizer, load_tokenizer
from tooln1.update import PolicyLoss, SupervisedLoss

# What a resumed run must not change: its result would differ by more than rounding.
FIXED_SECTIONS = ("task", "schedule", "rollout", "loss", "optimizer")


@dataclass
class Run:
    """What a run holds from its first step to its last."""

    config: Config
    world: World
    tokenizer: Tokenizer
    policy: Transformer  # fp32 masters, sharded over the ranks
    reference: Transformer | None  # the frozen initial model; None where the KL has no weight
    sampler: Sampler  # a whole copy of the policy in the sampling dtype
    optimizer: torch.optim.Optimizer
    loss: PolicyLoss | SupervisedLoss
    examples: list[Example]
    benches: list[LoadedBenchmark]  # what the policy is evaluated on: held-out examples, eval_bench
    order: EpochOrder
    steps: int
    request: StopRequest  # whether a signal has asked the run to stop
    turn_to: Callable[[str], None]  # takes what the run does next, for the words when something goes wrong
    notes: dict  # goes into every checkpoint: settings, and a fingerprint of the data
    log: RunLog | None = None  # open from the first step on
    done: int = 0  # steps that are complete
    saved: int = 0  # of them, those that a checkpoint has
    intact: bool = True  # the weights are those after the steps done: the next one can still be given up
    bad_steps: int = 0  # optimizer steps in a row whose loss or gradient was not finite
    failed_saves: int = 0  # attempts in a row to write a checkpoint


def prepare(
    config: Config, world: World, checkpoint: Checkpoint | None
) -> tuple[Tokenizer, Sequence, list[LoadedBenchmark], dict]:
    """Tokenizer, examples, benches and the notes for checkpoints; UserError where the run cannot work with them."""
    if checkpoint:
        say, processes = print if world.is_main else lambda words: None, (checkpoint.ranks, world.size)
        refuse_changes(checkpoint.notes.get("config", {}), config, str(checkpoint.path), processes, say)
    tokenizer = load_tokenizer(config.model)
    examples, benches = load_data(config, world, tokenizer)
    frozen = reference_of(config)
    files = [model_files(path) for path in (config.model, frozen) if path]
    notes = {"config": asdict(config), "train_data": fingerprint(examples), "model": [*map(weights.fingerprint, files)]}
    if checkpoint:
        for name, place in (("train_data", config.train_data), ("model", config.model)):
            if checkpoint.notes.get(name) != notes[name] and name not in allowed_changes(config):
                raise UserError(
                    f"{place} does not hold what {checkpoint.path} was made with: other examples (or others are too "
                    f"long), other weights or another tokenizer; give those, or allow it with --allow-changes {name}."
                )
    held_out = [case.example for bench in benches if bench.name == "heldout" for case in bench.chosen]
    shape, reference = read_config(config.model), read_config(frozen) if frozen else None
    settings = resolved(config, shape.num_parameters)
    check_run(settings, world, shape, reference, tokenizer, examples, held_out)
    return tokenizer, examples, benches, notes


def build(
    config: Config,
    world: World,
    tokenizer: Tokenizer,
    examples: Sequence,
    benches: list[LoadedBenchmark],
    notes: dict,
    turn_to: Callable[[str], None],
) -> Run:
    """Models, sampler, optimizer, order: a run before its first step."""
    settings = resolved(config, read_config(config.model).num_parameters)
    kept_how = ("compile", "activation_checkpointing", "accumulate_whole", "offload_optimizer", "offload_reference")
    policy, reference, copy = load_models(
        config.model, reference_of(config), world, tokenizer.vocab_size, **{name: settings[name] for name in kept_how}
    )
    sampler = Sampler(copy, tokenizer.stop_ids, config.rollout_rows, config.rollout_cache_tokens)
    optimizer = torch.optim.AdamW(
        policy.parameters(),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_eps,
        weight_decay=config.weight_decay,
        fused=world.device.type == "cuda",
    )
    policy_loss = PolicyLoss(
        config.temperature,
        config.clip_low,
        config.clip_high,
        config.dual_clip,
        config.kl_coef,
        config.entropy_coef,
        config.loss_aggregation,
        config.logprob_chunk_tokens,
    )
    loss = policy_loss if config.mode == "rl" else SupervisedLoss(config.logprob_chunk_tokens)
    order = EpochOrder(len(examples), config.seed)
    steps = config.steps or config.epochs * order.steps_per_epoch(config.prompts_per_step)
    return Run(
        config,
        world,
        tokenizer,
        policy,
        reference,
        sampler,
        optimizer,
        loss,
        examples,
        benches,
        order,
        steps,
        StopRequest(world),
        turn_to,
        notes,
    )


def resolved(config: Config, parameters: int) -> dict[str, Any]:
    """All settings by name, "auto", "on" and "off" made true or false for a model of so many parameters."""
    on = {"on": True, "off": False}
    return asdict(config) | {
        "activation_checkpointing": on.get(config.activation_checkpointing, parameters > 1e9),
        "accumulate_whole": on.get(config.accumulate_whole, parameters < 2e9),
    }


def allowed_changes(config: Config) -> set[str]:
    """The settings that `allow_changes` names; raises UserError for a name that is none."""
    if config.allow_changes == "all":
        return set(SETTINGS)
    return {known_setting(name.strip(), "allow_changes") for name in config.allow_changes.split(",") if name.strip()}


def refuse_changes(
    before: dict[str, Any], now: Config, where: str, processes: tuple[int, int], say: Callable[[str], None] = print
) -> None:
    """Raise UserError where a resumed run has other settings than before, of those that shape its weights.

    before: settings by name, as `where` holds them. `now.allow_changes` names the settings that may differ; `say` is
    told which do. processes: how many there were, and are.
    """
    old = replace(now, **{known_setting(name, where): checked(name, value, where) for name, value in before.items()})
    allowed, packing_counts = allowed_changes(now), now.loss_aggregation == "microbatch_token_mean"
    fixed = {name for name in SETTINGS if SECTION_OF[name] in FIXED_SECTIONS} - {"steps", "epochs"}
    fixed |= {"steps", "epochs"} if now.lr_schedule != "constant" or now.warmup_ratio else set()
    fixed |= {"tokens_per_microbatch"} if packing_counts else set()
    changed = {
        name: f"{name} {getattr(old, name)!r} (now {getattr(now, name)!r})"
        for name in fixed
        if getattr(old, name) != getattr(now, name)
    }
    if processes[0] != processes[1] and packing_counts:
        changed.setdefault("loss_aggregation", f"{processes[0]} processes (now {processes[1]}), which the loss sees")
    if accepted := [text for name, text in changed.items() if name in allowed]:
        say(f"changed, as allowed: {', '.join(accepted)}")
    if refused := [name for name in sorted(changed) if name not in allowed]:
        raise UserError(
            f"{where} was written with other settings: {', '.join(changed[name] for name in refused)}. "
            f"Restore them, or accept the change with --allow-changes {','.join(refused)}."
        )


def reference_of(config: Config) -> str:
    """The frozen model of the KL term, "" where that has no weight."""
    return (config.reference_model or config.model) if config.mode == "rl" and config.kl_coef else ""


def load_data(config: Config, world: World, tokenizer: Tokenizer) -> tuple[Sequence, list[LoadedBenchmark]]:
    """The training examples and what to evaluate on; over-long examples are left out."""
    fitting = partial(drop_long, tokenizer=tokenizer, max_prompt_tokens=config.max_prompt_tokens, think=config.think)
    held_out = read_examples(config.eval_data)[: config.eval_rows or None] if config.eval_data else []
    held_out, unasked = fitting(held_out, where=config.eval_data)
    kept, dropped = fitting(read_examples(config.train_data), where=config.train_data)
    if not kept:
        raise UserError(f"{config.train_data}: all prompts are over max_prompt_tokens ({config.max_prompt_tokens}).")
    if world.is_main:
        print(f"{len(kept)} training examples, {len(held_out)} held out; {dropped} and {unasked} over-long left out")
    benches = [held_out_benchmark(config.eval_data, held_out)] if held_out else []
    return kept, benches + load_benchmarks([config.eval_bench] if config.eval_bench else [])
