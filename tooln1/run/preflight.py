"""What can be known of a run before its first step: each check gives findings, and one sentence for each.

An error surely cannot work, a warning is to be looked at, "ok" says what was seen. The checks take plain values, so
they can be asked one by one; look_ahead.py asks all of them, and `train.py --check` does only that.
"""

from __future__ import annotations

import shutil
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tooln1.data import Example
from tooln1.io.errors import UserError
from tooln1.prepare.split import content_digest, source_row
from tooln1.prompt import THINK_OPEN, build_messages, format_reply
from tooln1.rewards import REWARDS, RULES
from tooln1.run.memory import Estimate, shown
from tooln1.tokenizer import Tokenizer

Level = Literal["ok", "warning", "error"]
CHECKPOINT_BYTES = 12  # a parameter: fp32 weights and two fp32 moments


@dataclass(frozen=True)
class Finding:
    """What one check saw."""

    level: Level
    about: str  # "disk", "memory", ...
    text: str  # a sentence: the values, and where something is wrong the way out


# ------------------------------------------------------------------------------------------------ data


def train_eval_overlap(train: Sequence[Example], held_out: Sequence[Example]) -> list[Finding]:
    """Held-out examples whose source row, or whose tools and first message, are also among those trained on.

    That is what `order.split` keeps apart. The first message and the tools, not the whole dialogue: whoever trained on
    one step of a dialogue has seen the beginning of the next. Ids decide what a row is, so files of different origin
    should not number their examples alike.
    """
    if not held_out:
        return [Finding("ok", "train_eval_overlap", "no held-out examples to compare with.")]
    asked = {example.messages[0]["content"] for example in held_out}  # few need hashing
    rows: dict[str, str] = {}
    contents: dict[str, dict[str, None]] = {}  # digest -> ids
    for example in train:
        rows.setdefault(source_row(example.id), example.id)
        if example.messages[0]["content"] in asked:
            contents.setdefault(content_digest(example), {})[example.id] = None
    same_row, same_content, itself = [], [], 0
    for example in held_out:
        twins = contents.get(content_digest(example), {})
        itself += example.id in twins
        if twins:
            same_content.append((example.id, next(iter(twins))))
        if row := rows.get(source_row(example.id)):
            same_row.append((example.id, row))
    if itself == len(held_out):
        text = (
            f"all {itself} held-out examples are training examples: figures on them are training accuracy; name "
            "other examples as eval_data (python -m tooln1.prepare makes a split)."
        )
        return [Finding("warning", "train_eval_overlap", text)]
    found = []
    for pairs, what in ((same_row, "come from a source row"), (same_content, "have the query and the tools of one")):
        if pairs:
            text = (
                f"{len(pairs)} of {len(held_out)} held-out examples {what} that is trained on (the first: "
                f"{pairs[0][0]}, as {pairs[0][1]} in training), so figures on them are too good; take them out, "
                "or split anew with python -m tooln1.prepare."
            )
            found.append(Finding("warning", "train_eval_overlap", text))
    none = f"none of {len(held_out)} held-out examples shares its source row, or query and tools, with {len(train)}."
    return found or [Finding("ok", "train_eval_overlap", none)]


def first_per_source(examples: Iterable[Example], count: int = 3) -> list[Example]:
    """The first `count` examples of every source."""
    seen: Counter[str] = Counter()
    chosen = []
    for example in examples:
        seen[example.source] += 1
        if seen[example.source] <= count:
            chosen.append(example)
    return chosen


# ------------------------------------------------------------------------------------------------ prompt and reply


def template(
    tokenizer: Tokenizer, examples: Sequence[Example], think: bool, reward: str, supervised: bool = False
) -> list[Finding]:
    """Whether prompts and right replies survive the chat template and the tokenizer, on some of each source.

    reward: a key of REWARDS; without `think` "binary_no_think" counts. supervised: replies are imitated, so a finished
    turn must begin with the prompt and end with a stop token. What surely cannot work is an error where all examples
    looked at show it, else a warning.
    """
    chosen, reward = first_per_source(examples), reward if think else "binary_no_think"
    faults: dict[tuple[Level, str], list[str]] = {}
    for example in chosen:
        try:
            faults_here = list(_template_faults(tokenizer, example, think, reward, supervised))
        except UserError as error:  # no template, or one that refuses these messages
            faults_here = [("error", str(error))]
        for fault in dict.fromkeys(faults_here):
            faults.setdefault(fault, []).append(example.id)
    found = []
    for (level, text), ids in faults.items():
        where = f" ({len(ids)} of {len(chosen)} examples looked at, the first: {ids[0]})"
        found.append(Finding(level if len(ids) == len(chosen) else "warning", "template", text + where))
    seen = f"{len(chosen)} examples, some of each source: their prompts are whole, right replies get the full reward."
    return found or [Finding("ok", "template", seen)]


