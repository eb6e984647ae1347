"""The settings of a run: a dataclass with the paper's hyper-parameters (Table 6), TOML presets and the command line.

A later source overrides an earlier one: the defaults in `Config`, the preset that a preset names as its `base`, the
preset itself, the command line. Only train.py, eval.py and run/ see `Config`.
"""

import argparse
import difflib
import json
import re
import tomllib
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

from tooln1.grpo import ADVANTAGES, AGGREGATIONS, KL_ESTIMATES, POLICY_LOSSES, SAMPLER_CORRECTIONS
from tooln1.io.errors import UserError
from tooln1.io.jsonl import read_text
from tooln1.lora import TARGETS
from tooln1.rewards import REWARDS

REPOSITORY = Path(__file__).resolve().parents[1]
SWITCH = ("auto", "on", "off")
DECODE, PACKED = ("auto", "graph", "eager", "gathered"), ("auto", "flex", "sdpa")


def setting(default: Any, help: str, unit: str = "", within: str = "[0, inf)", **about: Any) -> Any:
    """A field of `Config` with what `--help` prints and what its values are checked against.

    within: the interval that a number must lie in. about: `paper`, the paper's value; `choices`, the allowed texts;
    `const`, the value of `--name` without one; `section`, which begins here, of TOML and of `--help`.
    """
    return field(default=default, metadata={"help": help, "unit": unit, "within": within, **about})


