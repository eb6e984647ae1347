"""Train a model to call tools: GRPO with a rule-based reward (mode rl), or the supervised baselines (mode sft).

    torchrun --standalone --nproc-per-node 8 train.py --config configs/tool_n1_7b.toml
    python train.py                                     # the embedded demo, on whatever this machine is
    python train.py --help                              # every setting, its unit and the paper's value

`rl_step`, below, is one step of the whole algorithm; the equations are in tooln1/grpo.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

from tooln1.batch import PackedBatch, minibatch_rows, pack, plan
from tooln1.benchmarks.runner import Asking, Bench, figures, held_out_bench, load_benches
from tooln1.config import allowed_changes, load_config, refuse_changes, to_toml
from tooln1.data import EpochOrder, Example, Rollout, fingerprint, read_examples
from tooln1.distributed import World, copy_weights, launch, load_models, reshard
from tooln1.grpo import group_advantages, loss_total
from tooln1.io import weights
from tooln1.io.errors import Stopped, UserError, exit_on_user_error
from tooln1.io.files import atomic_write, check_writable
from tooln1.io.model_config import pair_cost
from tooln1.io.progress import progress
from tooln1.model import Transformer, model_files, read_config, save_model
from tooln1.prompt import build_messages, drop_long
from tooln1.rewards import REWARDS
from tooln1.run.checkpoint import Checkpoint, load_checkpoint, save_checkpoint, set_aside
from tooln1.run.faults import keep_batch, memory_in_words, ruined
from tooln1.run.look_ahead import look_ahead
from tooln1.run.metrics import Metrics, RunLog
from tooln1.run.reply_metrics import add_reply_metrics, add_sampler_gap, add_sampler_stats
from tooln1.run.run_dir import CHECKPOINTS, claimed, find_checkpoint, is_in, refuse_other_contents
from tooln1.run.signals import StopRequest
from tooln1.sampler.distributed import generate_distributed
from tooln1.sampler.sampler import Sampler
from tooln1.settings import Config, resolved
from tooln1.sft import demonstrations
from tooln1.tokenizer import Tokenizer, load_tokenizer
from tooln1.update import PolicyLoss, SupervisedLoss, optimizer_step, scheduled_rate, with_logprobs

DEFAULT = Path(__file__).parent / "configs" / "demo.toml"


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
    benches: list[Bench]  # what the policy is evaluated on: held-out examples, eval_bench
    order: EpochOrder
    steps: int
    request: StopRequest  # whether a signal has asked the run to stop
    turn_to: Callable[[str], None]  # takes what the run does next, for the words when something goes wrong
    notes: dict  # goes into every checkpoint: settings, and a fingerprint of the data
    done: int = 0  # steps that are complete
    saved: int = 0  # of them, those that a checkpoint has
    intact: bool = True  # the weights are those after the steps done: the next one can still be given up
    bad_steps: int = 0  # optimizer steps in a row whose loss or gradient was not finite
    failed_saves: int = 0  # attempts in a row to write a checkpoint


# ------------------------------------------------------------------------------------------------ the algorithm


def rl_step(run: Run, step: int, metrics: Metrics) -> list[dict]:
    """One GRPO step: sample groups, score them, compare within each group, update the policy. Returns the replies."""
    config = run.config
    chosen = run.order.take(step, config.prompts_per_step)
    examples = [run.examples[i] for i in chosen]
    with metrics.timer("rollout"):
        rollouts = sample(run, examples, keys=chosen, step=step)
    with metrics.timer("reward"):
        replies, rewards = score(run, rollouts, examples, step)
        groups = torch.tensor([rollout.group for rollout in rollouts])
        advantages = group_advantages(rewards, groups, config.advantage_eps, config.scale_by_std)
    minibatches = minibatch_rows(rollouts, config.prompts_per_minibatch)
    with metrics.timer("logprobs"):
        batches = [log_probs(run, my_batches(run, rollouts, rows, advantages), metrics) for rows in minibatches]
    with metrics.timer("update"):
        for rows, mini in zip(minibatches, batches, strict=True):
            lengths = [len(rollouts[row].reply) for row in rows]
            total = loss_total(config.loss_aggregation, lengths, config.max_reply_tokens)
            update(run, mini, rollouts, total, step, metrics)
    with metrics.timer("sync"):
        copy_weights(run.policy, run.sampler.model)
    answers = [examples[rollout.group].answer for rollout in rollouts]
    add_reply_metrics(metrics, rollouts, replies, answers, rewards, config.think, run.world.size)
    add_sampler_stats(metrics, run.sampler.stats)
    add_sampler_gap(metrics, rollouts, [batch for mini in batches for batch in mini])
    return [
        {"id": examples[rollout.group].id, "reward": reward, "reply": reply, "answer": answer}
        for rollout, reward, reply, answer in zip(rollouts, rewards.tolist(), replies, answers, strict=True)
    ]


def sft_step(run: Run, step: int, metrics: Metrics) -> list[dict]:
    """One supervised step: cross-entropy of written replies, on the same packed batches. There are no new replies."""
    config = run.config
    examples = [run.examples[i] for i in run.order.take(step, config.prompts_per_step)]
    with metrics.timer("update"):
        rollouts = demonstrations(examples, run.tokenizer, config.think, config.sft_on_prompt)
        for rows in minibatch_rows(rollouts, config.prompts_per_minibatch):
            total = sum(len(rollouts[row].reply) for row in rows)
            update(run, my_batches(run, rollouts, rows, torch.zeros(len(rollouts))), rollouts, total, step, metrics)
    return []


# ------------------------------------------------------------------------------------------------ its parts


def sample(run: Run, examples: list[Example], keys: list[int], step: int) -> list[Rollout]:
    """A group of replies to each example, sampled on all ranks and known to all of them afterwards."""
    config = run.config
    prompts = [run.tokenizer.prompt_ids(build_messages(example, config.think)) for example in examples]
    with progress(len(prompts) * config.group_size, "sampling", "replies", run.world.main) as bar:
        return generate_distributed(
            run.sampler,
            run.world,
            prompts,
            keys=keys,
            group_size=config.group_size,
            seed=config.seed,
            step=step,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            max_new_tokens=config.max_reply_tokens,
            on_finished=lambda rollout: bar.update(run.world.size),
            should_stop=run.request.asked,
            check=run.request.check,
        )


def score(run: Run, rollouts: list[Rollout], examples: list[Example], step: int) -> tuple[list[str], torch.Tensor]:
    """The text of each reply, special tokens kept, and its reward [N]; shuffled over the batch in the control."""
    reward = REWARDS[run.config.reward]
    replies = [run.tokenizer.decode(rollout.reply) for rollout in rollouts]
    rewards = [reward(reply, examples[rollout.group].answer) for reply, rollout in zip(replies, rollouts, strict=True)]
    rewards = torch.tensor(rewards, dtype=torch.float32)
    if run.config.shuffle_rewards:
        generator = torch.Generator().manual_seed(1_000_003 * run.config.seed + step)
        rewards = rewards[torch.randperm(len(rewards), generator=generator)]
    return replies, rewards


def log_probs(run: Run, batches: list[PackedBatch], metrics: Metrics) -> list[PackedBatch]:
    """The batches with the log-probs of the policy before the update, and of the reference."""
    config = run.config
    metrics.add_tokens("logprobs", sum(len(batch.tokens) for batch in batches))
    batches, sums = with_logprobs(
        batches, run.policy, run.reference, config.temperature, config.logprob_chunk_tokens, run.request.check
    )
    metrics.add_means(sums)
    return batches


def update(
    run: Run, batches: list[PackedBatch], rollouts: Sequence[Rollout], total: float, step: int, metrics: Metrics
) -> None:
    """One optimizer step on a mini-batch; one whose loss or gradient is not finite is skipped, counted and kept."""
    config = run.config
    check = run.request.check if run.intact else lambda: None
    rate = scheduled_rate(step, run.steps, config.learning_rate, config.lr_schedule, config.warmup_ratio)
    result = optimizer_step(
        run.policy, run.optimizer, batches, run.loss, total, config.max_grad_norm, rate, run.world.reduce, check
    )
    run.intact = False
    run.bad_steps = 0 if result.applied else run.bad_steps + 1
    if not result.applied:
        skipped, name = Path(config.run_dir) / "skipped", f"step-{step + 1:06d}-{run.bad_steps}"
        keep_batch(skipped, name, batches, rollouts, run.tokenizer, run.world, newest=config.max_bad_steps)
        if run.bad_steps >= config.max_bad_steps:
            raise ruined(run.bad_steps, step + 1, skipped, config.learning_rate)
    metrics.add_mean("loss", result.loss)
    metrics.add_mean("grad_norm", result.grad_norm)
    metrics.add_max("learning_rate", rate)
    metrics.add_sum("skipped_steps", (not result.applied) / run.world.size)
    metrics.add_tokens("update", sum(len(batch.tokens) for batch in batches))
    metrics.add_means(result.sums)


def my_batches(run: Run, rollouts: Sequence[Rollout], rows: list[int], advantages: torch.Tensor) -> list[PackedBatch]:
    """This rank's micro-batches of the mini-batch `rows`; every rank makes the same plan and takes its share."""
    config = run.config
    only_policy_term = config.mode == "rl" and not (config.kl_coef or config.entropy_coef)
    if only_policy_term and config.loss_aggregation != "microbatch_token_mean":
        # An advantage of 0 leaves nothing to learn (groups with equal rewards); the loss's total still counts it.
        rows = [row for row in rows if advantages[row] != 0]
    shares = plan(rollouts, rows, config.tokens_per_microbatch, run.world.size, pair_cost(run.policy.config))
    return [pack(rollouts, share, advantages, run.world.device) for share in shares[run.world.rank]]


