"""The rollout engine's bookkeeping, without a model: tokens come from a table, the cache records who wrote what."""

import random

import pytest

from tooln1.sampler.scheduler import Group, PagePool, Row, Scheduler

STOP = 7


class Machine:
    """Runs steps on plain lists: a place of the cache holds the token whose key and value would lie there.

    Each reply is fixed beforehand, so whatever the schedule, every row must come out with its own. What a row reads
    must be its own context, which a page shared or reused too early would not hold.
    """

    def __init__(self, prompts, replies, caps, *, pages, size, slots, budget, lookahead=0):
        self.replies, self.lookahead = replies, lookahead
        self.groups = [Group(number, prompt) for number, prompt in enumerate(prompts)]
        for group in self.groups:
            rows = range(len(replies[group.number]))
            group.rows = [Row(group, sample, caps[group.number][sample]) for sample in rows]
        self.pool = PagePool(pages, size)
        self.scheduler = Scheduler(self.groups, self.pool, slots, budget)
        self.cache = [[None] * size for _ in range(pages + 1)]
        self.newest = {}  # slot -> token
        self.peak_rows, self.starts = 0, []

    def run(self):
        results = []
        while self.scheduler.unfinished:
            step = self.scheduler.schedule()
            if step:
                results.append((step.draws, self.compute(step)))
            assert step or results, "nothing can run and nothing is on its way"
            while len(results) > (self.lookahead if step else 0):
                rows, tokens = results.pop(0)
                self.scheduler.postprocess(rows, tokens, [-1.0] * len(tokens), {STOP})
            self.check_pages()
        return {(row.group.number, row.sample): row.reply for group in self.groups for row in group.rows}

    def compute(self, step):
        size = self.pool.page_size
        for source, target in step.copies:
            self.cache[target] = list(self.cache[source])
        self.newest.update(step.known)
        assert sum(span.count for span in step.spans) <= self.scheduler.budget
        for span in step.spans:  # all are written before any is read
            self.write(span.row, span.start, span.row.tokens(span.start, span.count))
            self.starts.append(span.start)
        for row in step.rows:
            self.write(row, row.cached - 1, [self.newest[row.slot]])
        for row in [*step.rows, *(span.row for span in step.spans)]:
            whole = row.group.prompt + self.replies[row.group.number][row.sample]
            seen = [self.cache[row.pages[i // size]][i % size] for i in range(row.cached)]
            assert seen == whole[: row.cached], "a row does not see its own context"
        tokens = [self.replies[row.group.number][row.sample][row.drawn - 1] for row in step.draws]
        self.newest.update({row.slot: token for row, token in zip(step.draws, tokens, strict=True) if row.slot >= 0})
        self.peak_rows = max(self.peak_rows, len(step.rows))
        return tokens

    def write(self, row, start, tokens):
        for i, token in enumerate(tokens, start):
            self.cache[row.pages[i // self.pool.page_size]][i % self.pool.page_size] = token

    def check_pages(self):
        """Every page has exactly the users that the rows and groups know of."""
        users = [0] * (self.pool.pages + 1)
        for group in self.groups:
            for page in [*group.held, *(page for row in group.rows for page in row.pages)]:
                users[page] += 1
        assert users == self.pool.users and users[0] == 0
        assert sorted(self.pool.free) == [page for page in range(1, len(users)) if not users[page]]


def problem(seed, groups=6, size=4):
    """Random prompts and, for each, replies that end at the cap or with a stop token; five tokens more lie behind."""
    rng = random.Random(seed)
    prompts = [[rng.randrange(100, 999) for _ in range(rng.randint(1, 4 * size))] for _ in range(groups)]
    replies, caps = [], []
    for _ in prompts:
        lengths = [rng.randint(1, 5 * size) for _ in range(size)]
        stops = [rng.random() < 0.6 for _ in lengths]
        replies.append(
            [
                [rng.randrange(100, 999) for _ in range(n - stop)] + [STOP] * stop + [rng.randrange(100, 999)] * 5
                for n, stop in zip(lengths, stops, strict=True)
            ]
        )
        caps.append([n + 3 * stop for n, stop in zip(lengths, stops, strict=True)])
    return prompts, replies, caps


def wanted(replies, caps):
    def until_stop(reply, cap):
        return reply[: min(cap, reply.index(STOP) + 1 if STOP in reply else cap)]

    return {(g, s): until_stop(reply, caps[g][s]) for g, group in enumerate(replies) for s, reply in enumerate(group)}


@pytest.mark.parametrize("lookahead", [0, 1, 3])
@pytest.mark.parametrize(
    "pages,slots,budget", [(500, 99, 1000), (500, 1, 1000), (500, 5, 3), (11, 24, 1000), (11, 3, 5)]
)
def test_every_schedule_gives_every_row_its_own_context_and_reply(pages, slots, budget, lookahead):
    for seed in range(20):
        prompts, replies, caps = problem(seed)
        machine = Machine(prompts, replies, caps, pages=pages, size=4, slots=slots, budget=budget, lookahead=lookahead)
        assert machine.run() == wanted(replies, caps)
        stats = machine.scheduler.stats
        assert stats.prefilled == sum(map(len, prompts))
        assert len(machine.pool.free) == pages and machine.peak_rows <= slots
        if pages == 500:
            assert stats.preemptions == stats.recomputed == 0
        assert stats.peak_pages <= pages


def test_a_small_pool_puts_the_youngest_row_back():
    prompts, replies = [[100] * 4, [200] * 4], [[[300] * 12], [[400] * 12]]
    machine = Machine(prompts, replies, [[12], [12]], pages=5, size=4, slots=2, budget=99)
    assert machine.run() == {(0, 0): [300] * 12, (1, 0): [400] * 12}
    assert machine.scheduler.stats.preemptions == 1
    # the second had 4 + 5 tokens in 2 pages and one being drawn when the first needed its third page
    assert 4 < machine.scheduler.stats.recomputed <= 12


def test_pages_held_for_rows_to_come_are_given_up_when_nothing_else_can_run():
    machine = Machine([[100, 101]], [[[300], [400, 401]]], [[1, 2]], pages=1, size=4, slots=2, budget=9)
    assert machine.run() == {(0, 0): [300], (0, 1): [400, 401]}


def test_a_row_that_returns_shares_its_siblings_prompt_again():
    """Three rows on a prompt of two pages: what is put back returns behind the prompt that the eldest still holds."""
    caps = [[20, 10, 20]]
    replies = [[[300 + sample] * cap for sample, cap in enumerate(caps[0])]]
    machine = Machine([[100] * 8], replies, caps, pages=9, size=4, slots=3, budget=99)
    assert machine.run() == wanted(replies, caps)
    assert machine.scheduler.stats.preemptions == 2
    assert machine.starts == [0, 8, 0]  # the second time nobody holds it any more


def test_full_pages_are_shared_and_only_the_half_filled_one_is_copied():
    prompt = list(range(100, 110))  # 2½ pages
    machine = Machine([prompt], [[[200 + s] * 9 for s in range(5)]], [[9] * 5], pages=50, size=4, slots=5, budget=99)
    scheduler = machine.scheduler
    first = scheduler.schedule()
    assert [(span.start, span.count, len(span.draws)) for span in first.spans] == [(0, 10, 5)]
    scheduler.postprocess(first.draws, machine.compute(first), [0.0] * 5, {STOP})
    second = scheduler.schedule()
    tables = [row.pages for row in machine.groups[0].rows]
    assert all(table[:2] == tables[0][:2] for table in tables)
    assert len({table[2] for table in tables}) == 5
    assert second.copies == [(tables[0][2], table[2]) for table in tables[1:]]
    assert len(second.rows) == 5 and scheduler.stats.prefilled == 10
    machine.compute(second)


def peak_by_formula(prompts, lengths, size):
    """Most pages in use when all replies grow in step: a group's full pages once, each row's others."""

    def pages(tokens):
        return -(-tokens // size)

    peak = 0
    for t in range(1, max(max(group) for group in lengths)):  # the row's newest token t is being written
        used = 0
        for prompt, group in zip(prompts, lengths, strict=True):
            alive = sum(length > t for length in group)
            used += (len(prompt) // size) * (alive > 0) + alive * (pages(len(prompt) + t) - len(prompt) // size)
        peak = max(peak, used)
    return max(peak, sum(pages(len(prompt)) for prompt in prompts))


@pytest.mark.parametrize("seed", range(5))
def test_peak_pages_are_what_the_sharing_formula_says(seed):
    prompts, replies, caps = problem(seed, groups=5)
    lengths = [[len(wanted(replies, caps)[g, s]) for s in range(len(group))] for g, group in enumerate(replies)]
    machine = Machine(prompts, replies, caps, pages=500, size=4, slots=99, budget=10_000)
    machine.run()
    assert machine.scheduler.stats.peak_pages == peak_by_formula(prompts, lengths, 4)


def test_the_scheduler_touches_no_tensor():
    import tooln1.sampler.scheduler as module

    assert "torch" not in vars(module) and "numpy" not in vars(module)
