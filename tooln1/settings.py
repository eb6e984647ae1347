"""The table of settings: what each is called, its default, its unit, the paper's value, and what it may be.

`Config` is the hyper-parameter table of the paper (Table 6) plus what the program needs; where the paper has
a value, it is the default. config.py reads and writes it.
"""

from __future__ import annotations

import difflib
import sys
from dataclasses import asdict, dataclass, field, fields
from typing import Any, get_type_hints

from tooln1.io.errors import UserError

# The keys of tooln1.rewards.REWARDS, repeated so that settings import no other room; a test compares the two.
REWARD_NAMES = ("binary", "binary_no_think", "format_partial", "format_name_partial", "strict")
AGGREGATIONS = (
    "token_mean",
    "microbatch_token_mean",
    "sequence_mean_token_mean",
    "sequence_mean_token_sum",
    "dr_grpo",
)


def setting(
    default: Any,
    help: str,
    unit: str = "",
    paper: str = "",
    within: str = "",
    *,
    section: str = "",
    choices: tuple[str, ...] = (),
    alone: Any = None,
    is_path: bool = False,
) -> Any:
    """A dataclass field that carries what `--help` prints and what its values are checked against.

    `paper`: the paper's value as text. `within`: the allowed numbers as an interval, "(0, 1]" or "[1, inf)".
    `section`: opens a TOML section, which lasts until the next one opens. `choices`: the allowed texts.
    `alone`: what `--name` without a value means. `is_path`: a file or folder to read; when a preset names it,
    it is looked for in the repository too.
    """
    about = {"help": help, "unit": unit, "paper": paper, "within": within, "section": section}
    return field(default=default, metadata={**about, "choices": choices, "alone": alone, "is_path": is_path})