def evaluate(run: Run) -> dict[str, float]:
    """Greedy figures, as eval.py has them: "heldout_accuracy" (the binary reward), and eval_bench's totals by name."""
    asking = Asking(think=run.config.think, max_reply_tokens=run.config.max_reply_tokens)
    found = figures(run.benches, run.sampler, run.tokenizer, run.world, asking, run.request.asked, run.request.check)
    if "heldout_overall" in found:
        found["heldout_accuracy"] = found.pop("heldout_overall")
    return found


# ------------------------------------------------------------------------------------------------ the run


def train(config: Config, world: World) -> None:
    """A run from its first step, or from a checkpoint, to the exported model."""
    if config.threads:
        torch.set_num_threads(config.threads)
    run_dir = Path(config.run_dir)
    with claimed(run_dir, world), memory_in_words(asdict(config), world.note) as turn_to:
        checkpoint = find_checkpoint(run_dir, config.resume, world)
        tokenizer, examples, benches, notes = prepare(config, world, checkpoint)
        run = build(config, world, tokenizer, examples, benches, notes, turn_to)
        if checkpoint:
            resume(run, checkpoint)
        log = world.together(lambda: open_logs(run), f"{run_dir} cannot be written to")
        if run.saved < run.done:
            save(run, log)  # of a checkpoint from elsewhere: from now on this directory has one of its own
        with run.request:
            run_steps(run, log)
        export(run)
        log.close()


