"""Data-parallel sampling: prompts shared out over ranks by expected cost, all rollouts on every rank afterwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from tooln1.data import Rollout
from tooln1.distributed import World
from tooln1.io.errors import UserError
from tooln1.sampler.sampler import Sampler


def balance_by_cost(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Share out things of these costs: the costliest first, each to the rank that has the least so far."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    load = [0.0] * ranks
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = load.index(min(load))
        shares[rank].append(i)
        load[rank] += costs[i]
    return [sorted(share) for share in shares]


def generate_distributed(
    sampler: Sampler,
    world: World,
    prompts: list[list[int]],
    keys: list[int],
    group_size: int,
    max_new_tokens: int | list[int],
    on_finished: Callable[[Rollout], None] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    check: Callable[[], None] = lambda: None,
    **how,
) -> list[Rollout]:
    """`sampler.generate` with the prompts dealt over ranks; every rank gets all rollouts, in prompt order.

    max_new_tokens: one number, or one per prompt. on_finished: is handed each of this rank's own as soon as it ends.
    Ranks sample without waiting for each other; they meet when all replies are there. What the sampler refuses is a
    UserError here. `should_stop` ends a rank's sampling early; `check` is called on all ranks
    afterwards, and raises on all where one was stopped.
    """
    caps = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else max_new_tokens
    expected = [len(prompt) + group_size * cap for prompt, cap in zip(prompts, caps, strict=True)]
    mine = balance_by_cost(expected, world.size)[world.rank]  # like counts first, then lengths

    def of_all(rollout: Rollout) -> Rollout:
        return replace(rollout, group=mine[rollout.group])

    try:
        rollouts = sampler.generate(
            [prompts[i] for i in mine],
            keys=[keys[i] for i in mine],
            group_size=group_size,
            max_new_tokens=[caps[i] for i in mine],
            **how,
            on_finished=on_finished and (lambda rollout: on_finished(of_all(rollout))),
            should_stop=should_stop,
        )
    except ValueError as error:
        raise UserError(f"sampling: {error}") from error
    check()
    rollouts = world.gather([of_all(rollout) for rollout in rollouts])
    return sorted(rollouts, key=lambda rollout: (rollout.group, rollout.sample))
