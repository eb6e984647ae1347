"""The scheduler without a model: sampled tokens come from a table, the cache records which token wrote each place."""

import random

import pytest

from tooln1.sampler.scheduler import BlockManager, Scheduler, Sequence, SequenceGroup

STOP = 7


class Machine:
    """Runs steps on plain lists: a place of the cache holds the token whose key and value would be there.

    Every reply is fixed beforehand, so whatever the schedule, each sequence must end with its own. What a sequence
    reads must be its own context, which a block that is shared or reused too early would not hold.
    """

    def __init__(self, prompts, replies, limits, *, num_blocks, size=4, max_num_seqs, max_prefill=1000, lookahead=0):
        self.replies, self.lookahead, self.size = replies, lookahead, size
        self.groups = [SequenceGroup(i, prompt) for i, prompt in enumerate(prompts)]
        for group in self.groups:
            for sample, limit in enumerate(limits[group.index]):
                group.seqs.append(Sequence(group, 100 * group.index + sample, sample, limit))
        self.blocks = BlockManager(num_blocks, size)
        self.scheduler = Scheduler(self.groups, self.blocks, max_num_seqs, max_prefill, {STOP})
        self.cache = [[None] * size for _ in range(num_blocks + 1)]
        self.last_tokens = {}
        self.peak_seqs, self.starts = 0, []

    def run(self):
        results = []
        while self.scheduler.num_unfinished:
            step = self.scheduler.schedule()
            if step:
                results.append((step.seqs, self.compute(step)))
            assert step or results, "nothing can run and no result is expected"
            while len(results) > (self.lookahead if step else 0):
                seqs, tokens = results.pop(0)
                self.scheduler.postprocess(seqs, tokens, [-1.0] * len(tokens))
            self.check_ref_counts()
        return {(seq.group.index, seq.sample): seq.reply for group in self.groups for seq in group.seqs}

    def compute(self, step):
        for source, target in step.copies:
            self.cache[target] = list(self.cache[source])
        for seq, start, _ in step.prefills:  # all are written before any is read
            self.write(seq, start, seq.token_ids[start:])
            self.starts.append(start)
        decoding = [] if step.prefills else step.seqs
        for seq in decoding:
            self.write(seq, seq.num_cached_tokens - 1, [self.last_tokens[seq.index]])
        for seq in decoding or [prefill.seq for prefill in step.prefills]:
            context = (seq.group.prompt + self.reply(seq))[: seq.num_cached_tokens]
            seen = [self.cache[seq.block_table[i // self.size]][i % self.size] for i in range(len(context))]
            assert seen == context, "a sequence does not see its own context"
        tokens = [self.reply(seq)[seq.num_sampled - 1] for seq in step.seqs]
        self.last_tokens.update({seq.index: token for seq, token in zip(step.seqs, tokens, strict=True)})
        self.peak_seqs = max(self.peak_seqs, len(self.scheduler.running))
        return tokens

    def reply(self, seq):
        return self.replies[seq.group.index][seq.sample]

    def write(self, seq, start, tokens):
        for i, token in enumerate(tokens, start):
            self.cache[seq.block_table[i // self.size]][i % self.size] = token

    def check_ref_counts(self):
        expected = [0] * (self.blocks.num_blocks + 1)
        for group in self.groups:
            for block in [*group.prompt_blocks, *(block for seq in group.seqs for block in seq.block_table)]:
                expected[block] += 1
        assert expected == self.blocks.ref_count and expected[0] == 0
        assert sorted(self.blocks.free_blocks) == [block for block in range(1, len(expected)) if not expected[block]]


def problem(seed, groups=6, size=4):
    """Random prompts and replies that end at the limit or with a stop token; five more tokens follow in the table."""
    rng = random.Random(seed)
    prompts = [[rng.randrange(100, 999) for _ in range(rng.randint(1, 4 * size))] for _ in range(groups)]
    replies, limits = [], []
    for _ in prompts:
        lengths = [rng.randint(1, 5 * size) for _ in range(size)]
        stops = [rng.random() < 0.6 for _ in lengths]
        ends = [[STOP] * stop + [rng.randrange(100, 999)] * 5 for stop in stops]
        tokens = [[rng.randrange(100, 999) for _ in range(n - stop)] for n, stop in zip(lengths, stops, strict=True)]
        replies.append([reply + end for reply, end in zip(tokens, ends, strict=True)])
        limits.append([n + 3 * stop for n, stop in zip(lengths, stops, strict=True)])
    return prompts, replies, limits


def expected_replies(replies, limits):
    def cut(reply, limit):
        return reply[: min(limit, reply.index(STOP) + 1 if STOP in reply else limit)]

    return {(g, s): cut(reply, limits[g][s]) for g, group in enumerate(replies) for s, reply in enumerate(group)}


@pytest.mark.parametrize("lookahead", [0, 1, 3])
@pytest.mark.parametrize(
    "num_blocks,max_num_seqs,max_prefill", [(500, 99, 1000), (500, 1, 1000), (500, 5, 3), (11, 24, 1000), (11, 3, 5)]
)
def test_every_schedule_gives_each_sequence_its_own_context_and_reply(num_blocks, max_num_seqs, max_prefill, lookahead):
    for seed in range(20):
        prompts, replies, limits = problem(seed)
        room = dict(num_blocks=num_blocks, max_num_seqs=max_num_seqs, max_prefill=max_prefill, lookahead=lookahead)
        machine = Machine(prompts, replies, limits, **room)
        assert machine.run() == expected_replies(replies, limits)
        stats = machine.scheduler.stats
        assert stats.prefilled == sum(map(len, prompts))
        assert len(machine.blocks.free_blocks) == num_blocks and machine.peak_seqs <= max_num_seqs
        if num_blocks == 500:
            assert stats.preemptions == stats.recomputed == 0


def test_the_youngest_sequence_is_preempted_when_no_block_is_free():
    prompts, replies = [[100] * 4, [200] * 4], [[[300] * 12], [[400] * 12]]
    machine = Machine(prompts, replies, [[12], [12]], num_blocks=5, max_num_seqs=2)
    assert machine.run() == {(0, 0): [300] * 12, (1, 0): [400] * 12}
    assert machine.scheduler.stats.preemptions == 1
    # the second had 4 + 5 tokens in 2 blocks when the first needed its third block
    assert 4 < machine.scheduler.stats.recomputed <= 12


def test_a_preempted_sequence_shares_its_siblings_prompt_again():
    limits = [[20, 10, 20]]
    replies = [[[300 + sample] * limit for sample, limit in enumerate(limits[0])]]
    machine = Machine([[100] * 8], replies, limits, num_blocks=9, max_num_seqs=3)
    assert machine.run() == expected_replies(replies, limits)
    assert machine.scheduler.stats.preemptions == 2
    assert machine.starts == [0, 8, 0]  # the second time no sibling runs any more


def test_full_blocks_are_shared_and_only_the_partly_filled_one_is_copied():
    prompt = list(range(100, 110))  # 2½ blocks
    machine = Machine([prompt], [[[200 + s] * 9 for s in range(5)]], [[9] * 5], num_blocks=50, max_num_seqs=5)
    scheduler, seqs = machine.scheduler, machine.groups[0].seqs
    first = scheduler.schedule()
    assert first.prefills == [(seqs[0], 0, 5)] and first.seqs == seqs
    scheduler.postprocess(first.seqs, machine.compute(first), [0.0] * 5)
    second = scheduler.schedule()
    tables = [seq.block_table for seq in seqs]
    assert all(table[:2] == tables[0][:2] for table in tables)
    assert len({table[2] for table in tables}) == 5
    assert second.copies == [(tables[0][2], table[2]) for table in tables[1:]]
    assert second.seqs == seqs and scheduler.stats.prefilled == 10
