"""One real training step of the demo in numbers: the tables and blocks of docs/one_step.md.

    python scripts/one_step.py              # writes them anew; the words between them are written by hand
    python scripts/one_step.py --check      # exit code 1, and a diff, where the page says otherwise

`train.train` runs as it always does, and three of its functions are wrapped to note their arguments and results. What
is worked out here beside that is asserted to be what the step computed.
"""

import argparse
import contextlib
import copy
import difflib
import json
import math
import re
import sys
import tempfile
from decimal import Decimal
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import train  # noqa: E402
from tooln1.batch import pack  # noqa: E402
from tooln1.config import Config, load_config  # noqa: E402
from tooln1.distributed import launch  # noqa: E402
from tooln1.model import sequence_logits  # noqa: E402
from tooln1.prompt import parse_reply  # noqa: E402
from tooln1.rewards import fault_of  # noqa: E402
from tooln1.update import batch_logprobs  # noqa: E402

PAGE = ROOT / "docs" / "one_step.md"
SETTINGS = "--prompts-per-step 4 --prompts-per-minibatch 2 --group-size 4 --steps 1 --seed 14"
ALONE = "--device cpu --threads 1 --eval-data= --eval-before-training false --save-every 0"
STRING, RIGHT = 0, 3  # rows of two replies of group 0: a number written as a string, and the right one
FRACTION = re.compile(r"(-?\d+\.\d+(?:e[+-]\d+)?)")


# ------------------------------------------------------------------------------------------------ the step


def config_of(run_dir: Path) -> Config:
    """The demo's settings at the page's size."""
    return load_config([*SETTINGS.split(), *ALONE.split(), "--run-dir", str(run_dir)], train.DEFAULT)


class Step:
    """A step of train.py: what went in and out of its functions; the policy before, between and after its updates."""

    def __init__(self):
        calls, self.policies = {"sample_groups": [], "group_advantages": [], "optimizer_step": []}, []

        def noting(name, function):
            def wrapped(*args, **kwargs):
                if name == "optimizer_step":
                    self.policies.append(copy.deepcopy(args[0]))
                calls[name].append((args, function(*args, **kwargs)))
                return calls[name][-1][1]

            return wrapped

        wrapped = {name: noting(name, getattr(train, name)) for name in calls}
        quiet, patched = contextlib.redirect_stdout(sys.stderr), patch.multiple(train, **wrapped)
        with tempfile.TemporaryDirectory() as folder, launch("cpu") as world, quiet, patched:
            train.train(config_of(Path(folder)), world)
        (((self.run, _, metrics), (self.examples, self.rollouts, self.texts, self.rewards)),) = calls["sample_groups"]
        ((_, self.advantages),) = calls["group_advantages"]
        self.metrics, self.policies = metrics.reduced(), [*self.policies, self.run.policy]
        everything = pack(self.rollouts, range(len(self.rollouts)), self.advantages)
        with torch.no_grad():  # by each policy, of each reply's tokens
            passes = [batch_logprobs(policy, everything, 1.0, 1024)[0] for policy in self.policies]
        self.logprobs = [logprobs.split(list(everything.lengths)) for logprobs in passes]
        self.batches = [args[2][0] for args, _ in calls["optimizer_step"]]  # one micro-batch each
        self.results = [result for _, result in calls["optimizer_step"]]

    def equation_3(self, update: int) -> dict[str, torch.Tensor]:
        """Of each reply token of an update, [N]: its row and the columns of the page, without the help of grpo.py."""
        batch, result, config = self.batches[update], self.results[update], self.run.config
        rows = torch.tensor(batch.rows).repeat_interleave(torch.tensor(batch.lengths))
        new, advantage = torch.cat([self.logprobs[update][row] for row in batch.rows]), self.advantages[rows]
        old = new if batch.old_logprobs is None else batch.old_logprobs
        ratio, d = (new - old).exp(), batch.ref_logprobs - new
        clipped, k3 = ratio.clamp(1 - config.clip_low, 1 + config.clip_high), d.exp() - d - 1
        loss = torch.maximum(-ratio * advantage, -clipped * advantage) + 0.0  # no -0
        assert math.isclose(loss.sum(), result.sums["policy_loss"][0], abs_tol=1e-3)
        assert math.isclose(k3.sum(), result.sums["kl"][0], abs_tol=1e-4)
        assert math.isclose((loss + config.kl_coef * k3).mean(), result.loss, abs_tol=1e-5)
        assert update or ((ratio == 1).all() and not k3.any())
        columns = {
            "row": rows,
            "A": advantage,
            "log π_old": old,
            "log π": new,
            "ρ": ratio,
            "clip(ρ)": clipped,
            "L": loss,
        }
        return columns | {"log π_ref": batch.ref_logprobs, "k3": k3}

    def alike(self) -> list[list[int]]:
        """The rows of all replies; those of one group with the same text together."""
        same = {}
        for row, rollout in enumerate(self.rollouts):
            same.setdefault((rollout.group, self.texts[row]), []).append(row)
        return list(same.values())

    def name(self, *rows: int) -> str:
        return ", ".join(f"{self.rollouts[row].group}.{self.rollouts[row].sample}" for row in rows)

    def token(self, token: int) -> str:
        return f"`{self.run.tokenizer.decode([token])!r}`"


