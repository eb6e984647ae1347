"""Train a model to call tools: GRPO with a rule-based reward (mode rl), or the supervised baselines (mode sft).

    torchrun --standalone --nproc-per-node 8 train.py --config configs/tool_n1_7b.toml
    python train.py                                     # the embedded demo, on whatever this machine is
    python train.py --help                              # every setting, its unit and the paper's value

One step of rl(), below, is the whole algorithm; the equations are in tooln1/grpo.py.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tooln1.batch import PackedBatch, minibatch_rows, pack, plan
from tooln1.checkpoint import complete_checkpoints, load_checkpoint, save_checkpoint
from tooln1.config import differences, load_config, read_preset, to_toml
from tooln1.data import EpochOrder, Example, drop_long, read_examples
from tooln1.distributed import World, copy_weights, launch, sample_everywhere, shard
from tooln1.errors import UserError, atomic_write, exit_on_user_error
from tooln1.evaluation import Asking, Bench, answer, held_out_bench, load_benches, metrics_of
from tooln1.grpo import group_advantages, loss_total
from tooln1.metrics import Metrics, RunLog, progress
from tooln1.model import Transformer, load_model, save_model
from tooln1.model_config import pair_cost
from tooln1.prompt import build_messages
from tooln1.reply_metrics import add_reply_metrics, add_sampler_gap, add_sampler_stats
from tooln1.rewards import REWARDS
from tooln1.rollout import Rollout, Sampler
from tooln1.settings import Config
from tooln1.sft import demonstrations, read_pairs
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
    examples: Sequence  # of Example (rl) or of (Example, reply to imitate) (sft)
    benches: list[Bench]  # what the policy is evaluated on: held-out examples, eval_bench
    order: EpochOrder
    steps: int
    bad_steps: int = 0  # optimizer steps in a row whose gradient was not finite


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
            update(run, mini, loss_total(config.loss_aggregation, lengths, config.max_reply_tokens), step, metrics)
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
    pairs = [run.examples[i] for i in run.order.take(step, config.prompts_per_step)]
    with metrics.timer("update"):
        rollouts = demonstrations(pairs, run.tokenizer, config.think, config.sft_on_prompt)
        for rows in minibatch_rows(rollouts, config.prompts_per_minibatch):
            total = sum(len(rollouts[row].reply) for row in rows)
            update(run, my_batches(run, rollouts, rows, torch.zeros(len(rollouts))), total, step, metrics)
    return []


# ------------------------------------------------------------------------------------------------ its parts


def sample(run: Run, examples: list[Example], keys: list[int], step: int) -> list[Rollout]:
    """A group of replies to each example, sampled on all ranks and known to all of them afterwards."""
    config = run.config
    prompts = [prompt_ids(run.tokenizer, example, config.think) for example in examples]
    with progress(len(prompts) * config.group_size, "sampling", "replies", run.world.main) as bar:
        return sample_everywhere(
            run.sampler, run.world, prompts, keys=keys, group_size=config.group_size, seed=config.seed, step=step,
            temperature=config.temperature, top_p=config.top_p, top_k=config.top_k,
            max_new_tokens=config.max_reply_tokens, on_finished=lambda rollout: bar.update(run.world.size),
        )  # fmt: skip


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
    batches, sums = with_logprobs(batches, run.policy, run.reference, config.temperature, config.logprob_chunk_tokens)
    metrics.add_means(sums)
    return batches


def update(run: Run, batches: list[PackedBatch], total: float, step: int, metrics: Metrics) -> None:
    """One optimizer step on a mini-batch; one whose gradient is not finite is skipped and counted."""
    config = run.config
    rate = scheduled_rate(step, run.steps, config.learning_rate, config.lr_schedule, config.warmup_ratio)
    result = optimizer_step(run.policy, run.optimizer, batches, run.loss, total, config.max_grad_norm, rate)
    run.bad_steps = 0 if result.applied else run.bad_steps + 1
    if run.bad_steps >= config.max_bad_steps:
        raise UserError(
            f"{run.bad_steps} optimizer steps in a row had a gradient that is not finite; the run stops at step "
            f"{step + 1}. Lower learning_rate ({config.learning_rate}) or look at rollouts.jsonl."
        )
    one_rank = 1 / run.world.size  # the ranks' losses are parts that add up; their other numbers are equal
    metrics.add_mean("loss", result.loss, one_rank)
    metrics.add_mean("grad_norm", result.grad_norm)
    metrics.add_max("learning_rate", rate)
    metrics.add_sum("skipped_steps", (not result.applied) * one_rank)
    metrics.add_tokens("update", sum(len(batch.tokens) for batch in batches))
    metrics.add_means(result.sums)


def prompt_ids(tokenizer: Tokenizer, example: Example, think: bool) -> list[int]:
    """The token ids that ask for an example's reply."""
    return tokenizer.encode(tokenizer.render(build_messages(example, think), add_generation_prompt=True))


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
    figures = {}
    for bench in run.benches:
        predictions = answer(bench, run.sampler, run.tokenizer, run.world, asking)
        figures |= metrics_of(bench, predictions, asking.think)
    if "heldout_overall" in figures:
        figures["heldout_accuracy"] = figures.pop("heldout_overall")
    return figures


