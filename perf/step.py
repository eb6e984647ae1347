"""A whole GRPO step on the CPU: how long does ours take, and what does TRL's GRPOTrainer take for the same one?

    python perf/step.py                   # TRL, where it is installed, is compared and then timed in turns with ours
    python perf/step.py --only check      # loss and gradient on recorded rollouts only

A step is a rollout (16 prompts of ~728 tokens x 5 replies of ~105), the log-probs of the policy before the update and
of the reference, and 4 optimizer steps, each on a quarter of the rollout; fp32, the demo model. TRL (an optional peer:
`pip install trl`) gets the same weights, prompts, rewards, optimizer and numbers of new tokens. It samples with its own
`generate`, where a logits processor makes each reply end after its number of tokens; its gradient checkpointing is
off, and the fastest of several micro-batches is timed. Prints tables and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from shapes import DEMO, lognormal_lengths, machine, print_table, random_prompts, timed
from torch import Tensor

from tooln1.batch import PackedBatch, pack, pad_to_rows, plan_microbatches, split_into_minibatches
from tooln1.data import Rollout
from tooln1.distributed import copy_weights
from tooln1.grpo import group_advantages
from tooln1.model import load_model, read_config, save_model
from tooln1.sampler.sampler import Sampler
from tooln1.update import PolicyLoss, add_logprobs, optimizer_step

try:
    import datasets
    import tokenizers
    import transformers
    import trl
    from trl import GRPOConfig, GRPOTrainer
except ImportError:
    trl = None

TEMPERATURE, BETA, CLIP, RATE, DECAY = 0.7, 1e-3, 0.2, 1e-6, 0.01  # the paper's and train.py's
GROUP, UPDATES = 5, 4  # replies to a prompt, optimizer steps for each rollout
VOCAB = read_config(DEMO).vocab_size
CONTEXT = 4096  # the workload is longer than the 1024 that the demo was made for
CHUNK = 1024  # rows of logits alive at a time
EOS = 0  # the token TRL's replies are made to end with; ours end by count alone
PHASES = ("rollout", "logprobs", "update", "sync")


class Workload(NamedTuple):
    """What a step has to do; the N replies are numbered prompt by prompt."""

    prompts: list[list[int]]
    lengths: list[int]  # [N] tokens of each reply
    rewards: Tensor  # [N] float32, 0 or 1


def workload(prompts: int, prompt_tokens: int, reply_tokens: int) -> Workload:
    """Random tokens and rewards; prompt lengths spread like those of the xLAM data (mean 728, longest of 231 1,900)."""
    rng, count = random.Random(0), prompts * GROUP
    asked = random_prompts(rng, lognormal_lengths(rng, prompts, prompt_tokens, 0.36, 3 * prompt_tokens), VOCAB)
    lengths = lognormal_lengths(rng, count, reply_tokens, 0.6, 3 * reply_tokens)
    return Workload(asked, lengths, torch.tensor([float(rng.random() < 0.5) for _ in range(count)]))


# ------------------------------------------------------------------------------------------------ ours


class Ours:
    """Policy, reference, sampler and optimizer as train.py holds them, in one process."""

    def __init__(self, work: Workload, budget: int):
        self.work, self.budget = work, budget
        self.policy, self.reference, copy = (load_model(DEMO) for _ in range(3))
        for model in (self.policy, copy):
            model.config.raw["max_position_embeddings"] = CONTEXT
        self.sampler = Sampler(copy, stop_ids=[])
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=RATE, weight_decay=DECAY)
        self.loss = PolicyLoss(TEMPERATURE, CLIP, CLIP, kl_coef=BETA, chunk=CHUNK)

    def sample(self, step: int) -> list[Rollout]:
        """The replies, each as long as the workload says."""
        return self.sampler.generate(self.work.prompts, GROUP, TEMPERATURE, self.work.lengths, step=step)

    def batches(self, rollouts: list[Rollout], rows: list[int], budget: int, first: bool = False) -> list[PackedBatch]:
        """The micro-batches of a mini-batch, with advantages, reference and, but of the first one, old log-probs."""
        advantages = group_advantages(self.work.rewards, torch.tensor([rollout.group for rollout in rollouts]))
        packed = [pack(rollouts, share, advantages) for share in plan_microbatches(rollouts, rows, budget, 1)[0]]
        return add_logprobs(packed, None if first else self.policy, self.reference, TEMPERATURE, CHUNK)[0]

    def step(self, number: int) -> dict[str, float]:
        """One whole step; its seconds by phase."""
        seconds = dict.fromkeys(PHASES, 0.0)
        rollouts = timed(seconds, "rollout", self.sample, number)
        assert [len(rollout.reply) for rollout in rollouts] == self.work.lengths
        shares = split_into_minibatches(rollouts, range(len(rollouts)), len(self.work.prompts) // UPDATES)
        minibatches = [
            timed(seconds, "logprobs", self.batches, rollouts, rows, self.budget, rows is shares[0]) for rows in shares
        ]
        for batches in minibatches:
            total = sum(len(batch.targets) for batch in batches)
            timed(seconds, "update", optimizer_step, self.policy, self.optimizer, batches, self.loss, total, 1.0, RATE)
        timed(seconds, "sync", copy_weights, self.policy, self.sampler.model)
        return seconds | {"step": sum(seconds.values())}


# ------------------------------------------------------------------------------------------------ the peer


class Peer:
    """TRL's GRPOTrainer on the weights in `folder`/model, `at_once` replies a micro-batch."""

    def __init__(self, work: Workload, folder: str, at_once: int):
        self.work, count = work, len(work.lengths)
        config = GRPOConfig(
            output_dir=f"{folder}/out",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            shuffle_dataset=False,
            max_steps=UPDATES,
            per_device_train_batch_size=at_once,
            gradient_accumulation_steps=count // UPDATES // at_once,
            steps_per_generation=count // at_once,
            num_generations=GROUP,
            max_completion_length=max(work.lengths),
            temperature=TEMPERATURE,
            epsilon=CLIP,
            beta=BETA,
            use_bias_correction_kl=False,
            loss_type="dapo",  # the plain k3, and the mean over a mini-batch's tokens
            learning_rate=RATE,
            lr_scheduler_type="constant",
            weight_decay=DECAY,
            max_grad_norm=1.0,
        )
        words = {"prompt": [" ".join(f"t{token}" for token in prompt) for prompt in work.prompts]}
        self.trainer = trainer = GRPOTrainer(
            f"{folder}/model", self.reward, config, datasets.Dataset.from_dict(words), processing_class=word_tokenizer()
        )
        trainer.remove_callback(transformers.PrinterCallback)
        self.generate, trainer.model.generate = trainer.model.generate, self.sample
        self.prepare, trainer._generate_and_score_completions = trainer._generate_and_score_completions, self.begin

    def step(self, replies: Tensor | None = None) -> dict[str, float]:
        """One whole step; its seconds by phase. Given the `replies` of another peer, nothing is generated."""
        self.seconds, self.replies = dict.fromkeys(PHASES, 0.0), replies
        self.trainer.train()
        self.seconds["update"] = time.perf_counter() - self.start - self.seconds["rollout"] - self.seconds["logprobs"]
        assert self.trainer.state.global_step == UPDATES
        return self.seconds | {"step": sum(self.seconds.values())}

    def begin(self, inputs: list[dict]) -> dict:
        """From prompts to the rollout's batch, rewards included; the step starts here, when train() is all set up."""
        self.start = time.perf_counter()
        result = self.prepare(inputs)
        self.seconds["logprobs"] = time.perf_counter() - self.start - self.seconds["rollout"]
        return result

    def sample(self, input_ids: Tensor, **how) -> Tensor:
        """`generate`, told where each reply ends: its last token can only be EOS, and no other can."""
        last = torch.tensor(self.work.lengths)[:, None] - 1 + input_ids.shape[1]  # [N, 1]

        def end_on_time(ids: Tensor, scores: Tensor) -> Tensor:
            is_eos = torch.arange(scores.shape[1]) == EOS
            return scores.masked_fill(is_eos != (last == ids.shape[1]), -torch.inf)

        if self.replies is None:
            how["logits_processor"] = [end_on_time]
            self.replies = timed(self.seconds, "rollout", self.generate, input_ids, **how)
        return self.replies

    def reward(self, completion_ids: list[list[int]], **_) -> list[float]:
        """The workload's rewards, provided the replies are as long as ours."""
        assert [len(ids) for ids in completion_ids] == self.work.lengths
        return self.work.rewards.tolist()


