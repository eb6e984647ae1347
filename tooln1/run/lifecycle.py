"""The life of a run: open or resume, log, save, evaluate, stop, export."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch

from tooln1.benchmarks.runner import GenerationConfig, generate_predictions, totals_by_log_name
from tooln1.config import Config, to_toml
from tooln1.distributed import World, copy_weights, reshard
from tooln1.io.errors import Stopped, UserError
from tooln1.io.files import atomic_write
from tooln1.model import save_model
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
from tooln1.run.metrics import Metrics, RunLog
from tooln1.run.setup import Run, build, prepare


@contextmanager
def open_run(config: Config, world: World) -> Iterator[Run]:
    """A run ready for its next step, from the beginning or from a checkpoint; a block that ends well exports the model.

    Within the block a request to stop (`Stopped`) saves the steps that are complete, and memory that runs out is a
    `UserError` naming the settings to turn.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    run_dir = Path(config.run_dir)
    with claimed(run_dir, world), explain_oom(asdict(config)) as turn_to:
        checkpoint = find_checkpoint(run_dir, config.resume, world)
        tokenizer, examples, benches, notes = prepare(config, world, checkpoint)
        run = build(config, world, tokenizer, examples, benches, notes, turn_to)
        if checkpoint:
            resume(run, checkpoint)
        run.log = world.run_on_all_ranks(lambda: open_logs(run), f"{run_dir} cannot be written to")
        if run.saved < run.done:
            save(run)  # of a checkpoint from elsewhere: from now on this directory has one of its own
        try:
            with run.request:
                yield run
        except Stopped:  # the weights are those of the last complete step
            reshard(run.policy)
            if run.done > run.saved:
                save(run)
            if world.is_main:
                print(f"stopped after step {run.done} of {run.steps}; --resume auto goes on from there")
            raise
        export(run)
        run.log.close()


def metrics_of_step(run: Run, step: int) -> Metrics:
    """Empty metrics for the step after `step` complete ones; phases wait for the GPU and are told to the run."""
    synchronize = torch.cuda.synchronize if run.world.device.type == "cuda" else lambda: None
    return Metrics(synchronize, enter=lambda phase: run.turn_to(f"step {step + 1}, {phase}"))


def finish_step(run: Run, metrics: Metrics, replies: list[dict]) -> None:
    """Log a step that is complete, save and evaluate where that is due."""
    config = run.config
    run.log.step(run.done + 1, metrics.reduced(run.world.gather))
    run.log.rollouts(run.done + 1, replies, config.log_rollouts)
    run.done, run.intact = run.done + 1, True
    last = run.done == run.steps
    if last or run.failed_saves or (config.save_every and run.done % config.save_every == 0):
        save(run, may_fail=not last)
    evaluate_if_due(run)


def evaluate(run: Run) -> dict[str, float]:
    """Greedy accuracies, as in eval.py: "heldout_accuracy" (the binary reward), and eval_bench's totals by name."""
    generation = GenerationConfig(think=run.config.think, max_reply_tokens=run.config.max_reply_tokens)
    stop, found = {"should_stop": run.request.asked, "check": run.request.check}, {}
    for benchmark in run.benches:
        predictions = {}
        for new in generate_predictions(benchmark, run.sampler, run.tokenizer, run.world, generation, **stop):
            predictions |= new
        found |= totals_by_log_name(benchmark, predictions, generation.think)
    if "heldout_overall" in found:
        found["heldout_accuracy"] = found.pop("heldout_overall")
    return found


def open_logs(run: Run) -> RunLog:
    """The run's settings and logs in its directory, where it begins, or goes on, to write from now on."""
    config, world, run_dir = run.config, run.world, Path(run.config.run_dir)
    if world.is_main:
        with atomic_write(run_dir / "config.toml") as file:
            file.write(to_toml(replace(config, resume="", allow_changes="", check=False)))
    return RunLog(run_dir, run.steps, completed=run.done, tensorboard=config.tensorboard, write=world.is_main)


