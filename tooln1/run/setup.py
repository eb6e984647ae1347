"""What a run holds, and how it is put together from its settings: data, tokenizer, models, sampler, optimizer."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import Any

import torch

from tooln1.benchmarks.runner import LoadedBenchmark, held_out_benchmark, load_benchmarks
from tooln1.config import SECTION_OF, SETTINGS, Config, checked, known_setting
from tooln1.data import EpochOrder, Example, fingerprint
from tooln1.distributed import World, shard
from tooln1.io import weights
from tooln1.io.errors import UserError
from tooln1.lora import WithoutAdapters, add_adapters, reset_adapters
from tooln1.model import Transformer, load_weights, meta_model, model_files, read_config
from tooln1.prompt import drop_long
from tooln1.run import memory
from tooln1.run.checkpoint import Checkpoint
from tooln1.run.checks import check_run, code_version, require_same_on_all_ranks
from tooln1.run.metrics import RunLog
from tooln1.run.signals import StopRequest
from tooln1.run.task_file import load_task
from tooln1.sampler.sampler import Sampler
from tooln1.task import Task
from tooln1.tokenizer import Tokenizer, load_tokenizer
from tooln1.update import PolicyLoss, SupervisedLoss

Reference = Transformer | WithoutAdapters | None
# What a resumed run must not change: its result would differ by more than rounding.
FIXED_SECTIONS = ("task", "schedule", "rollout", "loss", "optimizer", "lora")


@dataclass
class Run:
    """What a run holds from its first step to its last."""

    config: Config
    world: World
    tokenizer: Tokenizer
    policy: Transformer  # fp32 masters (LoRA: fp32 adapters), sharded over the ranks
    reference: Reference  # the frozen initial model; None where the KL is off
    sampler: Sampler  # of a whole copy of the policy in the sampling dtype (LoRA on one process: of the policy)
    optimizer: torch.optim.Optimizer
    loss: PolicyLoss | SupervisedLoss
    examples: list[Example]
    benchmarks: list[LoadedBenchmark]  # what the policy is evaluated on: held-out examples, eval_bench
    order: EpochOrder
    steps: int
    task: Task
    stop_request: StopRequest  # set by SIGTERM and SIGINT
    set_phase: Callable[[str], None]  # called with what the run does next, for error messages
    notes: dict  # stored in every checkpoint: settings, fingerprints of data and models
    update_attention: str = "auto"  # kernel of the attention over packed batches, then "flex" or "sdpa"
    log: RunLog | None = None  # open from the first step on; None on the ranks other than 0
    completed_steps: int = 0
    position: int = 0  # in the order, behind all prompts that have been drawn
    completed_position: int = 0  # behind those of the completed steps
    saved_steps: int = 0  # completed steps that the newest checkpoint has
    can_abandon_step: bool = True  # the weights are still those of the last completed step
    bad_steps: int = 0  # optimizer steps in a row whose loss or gradient was not finite
    failed_saves: int = 0  # attempts in a row to write a checkpoint


def prepare(
    config: Config, world: World, checkpoint: Checkpoint | None, task_file: str = ""
) -> tuple[Task, Tokenizer, Sequence, list[LoadedBenchmark], dict]:
    """Task, tokenizer, examples, benchmarks, notes for checkpoints, checked: raises UserError for a faulty run."""
    require_same_on_all_ranks(world, asdict(config) | {"code": code_version(), "torch": torch.__version__})
    if checkpoint:
        say, processes = print if world.is_main else lambda words: None, (checkpoint.ranks, world.size)
        refuse_changes(checkpoint.notes.get("config", {}), config, str(checkpoint.path), processes, say)
    task, tokenizer = load_task(task_file, config.think, config.reward), load_tokenizer(config.model)
    examples, benchmarks = load_data(config, world, tokenizer, task)
    frozen = reference_of(config)
    notes = {"config": asdict(config), "train_data": fingerprint(examples), "task": task.fingerprint}
    for name, path in (("model", config.model), ("reference_model", frozen)):
        notes[name] = weights.fingerprint(model_files(path)) if path else ""
    held_out = [case.example for one in benchmarks if one.name == "heldout" for case in one.chosen]
    contents = {f"content of {name}": notes[name] for name in ("train_data", "task", "model", "reference_model")}
    require_same_on_all_ranks(world, contents | {"content of eval_data": fingerprint(held_out)})
    if checkpoint:
        sources = {"train_data": config.train_data, "model": config.model, "reference_model": frozen}
        for name, place in (sources | {"task": task_file or "Tool-N1, without --task,"}).items():
            before, now = checkpoint.notes.get(name), notes[name]  # "" without a reference model
            if before and now and before != now and name not in allowed_changes(config):
                raise UserError(
                    f"{place} is not what {checkpoint.path} was made with: another task, other examples (or others "
                    f"are too long), weights or tokenizer; give those, or allow it with --allow-changes {name}."
                )
    shape, reference = read_config(config.model), read_config(frozen) if frozen else None
    settings = resolved(config, shape.num_parameters)
    check_run(settings, world, shape, reference, tokenizer, examples, held_out, task)
    return task, tokenizer, examples, benchmarks, notes


def build(
    config: Config, world: World, checkpoint: Checkpoint | None, task_file: str, set_phase: Callable[[str], None]
) -> Run:
    """A run before its first step: what `prepare` checks, models, sampler, optimizer, order."""
    task, tokenizer, examples, benchmarks, notes = prepare(config, world, checkpoint, task_file)
    there, cuda = memory.available(world.device), world.device.type == "cuda"
    policy, reference, sampling_copy = load_models(config, world, tokenizer.vocab_size)
    settings = resolved(config, policy.config.num_parameters)
    frozen = read_config(path) if (path := reference_of(config)) else None
    free_bytes = memory.estimate(policy.config, frozen, settings, there, world.size, 0, 0).free_bytes
    cache = (config.max_num_seqs, config.rollout_cache_tokens)
    sampler = Sampler(sampling_copy, tokenizer.stop_ids, *cache, free_bytes=free_bytes)
    decay = {"betas": (config.adam_beta1, config.adam_beta2), "weight_decay": config.weight_decay}
    optimizer = torch.optim.AdamW(policy.parameters(), config.learning_rate, eps=config.adam_eps, fused=cuda, **decay)
    order = EpochOrder(len(examples), config.seed)
    return Run(
        config=config,
        world=world,
        tokenizer=tokenizer,
        policy=policy,
        reference=reference,
        sampler=sampler,
        optimizer=optimizer,
        loss=loss_of(config),
        examples=examples,
        benchmarks=benchmarks,
        order=order,
        steps=config.steps or config.epochs * order.steps_per_epoch(config.prompts_per_step),
        task=task,
        stop_request=StopRequest(world),
        set_phase=set_phase,
        notes=notes,
    )


def load_models(config: Config, world: World, vocabulary: int) -> tuple[Transformer, Reference, Transformer]:
    """The policy, the reference (None if the KL is off) and the sampler's copy, on this process's device.

    The policy is fp32 and sharded; the others are bf16 on CUDA, else fp32, the reference sharded, the copy not, and
    without values before `copy_weights`. With LoRA only adapters are fp32, and the reference is the policy's base; on
    one process all three are one. All are sharded before they are read, so that no process has all fp32 weights.
    """
    low = torch.bfloat16 if world.device.type == "cuda" else torch.float32
    lora, reference, hybrid, host = config.lora_rank > 0, None, config.sharding == "hybrid", torch.device("cpu")
    policy = meta_model(config.model, low if lora else torch.float32, vocabulary)
    if lora:
        add_adapters(policy, config.lora_rank, config.lora_alpha, config.lora_targets.split(","), config.seed)
    settings = resolved(config, policy.config.num_parameters)
    for block in policy.model.layers:
        block.recompute = settings["activation_checkpointing"]
        if config.compile:
            block.compile_parts()
    one_copy = lora and world.size == 1
    if not one_copy:
        policy = shard(policy, world, low, config.offload_optimizer, settings["accumulate_unsharded"], hybrid)
    load_weights(policy, host if config.offload_optimizer else world.device)
    if lora:
        reset_adapters(policy, config.seed)
        reference = WithoutAdapters(policy) if config.kl != "off" else None
    if path := reference_of(config):
        reference = meta_model(path, low, vocabulary).requires_grad_(False)
        reference = shard(reference, world, offload=config.offload_reference, hybrid=hybrid)
        load_weights(reference, host if config.offload_reference else world.device)
    if one_copy:
        return policy, reference, policy
    return policy, reference, meta_model(config.model, low, vocabulary).to_empty(device=world.device)


def loss_of(config: Config) -> PolicyLoss | SupervisedLoss:
    """The loss of the run's mode."""
    if config.mode == "sft":
        return SupervisedLoss(config.logprob_chunk_tokens)
    own = {field.name: getattr(config, field.name) for field in fields(PolicyLoss) if field.name in SETTINGS}
    return PolicyLoss(**own, aggregation=config.loss_aggregation, chunk=config.logprob_chunk_tokens)