@dataclass(frozen=True)
class Config:
    """Everything that a run can be told: setting(default, help, unit, the paper's value, allowed range)."""

    mode: str = setting(
        "rl", "reinforcement learning, or the supervised baseline", "", "rl", section="run", choices=("rl", "sft")
    )
    run_dir: str = setting("runs/tool_n1", "folder for everything that the run writes")
    seed: int = setting(0, "fixes data order and sampling, on any number of processes", within="[0, 9e18]")
    resume: str = setting("", "go on from a checkpoint: a path, or auto: the newest whole one in run_dir", alone="auto")
    allow_changes: str = setting(
        "", "settings that may differ from those of the run resumed: names with commas, or all", alone="all"
    )
    check: bool = setting(False, "only check what can be known before the first step; exit code 2: mend something")
    collective_timeout: int = setting(600, "longest that a process waits for the others", "seconds", "", "[1, 1e6]")
    device: str = setting("auto", "where to compute; auto: on CUDA where there is one", choices=("auto", "cpu", "cuda"))
    threads: int = setting(0, "CPU threads of a process; 0: torch's own choice", "threads", "", "[0, 4096]")
    tensorboard: bool = setting(False, "write TensorBoard files too (needs requirements-extra.txt)")

    model: str = setting(
        "Qwen/Qwen2.5-7B-Instruct",
        "Hugging Face folder or hub id to start from",
        "",
        "Qwen2.5-7B/14B",
        section="model_and_data",
        is_path=True,
    )
    reference_model: str = setting(
        "", "frozen model of the KL term; empty: the same as model", "", "same as model", is_path=True
    )
    train_data: str = setting("data/tool_n1/train.jsonl", "examples to train on (JSON lines)", is_path=True)
    eval_data: str = setting("", "held-out examples; empty: no evaluation", is_path=True)
    think: bool = setting(True, "ask for <think> ... </think> before the calls", "", "true")
    max_prompt_tokens: int = setting(4096, "longer prompts are left out, and counted", "tokens", "4096", "[1, 1e9]")

    epochs: int = setting(
        7, "passes over train_data (not used when steps is set)", "epochs", "7", "[0, 1e6]", section="schedule"
    )
    steps: int = setting(0, "rollout steps to train; 0: epochs decide", "steps", "", "[0, 1e6]")
    prompts_per_step: int = setting(1024, "examples of a step", "prompts", "1024", "[1, 1e9]")
    group_size: int = setting(5, "replies sampled for each prompt", "replies", "5", "[1, 1e9]")
    prompts_per_minibatch: int = setting(256, "examples of an optimizer step", "prompts", "256", "[1, 1e9]")
    tokens_per_microbatch: int = setting(
        30720,
        "most tokens in a forward pass of one process; a matter of memory and speed only",
        "tokens",
        "30720",
        "[1, 1e9]",
    )

    temperature: float = setting(
        0.7, "divides the logits, in the sampler and in every log-prob", "", "0.7", "(0, inf)", section="rollout"
    )
    top_p: float = setting(1.0, "sample among the likeliest tokens up to this probability; 1: off", "", "1", "(0, 1]")
    top_k: int = setting(0, "sample among so many likeliest tokens; 0: off", "tokens", "off", "[0, 1e9]")
    max_reply_tokens: int = setting(8192, "a longer reply is cut off there", "tokens", "8192", "[1, 1e9]")
    rollout_rows: int = setting(0, "most replies sampled at once; 0: all, on CUDA 512", "replies", "", "[0, 1e9]")
    rollout_cache_tokens: int = setting(
        0,
        "key/value cache of the sampler; 0: what the replies can need, at most "
        "a third of the memory free at the first step",
        "tokens",
        "",
        "[0, 1e9]",
    )

    reward: str = setting("binary", "how a reply is scored", "", "binary", section="reward", choices=REWARD_NAMES)
    shuffle_rewards: bool = setting(False, "permute the rewards within the batch: the control experiment")

    clip_low: float = setting(0.2, "the ratio is clipped below at 1 - clip_low", "", "0.2", "[0, 1]", section="loss")
    clip_high: float = setting(0.2, "the ratio is clipped above at 1 + clip_high", "", "0.2", "[0, inf)")
    dual_clip: float = setting(0.0, "where A < 0, the most a ratio counts for; 0: off", "", "off", "[0, inf)")
    kl_coef: float = setting(1e-3, "weight of the KL to the reference model", "", "0.001", "[0, inf)")
    entropy_coef: float = setting(0.0, "weight of an entropy bonus", "", "0", "[0, inf)")
    scale_by_std: bool = setting(True, "divide advantages by the group's standard deviation", "", "true")
    advantage_eps: float = setting(1e-6, "added to that standard deviation", "", "1e-6", "(0, inf)")
    loss_aggregation: str = setting(
        "token_mean",
        "how token losses become one number; microbatch_token_mean is the released code's; it depends on the packing",
        choices=AGGREGATIONS,
    )
    sft_on_prompt: bool = setting(False, "sft: learn the prompt's tokens too, not only the reply's")

    learning_rate: float = setting(
        1e-6, "AdamW's step size, the peak of the schedule", "", "1e-6", "(0, inf)", section="optimizer"
    )
    lr_schedule: str = setting(
        "constant", "course of the learning rate after the warm-up", "", "constant", choices=("constant", "cosine")
    )
    warmup_ratio: float = setting(0.0, "length of the linear warm-up", "part of all steps", "0", "[0, 1]")
    adam_beta1: float = setting(0.9, "decay of AdamW's mean gradient", "", "0.9", "[0, 1)")
    adam_beta2: float = setting(0.999, "decay of AdamW's mean squared gradient", "", "0.999", "[0, 1)")
    adam_eps: float = setting(1e-8, "added to AdamW's denominator", "", "", "(0, inf)")
    weight_decay: float = setting(0.01, "AdamW's decoupled weight decay", "", "0.01", "[0, inf)")
    max_grad_norm: float = setting(1.0, "larger gradients are scaled down to this norm", "", "1", "(0, inf)")
    max_bad_steps: int = setting(
        5,
        "non-finite optimizer steps in a row (each is skipped, its batch written to skipped/) that stop the run",
        "optimizer steps",
        "",
        "[1, 1e9]",
    )

    activation_checkpointing: str = setting(
        "auto",
        "recompute each layer in the backward pass: less memory, about "
        "a third more work; auto: from a billion parameters on",
        "",
        "on",
        section="memory",
        choices=("auto", "on", "off"),
    )
    accumulate_whole: str = setting(
        "auto",
        "keep weights and gradients whole between the micro-batches of an "
        "optimizer step: fewer collectives, 6 bytes a parameter; auto: below 2 billion",
        choices=("auto", "on", "off"),
    )
    offload_reference: bool = setting(False, "keep the reference model's shards in the host's memory (CUDA)")
    offload_optimizer: bool = setting(False, "keep the policy's shards, gradients and Adam state there (CUDA)")
    compile: bool = setting(False, "torch.compile what stands beside the attention in each layer of the policy")
    logprob_chunk_tokens: int = setting(1024, "tokens whose logits are in memory at once", "tokens", "", "[1, 1e9]")

    eval_every: int = setting(
        10,
        "evaluate on eval_data and eval_bench every so many steps; 0: only at the end",
        "steps",
        "10",
        "[0, 1e9]",
        section="evaluation_and_saving",
    )
    eval_bench: str = setting("", "a benchmark to evaluate on too, NAME=PATH as eval.py takes it; empty: none")
    eval_rows: int = setting(0, "evaluate on the first so many examples; 0: all", "examples", "", "[0, 1e9]")
    eval_before_training: bool = setting(False, "evaluate the starting model too", "", "false")
    save_every: int = setting(
        10, "write a checkpoint every so many steps; 0: only at the end", "steps", "10", "[0, 1e9]"
    )
    keep_checkpoints: int = setting(2, "newest checkpoints that are kept", "checkpoints", "", "[1, 1e9]")
    keep_every: int = setting(
        0, "keep the checkpoints of every so many steps for good; 0: none", "steps", "", "[0, 1e9]"
    )
    max_failed_saves: int = setting(
        3,
        "failed attempts in a row to write a checkpoint (one after each step) that stop the run",
        "attempts",
        "",
        "[1, 1e9]",
    )
    log_rollouts: int = setting(
        4, "best replies, and as many of the worst, written to rollouts.jsonl a step", "replies", "", "[0, 1e9]"
    )


