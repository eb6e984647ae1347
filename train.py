"""Train a model to call tools: GRPO with a rule-based reward (mode rl), or the supervised baselines (mode sft).

    torchrun --standalone --nproc-per-node 8 train.py --config configs/tool_n1_7b.toml
    python train.py                                     # the embedded demo, on whatever this machine is
    python train.py --task examples/arithmetic.py ...   # another task than tool calls, in one file
    python train.py --help                              # every setting, its unit and the paper's value

`rl_step`, below, is one step of the whole algorithm; the equations are in tooln1/grpo.py.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record
from tqdm import tqdm

from tooln1.batch import PackedBatch, pack, plan_microbatches, split_into_minibatches
from tooln1.config import Config, load_config
from tooln1.data import Example, Rollout
from tooln1.distributed import World, copy_weights, launch
from tooln1.grpo import equal_rewards, group_advantages, loss_total, rows_to_train_on
from tooln1.io.errors import exit_on_user_error
from tooln1.io.files import check_writable
from tooln1.io.model_config import pair_cost
from tooln1.run.checkpoint import find_checkpoint
from tooln1.run.faults import save_skipped_batch
from tooln1.run.lifecycle import evaluate_if_due, finish_step, metrics_of_step, open_run, release_weights
from tooln1.run.metrics import Metrics
from tooln1.run.reply_metrics import add_reply_metrics, add_sampler_stats
from tooln1.run.setup import Run, prepare
from tooln1.sampler.distributed import generate_distributed
from tooln1.sft import demonstrations
from tooln1.update import add_logprobs, optimizer_step, scheduled_learning_rate

DEFAULT = Path(__file__).parent / "configs" / "demo.toml"


# ------------------------------------------------------------------------------------------------ the algorithm


def rl_step(run: Run, step: int, metrics: Metrics) -> list[dict]:
    """One GRPO step: sample groups, score them, compare within each group, update the policy. Returns the replies."""
    config = run.config
    with metrics.timer("sync"):
        copy_weights(run.policy, run.sampler.model)
    examples, rollouts, replies, rewards = sample_groups(run, step, metrics)
    release_weights(run)
    groups = torch.tensor([rollout.group for rollout in rollouts])
    advantages = group_advantages(rewards, groups, config.advantage_eps, kind=config.advantage)
    chosen = rows_to_train_on(rewards, groups, config.prompts_per_step * config.group_size)
    minibatches = split_into_minibatches(rollouts, chosen, config.prompts_per_minibatch, config.mask_truncated)
    with metrics.timer("logprobs"):
        batches = [
            log_probs(run, my_batches(run, rollouts, rows, advantages), metrics, is_first=rows is minibatches[0])
            for rows in minibatches
        ]
    with metrics.timer("update"):
        for rows, mini in zip(minibatches, batches, strict=True):
            lengths = [len(rollouts[row].reply) for row in rows]
            total = loss_total(config.loss_aggregation, lengths, config.max_reply_tokens)
            update(run, mini, rollouts, total, step, metrics)
    answered = [examples[rollout.group] for rollout in rollouts]
    mine = slice(run.world.rank, None, run.world.size)  # means are sums and counts, which the ranks add up
    add_reply_metrics(metrics, rollouts, rewards, map(run.task.metrics, replies[mine], answered[mine]), run.world.size)
    return [
        {"id": example.id, "reward": reward, "reply": reply, "answer": example.answer}
        for example, reward, reply in zip(answered, rewards.tolist(), replies, strict=True)
    ]


def sft_step(run: Run, step: int, metrics: Metrics) -> list[dict]:
    """One supervised step: cross-entropy of written replies, on the same packed batches. There are no new replies."""
    config = run.config
    chosen, run.position = run.order.take(run.position, config.prompts_per_step)
    examples = [run.examples[i] for i in chosen]
    with metrics.timer("update"):
        rollouts = demonstrations(examples, run.tokenizer, run.task.messages)
        for rows in split_into_minibatches(rollouts, range(len(rollouts)), config.prompts_per_minibatch):
            total = sum(len(rollouts[row].reply) for row in rows)
            update(run, my_batches(run, rollouts, rows, torch.zeros(len(rollouts))), rollouts, total, step, metrics)
    return []


# ------------------------------------------------------------------------------------------------ its parts


def sample_groups(run: Run, step: int, metrics: Metrics) -> tuple[list[Example], list[Rollout], list[str], Tensor]:
    """The examples of a step, the replies to them as rollouts and as texts, and their rewards [N].

    dynamic_sampling: in up to so many further rounds, each prompt whose replies all got one reward is made up for by
    the order's next one (DAPO, arXiv 2503.14476, Sec. 3.2). For data of which the policy solves most always or never;
    it costs replies.
    """
    config, missing = run.config, run.config.prompts_per_step
    examples, rollouts, replies, rewards = [], [], [], torch.empty(0)
    for sampling_round in range(1 + config.dynamic_sampling):
        chosen, run.position = run.order.take(run.position, missing)
        more = [run.examples[i] for i in chosen]
        with metrics.timer("rollout"):
            # A step of two epochs can meet an example again, in another round: with other random numbers, then.
            sampled = sample(run, more, keys=[i + sampling_round * len(run.examples) for i in chosen], step=step)
        with metrics.timer("reward"):
            texts, scores = score(run, sampled, more, step)
        rollouts += [replace(rollout, group=rollout.group + len(examples)) for rollout in sampled]
        examples, replies, rewards = examples + more, replies + texts, torch.cat([rewards, scores])
        add_sampler_stats(metrics, run.sampler.stats)
        metrics.add("sampling_rounds", "max", sampling_round + 1)
        metrics.add("prompts_drawn", "max", len(examples))
        metrics.add("replies_sampled", "max", len(rollouts))
        equal = equal_rewards(scores, torch.tensor([rollout.group for rollout in sampled]))
        missing = int(equal.sum()) // config.group_size
        if not missing:
            break
    return examples, rollouts, replies, rewards


def sample(run: Run, examples: list[Example], keys: list[int], step: int) -> list[Rollout]:
    """A group of replies to each example, sampled on all ranks and known to all of them afterwards."""
    config = run.config
    prompts = [run.tokenizer.prompt_ids(run.task.messages(example)) for example in examples]
    total, hidden = len(prompts) * config.group_size, None if run.world.is_main else True  # None: not on a terminal
    with tqdm(desc="sampling", total=total, unit=" replies", leave=False, disable=hidden) as bar:
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
            should_stop=run.stop_request.asked,
            check=run.stop_request.check,
        )


def score(run: Run, rollouts: list[Rollout], examples: list[Example], step: int) -> tuple[list[str], Tensor]:
    """The text of each reply, special tokens kept, and its reward [N]; shuffled over the batch in the control.

    Each rank scores a part of them: a task's reward may be slow, and may differ from call to call.
    """
    world = run.world
    replies = [run.tokenizer.decode(rollout.reply) for rollout in rollouts]
    mine = range(len(rollouts) * world.rank // world.size, len(rollouts) * (world.rank + 1) // world.size)
    work = partial(list, (run.task.reward(replies[i], examples[rollouts[i].group]) for i in mine))
    rewards = torch.tensor(world.gather(world.run_on_all_ranks(work, "scoring")), dtype=torch.float32)
    if run.config.shuffle_rewards:
        generator = torch.Generator().manual_seed(1_000_003 * run.config.seed + step)
        rewards = rewards[torch.randperm(len(rewards), generator=generator)]
    return replies, rewards


def log_probs(run: Run, batches: list[PackedBatch], metrics: Metrics, is_first: bool) -> list[PackedBatch]:
    """The batches with the log-probs of the reference and, where they are not the update's own, of the policy."""
    config = run.config
    policy = None if is_first or config.old_logprobs == "sampler" else run.policy
    if policy or run.reference:
        metrics.add_tokens("logprobs", sum(len(batch.tokens) for batch in batches))
    batches, sums = add_logprobs(
        batches, policy, run.reference, config.temperature, config.logprob_chunk_tokens, run.stop_request.check
    )
    metrics.add_means(sums)
    return batches