def _template_faults(
    tokenizer: Tokenizer, example: Example, think: bool, reward: str, supervised: bool
) -> Iterator[tuple[Level, str]]:
    messages = build_messages(example, think)
    reply = format_reply(example.answer, "The user asks for it." if think else None)
    bare, prompt = (tokenizer.render(messages, add_generation_prompt=asks) for asks in (False, True))
    finished, stops = tokenizer.render([*messages, {"role": "assistant", "content": reply}]), tokenizer.stop_ids
    if lost := {message["role"] for message in messages if message["content"].strip() not in prompt}:
        yield "error", f"the chat template leaves out or changes what {' and '.join(sorted(lost))} say; use another"
    if tokenizer.decode(tokenizer.encode(prompt)) != prompt:
        yield "warning", "the prompt's tokens decode to another text: the tokenizer drops or rewrites characters"
    if prompt == bare:
        yield "warning", "add_generation_prompt changes nothing in the chat template: the model may not know to reply"
    elif prompt.startswith(bare) and THINK_OPEN in prompt[len(bare) :]:
        yield "warning", f"the chat template opens {THINK_OPEN} itself: replies lack it, and rewards ask for it"
    full = RULES[reward].exact_value + RULES[reward].format_value
    for stop in (stop for stop in stops if stop < tokenizer.vocab_size):
        word = tokenizer.decode([stop])
        if tokenizer.encode(word) != [stop]:
            yield "warning", f"the text {word!r} of stop id {stop} is not encoded as that one token"
        if REWARDS[reward](tokenizer.decode(tokenizer.encode(reply + word)), example.answer) < full:
            yield "warning", f"a right reply and {word!r}, encoded and decoded, miss the full {reward} reward"
    level = "error" if supervised else "warning"
    last = tokenizer.encode(finished.rstrip())[-1:]
    if not set(last) & set(stops):
        yield (
            level,
            (
                f"the chat template ends a turn with {tokenizer.decode(last)!r} {last}, none of the stop ids "
                f"{list(stops)}; add it to eos_token_id in generation_config.json"
            ),
        )
    if supervised and not finished.startswith(prompt):
        yield level, "the chat template does not begin a finished reply with its prompt: it cannot be imitated"


def stop_ids(tokenizer: Tokenizer, model_vocab_size: int) -> list[Finding]:
    """Whether the stop ids exist in the tokenizer and the model, and the tokenizer's ids in the model."""
    ids = tokenizer.vocab_size
    if ids > model_vocab_size:
        text = f"the tokenizer has {ids} ids, the model {model_vocab_size}: they do not belong together; name its own."
        return [Finding("error", "stop ids", text)]
    try:
        stops = tokenizer.stop_ids
    except UserError as error:
        return [Finding("error", "stop ids", str(error))]
    unknown = [stop for stop in stops if stop >= ids or not tokenizer.decode([stop])]
    if unknown:
        level = "error" if len(unknown) == len(stops) else "warning"
        text = (
            f"stop ids {unknown} of {list(stops)} are no tokens of the tokenizer, which has ids below {ids}: no "
            "reply can end with them; mend eos_token_id in generation_config.json."
        )
        return [Finding(level, "stop ids", text)]
    words = ", ".join(f"{stop} {tokenizer.decode([stop])}" for stop in stops)
    return [Finding("ok", "stop ids", f"{words}; the tokenizer has {ids} ids, the model {model_vocab_size}.")]


def sample(tokenizer: Tokenizer, example: Example, think: bool, most_characters: int = 3000) -> str:
    """The prompt of `example` as the model sees it, special tokens written out; a long one without its middle."""
    ids = tokenizer.prompt_ids(build_messages(example, think))
    text, half = tokenizer.decode(ids), most_characters // 2
    if (left_out := len(text) - 2 * half) > 0:
        text = f"{text[:half]}\n[... {left_out} characters left out ...]\n{text[len(text) - half :]}"
    visible = "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
    head = f"the prompt of {example.id}: {len(ids)} tokens, the last ones {ids[-6:]}"
    return "\n    | ".join([head, *visible.split("\n")])


# ------------------------------------------------------------------------------------------------ lengths, numbers