def resolved(config: Config, parameters: int) -> dict[str, Any]:
    """All settings by name, "auto", "on" and "off" made true or false for a model of so many parameters."""
    on = {"on": True, "off": False}
    return asdict(config) | {
        "activation_checkpointing": on.get(config.activation_checkpointing, parameters > 1e9),
        "accumulate_whole": on.get(config.accumulate_whole, parameters < 2e9),
    }


SETTINGS = {entry.name: entry for entry in fields(Config)}
KINDS: dict[str, type] = get_type_hints(Config)
PATHS = tuple(name for name, entry in SETTINGS.items() if entry.metadata["is_path"])
KIND_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def _sections() -> dict[str, str]:
    """The section of each setting, in order."""
    found, current = {}, ""
    for name, entry in SETTINGS.items():
        current = entry.metadata["section"] or current
        found[name] = current
    return found


SECTION_OF = _sections()

# A run may go on with other values of these: they change what it learns by rounding at most. The number of steps counts
# where the learning rate depends on it (config.refuse_changes); of models and data, what is in the files (train.py).
MAY_CHANGE = frozenset(
    (
        "run_dir",
        "resume",
        "allow_changes",
        "check",
        "collective_timeout",
        "device",
        "threads",
        "tensorboard",
        "model",
        "reference_model",
        "train_data",
        "steps",
        "epochs",
        "tokens_per_microbatch",
        "rollout_rows",
        "rollout_cache_tokens",
        "activation_checkpointing",
        "accumulate_whole",
        "offload_reference",
        "offload_optimizer",
        "compile",
        "logprob_chunk_tokens",
        "max_bad_steps",
        "eval_data",
        "eval_every",
        "eval_bench",
        "eval_rows",
        "eval_before_training",
        "save_every",
        "keep_checkpoints",
        "keep_every",
        "max_failed_saves",
        "log_rollouts",
    )
)


def shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def checked(name: str, value: Any, where: str = "") -> Any:
    """`value` (an int where a float is due becomes one), or a `UserError` saying what the setting takes."""
    kind, about = KINDS[name], SETTINGS[name].metadata
    place = f"{where}: " if where else ""
    if kind is float and type(value) is int and abs(value) <= sys.float_info.max:
        value = float(value)
    if type(value) is not kind:
        raise UserError(f"{place}{name} takes {KIND_WORDS[kind]}, not {shown(value)}.")
    if about["choices"] and value not in about["choices"]:
        nearest = difflib.get_close_matches(value, about["choices"], n=1)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        raise UserError(f"{place}{name} is one of {', '.join(about['choices'])}, not {shown(value)}.{hint}")
    if about["within"] and not _is_within(value, about["within"]):
        raise UserError(f"{place}{name} must be {_range_words(about['within'])}, not {shown(value)}.")
    if kind is str and any(letter == "\0" or "\ud800" <= letter <= "\udfff" for letter in value):
        raise UserError(f"{place}{name} is not readable text: {shown(value)}.")
    return value


def _is_within(value: float, interval: str) -> bool:
    """Whether a number lies in an interval like "(0, 1]": NaN in none, infinity in none that ends "inf)"."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = value > low if interval[0] == "(" else value >= low
    below = value < high if interval[-1] == ")" else value <= high
    return above and below


def _range_words(interval: str) -> str:
    low, high = interval[1:-1].split(", ")
    words = f"above {low}" if interval[0] == "(" else f"at least {low}"
    if high == "inf":
        return f"{words} and finite"
    return words + (f" and below {high}" if interval[-1] == ")" else f" and at most {high}")


def validate(config: Config) -> None:
    """Check every value alone and against the others; raises `UserError`.

    In rl mode a group needs two replies, because GRPO measures a reply against the others of its group. (In a
    group of one the released code takes the bare reward as the advantage: no longer GRPO, so it is refused
    here.) What depends on the number of processes is checked where that number is known, in train.py.
    """
    for name in SETTINGS:
        checked(name, getattr(config, name))
    for name in ("run_dir", "model", "train_data"):
        if not getattr(config, name):
            raise UserError(f"{name} is empty; it takes a path.")
    if config.prompts_per_step % config.prompts_per_minibatch:
        raise UserError(
            f"prompts_per_minibatch ({config.prompts_per_minibatch}) must divide prompts_per_step "
            f"({config.prompts_per_step}), so that all mini-batches of a step are of one size."
        )
    if config.allow_changes and not config.resume:
        raise UserError("allow_changes is of use only to a run that goes on: add --resume.")
    if config.epochs == 0 and config.steps == 0:
        raise UserError("epochs and steps are both 0: nothing to train; set one of them to 1 or more.")
    if 0 < config.dual_clip <= 1:
        raise UserError(f"dual_clip must be 0 (off) or above 1, not {config.dual_clip}.")
    if config.mode == "rl" and config.group_size < 2:
        raise UserError("group_size is 1, but GRPO measures a reply against others to the same prompt; take 2 or more.")
    if config.mode == "rl" and not config.think and config.reward != "binary_no_think":
        raise UserError(
            f"reward {config.reward} asks for a <think> block, which think = false does not prompt for; "
            "set reward to binary_no_think, or think to true."
        )
