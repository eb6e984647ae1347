"""The supervised baselines: imitate a written reply, on the same packed batches as reinforcement learning.

A row is an `Example` with a field "reply": the text to imitate, without the stop token. A row without one is
answered by its gold calls alone, which is the paper's SFT without reasoning (Table 3, "no-reason SFT").
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tooln1.data import Example, checked_example
from tooln1.errors import UserError
from tooln1.jsonl import field, read_rows, shown
from tooln1.prompt import build_messages, format_reply
from tooln1.rollout import Rollout
from tooln1.tokenizer import Tokenizer


def read_pairs(path: str | Path) -> list[tuple[Example, str]]:
    """The examples of a JSONL file, each with the reply to imitate. Raises UserError as `read_examples` does."""
    pairs, seen = [], set()
    for where, row in read_rows(path):
        reply = field(row, "reply", str, where) if "reply" in row else None
        example = checked_example({key: value for key, value in row.items() if key != "reply"}, where, seen)
        pairs.append((example, format_reply(example.answer) if reply is None else reply))
    return pairs


def demonstrations(
    pairs: Sequence[tuple[Example, str]], tokenizer: Tokenizer, think: bool, on_prompt: bool
) -> list[Rollout]:
    """The pairs as rollouts to imitate, each a group of its own.

    With `on_prompt` the loss covers the prompt as well: everything behind the first token counts as the reply.
    """
    rollouts = []
    for group, (example, reply) in enumerate(pairs):
        try:
            prompt, target = _tokens(build_messages(example, think), reply, tokenizer)
        except UserError as error:
            raise UserError(f"example {shown(example.id)}: {error}") from error
        if on_prompt:
            prompt, target = prompt[:1], [*prompt[1:], *target]
        rollouts.append(Rollout(group, 0, prompt, target, [0.0] * len(target), True))
    return rollouts


def _tokens(messages: list[dict], reply: str, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Prompt and target ids; the model's own template says which stop token closes the reply."""
    before = tokenizer.render(messages, add_generation_prompt=True)
    after = tokenizer.render([*messages, {"role": "assistant", "content": reply}])
    if not after.startswith(before):
        raise UserError("the chat template does not begin a finished reply with its prompt; it cannot be imitated.")
    target = tokenizer.encode(after[len(before) :])
    stops = [i for i, token in enumerate(target) if token in tokenizer.stop_ids]
    if not stops:
        raise UserError("the chat template ends a reply with none of the stop ids in generation_config.json.")
    return tokenizer.encode(before), target[: stops[-1] + 1]