def open_logs(run: Run) -> RunLog:
    """The run's settings and logs in its directory, where it begins, or goes on, to write from now on."""
    config, world, run_dir = run.config, run.world, Path(run.config.run_dir)
    if world.main:
        with atomic_write(run_dir / "config.toml") as file:
            file.write(to_toml(replace(config, resume="", allow_changes="", check=False)))
    completed = run.done or None
    log = RunLog(run_dir, run.steps, completed=completed, tensorboard=config.tensorboard, write=world.main)
    world.remember(str(run_dir.absolute()))  # a restart by torchrun goes on with it
    return log


def run_steps(run: Run, log: RunLog) -> None:
    """All steps that are left, each logged when it is complete. A request to stop saves what is done: Stopped."""
    config, world = run.config, run.world
    one_step = rl_step if config.mode == "rl" else sft_step
    synchronize = torch.cuda.synchronize if world.device.type == "cuda" else lambda: None
    try:
        evaluate_if_due(run, log)
        for step in range(run.done, run.steps):
            run.request.check()
            metrics = Metrics(synchronize, enter=lambda phase, step=step: run.turn_to(f"step {step + 1}, {phase}"))
            with metrics.timer("step"):
                replies = one_step(run, step, metrics)
            log.step(step + 1, metrics.reduced(world.reduce))
            log.rollouts(step + 1, replies, config.log_rollouts)
            run.done, run.intact = step + 1, True
            last = run.done == run.steps
            if last or run.failed_saves or (config.save_every and run.done % config.save_every == 0):
                save(run, log, may_fail=not last)
            evaluate_if_due(run, log)
    except Stopped:  # the weights are those of the last complete step
        reshard(run.policy)
        if run.done > run.saved:
            save(run, log)
        if world.main:
            print(f"stopped after step {run.done} of {run.steps}; --resume auto goes on from there")
        raise