def word_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """The text "t5 t7" for the ids 5, 7: TRL wants texts, and these become exactly the ids of the workload."""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"t{i}": i for i in range(VOCAB)}, unk_token=f"t{EOS}"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    names = {"eos_token": f"t{EOS}", "pad_token": f"t{EOS}", "padding_side": "left"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, **names)


def recorded(ours: Ours) -> tuple[list[Rollout], list[PackedBatch]]:
    """Rollouts; and micro-batches of a mini-batch, with noise on old and reference log-probs: ratios away from 1."""
    torch.manual_seed(0)
    work, rollouts = ours.work, ours.sample(step=0)
    rows = split_into_minibatches(rollouts, range(len(rollouts)), len(work.prompts) // UPDATES)[0]
    batches = ours.batches(rollouts, rows, budget=max(map(len, work.prompts)) + 2 * max(work.lengths))
    assert len(batches) > 1, "a single micro-batch would not show a wrong denominator"
    for i, batch in enumerate(batches):
        old, ref = 0.3 * torch.randn(2, len(batch.targets)) + torch.stack([batch.old_logprobs, batch.ref_logprobs])
        batches[i] = replace(batch, old_logprobs=old, ref_logprobs=ref)
    return rollouts, batches


def padded(rollouts: list[Rollout], batches: list[PackedBatch]) -> dict[str, Tensor]:
    """The same mini-batch as TRL has it: a row a reply, prompts padded on the left, replies on the right."""
    prompts = [torch.tensor(rollouts[row].prompt) for batch in batches for row in batch.rows]
    lengths = [length for batch in batches for length in batch.lengths]

    def rows(field: str) -> Tensor:
        return pad_to_rows(torch.cat([getattr(batch, field) for batch in batches]), lengths)[0]

    def left(tensors: list[Tensor]) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_side="left")

    return {
        "prompt_ids": left(prompts),
        "prompt_mask": left([torch.ones_like(ids) for ids in prompts]),
        "completion_ids": rows("targets"),
        "completion_mask": pad_to_rows(torch.ones(sum(lengths)).long(), lengths)[0],
        "old_per_token_logps": rows("old_logprobs"),
        "ref_per_token_logps": rows("ref_logprobs"),
        "advantages": torch.cat([batch.advantages for batch in batches]),
        "num_items_in_batch": torch.tensor(sum(lengths) * UPDATES),  # TRL's count is of the whole rollout
    }