@dataclass(frozen=True)
class Config:
    """All settings of a run. setting(default, help, unit, allowed interval, paper=the paper's value)."""

    run_dir: str = setting("runs/tool_n1", "directory for everything that the run writes", section="run")
    resume: str = setting("", "checkpoint to resume from; auto: the newest complete one in run_dir", const="auto")
    allow_changes: str = setting("", "names of settings, or all: may differ from the checkpoint's", const="all")
    check: bool = setting(False, "only run the checks before the first step; exit code 2 if one fails")
    collective_timeout: int = setting(600, "longest wait of a process for the others", "seconds", "[1, inf)")
    max_bad_steps: int = setting(5, "non-finite optimizer steps in a row that stop the run", "steps", "[1, inf)")
    device: str = setting("auto", "auto: CUDA if there is a GPU", choices=("auto", "cpu", "cuda"))
    threads: int = setting(0, "CPU threads of a process; 0: torch's default", "threads")
    tensorboard: bool = setting(False, "also write TensorBoard files (requirements-extra.txt)")

    model: str = setting("Qwen/Qwen2.5-7B-Instruct", "Hugging Face directory or hub id", section="model_and_data")
    reference_model: str = setting("", "model of the KL term; empty: same as model", paper="")
    train_data: str = setting("data/tool_n1/train.jsonl", "training examples (JSONL)")
    eval_data: str = setting("", "held-out examples; empty: no evaluation on them")

    mode: str = setting("rl", "GRPO, or supervised fine-tuning", paper="rl", choices=("rl", "sft"), section="task")
    seed: int = setting(0, "of data order and sampling; the same on any number of processes", within="[0, 9e18]")
    think: bool = setting(True, "prompt for <think> ... </think> before the calls", paper=True)
    reward: str = setting("binary", "rule that scores a reply", paper="binary", choices=tuple(REWARDS))
    shuffle_rewards: bool = setting(False, "permute the rewards within the batch: the control experiment")
    max_prompt_tokens: int = setting(4096, "longer prompts are left out", "tokens", "[1, inf)", paper=4096)

    epochs: int = setting(7, "passes over train_data; not used if steps is set", "epochs", paper=7, section="schedule")
    steps: int = setting(0, "rollout steps to train; 0: epochs decide", "steps")
    prompts_per_step: int = setting(1024, "examples of a rollout step", "prompts", "[1, inf)", paper=1024)
    prompts_per_minibatch: int = setting(256, "examples of an optimizer step", "prompts", "[1, inf)", paper=256)
    group_size: int = setting(5, "replies sampled for each prompt", "replies", "[1, inf)", paper=5)

    temperature: float = setting(0.7, "divides all logits", "", "(0, inf)", paper=0.7, section="rollout")
    top_p: float = setting(1.0, "sample from the most likely tokens of this total; 1: off", "", "(0, 1]", paper=1.0)
    top_k: int = setting(0, "sample from this many most likely tokens; 0: off", "tokens", paper=0)
    max_reply_tokens: int = setting(8192, "replies are cut off at this length", "tokens", "[1, inf)", paper=8192)
    dynamic_sampling: int = setting(0, "further prompts for those whose rewards are all equal", "rounds", paper=0)

    policy_loss: str = setting("clipped", "see grpo.py", paper="clipped", choices=tuple(POLICY_LOSSES), section="loss")
    clip_low: float = setting(0.2, "the ratio is clipped at 1 - clip_low", "", "[0, 1]", paper=0.2)
    clip_high: float = setting(0.2, "the ratio is clipped at 1 + clip_high", paper=0.2)
    dual_clip: float = setting(0.0, "largest ratio that counts where A < 0; 0: off", paper=0.0)
    kl: str = setting("k3", "its estimate; off: no reference model", paper="k3", choices=(*KL_ESTIMATES, "off"))
    kl_coef: float = setting(1e-3, "weight of the KL to the reference model; 0: only logged", paper=1e-3)
    entropy_coef: float = setting(0.0, "weight of the entropy bonus", paper=0.0)
    advantage: str = setting("std", "of a reply in its group; see grpo.py", paper="std", choices=tuple(ADVANTAGES))
    advantage_eps: float = setting(1e-6, "std: added to the standard deviation", "", "(0, inf)", paper=1e-6)
    loss_aggregation: str = setting("token_mean", "how token losses are averaged; see grpo.py", choices=AGGREGATIONS)
    mask_truncated: bool = setting(False, "leave replies that were cut off out of the loss", paper=False)
    old_logprobs: str = setting("policy", "where pi_old is from", paper="policy", choices=("policy", "sampler"))
    sampler_correction: str = setting("off", "weights by pi_old / pi_sampler", choices=tuple(SAMPLER_CORRECTIONS))
    sampler_ratio_cap: float = setting(2.0, "most that such a weight can be", "", "(0, inf)")

    learning_rate: float = setting(1e-6, "AdamW's, at its peak", "", "(0, inf)", paper=1e-6, section="optimizer")
    lr_schedule: str = setting("constant", "after the warm-up", paper="constant", choices=("constant", "cosine"))
    warmup_ratio: float = setting(0.0, "length of the linear warm-up", "share of all steps", "[0, 1]", paper=0.0)
    adam_beta1: float = setting(0.9, "decay of the mean gradient", "", "[0, 1)", paper=0.9)
    adam_beta2: float = setting(0.999, "decay of the mean squared gradient", "", "[0, 1)", paper=0.999)
    adam_eps: float = setting(1e-8, "added to AdamW's denominator", "", "(0, inf)")
    weight_decay: float = setting(0.01, "AdamW's, decoupled", paper=0.01)
    max_grad_norm: float = setting(1.0, "gradients are clipped to this norm", "", "(0, inf)", paper=1.0)

    lora_rank: int = setting(0, "train only adapters of this rank, at about 10 x the rate; 0: off", section="lora")
    lora_alpha: float = setting(32.0, "adapters are multiplied by lora_alpha / lora_rank", "", "(0, inf)")
    lora_targets: str = setting(",".join(TARGETS), "layers of each block that get an adapter")

    compile: bool = setting(False, "torch.compile the layers of the policy", section="memory_and_speed")
    activation_checkpointing: str = setting("auto", "recompute layers; auto: from 4e8 parameters", choices=SWITCH)
    accumulate_unsharded: str = setting("auto", "no resharding between micro-batches; auto: below 2e9", choices=SWITCH)
    sharding: str = setting("full", "of weights; hybrid: in a node, nodes hold replicas", choices=("full", "hybrid"))
    sampler_weights: str = setting("keep", "release: freed in updates; new CUDA graphs", choices=("keep", "release"))
    offload_reference: bool = setting(False, "keep the reference model's shards in host memory (CUDA)")
    offload_optimizer: bool = setting(False, "keep the policy's shards and Adam state in host memory (CUDA)")
    tokens_per_microbatch: int = setting(30720, "most of a process's forward pass", "tokens", "[1, inf)", paper=30720)
    logprob_chunk_tokens: int = setting(1024, "tokens whose logits are in memory at once", "tokens", "[1, inf)")
    max_num_seqs: int = setting(0, "most replies sampled at once; 0: all, on CUDA 512", "replies")
    rollout_cache_tokens: int = setting(0, "KV cache; 0: as needed, in half of the memory that is left", "tokens")
    rollout_decode: str = setting("auto", "decoding; auto: the first that works on the GPU", choices=DECODE)
    update_attention: str = setting("auto", "of packed batches; auto: the first that works", choices=PACKED)

    eval_bench: str = setting("", "benchmark, NAME=PATH as for eval.py", section="evaluation_and_saving")
    eval_every: int = setting(10, "evaluate after every so many steps; 0: only at the end", "steps", paper=10)
    max_eval_examples: int = setting(0, "evaluate on the first examples only; 0: all", "examples")
    eval_before_training: bool = setting(False, "evaluate the initial model too", paper=False)
    save_every: int = setting(10, "save a checkpoint after every so many steps; 0: only at the end", "steps", paper=10)
    keep_checkpoints: int = setting(2, "newest checkpoints that are kept", "checkpoints", "[1, inf)")
    keep_every: int = setting(0, "checkpoints of every so many steps are never deleted; 0: none", "steps")
    max_failed_saves: int = setting(3, "failed saves in a row that stop the run", "attempts", "[1, inf)")
    log_rollouts: int = setting(4, "best, and as many worst, replies of a step in rollouts.jsonl", "replies")