def evaluate_if_due(run: Run, log: RunLog) -> None:
    """Evaluate where that is due after the steps done, and add the figures to the step's row, if it has none yet.

    The step is complete, and saved if that is due, before: a run that is stopped or killed in here goes on with this.
    One that goes on from another run's checkpoint evaluates what that one may not have, its last step.
    """
    config, step, last = run.config, run.done, run.done == run.steps
    due = (last or (config.eval_every and step % config.eval_every == 0)) if step else config.eval_before_training
    has_row = log.row.get("step") == step
    missing = "seconds/eval" not in log.row if has_row else last or not step
    if run.benches and due and run.world.from_main(missing):
        metrics = Metrics(enter=lambda phase: run.turn_to(f"step {step}, {phase}"))
        with metrics.timer("eval"):
            copy_weights(run.policy, run.sampler.model)
            metrics.add_means({name: (value, 1) for name, value in evaluate(run).items()})
        log.step(step, metrics.reduced(run.world.reduce))


def save(run: Run, log: RunLog, may_fail: bool = False) -> None:
    """Write a checkpoint of the steps done. One that `may_fail` is tried again after the next step, a few times."""
    config, world = run.config, run.world
    run.turn_to(f"step {run.done}, save")
    notes = run.notes | {"bad_steps": run.bad_steps, "cache_tokens": world.gather([run.sampler.affordable])}
    try:
        world.together(log.flush, "the logs could not be written")
        save_checkpoint(
            Path(config.run_dir) / CHECKPOINTS,
            run.done,
            run.policy,
            run.optimizer,
            world,
            notes,
            0 if run.bad_steps else config.keep_checkpoints,
            config.keep_every,  # the older may be needed again
        )
    except UserError as error:
        run.failed_saves += 1
        if not may_fail or run.failed_saves >= config.max_failed_saves:
            raise
        if world.main:
            again = f"Trying again after the next step (attempt {run.failed_saves} of {config.max_failed_saves})."
            print(f"warning: {error} {again}", file=sys.stderr)
    else:
        run.failed_saves, run.saved = 0, run.done


def resume(run: Run, checkpoint: Checkpoint) -> None:
    """Fill the run from a checkpoint; later ones in its directory are set aside, because they are written anew."""
    folder, notes = Path(run.config.run_dir) / CHECKPOINTS, checkpoint.notes
    load_checkpoint(checkpoint.path, run.policy, run.optimizer, run.world)
    copy_weights(run.policy, run.sampler.model)
    run.done, run.bad_steps = checkpoint.step, 0 if run.config.allow_changes else notes.get("bad_steps", 0)
    run.saved = run.done if is_in(checkpoint.path, Path(run.config.run_dir)) else 0
    if checkpoint.ranks == run.world.size:  # the same cache, so that the same replies are sampled side by side
        run.sampler.affordable = notes.get("cache_tokens", {run.world.rank: None})[run.world.rank]
    aside = run.world.together(lambda: set_aside(folder, run.done) if run.world.main else [], f"{folder}: renaming")
    if run.world.main:
        steps = f"with step {run.done + 1}" if run.done < run.steps else f"whose {run.done} steps are all there are"
        print(f"going on from {checkpoint.path}, {steps}")
        if aside:
            print(f"set aside, because this run writes these steps anew: {', '.join(aside)}")


