"""Data-parallel sampling: prompts distributed over ranks by expected cost, all rollouts on every rank afterwards."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from tooln1.data import Rollout
from tooln1.distributed import World
from tooln1.io.errors import UserError
from tooln1.sampler.sampler import Sampler


def balance_by_cost(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Indices of `costs` for each rank: the costliest first, each to the rank with the least cost so far."""
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
    check: Callable[[], None] = lambda: None,
    **sampling,
) -> list[Rollout]:
    """`sampler.generate` with the prompts distributed over ranks; every rank returns all rollouts, in prompt order.

    max_new_tokens: one number, or one per prompt. check: called on all ranks after the sampling, for which they do not
    wait for each other; raises on all if one stopped. sampling: `on_finished`, `should_stop` and others, of this rank's
    prompts alone. Raises UserError for what the sampler refuses.
    """
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else max_new_tokens
    costs = [len(prompt) + group_size * limit for prompt, limit in zip(prompts, limits, strict=True)]
    mine = balance_by_cost(costs, world.size)[world.rank]
    try:
        rollouts = sampler.generate(
            [prompts[i] for i in mine],
            keys=[keys[i] for i in mine],
            group_size=group_size,
            max_new_tokens=[limits[i] for i in mine],
            **sampling,
        )
    except ValueError as error:
        raise UserError(f"sampling: {error}") from error
    check()
    rollouts = world.gather([replace(rollout, group=mine[rollout.group]) for rollout in rollouts])
    return sorted(rollouts, key=lambda rollout: (rollout.group, rollout.sample))