def longest_prompt(tokenizer: Tokenizer, examples: Iterable[Example], think: bool, counted: int = 256) -> int:
    """Tokens of the longest prompt: the most among the `counted` ones with the most bytes (all at 0)."""

    def rendered(example: Example) -> str:
        return tokenizer.render(build_messages(example, think), add_generation_prompt=True)

    ranked = sorted(examples, key=lambda example: -len(rendered(example).encode()))[: counted or None]
    return max((len(tokenizer.encode(rendered(example))) for example in ranked), default=0)


def lengths(
    longest: int,
    max_reply_tokens: int,
    group_size: int,
    tokens_per_microbatch: int,
    context: int | None,
    cache_tokens: int = 0,
) -> list[Finding]:
    """The `longest` prompt and its replies, in tokens, against the model's context, the micro-batch and the cache.

    context: max_position_embeddings, None where config.json does not say. mode sft: group_size 1, and the longest
    reply there is. cache_tokens: rollout_cache_tokens, 0 where it is not set.
    """
    sequence, found = longest + max_reply_tokens, []
    if context and longest >= context:
        text = (
            f"the longest prompt has {longest} tokens, the model's context {context}: it would stop the run; "
            f"set max_prompt_tokens below {context}."
        )
        found.append(Finding("error", "lengths", text))
    elif context and sequence > context:
        text = (
            f"a prompt of {longest} tokens and max_reply_tokens {max_reply_tokens} go beyond the model's context "
            f"of {context}, which it was never trained for; lower max_reply_tokens to {context - longest}, or "
            "max_prompt_tokens."
        )
        found.append(Finding("warning", "lengths", text))
    if 0 < cache_tokens < sequence:
        text = (
            f"a prompt and its reply may have {sequence} tokens, rollout_cache_tokens is {cache_tokens}: it would "
            f"stop the run; raise it to {sequence + 16} or more, or lower max_reply_tokens."
        )
        found.append(Finding("error", "lengths", text))
    if sequence > tokens_per_microbatch:
        text = (
            f"one reply and its prompt may have {sequence} tokens, tokens_per_microbatch is "
            f"{tokens_per_microbatch}: such a one is computed whole, and may not fit into memory; raise "
            "tokens_per_microbatch to the memory there is, or lower max_reply_tokens."
        )
        found.append(Finding("warning", "lengths", text))
    group = longest + group_size * max_reply_tokens
    fits = "fits" if group <= tokens_per_microbatch else "is split, its prompt computed again, above"
    seen = (
        f"longest prompt {longest}, with a reply at most {sequence} of {context or 'unknown'} tokens of context; a "
        f"group, at most {group}, {fits} tokens_per_microbatch {tokens_per_microbatch}."
    )
    return found or [Finding("ok", "lengths", seen)]


def schedule(
    examples: int, *, prompts_per_step: int, prompts_per_minibatch: int, processes: int, epochs: int, steps: int
) -> list[Finding]:
    """Examples in steps, steps in mini-batches, both over processes: what divides what. `steps` 0: epochs decide."""
    if prompts_per_step > examples:
        text = (
            f"prompts_per_step is {prompts_per_step}, but only {examples} training examples are there; lower it to "
            f"{examples} or less, or give more data."
        )
        return [Finding("error", "schedule", text)]
    if prompts_per_step % prompts_per_minibatch:
        text = (
            f"prompts_per_minibatch ({prompts_per_minibatch}) does not divide prompts_per_step "
            f"({prompts_per_step}); choose a divisor."
        )
        return [Finding("error", "schedule", text)]
    per_epoch, left_out = divmod(examples, prompts_per_step)
    total = steps or epochs * per_epoch
    found = []
    for name, count in (("prompts_per_step", prompts_per_step), ("prompts_per_minibatch", prompts_per_minibatch)):
        if count < processes:
            text = f"{name} is {count}: {processes - count} of {processes} processes have nothing to do; raise it."
            found.append(Finding("warning", "schedule", text))
    seen = (
        f"{total} steps of {prompts_per_step} prompts in mini-batches of {prompts_per_minibatch}, with {processes} "
        f"process{'es' * (processes > 1)}: {total / per_epoch:,.1f} passes over the data, {per_epoch} steps each "
        f"({left_out} of the {examples} examples do not fill a step)."
    )
    return found + [Finding("ok", "schedule", seen)]


# ------------------------------------------------------------------------------------------------ the machine