# ------------------------------------------------------------------------------------------------ the run


def build(config: Config, world: World) -> tuple[Run, int]:
    """Everything a run needs, and how many of its steps are done already."""
    tokenizer = load_tokenizer(config.model)
    tokenizer.stop_ids  # noqa: B018  a model without one fails now, not in the first step
    examples, benches = load_data(config, world, tokenizer)
    policy, reference, copy = load_models(config, world, tokenizer.vocab_size)
    sampler = Sampler(copy, tokenizer.stop_ids, config.rollout_rows, config.rollout_cache_tokens)
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=config.learning_rate, betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_eps, weight_decay=config.weight_decay, fused=world.device.type == "cuda",
    )  # fmt: skip
    policy_loss = PolicyLoss(
        config.temperature, config.clip_low, config.clip_high, config.dual_clip, config.kl_coef,
        config.entropy_coef, config.loss_aggregation, config.logprob_chunk_tokens,
    )  # fmt: skip
    loss = policy_loss if config.mode == "rl" else SupervisedLoss(config.logprob_chunk_tokens)
    order = EpochOrder(len(examples), config.seed)
    steps = config.steps or config.epochs * order.steps_per_epoch(config.prompts_per_step)
    run = Run(config, world, tokenizer, policy, reference, sampler, optimizer, loss, examples, benches, order, steps)
    return run, resume(run)


def load_models(
    config: Config, world: World, vocabulary: int
) -> tuple[Transformer, Transformer | None, Transformer]:
    """The policy, the reference (None where the KL has no weight) and the copy that samples."""
    low = torch.bfloat16 if world.device.type == "cuda" else torch.float32
    policy = load_model(config.model, torch.float32, world.device, vocabulary)
    size = sum(parameter.numel() for parameter in policy.parameters())

    def chosen(setting: str, by_size: bool) -> bool:
        return by_size if setting == "auto" else setting == "on"

    for block in policy.model.layers:
        block.recompute = chosen(config.activation_checkpointing, size > 1e9)
        if config.compile:
            block.compile_parts()
    # It is sharded before the others come, so that only one whole model is there at a time.
    policy = shard(policy, world, low, config.offload_optimizer, chosen(config.accumulate_whole, size < 2e9))
    reference = None
    if config.mode == "rl" and config.kl_coef:
        reference = load_model(config.reference_model or config.model, low, world.device, vocabulary)
        reference = shard(reference.requires_grad_(False), world, offload=config.offload_reference)
    return policy, reference, load_model(config.model, low, world.device, vocabulary)


def load_data(config: Config, world: World, tokenizer: Tokenizer) -> tuple[Sequence, list[Bench]]:
    """The training examples (sft: each with its reply) and what to evaluate on; over-long examples are left out."""
    say = print if world.main else lambda *words: None
    held_out = read_examples(config.eval_data) if config.eval_data else []
    held_out, unasked = drop_long(held_out[: config.eval_rows or None], tokenizer, config.max_prompt_tokens)
    if config.mode == "sft":  # of (example, reply); a pair too long for max_prompt_tokens is left out by its prompt
        pairs = read_pairs(config.train_data)
        fitting, dropped = drop_long([example for example, _ in pairs], tokenizer, config.max_prompt_tokens)
        ids = {example.id for example in fitting}
        kept = [pair for pair in pairs if pair[0].id in ids]
    else:
        kept, dropped = drop_long(read_examples(config.train_data), tokenizer, config.max_prompt_tokens)
    if not kept:
        raise UserError(f"{config.train_data}: no example is left (max_prompt_tokens {config.max_prompt_tokens}).")
    say(f"{len(kept)} training examples, {len(held_out)} held out; {dropped} and {unasked} over-long ones left out")
    benches = [held_out_bench(config.eval_data, held_out)] if held_out else []
    return kept, benches + load_benches([config.eval_bench] if config.eval_bench else [])