def check(ours: Ours, peer: Peer) -> list[dict]:
    """Loss and gradient on recorded rollouts, ours in micro-batches, TRL's in one. Raises if 1e-3 or more apart."""
    rollouts, batches = recorded(ours)
    inputs, trainer = padded(rollouts, batches), peer.trainer
    beta = trainer.beta = 100 * BETA  # with the paper's weight a wrong KL would hide in the tolerance
    trainer.current_gradient_accumulation_steps, trainer.args.steps_per_generation = 1, UPDATES
    replies, tokens = len(inputs["advantages"]), sum(len(batch.targets) for batch in batches)
    still = torch.optim.SGD(ours.policy.parameters())
    results = []
    for theirs, how, total in (
        ("dapo", "token_mean", tokens),
        ("grpo", "sequence_mean_token_mean", replies),
        ("dr_grpo", "dr_grpo", replies * trainer.max_completion_length),
    ):
        loss_of = replace(ours.loss, kl_coef=beta, aggregation=how)
        result = optimizer_step(ours.policy, still, batches, loss_of, total, torch.inf, learning_rate=0.0)
        trainer.loss_type = theirs
        trainer.model.train().zero_grad()
        loss = trainer.compute_loss(trainer.model, inputs)
        loss.backward()
        own = {name: parameter.grad for name, parameter in ours.policy.named_parameters()}
        other = {name: parameter.grad for name, parameter in trainer.model.named_parameters()}
        norm = torch.nn.utils.get_total_norm(other.values()).item()
        gaps = {
            "loss gap": abs(result.loss / loss.item() - 1),
            "norm gap": abs(result.grad_norm / norm - 1),
            "gradient gap": torch.nn.utils.get_total_norm([own[name] - other[name] for name in other]).item() / norm,
        }
        clipped, count = result.sums["clip_fraction"]
        results.append({"TRL": theirs, "loss": loss.item(), "norm": norm, "clipped": clipped / count} | gaps)
        assert max(gaps.values()) < 1e-3, results[-1]
    return results