# ------------------------------------------------------------------------------------------------ the blocks


def table(*rows) -> str:
    """Rows of cells, the first one the titles; fractions with four digits."""
    cells = [
        [f"{cell:.4f}" if isinstance(cell, float) else str(cell).replace("|", "\\|") for cell in row] for row in rows
    ]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def code(*lines: str) -> str:
    return "\n".join(["```", *lines, "```"])


def calls_of(calls: list[dict]) -> str:
    return " and ".join(f"`{call['name']} {json.dumps(call['arguments'])}`" for call in calls)


def example(step: Step) -> str:
    first = step.examples[0]
    tools = ", ".join(f"`{tool['name']}({', '.join(tool['parameters'])})`" for tool in first.tools)
    asked = ("user", first.messages[0]["content"])
    return table(("id", f"`{first.id}`"), asked, ("candidate tools", tools), ("answer", calls_of(first.answer)))


def prompt(step: Step) -> str:
    ids, decode = step.rollouts[0].prompt, step.run.tokenizer.decode
    lines = [line if len(line) < 100 else line[:96] + " ..." for line in decode(ids).splitlines() if line]
    last = "  ".join(f"{token} {decode([token])!r}" for token in ids[-6:])
    size = f"({len(decode(ids)):,} characters, {len(ids)} tokens; the last: {last})"
    return code(*lines[:2], "...", *lines[7:11], "...", *lines[-4:], size)


def reply(step: Step) -> str:
    tokens = zip(step.rollouts[RIGHT].reply, map(math.exp, step.rollouts[RIGHT].logprobs), strict=True)
    unsure = [(i, step.token(token), p) for i, (token, p) in enumerate(tokens) if p < 0.97]
    return table(("place", "token", "π"), *unsure)


def rewards(step: Step) -> str:
    rows = []
    for row, *others in step.alike():
        rollout, text = step.rollouts[row], step.texts[row]
        fault = fault_of(text, step.examples[rollout.group].answer).replace("_", " ")
        calls = calls_of(parse_reply(text).calls)
        rows.append((step.name(row, *others), calls, len(rollout.reply), int(step.rewards[row]), fault))
    return table(("replies", "calls", "tokens", "r", "fault"), *rows)


def advantages(step: Step) -> str:
    rows = []
    for group in range(len(step.examples)):
        r, advantage = step.rewards.view(4, 4)[group], step.advantages.view(4, 4)[group]
        numbers = ", ".join(f"{x:.4f}" for x in advantage)
        rows.append((group, ", ".join(f"{x:.0f}" for x in r), r.mean().item(), r.std().item(), numbers))
    return table(("group", "r", "mean r", "std r", "A"), *rows)


def stream(step: Step) -> str:
    batch = step.batches[0]
    (_, size, (first, *_)), (second, *_) = batch.segments
    places = [(0, "prompt of group 0 begins"), (size - 1, "prompt of group 0 ends"), (size, "reply 0.0 begins")]
    places += [(size + first - 1, "reply 0.0 ends"), (size + first, "reply 0.1 begins")]
    places += [(second - 1, "reply 0.3 ends"), (second, "prompt of group 1 begins")]
    rows = [(i, int(batch.positions[i]), step.token(batch.tokens[i]), what) for i, what in places]
    return table(("index", "position", "token", ""), *rows)