def update(
    run: Run, batches: list[PackedBatch], rollouts: Sequence[Rollout], total: float, step: int, metrics: Metrics
) -> None:
    """One optimizer step on a mini-batch; one whose loss or gradient is not finite is skipped, counted and kept."""
    config = run.config
    check = run.stop_request.check if run.can_abandon_step else lambda: None
    rate = scheduled_learning_rate(step, run.steps, config.learning_rate, config.lr_schedule, config.warmup_ratio)
    result = optimizer_step(
        run.policy, run.optimizer, batches, run.loss, total, config.max_grad_norm, rate, run.world.all_reduce, check
    )
    run.can_abandon_step = False
    run.bad_steps = 0 if result.applied else run.bad_steps + 1
    if not result.applied:
        save_skipped_batch(run, step, batches, rollouts)
    metrics.add_mean("loss", result.loss)
    metrics.add_mean("grad_norm", result.grad_norm)
    metrics.add("learning_rate", "max", rate)
    metrics.add("skipped_steps", "sum", (not result.applied) / run.world.size)
    metrics.add_tokens("update", sum(len(batch.tokens) for batch in batches))
    metrics.add_means(result.sums)


def my_batches(run: Run, rollouts: Sequence[Rollout], rows: list[int], advantages: Tensor) -> list[PackedBatch]:
    """This rank's micro-batches of the mini-batch `rows`; every rank makes the same plan and takes its share."""
    config = run.config
    only_policy_term = config.mode == "rl" and config.kl == "off" and not config.entropy_coef
    if only_policy_term and config.loss_aggregation != "microbatch_token_mean":
        # An advantage of 0 leaves nothing to learn (groups with equal rewards); the loss's total still counts it.
        rows = [row for row in rows if advantages[row] != 0]
    cost = pair_cost(run.policy.config)
    mine = plan_microbatches(rollouts, rows, config.tokens_per_microbatch, run.world.size, cost)[run.world.rank]
    return [pack(rollouts, share, advantages, run.world.device, run.update_attention) for share in mine]


# ------------------------------------------------------------------------------------------------ the run


def train(config: Config, world: World, task: str = "") -> None:
    """A run from its first step, or from a checkpoint, to the exported model. task: as given to --task."""
    one_step = rl_step if config.mode == "rl" else sft_step
    with open_run(config, world, task) as run:
        evaluate_if_due(run)
        for step in range(run.completed_steps, run.steps):
            run.stop_request.check()
            metrics = metrics_of_step(run, step)
            with metrics.timer("step"):
                replies = one_step(run, step, metrics)
            finish_step(run, metrics, replies)


def main() -> None:
    """Read the settings, join the other processes, train or check."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--task", default="")  # no setting, which a preset could give: the file is run as code
    options, argv = parser.parse_known_args()
    config = load_config(argv, DEFAULT)
    with launch(config.device, config.collective_timeout) as world:
        if config.check:
            check_writable(config.run_dir, "run_dir")
            prepare(config, world, find_checkpoint(Path(config.run_dir), config.resume, world), options.task)
        else:
            train(config, world, options.task)


if __name__ == "__main__":
    record(exit_on_user_error)(main)