# ------------------------------------------------------------------------------------------------ the race


def race(work: Workload, ours: Ours, folder: str, sizes: list[int], repeats: int) -> dict:
    """Seconds of a step by phase, medians, in turns with the peer; `sizes` are the micro-batches that it may use."""
    ours.step(0)
    peers = {size: Peer(work, folder, size) for size in sizes if trl}
    tried, replies = {}, None  # the micro-batch does not touch the sampling, so they are tried on the same replies
    for size, peer in peers.items():
        seconds = peer.step(replies)
        tried[size], replies = seconds["step"] - seconds["rollout"], peer.replies
    best = min(tried, key=tried.get, default=None)
    turns = [(ours.step(1 + turn), peers[best].step() if trl else {}) for turn in range(repeats)]
    sides = zip(*turns, strict=True)
    own, other = ({phase: statistics.median(run[phase] for run in side) for phase in side[0]} for side in sides)
    result, rows = {"seconds": own}, [("seconds", *own), ("ours", *own.values())]
    if trl:
        ratios = [theirs["step"] / mine["step"] for mine, theirs in turns]
        result |= {"trl_seconds": other, "ratio": statistics.median(ratios), "ratios": ratios}
        result |= {"trl_replies_at_once": best, "trl_without_rollout_by_replies_at_once": tried}
        rows += [("TRL", *other.values()), ("ratio", *[""] * len(PHASES), result["ratio"])]
    print_table(rows)
    return result


def main() -> None:
    """Check, time, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=("check", "time"), help="one half")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=3)
    shape = "prompts (a multiple of 4), mean tokens of one, mean tokens of a reply"
    parser.add_argument("--workload", type=int, nargs=3, default=(16, 728, 105), metavar=("N", "P", "R"), help=shape)
    parser.add_argument("--budget", type=int, default=8192, help="tokens in our micro-batches")
    parser.add_argument("--replies-at-once", type=int, nargs="+", default=[20, 10, 5], help="TRL's; divide 5 N / 4")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    work = workload(*args.workload)
    ours = Ours(work, args.budget)
    result = {"machine": machine(), "torch": torch.__version__, "trl": trl and trl.__version__}
    for name, lengths in ("prompt", list(map(len, work.prompts))), ("reply", work.lengths):
        result |= {f"{name}_count": len(lengths), f"{name}_tokens": sum(lengths), f"longest_{name}": max(lengths)}
    print_table([("", *result), ("", *result.values())])
    with tempfile.TemporaryDirectory() as folder:
        save_model(ours.policy, Path(folder) / "model")
        (Path(folder) / "model" / "generation_config.json").unlink()  # its stop tokens would end replies early
        if trl and args.only != "time":
            result["check"] = check(ours, Peer(work, folder, args.replies_at_once[0]))
            print_table([tuple(result["check"][0]), *(tuple(one.values()) for one in result["check"])])
        if args.only != "check":
            result |= race(work, ours, folder, args.replies_at_once, args.repeats)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
