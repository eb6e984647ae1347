"""Checks of a run before its first step. `train.py --check` does only these.

Each check yields findings: an "error" stops the run, a "warning" is printed, "ok" says what was found.
"""

import hashlib
import json
import shutil
import socket
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tooln1.config import REPOSITORY
from tooln1.data import Example
from tooln1.distributed import World
from tooln1.io.errors import UserError
from tooln1.io.model_config import ModelConfig
from tooln1.prepare.split import content_digest, source_row
from tooln1.prompt import THINK_OPEN, format_reply
from tooln1.rewards import REWARDS, RULES
from tooln1.run import memory
from tooln1.run.metrics import tensorboard_writer
from tooln1.sft import target_text
from tooln1.task import Task
from tooln1.tokenizer import Tokenizer

CHECKPOINT_BYTES = 12  # per trained parameter: fp32 weights and two fp32 moments


def code_version() -> str:
    """A hash of the source of train.py and tooln1/."""
    files = [REPOSITORY / "train.py", *sorted((REPOSITORY / "tooln1").rglob("*.py"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def require_same_on_all_ranks(world: World, facts: Mapping[str, Any]) -> None:
    """Raise UserError on all ranks if `facts`, values by name, differ between them: which, where (a collective).

    Nodes may hold other copies of the code, the packages or the files.
    """
    ranks = world.gather([(socket.gethostname(), facts)])
    places: dict[str, list[str]] = defaultdict(list)  # of each value that is not the usual one
    for name in facts:
        values = [repr(theirs.get(name)) for _, theirs in ranks]
        (usual, _), *_ = Counter(values).most_common()  # of equally usual ones rank 0's
        for rank, value in enumerate(values):
            if value != usual:
                places[f"{name} is {value} and not {usual}"].append(f"rank {rank} ({ranks[rank][0]})")
    if places:
        different = "; ".join(f"{what} on {', '.join(where)}" for what, where in places.items())
        way_out = "Give them the same code, settings and files; a task file must not be random."
        raise UserError(f"Not all processes run the same: {different}. {way_out}")


class Finding(NamedTuple):
    """What one check found."""

    level: Literal["ok", "warning", "error"]
    about: str  # "disk", "memory", ...
    text: str  # the values, and for an error or a warning what to change


def check_run(
    settings: Mapping[str, Any],
    world: World,
    config: ModelConfig,
    reference: ModelConfig | None,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    held_out: Sequence[Example],
    task: Task,
) -> None:
    """All checks of a run, on rank 0. Raises UserError on all ranks for an error, and with --check for a warning."""
    prompt, reply = longest_prompt(tokenizer, examples, task), settings["max_reply_tokens"]
    if settings["mode"] == "sft":
        reply = max(len(tokenizer.encode(target_text(example))) for example in examples)
    there = memory.available(world.device)
    # on all ranks, because FSDP2 makes a mesh of them
    needed = memory.estimate(config, reference, settings, there, world.size, prompt, reply)

    def check() -> None:
        if settings["tensorboard"]:
            tensorboard_writer()
        findings = [
            *schedule(len(examples), settings, world.size),
            *lengths(settings, config.raw.get("max_position_embeddings"), prompt, reply),
            *stop_ids(tokenizer, config.vocab_size),
            *template(tokenizer, examples, task, settings["mode"] == "sft"),
            *train_eval_overlap(examples, held_out, task),
            *fits_memory(needed, settings, there),
            *disk(settings, config.num_parameters, memory.num_trained(config, settings)),
        ]
        if settings["check"]:
            print("memory of one process:", memory.table(needed), "", sep="\n")
        report(findings, settings["check"])

    world.run_on_all_ranks(check if world.is_main else lambda: None, "the checks before the first step")


def report(findings: Sequence[Finding], check: bool) -> None:
    """Print the findings (without `check` only warnings, on stderr); raise UserError for those that stop the run."""
    for level, about, text in findings:
        if check:
            print(f"{level:<8} {about}: {text}")
        elif level == "warning":
            print(f"warning: {about}: {text}", file=sys.stderr)
    wrong = [finding for finding in findings if finding.level == "error" or (check and finding.level == "warning")]
    if wrong and check:
        names = ", ".join(finding.about for finding in wrong)
        raise UserError(f"{len(wrong)} of {len(findings)} findings, printed above, need a change: {names}.")
    if wrong:
        raise UserError(f"{wrong[0].about}: {wrong[0].text}")


def schedule(examples: int, settings: Mapping[str, Any], processes: int) -> Iterator[Finding]:
    """Whether the examples fill a step, and the prompts of a mini-batch all processes."""
    prompts, per_minibatch = settings["prompts_per_step"], settings["prompts_per_minibatch"]
    if prompts > examples:
        text = f"prompts_per_step is {prompts}, but there are only {examples} training examples; lower it."
        yield Finding("error", "schedule", text)
        return
    if per_minibatch < processes:
        text = f"prompts_per_minibatch is {per_minibatch}: some of the {processes} processes have no work; raise it."
        yield Finding("warning", "schedule", text)
    per_epoch = examples // prompts
    steps = settings["steps"] or settings["epochs"] * per_epoch
    text = f"{steps} steps of {prompts} prompts, {steps / per_epoch:,.1f} epochs of {per_epoch} steps."
    yield Finding("ok", "schedule", text)


def longest_prompt(tokenizer: Tokenizer, examples: Iterable[Example], task: Task, counted: int = 256) -> int:
    """Tokens of the longest prompt; only the `counted` prompts with the most bytes are tokenized."""
    prompts = [tokenizer.render(task.messages(example), add_generation_prompt=True) for example in examples]
    prompts.sort(key=lambda prompt: -len(prompt.encode()))
    return max((len(tokenizer.encode(prompt)) for prompt in prompts[:counted]), default=0)


def lengths(settings: Mapping[str, Any], context: int | None, prompt: int, reply: int) -> Iterator[Finding]:
    """The longest prompt and reply, in tokens, against the model's context, the KV cache and the micro-batch.

    context: max_position_embeddings, None if config.json does not have it.
    """
    cache, microbatch = settings["rollout_cache_tokens"], settings["tokens_per_microbatch"]
    sizes = f"the longest prompt has {prompt} tokens, with a reply up to {prompt + reply}"
    if context and prompt + reply > context:
        text = f"{sizes}; the model's context is {context}: lower max_prompt_tokens or max_reply_tokens."
        yield Finding("error" if prompt >= context else "warning", "lengths", text)
    if settings["mode"] == "rl" and 0 < cache < prompt + reply:
        text = f"{sizes}; rollout_cache_tokens is {cache}: raise it, or lower max_reply_tokens."
        yield Finding("error", "lengths", text)
    if prompt + reply > microbatch:
        text = f"{sizes}; tokens_per_microbatch is {microbatch}: longer sequences are not split; raise it."
        yield Finding("warning", "lengths", text)
    yield Finding("ok", "lengths", f"{sizes}; the model's context is {context or 'not known'}.")


def stop_ids(tokenizer: Tokenizer, model_vocab_size: int) -> Iterator[Finding]:
    """Whether the model has all ids of the tokenizer, and which ids end a reply."""
    try:
        stops = ", ".join(f"{stop} {tokenizer.decode([stop])}" for stop in tokenizer.stop_ids)
        yield Finding("ok", "stop ids", f"{stops}.")
    except UserError as error:
        yield Finding("error", "stop ids", str(error))
    if tokenizer.vocab_size > model_vocab_size:
        text = f"the tokenizer has {tokenizer.vocab_size} ids, the model {model_vocab_size}; use the model's tokenizer."
        yield Finding("error", "stop ids", text)


def template(tokenizer: Tokenizer, examples: Sequence[Example], task: Task, sft: bool) -> Iterator[Finding]:
    """Whether prompts and right replies survive the chat template and the tokenizer: one example of each source."""
    first = {example.source: example for example in reversed(examples)}
    faults: dict[tuple[str, str], str] = {}
    for example in first.values():
        for level, text in template_faults(tokenizer, example, task, sft):
            faults.setdefault((level, text), f"{text} (example {example.id}).")
    for (level, _), text in faults.items():
        yield Finding(level, "template", text)
    if not faults:
        yield Finding("ok", "template", f"prompts and right replies of {len(first)} examples are unchanged by it.")


def template_faults(tokenizer: Tokenizer, example: Example, task: Task, sft: bool) -> Iterator[tuple[str, str]]:
    """(level, text) for what the template or the tokenizer changes in an example's prompt and a right reply to it."""
    think = task.think and not task.file
    reward = task.rule if think else "binary_no_think"
    messages = task.messages(example)
    right = format_reply(example.answer, "The user wants this." if think else None)
    reply = target_text(example) if task.file else right
    bare, prompt = (tokenizer.render(messages, add_generation_prompt=start) for start in (False, True))
    finished = tokenizer.render([*messages, {"role": "assistant", "content": reply}])
    missing = [message for message in messages if message["content"].strip() not in prompt]
    # LLaMA 3's template writes the result of a tool as a JSON string, which is no fault
    missing = [message for message in missing if json.dumps(message["content"], ensure_ascii=False) not in prompt]
    for role in dict.fromkeys(message["role"] for message in missing):
        level = "error" if role in ("system", "user") else "warning"
        yield level, f"the chat template omits or changes {role} messages; use another template"
    if tokenizer.decode(tokenizer.encode(prompt)) != prompt:
        yield "warning", "the tokens of a prompt decode to another text: the tokenizer drops or changes characters"
    if prompt == bare:
        yield "warning", "the chat template ignores add_generation_prompt: the model may not start a reply"
    elif prompt.startswith(bare) and THINK_OPEN in prompt[len(bare) :]:
        yield "warning", f"the chat template writes {THINK_OPEN} itself: replies lack it, and rewards require it"
    full = RULES[reward].exact_value + RULES[reward].format_value
    stop = tokenizer.decode([tokenizer.stop_ids[0]])
    if not task.file and REWARDS[reward](tokenizer.decode(tokenizer.encode(reply + stop)), example.answer) < full:
        yield "warning", f"a right reply does not get the full {reward} reward after tokenization"
    last = tokenizer.encode(finished.rstrip())[-1:]
    if not set(last) & set(tokenizer.stop_ids):
        text = f"the chat template ends a reply with {tokenizer.decode(last)!r}, none of the stop ids"
        yield "error" if sft else "warning", f"{text}; add it to eos_token_id in generation_config.json"
    if task.file:
        task.reward(reply + stop, example)  # its faults are told before the start
    if sft and reply.strip() not in finished:
        yield "warning", "the chat template changes the reply that is to be imitated"
    if sft and not finished.startswith(prompt):
        yield "error", "the chat template does not begin a finished reply with its prompt: it cannot be imitated"


def train_eval_overlap(train: Sequence[Example], held_out: Sequence[Example], task: Task) -> Iterator[Finding]:
    """Held-out examples that share their source row, or their tools and first message, with a training example.

    `prepare.split` keeps these apart. Ids name the source row, so files of different origin need different ids. With a
    task file they share their whole prompt instead.
    """

    def traits(example: Example) -> set[str]:
        ours = (source_row(example.id), content_digest(example))
        return {json.dumps(task.messages(example))} if task.file else set(ours)

    seen = set().union(*map(traits, train))
    shared = [example.id for example in held_out if traits(example) & seen]
    what = "prompt" if task.file else "source row, or tools and first message"
    text = f"{len(shared)} of {len(held_out)} held-out examples share their {what}, with training examples"
    if shared:
        way_out = "accuracy on them is too high; remove them, or split with python -m tooln1.prepare"
        text = f"{text} (the first: {shared[0]}): {way_out}"
    yield Finding("warning" if shared else "ok", "train_eval_overlap", f"{text}.")


def fits_memory(
    needed: memory.Estimate, settings: Mapping[str, Any], available: Mapping[str, int]
) -> Iterator[Finding]:
    """The estimate of a process against the memory of its GPU and its share of the host's."""
    for place, there in available.items():
        if not needed.total(place):
            continue
        certain, total = needed.total(place, ["counted"]), needed.total(place)
        sizes = [memory.format_bytes(size) for size in (total, certain, there)]
        text = "a process needs {}, {} of it certain; it has {} on the {place}".format(*sizes, place=place)
        if certain > there:
            change = memory.with_values(memory.WEIGHT_SETTINGS, settings)
            yield Finding("error", "memory", f"{text}: change one of {change}, or use more machines.")
        elif total > there:
            change = memory.with_values(memory.PASS_SETTINGS + memory.WEIGHT_SETTINGS, settings)
            yield Finding("warning", "memory", f"{text}: change one of {change}.")
        else:
            yield Finding("ok", "memory", f"{text}.")


def disk(settings: Mapping[str, Any], parameters: int, trained: int) -> Iterator[Finding]:
    """The free disk at run_dir against the checkpoints that are kept, the one being written, and the export."""
    one, export, keep = CHECKPOINT_BYTES * trained, 4 * parameters, settings["keep_checkpoints"]
    folder = Path(settings["run_dir"]).absolute()
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    level = "error" if free < one + export else "warning" if free < (keep + 1) * one + export else "ok"
    text = (
        f"{memory.format_bytes(free)} free, a checkpoint takes {memory.format_bytes(one)}, keep_checkpoints is {keep}"
    )
    yield Finding(level, "disk", text + ("." if level == "ok" else ": free space, or choose another run_dir."))
