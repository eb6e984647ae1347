"""The supervised baselines: imitate a written reply, on the same packed batches as reinforcement learning.

`Example.reply` is the text to imitate, without the stop token. An example without one is answered by its gold calls
alone, which is the paper's SFT without reasoning (Table 3, "no-reason SFT").
"""

from collections.abc import Callable, Sequence

from tooln1.data import Example, Rollout
from tooln1.io.errors import UserError
from tooln1.io.jsonl import shown
from tooln1.prompt import format_reply
from tooln1.tokenizer import Tokenizer


def target_text(example: Example) -> str:
    """The reply to imitate."""
    return format_reply(example.answer) if example.reply is None else example.reply


def demonstrations(
    examples: Sequence[Example], tokenizer: Tokenizer, messages: Callable[[Example], list[dict]]
) -> list[Rollout]:
    """The examples as rollouts to imitate, each a group of its own. messages: gives the prompt of an example."""
    rollouts = []
    for group, example in enumerate(examples):
        asked = messages(example)
        try:
            prompt, target = _tokens(asked, target_text(example), tokenizer)
        except UserError as error:
            raise UserError(f"example {shown(example.id)}: {error}") from error
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