def memory(needed: Estimate, *, cuda: bool, device_bytes: int, host_bytes: int, local_processes: int) -> list[Finding]:
    """A process's estimate against its GPU, or those of all `local_processes` of this machine against its memory.

    device_bytes: what a GPU has (`memory.device_bytes`, before models are loaded); not looked at on the CPU.
    """
    places = [("a GPU", False, 1, device_bytes)] if cuda else []
    many = f", for its {local_processes} processes together" if local_processes > 1 else ""
    places.append((f"this machine{many}", cuda, local_processes, host_bytes))
    return [_fits(needed, *place) for place in places if needed.total(offloaded=place[1])]


def _fits(needed: Estimate, place: str, offloaded: bool, processes: int, there: int) -> Finding:
    certain, total = needed.certain(offloaded) * processes, needed.total(offloaded) * processes
    loading = 0 if offloaded else needed.loading * processes
    if loading > there:
        text = (
            f"while it is loaded, the whole policy in fp32 needs {shown(loading)} of {place}, which has "
            f"{shown(there)}: this cannot work; take a smaller model or more memory."
        )
        return Finding("error", "memory", text)
    if certain > there:
        text = (
            f"weights, gradients, Adam's moments and copies alone need {shown(certain)} of {place}, which has "
            f"{shown(there)}: this cannot work; ways out: {'; '.join(needed.ways_out)}."
        )
        return Finding("error", "memory", text)
    if total > there:
        ways = "; ".join(needed.more_ways_out + needed.ways_out)
        text = (
            f"about {shown(total)} ({shown(certain)} of it for sure) are needed of {place}, which has "
            f"{shown(there)}; ways out: {ways}."
        )
        return Finding("warning", "memory", text)
    text = f"about {shown(total)} ({shown(certain)} of it for sure) of {place}, which has {shown(there)}."
    return Finding("ok", "memory", text)


def disk(
    run_dir: str | Path,
    parameters: int,
    *,
    present: Sequence[int],
    steps: int,
    save_every: int,
    keep_checkpoints: int,
    keep_every: int,
    export_bytes: int,
) -> list[Finding]:
    """The checkpoints and the export still to be written, at their peak, against what is free where `run_dir` is.

    present: the steps of the checkpoints there, oldest first; the run goes on behind the last.
    keep_checkpoints: newest ones kept (0: all); keep_every: those of steps that it divides are kept for good (0: none).
    export_bytes: of a parameter in hf/, 2 from CUDA and 4 from the CPU.
    """
    one, export = CHECKPOINT_BYTES * parameters, export_bytes * parameters
    peak, last = _most_checkpoints(present, steps, save_every, keep_checkpoints, keep_every)
    needed = max(0, max(peak * one, last * one + export) - len(present) * one)
    place = Path(run_dir).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    words = (
        f"{shown(needed)} will be needed in {run_dir} (checkpoints of {shown(one)}, at most {peak} at once, "
        f"{len(present)} there already; the model {shown(export)}), {shown(free)} are free"
    )
    way_out = (
        f"; make room, choose another run_dir, or change keep_checkpoints ({keep_checkpoints}) or keep_every "
        f"({keep_every})."
    )
    if free < min(needed, one + export):
        return [Finding("error", "disk", f"{words}: not even for one checkpoint and the model{way_out}")]
    if free < needed:
        return [Finding("warning", "disk", words + way_out)]
    return [Finding("ok", "disk", words + ".")]


def _most_checkpoints(present: list[int], steps: int, save_every: int, keep: int, keep_every: int) -> tuple[int, int]:
    """(the most checkpoints there at once, the number left at the end), saving and removing as train.py does."""
    held, peak = list(present), len(present)
    for step in range(max(present, default=0) + 1, steps + 1):
        if step == steps or (save_every and step % save_every == 0):
            peak = max(peak, len(held) + 1)
            held.append(step)
            newest = held[-keep:]  # with keep = 0 all of them
            held = [step for step in held if step in newest or (keep_every and step % keep_every == 0)]
    return peak, len(held)


# ------------------------------------------------------------------------------------------------ in words


def report(findings: Iterable[Finding], width: int = 120) -> str:
    """The findings as aligned lines for the console."""
    lines = []
    for finding in findings:
        head = f"{finding.level:<7}  {finding.about:<8}  "
        lines.append(
            textwrap.fill(
                finding.text,
                width,
                initial_indent=head,
                subsequent_indent=" " * len(head),
                break_on_hyphens=False,
                break_long_words=False,
            )
        )
    return "\n".join(lines)