def shapes(step: Step) -> str:
    batch, lines = step.batches[0], []
    sizes = {name: len(value) for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    for symbol, size in zip("TNR", (len(batch.tokens), len(batch.targets), len(batch.rows)), strict=True):
        lines.append(f"[{symbol} = {size}]".ljust(12) + ", ".join(name for name in sizes if sizes[name] == size))
    apart = sum(len(step.rollouts[row].prompt) for row in batch.rows) + len(batch.targets)
    return code(*lines, f"lengths     {batch.lengths}", f"T would be {apart:,} if each reply had a prompt of its own")


def logits(step: Step) -> str:
    right, other = step.rollouts[RIGHT].reply, step.rollouts[STRING].reply
    place = next(i for i, (one, two) in enumerate(zip(right, other, strict=True)) if one != two)
    z = sequence_logits(step.policies[0], step.rollouts[RIGHT].prompt + right[:place])[-1]
    rows, total, index = [], z.logsumexp(0), sum(step.batches[0].lengths[:RIGHT]) + place
    found = step.batches[0].sampler_logprobs, step.equation_3(0)["log π_old"], step.batches[0].ref_logprobs
    for token in z.topk(3).indices.tolist():
        by_hand = (z[token] - total).item()
        others = [values[index].item() if token == right[place] else "" for values in found]
        assert all(math.isclose(value, by_hand, abs_tol=1e-4) for value in others if value)
        rows.append((step.token(token), f"{z[token]:.3f} − {total:.3f} =", by_hand, math.exp(by_hand), *others))
    return table(("token", "z − log Σ exp z", "log π", "π", "sampler", "update", "reference"), *rows)


def first_update(step: Step) -> str:
    batch, _ = step.batches[0], step.equation_3(0)
    terms = [f"{-a:.1f} · {n}" for a, n in zip(batch.advantages.tolist(), batch.lengths, strict=True)]
    return code(f"loss = ({' + '.join(terms)}) / {len(batch.targets)} = {step.results[0].loss:.4f}")


def weights(step: Step) -> str:
    vectors, rows = [torch.cat([p.detach().flatten() for p in policy.parameters()]) for policy in step.policies], []
    for update, result in enumerate(step.results):
        change = (vectors[update + 1] - vectors[update]).abs()
        moved = (f"{change.median():.2e}", f"{change.max():.2e}")
        rows.append((update + 1, f"{result.grad_norm:.3g}", f"{step.metrics['learning_rate']:.0e}", *moved))
    return table(("update", "gradient norm", "learning rate", "change of a weight, median", "largest"), *rows)


def second_update(step: Step) -> str:
    columns, rows = step.equation_3(1), []
    for row in (same[0] for same in step.alike() if same[0] in step.batches[1].rows):
        mine = (columns["row"] == row).nonzero()[:, 0]
        i = mine[(columns["log π"] - columns["log π_old"])[mine].abs().argmax()]
        numbers = [values[i].item() for name, values in columns.items() if name != "row"]
        rows.append((step.name(row), step.token(step.batches[1].targets[i]), *numbers))
    return table(("reply", "token", *list(columns)[1:]), *rows)


def second_loss(step: Step) -> str:
    columns, result = step.equation_3(1), step.results[1]
    loss, k3, clipped, n = columns["L"].sum(), columns["k3"].sum(), *map(int, result.sums["clip_fraction"])
    return code(
        f"loss = (Σ L + β Σ k3) / N = ({loss:.4f} + 0.001 · {k3:.4f}) / {n} = {result.loss:.6f}",
        f"the clip took away the gradient of {clipped} of {n} tokens",
    )


def probabilities(step: Step) -> str:
    rows = [
        (step.name(*same), step.advantages[same[0]].item(), *(by[same[0]].sum().exp().item() for by in step.logprobs))
        for same in step.alike()
    ]
    return table(("replies", "A", "before", "after update 1", "after update 2"), *rows)


def metrics(step: Step) -> str:
    names = ("reward", "loss", "kl", "clip_fraction", "grad_norm", "entropy", "zero_variance_fraction")
    return table([f"`{name}`" for name in names], [f"{step.metrics[name]:.3g}" for name in names])


BLOCKS = (example, prompt, reply, rewards, advantages, stream, shapes, logits, first_update, weights, second_update)
BLOCKS += (second_loss, probabilities, metrics)


# ------------------------------------------------------------------------------------------------ the page


def filled(page: str, step: Step) -> str:
    """The page with its blocks, each from the comment with its name to the next empty line, written anew."""
    for block in BLOCKS:
        text = f"<!-- {block.__name__} -->\n{block(step)}\n"
        page, found = re.subn(rf"<!-- {block.__name__} -->\n(.+\n)*", lambda _, text=text: text, page)
        assert found == 1, f"{PAGE} has {found} comments {block.__name__}"
    return page


def agree(page: str, other: str) -> bool:
    """Whether two pages say the same: fractions within 1% or a unit of the last digit (at most 1e-4), else exactly."""
    ours, theirs = FRACTION.split(page), FRACTION.split(other)
    pairs = enumerate(zip(ours, theirs, strict=False))
    return len(ours) == len(theirs) and all(_close(a, b) if i % 2 else a == b for i, (a, b) in pairs)


def _close(a: str, b: str) -> bool:
    last_digit = 10.0 ** Decimal(a).as_tuple().exponent
    return math.isclose(float(a), float(b), rel_tol=0.01, abs_tol=1.01 * min(1e-4, last_digit))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with the page, write nothing")
    check, page = parser.parse_args().check, PAGE.read_text(encoding="utf-8")
    now = filled(page, Step())
    if not check:
        PAGE.write_text(now, encoding="utf-8")
    elif not agree(page, now):
        sys.exit("\n".join(difflib.unified_diff(page.splitlines(), now.splitlines(), str(PAGE), "now", lineterm="")))


if __name__ == "__main__":
    main()