def resolved(config: Config, parameters: int) -> dict[str, Any]:
    """All settings by name, "auto", "on" and "off" made true or false for a model of so many parameters."""
    on = {"on": True, "off": False}
    return asdict(config) | {
        "activation_checkpointing": on.get(config.activation_checkpointing, parameters > 4e8),
        "accumulate_unsharded": on.get(config.accumulate_unsharded, parameters < 2e9),
    }


def allowed_changes(config: Config) -> set[str]:
    """The settings that `allow_changes` names, and "task" for --task; raises UserError for a name that is none."""
    if config.allow_changes == "all":
        return {*SETTINGS, "task"}
    names = {name.strip() for name in config.allow_changes.split(",") if name.strip()}
    return {name if name == "task" else known_setting(name, "allow_changes") for name in names}


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
    """The path of the frozen model of the KL term, "" if that is off or, with LoRA, the base of the policy."""
    path = config.reference_model or config.model
    own = config.lora_rank and path == config.model
    return path if config.mode == "rl" and config.kl != "off" and not own else ""


def load_data(config: Config, world: World, tokenizer: Tokenizer, task: Task) -> tuple[Sequence, list[LoadedBenchmark]]:
    """The training examples and what to evaluate on; over-long examples are left out."""
    limits = {"tokenizer": tokenizer, "max_prompt_tokens": config.max_prompt_tokens}
    keep_short = partial(drop_long, messages=task.messages, **limits)
    held_out = task.read(config.eval_data)[: config.max_eval_examples or None] if config.eval_data else []
    held_out, held_out_dropped = keep_short(held_out, where=config.eval_data)
    kept, dropped = keep_short(task.read(config.train_data), where=config.train_data)
    if not kept:
        raise UserError(f"{config.train_data}: all prompts are over max_prompt_tokens ({config.max_prompt_tokens}).")
    if world.is_main:
        left_out = f"{dropped} and {held_out_dropped} with too long a prompt left out"
        print(f"{len(kept)} training examples, {len(held_out)} held out; {left_out}")
    benchmarks = [held_out_benchmark(config.eval_data, held_out, task)] if held_out else []
    return kept, benchmarks + load_benchmarks([config.eval_bench] if config.eval_bench else [], task=task)
