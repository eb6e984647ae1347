"""The life of a run: open or resume, log, save, evaluate, stop, export."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch

from tooln1.benchmarks.runner import GenerationConfig, generate_predictions, totals_by_log_name
from tooln1.config import Config, to_toml
from tooln1.distributed import World, copy_weights, full_tensor, reshard
from tooln1.io.errors import Stopped, UserError
from tooln1.io.files import atomic_write
from tooln1.lora import save_adapters, trained_parameters
from tooln1.model import load_model, save_model
from tooln1.run.checkpoint import (
    CHECKPOINTS,
    Checkpoint,
    claimed,
    find_checkpoint,
    is_in,
    load_checkpoint,
    remove_old,
    save_checkpoint,
    set_aside,
)
from tooln1.run.faults import explain_oom
from tooln1.run.kernels import choose_decode, choose_update_attention
from tooln1.run.metrics import Metrics, RunLog
from tooln1.run.setup import Run, build


@contextmanager
def open_run(config: Config, world: World, task_file: str = "") -> Iterator[Run]:
    """A run ready for its next step: new, or resumed from a checkpoint. Exports the model when the block succeeds.

    In the block, SIGTERM and SIGINT end the run with `Stopped` after its completed steps are saved, and memory that
    runs out becomes a UserError that names settings to change.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    elif config.offload_optimizer:  # AdamW runs on the CPU, and torchrun gives each process a single thread
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    run_dir = Path(config.run_dir)
    with claimed(run_dir, world), explain_oom(asdict(config)) as set_phase:
        checkpoint = find_checkpoint(run_dir, config.resume, world)
        run = build(config, world, checkpoint, task_file, set_phase)
        if checkpoint:
            resume(run, checkpoint)
        how = (config.update_attention, config.tokens_per_microbatch)
        run.update_attention = choose_update_attention(run.policy.config, *how, world)
        if config.mode == "rl" or run.benchmarks:
            set_phase("first rollout")
            copy_weights(run.policy, run.sampler.model)
            choose_decode(run.sampler, config.rollout_decode, world)
        release_weights(run)
        open_logs = partial(open_log, run) if world.is_main else lambda: None
        run.log = world.run_on_all_ranks(open_logs, f"{run_dir} cannot be written to")
        if run.saved_steps < run.completed_steps:
            save(run)  # resumed from another run's checkpoint: this directory needs one of its own
        with run.stop_request:  # also while it saves: a job manager's signal can come twice
            try:
                yield run
            except Stopped:  # the weights are those of the last completed step
                reshard(run.policy)
                if run.completed_steps > run.saved_steps:
                    save(run)
                if world.is_main:
                    print(f"stopped after step {run.completed_steps} of {run.steps}; continue with --resume auto")
                raise
        export(run)


def open_log(run: Run) -> RunLog:
    """Write config.toml and open the logs, cut back to the completed steps."""
    config, run_dir = run.config, Path(run.config.run_dir)
    with atomic_write(run_dir / "config.toml") as file:
        file.write(recorded_settings(config))
    return RunLog(run_dir, run.steps, run.completed_steps, config.tensorboard)


def recorded_settings(config: Config) -> str:
    """The content of a run's config.toml: all settings but those of a single start."""
    return to_toml(replace(config, resume="", allow_changes="", check=False))


def metrics_of_step(run: Run, step: int) -> Metrics:
    """Empty metrics for a step, counted from 0; its timers wait for the GPU and set the run's phase."""
    synchronize = torch.cuda.synchronize if run.world.device.type == "cuda" else lambda: None
    return Metrics(synchronize, enter=lambda phase: run.set_phase(f"step {step + 1}, {phase}"))


def finish_step(run: Run, metrics: Metrics, replies: list[dict]) -> None:
    """Log a completed step; save and evaluate if that is due."""
    config = run.config
    run.completed_steps, run.can_abandon_step = run.completed_steps + 1, True
    run.completed_position = run.position
    log_step(run, metrics, replies)
    last = run.completed_steps == run.steps
    if last or run.failed_saves or (config.save_every and run.completed_steps % config.save_every == 0):
        save(run, may_fail=not last)
    evaluate_if_due(run)


def log_step(run: Run, metrics: Metrics, replies: Sequence[dict] = ()) -> None:
    """Log metrics and replies of the last completed step, reduced over the ranks (a collective)."""
    values = metrics.reduced(run.world.gather)

    def log() -> None:
        if run.log:
            run.log.step(run.completed_steps, values)
            run.log.rollouts(run.completed_steps, replies, run.config.log_rollouts)

    run.world.run_on_all_ranks(log, "the logs could not be written")