def evaluate_if_due(run: Run) -> None:
    """Evaluate if that is due after the steps done and not logged yet; the figures are logged under the same step.

    The step is complete, and saved if that is due, before: a run that is stopped or killed in here goes on with this.
    One that goes on from another run's checkpoint evaluates what that one may not have, its last step.
    """
    config, step, last = run.config, run.done, run.done == run.steps
    due = (last or (config.eval_every and step % config.eval_every == 0)) if step else config.eval_before_training
    has_row = run.log.row.get("step") == step
    missing = "seconds/eval" not in run.log.row if has_row else last or not step
    if run.benches and due and run.world.broadcast(missing):
        metrics = Metrics(enter=lambda phase: run.turn_to(f"step {step}, {phase}"))
        with metrics.timer("eval"):
            copy_weights(run.policy, run.sampler.model)
            metrics.add_means({name: (value, 1) for name, value in evaluate(run).items()})
        run.log.step(step, metrics.reduced(run.world.gather))


def save(run: Run, may_fail: bool = False) -> None:
    """Write a checkpoint of the steps done. One that `may_fail` is tried again after the next step, a few times."""
    config, world, folder = run.config, run.world, Path(run.config.run_dir) / CHECKPOINTS
    run.turn_to(f"step {run.done}, save")
    notes = run.notes | {"bad_steps": run.bad_steps, "free_bytes": world.gather([run.sampler.free_bytes])}
    try:
        world.run_on_all_ranks(run.log.flush, "the logs could not be written")
        save_checkpoint(folder, run.done, run.policy, run.optimizer, world, notes)
    except UserError as error:
        run.failed_saves += 1
        if not may_fail or run.failed_saves >= config.max_failed_saves:
            raise
        if world.is_main:
            again = f"Trying again after the next step (attempt {run.failed_saves} of {config.max_failed_saves})."
            print(f"warning: {error} {again}", file=sys.stderr)
    else:
        run.failed_saves, run.saved = 0, run.done
        if world.is_main and not run.bad_steps:  # while steps are skipped, an older one may be needed again
            remove_old(folder, config.keep_checkpoints, config.keep_every)


def resume(run: Run, checkpoint: Checkpoint) -> None:
    """Fill the run from a checkpoint; later ones in its directory are set aside, because they are written anew."""
    folder, notes = Path(run.config.run_dir) / CHECKPOINTS, checkpoint.notes
    load_checkpoint(checkpoint.path, run.policy, run.optimizer)
    copy_weights(run.policy, run.sampler.model)
    run.done, run.bad_steps = checkpoint.step, 0 if run.config.allow_changes else notes.get("bad_steps", 0)
    run.saved = run.done if is_in(checkpoint.path, Path(run.config.run_dir)) else 0
    if checkpoint.ranks == run.world.size:  # the same cache, so that the same replies are sampled side by side
        run.sampler.free_bytes = notes.get("free_bytes", {run.world.rank: None})[run.world.rank]
    aside = run.world.run_on_all_ranks(
        lambda: set_aside(folder, run.done) if run.world.is_main else [], f"{folder}: renaming"
    )
    if run.world.is_main:
        steps = f"with step {run.done + 1}" if run.done < run.steps else f"whose {run.done} steps are all there are"
        print(f"going on from {checkpoint.path}, {steps}")
        if aside:
            print(f"set aside, because this run writes these steps anew: {', '.join(aside)}")


def export(run: Run) -> None:
    """The policy as a Hugging Face directory, run_dir/hf."""
    run_dir, world = Path(run.config.run_dir), run.world
    run.turn_to("export")
    copy_weights(run.policy, run.sampler.model)
    write = (lambda: save_model(run.sampler.model, run_dir / "hf")) if world.is_main else (lambda: None)
    world.run_on_all_ranks(write, f"the model could not be exported to {run_dir / 'hf'}; --resume auto tries it again")
    if world.is_main:
        print(f"done: the model is in {run_dir / 'hf'}, the curves: python -m tooln1.run.plot {run_dir}")