def export(run: Run) -> None:
    """The policy as a Hugging Face directory, run_dir/hf."""
    run_dir, world = Path(run.config.run_dir), run.world
    run.turn_to("export")
    copy_weights(run.policy, run.sampler.model)
    write = (lambda: save_model(run.sampler.model, run_dir / "hf")) if world.main else (lambda: None)
    world.together(write, f"the model could not be exported to {run_dir / 'hf'}; --resume auto tries it again")
    if world.main:
        print(f"done: the model is in {run_dir / 'hf'}, the curves: python -m tooln1.run.plot {run_dir}")


def prepare(
    config: Config, world: World, checkpoint: Checkpoint | None
) -> tuple[Tokenizer, Sequence, list[Bench], dict]:
    """Tokenizer, examples, benches and the notes for checkpoints; UserError where the run cannot work with them."""
    if checkpoint:
        say, processes = print if world.main else lambda words: None, (checkpoint.ranks, world.size)
        refuse_changes(checkpoint.notes.get("config"), config, str(checkpoint.path), processes, say)
    tokenizer = load_tokenizer(config.model)
    examples, benches = load_data(config, world, tokenizer)
    frozen = reference_of(config)
    files = [model_files(path) for path in (config.model, frozen) if path]
    notes = {"config": asdict(config), "train_data": fingerprint(examples), "model": [*map(weights.fingerprint, files)]}
    if checkpoint:
        places = {"train_data": config.train_data, "model": config.model}
        refuse_other_contents(checkpoint, notes, places, allowed_changes(config))
    held_out = [case.example for bench in benches if bench.name == "heldout" for case in bench.chosen]
    shape, reference = read_config(config.model), read_config(frozen) if frozen else None
    settings = resolved(config, shape.num_parameters)
    look_ahead(settings, world, shape, reference, tokenizer, examples, held_out)
    return tokenizer, examples, benches, notes


def build(
    config: Config,
    world: World,
    tokenizer: Tokenizer,
    examples: Sequence,
    benches: list[Bench],
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


def reference_of(config: Config) -> str:
    """The frozen model of the KL term, "" where that has no weight."""
    return (config.reference_model or config.model) if config.mode == "rl" and config.kl_coef else ""


def load_data(config: Config, world: World, tokenizer: Tokenizer) -> tuple[Sequence, list[Bench]]:
    """The training examples and what to evaluate on; over-long examples are left out."""
    fitting = partial(drop_long, tokenizer=tokenizer, max_prompt_tokens=config.max_prompt_tokens, think=config.think)
    held_out = read_examples(config.eval_data)[: config.eval_rows or None] if config.eval_data else []
    held_out, unasked = fitting(held_out, where=config.eval_data)
    kept, dropped = fitting(read_examples(config.train_data), where=config.train_data)
    if not kept:
        raise UserError(f"{config.train_data}: all prompts are over max_prompt_tokens ({config.max_prompt_tokens}).")
    if world.main:
        print(f"{len(kept)} training examples, {len(held_out)} held out; {dropped} and {unasked} over-long left out")
    benches = [held_out_bench(config.eval_data, held_out)] if held_out else []
    return kept, benches + load_benches([config.eval_bench] if config.eval_bench else [])


def main() -> None:
    """Read the settings, join the other processes, train or check."""
    config = load_config(sys.argv[1:], DEFAULT)
    with launch(config.device, config.collective_timeout) as world:
        if config.check:
            check_writable(config.run_dir, "run_dir")
            prepare(config, world, find_checkpoint(Path(config.run_dir), config.resume, world))
        else:
            train(config, world)


if __name__ == "__main__":
    exit_on_user_error(main)