def evaluate_if_due(run: Run) -> None:
    """Evaluate if that is due after the completed steps and not logged yet; log the figures under the last step.

    The step is logged and, if due, saved before: a run that is stopped or killed during the evaluation repeats it when
    it is resumed.
    """
    config, step, last = run.config, run.completed_steps, run.completed_steps == run.steps
    due = (last or (config.eval_every and step % config.eval_every == 0)) if step else config.eval_before_training
    missing = False
    if run.log:  # a run resumed from another one's checkpoint has no row of that step
        has_row = run.log.row.get("step") == step
        missing = "seconds/eval" not in run.log.row if has_row else last or not step
    if run.benchmarks and due and run.world.broadcast(missing):
        metrics = metrics_of_step(run, step - 1)
        with metrics.timer("eval"):
            metrics.add_means({name: (value, 1) for name, value in evaluate(run).items()})
        log_step(run, metrics)


def evaluate(run: Run) -> dict[str, float]:
    """Greedy accuracies, as in eval.py: eval_bench's totals by name, and "heldout_accuracy".

    That is the mean of the binary reward, or of a task file's.
    """
    generation = GenerationConfig(think=run.config.think, max_reply_tokens=run.config.max_reply_tokens)
    stop, found = {"should_stop": run.stop_request.asked, "check": run.stop_request.check}, {}
    copy_weights(run.policy, run.sampler.model)
    for benchmark in run.benchmarks:
        predictions = {}
        for new in generate_predictions(benchmark, run.sampler, run.tokenizer, run.world, generation, **stop):
            predictions |= new
        score = partial(totals_by_log_name, benchmark, predictions, generation.think)
        found |= run.world.run_on_all_ranks(score, "the evaluation")
    release_weights(run)
    if "heldout_overall" in found:
        found["heldout_accuracy"] = found.pop("heldout_overall")
    return found


def release_weights(run: Run) -> None:
    """Free the sampler's copy of the weights if that is set; with LoRA on one process there is none."""
    if run.config.sampler_weights == "release" and run.sampler.model is not run.policy:
        run.sampler.release_weights()


def save(run: Run, may_fail: bool = False) -> None:
    """Write a checkpoint of the completed steps. One that `may_fail` is tried again after each of the next steps."""
    config, world, folder = run.config, run.world, Path(run.config.run_dir) / CHECKPOINTS
    run.set_phase(f"step {run.completed_steps}, save")
    notes = run.notes | {"bad_steps": run.bad_steps, "position": run.completed_position}
    try:
        world.run_on_all_ranks(run.log.sync if run.log else lambda: None, "the logs could not be written")
        save_checkpoint(folder, run.completed_steps, run.policy, run.optimizer, world, notes)
    except UserError as error:
        run.failed_saves += 1
        if not may_fail or run.failed_saves >= config.max_failed_saves:
            raise
        if world.is_main:
            again = f"Trying again after the next step (attempt {run.failed_saves} of {config.max_failed_saves})."
            print(f"warning: {error} {again}", file=sys.stderr)
    else:
        run.failed_saves, run.saved_steps = 0, run.completed_steps
        if world.is_main and not run.bad_steps:  # while steps are skipped, an older one may be needed again
            remove_old(folder, config.keep_checkpoints, config.keep_every)


def resume(run: Run, checkpoint: Checkpoint) -> None:
    """Load a checkpoint into the run; later ones in its directory are renamed, because the run writes them again."""
    world, folder, notes = run.world, Path(run.config.run_dir) / CHECKPOINTS, checkpoint.notes
    load_checkpoint(checkpoint.path, run.policy, run.optimizer)
    run.completed_steps = checkpoint.step
    run.position = run.completed_position = notes["position"]
    run.bad_steps = 0 if run.config.allow_changes else notes["bad_steps"]
    run.saved_steps = checkpoint.step if is_in(checkpoint.path, Path(run.config.run_dir)) else 0
    rename = partial(set_aside, folder, checkpoint.step) if world.is_main else list
    renamed = world.run_on_all_ranks(rename, f"{folder}: renaming")
    if world.is_main:
        print(f"resuming from {checkpoint.path} after step {checkpoint.step} of {run.steps}")
        if renamed:
            print(f"renamed, because this run writes these steps again: {', '.join(renamed)}")


def export(run: Run) -> None:
    """Write the policy as a Hugging Face directory, run_dir/hf; with LoRA also the adapters, run_dir/hf_adapter."""
    config, folder, world = run.config, Path(run.config.run_dir) / "hf", run.world
    run.set_phase("export")
    copy_weights(run.policy, run.sampler.model)
    adapters = trained_parameters(run.policy) if config.lora_rank else {}
    adapters = {name: full_tensor(adapter) for name, adapter in adapters.items()}

    def write() -> None:
        model = run.sampler.model
        if model is run.policy:  # LoRA on one process
            model = load_model(config.model, model.head.dtype)
            copy_weights(run.policy, model)
        save_model(model, folder)
        if adapters:
            save_adapters(adapters, config.lora_alpha, config.model, folder.with_name("hf_adapter"))

    write = write if world.is_main else lambda: None
    world.run_on_all_ranks(write, f"the model could not be exported to {folder}; --resume auto tries it again")
    if world.is_main:
        print(f"done: the model is in {folder}, the curves: python -m tooln1.run.plot {folder.parent}")