MUST_AGREE = ("mode", "seed", "train_data", "prompts_per_step", "max_prompt_tokens")  # they fix the order of the data


def check_run_dir(config: Config, world: World) -> None:
    """Refuse to write over another run, or to go on with one whose data order would change; before anything loads."""
    run_dir = Path(config.run_dir)
    if not config.resume:
        if (run_dir / "metrics.jsonl").exists():
            raise UserError(f"{run_dir} already holds a run: go on with --resume, or choose another --run-dir.")
    elif (run_dir / "config.toml").exists():
        changed = differences(Config(**read_preset(run_dir / "config.toml")), config)
        if names := [name for name in MUST_AGREE if name in changed]:
            before, now = changed[names[0]]
            raise UserError(
                f"{run_dir}: the run to resume has {names[0]} = {before!r}, not {now!r}: examples would repeat or be "
                "missed; set it back, or start anew in another --run-dir."
            )
    world.wait()  # no rank writes here before all have looked
    if world.main:
        run_dir.mkdir(parents=True, exist_ok=True)
    world.wait()
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: not seen by rank {world.rank}; --run-dir must be on storage that all nodes share.")


def resume(run: Run) -> int:
    """Steps that the checkpoint asked for has behind it (0: none was); fills policy, optimizer and sampler from it."""
    if not run.config.resume:
        return 0
    say = print if run.world.main else lambda *words: None
    folder = Path(run.config.run_dir) / "checkpoints"
    there = complete_checkpoints(folder)
    if run.config.resume == "auto" and not there:
        say(f"no checkpoint in {folder}: beginning with step 1")
        return 0
    checkpoint = there[-1] if run.config.resume == "auto" else Path(run.config.resume)
    if not checkpoint.is_dir():
        others = ", ".join(path.name for path in there) or "none"
        raise UserError(f"{checkpoint}: there is no such checkpoint; {folder} has {others}.")
    done = load_checkpoint(checkpoint, run.policy, run.optimizer, run.world)
    copy_weights(run.policy, run.sampler.model)
    say(f"going on from {checkpoint}, with step {done + 1}")
    return done


def train(config: Config, world: World) -> None:
    """Run all steps that are left; log, evaluate, save, export."""
    if config.threads:
        torch.set_num_threads(config.threads)
    check_run_dir(config, world)
    run, done = build(config, world)
    run_dir = Path(config.run_dir)
    if world.main:
        with atomic_write(run_dir / "config.toml") as file:
            file.write(to_toml(replace(config, resume="")))
    log = RunLog(run_dir, run.steps, completed=done or None, tensorboard=config.tensorboard, write=world.main)
    if config.eval_before_training and not done and run.benches:
        log.step(0, evaluate(run))
    one_step = rl_step if config.mode == "rl" else sft_step
    synchronize = torch.cuda.synchronize if world.device.type == "cuda" else lambda: None
    for step in range(done, run.steps):
        metrics = Metrics(synchronize)
        last = step + 1 == run.steps
        with metrics.timer("step"):
            replies = one_step(run, step, metrics)
            if run.benches and (last or (config.eval_every and (step + 1) % config.eval_every == 0)):
                with metrics.timer("eval"):
                    copy_weights(run.policy, run.sampler.model)
                    metrics.add_means({name: (value, 1) for name, value in evaluate(run).items()})
        log.step(step + 1, metrics.reduced(world.reduce))
        log.rollouts(step + 1, replies, config.log_rollouts)
        if last or (config.save_every and (step + 1) % config.save_every == 0):
            folder = run_dir / "checkpoints"
            save_checkpoint(folder, step + 1, run.policy, run.optimizer, world, config.keep_checkpoints)
    copy_weights(run.policy, run.sampler.model)
    if world.main:
        save_model(run.sampler.model, run_dir / "hf")
        print(f"done: the model is in {run_dir / 'hf'}, the curves: python -m tooln1.plot {run_dir}")
    world.wait()
    log.close()


def main() -> None:
    """Read the settings, join the other processes, train."""
    config = load_config(sys.argv[1:], DEFAULT)
    with launch(config.device) as world:
        train(config, world)


if __name__ == "__main__":
    exit_on_user_error(main)