SETTINGS = {entry.name: entry for entry in fields(Config)}
KINDS: dict[str, type] = get_type_hints(Config)
KIND_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
PATHS = ("model", "reference_model", "train_data", "eval_data")  # of files to read, which may be in the repository
_toml_value = partial(json.dumps, ensure_ascii=False)  # JSON's texts, numbers and booleans are TOML's
SECTION_OF: dict[str, str] = {}
for _entry in fields(Config):
    SECTION_OF[_entry.name] = _entry.metadata.get("section") or list(SECTION_OF.values())[-1]


def load_config(argv: list[str], default_toml: str | Path) -> Config:
    """The settings that a command line gives: `--config TOML` (else `default_toml`), then `--key value` options.

    A boolean needs no value (`--think`), nor does `--resume` (auto). Dashes and underscores are equal, the last of
    two equal options counts, `--help` prints all settings and exits with 0. Raises UserError for an unknown key
    (naming the nearest), a value of the wrong type or out of range, and a preset that cannot be read.
    """
    argv = [re.sub("^--[^=]+", lambda key: key[0].replace("_", "-"), argument) for argument in argv]
    preset_parser = _Parser(add_help=False, allow_abbrev=False)
    preset_parser.add_argument("--config", default=str(default_toml))
    preset = _in_repository(preset_parser.parse_known_args(argv)[0].config)
    values = asdict(Config()) | read_preset(preset)
    values |= {name: _in_repository(values[name]) for name in PATHS}
    options, unknown = _command_line(preset, values).parse_known_args(argv)
    if unknown:
        raise UserError(f"command line: unknown argument {unknown[0]!r}{_hint(unknown[0])}")
    config = Config(**{name: getattr(options, name) for name in SETTINGS})
    validate(config)
    return config


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are UserErrors, without the usage of 60 options before them."""

    def error(self, message: str) -> None:
        raise UserError(f"command line: {message} (--help lists all settings)")


def _command_line(preset: str, values: dict[str, Any]) -> _Parser:
    """The parser of `--config` and all settings, whose defaults are `values`, those of `preset`."""
    parser = _Parser(
        usage="%(prog)s [--config TOML] [--task FILE] [--key value ...]",
        description=f"Defaults are those of the preset {preset}.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32),
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="TOML", help="preset of settings to start from")
    parser.add_argument("--task", metavar="FILE", help="Python file with the reward of another task; it is run as code")
    truth = {"true": True, "false": False}
    convert = {bool: lambda text: truth.get(text.lower(), text)}  # any other text is refused by `checked`
    metavars = {int: "N", float: "X", bool: "true|false", str: "TEXT"}
    for name, entry in SETTINGS.items():
        about, kind = entry.metadata, KINDS[name]
        if "section" in about:
            group = parser.add_argument_group(about["section"])
        const = True if kind is bool else about.get("const")
        notes = [about["unit"], f"default: {_toml_value(values[name])}"]
        notes += [f"paper: {_toml_value(about['paper'])}"] if "paper" in about else []
        group.add_argument(
            f"--{name.replace('_', '-')}",
            type=convert.get(kind, kind),
            default=values[name],
            nargs=None if const is None else "?",
            const=const,
            choices=about.get("choices"),
            metavar=None if "choices" in about else metavars[kind],
            help=f"{about['help']} [{'; '.join(filter(None, notes))}]".replace("%", "%%"),
        )
    return parser


def read_preset(path: str | Path) -> dict[str, Any]:
    """The settings in a TOML file and in its `base` (a path relative to the file), which it overrides; all checked.

    Settings stand at the top or in sections, whose names are free.
    """
    path = Path(path)
    text = read_text(path)
    try:
        table = tomllib.loads(text)
    except ValueError as error:
        raise UserError(f"{path} is not valid TOML: {error}.") from None
    base = table.pop("base", None)
    inherited = {} if base is None else read_preset(path.parent / str(base))
    own: dict[str, Any] = {}
    for key, value in table.items():
        for name, item in value.items() if isinstance(value, dict) else [(key, value)]:
            name = known_setting(name, str(path))
            if name in own:
                raise UserError(f"{path}: {name} is set twice; keep one of the two.")
            own[name] = checked(name, item, str(path))
    return inherited | own


def _in_repository(path: str) -> str:
    """`path`, or its place in the repository where it exists only there."""
    return path if Path(path).exists() or not (REPOSITORY / path).exists() else str(REPOSITORY / path)


def known_setting(key: str, where: str) -> str:
    """`key` as the name of a setting. Raises UserError, naming the nearest, if there is none."""
    name = key.replace("-", "_")
    if name not in SETTINGS:
        raise UserError(f"{where}: there is no setting {key!r}{_hint(name)}")
    return name


def _hint(key: str) -> str:
    name = key.partition("=")[0].lstrip("-").replace("-", "_")
    nearest = difflib.get_close_matches(name, [*SETTINGS, "config"], n=1)
    return f". Did you mean {nearest[0]!r}?" if nearest else " (--help lists all settings)."


def checked(name: str, value: Any, where: str = "") -> Any:
    """`value` (an int becomes a float where one is due), or a UserError saying what the setting takes."""
    kind, about = KINDS[name], SETTINGS[name].metadata
    place = f"{where}: " if where else ""
    value = float(value) if kind is float and type(value) is int else value
    if type(value) is not kind:
        raise UserError(f"{place}{name} takes {KIND_NAMES[kind]}, not {value!r}.")
    if value not in about.get("choices", (value,)):
        raise UserError(f"{place}{name} is one of {', '.join(about['choices'])}, not {value!r}.")
    if kind in (int, float):
        low, high = (float(end) for end in about["within"][1:-1].split(","))
        above = value > low if about["within"].startswith("(") else value >= low
        below = value < high if about["within"].endswith(")") else value <= high
        if not (above and below):
            raise UserError(f"{place}{name} must lie in {about['within']}, not {value}.")
    return value


def validate(config: Config) -> None:
    """Check every value by itself and against the others. Raises UserError."""
    for name in SETTINGS:
        checked(name, getattr(config, name))
    rl, targets = config.mode == "rl", set(config.lora_targets.split(","))
    for wrong, sentence in (
        (not config.run_dir, "run_dir is empty; it takes a path."),
        (
            config.prompts_per_step % config.prompts_per_minibatch,
            f"prompts_per_minibatch ({config.prompts_per_minibatch}) must divide prompts_per_step "
            f"({config.prompts_per_step}), so that all mini-batches of a step have one size.",
        ),
        (not config.epochs and not config.steps, "epochs and steps are both 0; set one of them to 1 or more."),
        (0 < config.dual_clip <= 1, f"dual_clip must be 0 (off) or above 1, not {config.dual_clip}."),
        (targets - set(TARGETS), f"lora_targets takes some of {','.join(TARGETS)}, not {config.lora_targets!r}."),
        (config.lora_rank and config.offload_optimizer, "offload_optimizer is not for LoRA; set it to false."),
        (
            config.old_logprobs == "sampler" and config.sampler_correction != "off",
            f"sampler_correction {config.sampler_correction} compares the policy's old log-probs with the sampler's; "
            "set old_logprobs to policy, or sampler_correction to off.",
        ),
        (rl and config.group_size < 2, "group_size is 1, but GRPO compares the replies to a prompt; take 2 or more."),
        (
            rl and not config.think and config.reward != "binary_no_think",
            f"reward {config.reward} pays for a <think> block, which think = false does not prompt for; "
            "set reward to binary_no_think, or think to true.",
        ),
    ):
        if wrong:
            raise UserError(sentence)


def to_toml(config: Config) -> str:
    """The config as TOML that `read_preset` reads back to an equal one (floats to the last bit)."""
    lines = ["# Every setting of a run; `train.py --help` explains them."]
    for name, entry in SETTINGS.items():
        if "section" in entry.metadata:
            lines += ["", f"[{entry.metadata['section']}]"]
        lines.append(f"{name} = {_toml_value(getattr(config, name))}")
    return "\n".join(lines) + "\n"
