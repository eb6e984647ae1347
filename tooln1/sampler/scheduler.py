"""Which reply runs when, and in which pages of the key/value cache: plain integers, no tensor is touched here.

    schedule       what to run next: prompts (and rows put back earlier) as one packed prefill, else one decode step
    postprocess    take in the drawn tokens; rows that have ended leave, and their places are free at once

A prompt of 2½ pages and its five replies; `=` is shared, `'` a copy of the half-filled page:

    prompt    [ p0 ][ p1 ][ p2  ]                       prefilled once
    reply 0   [ p0=][ p1=][ p2 ··][ ···· ]              goes on in the prompt's own last page
    reply 1   [ p0=][ p1=][ p2'··][ ···· ][ ·· ]
    reply 2   [ p0=][ p1=][ p2'· ]
    ...

Nothing is set aside for the cap on a reply: a row takes a page when it has filled the last one. When the pool is empty
the youngest row is put back; it keeps its tokens and computes their keys and values again when it returns.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field


class PagePool:
    """Counts who uses each page. Page 0 is never handed out: padding reads and writes there."""

    def __init__(self, pages: int, page_size: int):
        self.pages, self.page_size = pages, page_size
        self.free = list(range(pages, 0, -1))
        self.users = [0] * (pages + 1)
        self.peak = 0  # most pages ever in use at once

    def pages_for(self, tokens: int) -> int:
        """Pages that hold so many tokens."""
        return -(-tokens // self.page_size)

    def take(self, count: int) -> list[int]:
        """So many free pages, each with one user. The caller has made sure that there are enough."""
        taken = [self.free.pop() for _ in range(count)]
        self.share(taken)
        self.peak = max(self.peak, self.pages - len(self.free))
        return taken

    def share(self, pages: Iterable[int]) -> None:
        """One more user for each page."""
        for page in pages:
            self.users[page] += 1

    def give_back(self, pages: Iterable[int]) -> None:
        """One user less for each page; one that nobody uses is free."""
        for page in pages:
            self.users[page] -= 1
            if self.users[page] == 0:
                self.free.append(page)


@dataclass(eq=False)
class Group:
    """A prompt and the replies it is to have."""

    number: int  # which prompt of the call
    prompt: list[int]  # token ids
    rows: list[Row] = field(default_factory=list)
    held: list[int] = field(default_factory=list)  # the prompt's pages, kept for rows that have not started yet
    running: dict[Row, None] = field(default_factory=dict)  # rows with pages, the eldest first


@dataclass(eq=False)
class Row:
    """One reply on its way."""

    group: Group
    sample: int  # which of the group's replies
    cap: int  # most tokens it may have
    stream: int = 0  # of its random numbers
    reply: list[int] = field(default_factory=list)  # its tokens so far
    logprobs: list[float] = field(default_factory=list)
    drawn: int = 0  # tokens drawn, those included that have not come back from the device yet
    cached: int = 0  # tokens, of prompt and reply together, whose keys and values are in `pages`
    pages: list[int] = field(default_factory=list)
    slot: int = -1  # its place in the sampler's tables; -1: it has none, and no pages
    started: bool = False  # has had pages before
    done: bool = False
    finished: bool = False  # ended with a stop token

    @property
    def settled(self) -> bool:
        """Whether all its drawn tokens are known here."""
        return self.drawn == len(self.reply)

    @property
    def known(self) -> int:
        """Tokens of prompt and reply that are known here."""
        return len(self.group.prompt) + len(self.reply)

    def tokens(self, start: int, count: int) -> list[int]:
        """So many of its token ids from `start` on, counted from the prompt's first."""
        prompt = self.group.prompt
        return (prompt if start + count <= len(prompt) else prompt + self.reply)[start : start + count]


@dataclass(frozen=True)
class Span:
    """Tokens of one row that a prefill computes."""

    row: Row
    start: int  # position of the first
    count: int
    draws: list[Row]  # rows that draw their next token where the span ends: a group's all, one that returns, or none


@dataclass(frozen=True)
class Step:
    """What to run next: `copies` and `known` first, then the spans of a prefill or the rows of a decode step."""

    copies: list[tuple[int, int]] = field(default_factory=list)  # (from page, to page)
    known: list[tuple[int, int]] = field(default_factory=list)  # (slot, token): what a starting row goes on from
    spans: list[Span] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)

    @property
    def draws(self) -> list[Row]:
        """The rows that draw a token, in the order of the results."""
        return self.rows or [row for span in self.spans for row in span.draws]


@dataclass
class Stats:
    """What sampling took."""

    prefilled: int = 0  # prompt tokens computed for the first time
    recomputed: int = 0  # tokens computed once more for rows that were put back
    decoded: int = 0  # tokens computed one a row
    steps: int = 0  # decode steps
    preemptions: int = 0
    peak_pages: int = 0


class Scheduler:
    """Continuous batching over `slots` rows and the pages of `pool`; a prefill computes at most `budget` tokens.

    A group starts with its first row, which prefills the prompt; at its end every row of the group draws its first
    token. The others then start on the same pages. Rows start in order, and the youngest is the first to be put back.
    """

    def __init__(self, groups: Sequence[Group], pool: PagePool, slots: int, budget: int):
        self.pool, self.budget = pool, budget
        self.free_slots = list(range(slots - 1, -1, -1))
        self.waiting = deque(group.rows[0] for group in groups)
        self.prefilling: deque[Row] = deque()  # have pages, but not yet all their known tokens in them
        self.running: dict[Row, None] = {}  # draw one token a step, the eldest first
        self.holding: dict[Group, None] = {}  # keep their prompt's pages for rows that are to start
        self.unfinished = sum(len(group.rows) for group in groups)
        self.stats = Stats()

    # -------------------------------------------------------------------------------------------- schedule

    def schedule(self) -> Step | None:
        """The next step; None: nothing can run before the results of earlier ones are in, or nothing is left."""
        step = Step()
        budget = self.budget
        while budget:
            if self.prefilling:
                budget -= self._prefill(self.prefilling[0], budget, step)
            elif not (self.waiting and self._start(self.waiting[0], step)):
                break
        if not step.spans:
            for row in list(self.running):
                self._decode(row, step)
            self.stats.steps += bool(step.rows)
        self.stats.peak_pages = self.pool.peak
        return step if step.draws or step.spans else None

    def _start(self, row: Row, step: Step) -> bool:
        """Give the first of the waiting rows a slot and its pages; whether that could be."""
        pool, group, fresh = self.pool, row.group, row.drawn == 0
        expected = sum(_unstarted(other) for other in self.holding) if fresh else 0  # will need slots and pages soon
        if not row.settled or len(self.free_slots) <= expected:
            return False
        # Pages to leave free, lest the newcomer be put back at once: one for each row that runs or is about to. With
        # nobody running there is nobody to wait for.
        spare = expected + len(self.running) if self.running else 0
        while True:
            shared, cached, half = self._prompt_pages(group)
            need = pool.pages_for(row.known) - len(shared)
            if need + spare <= len(pool.free):
                break
            if self.running or not self.holding:
                return False
            self._release(next(reversed(self.holding)))
        pool.share(shared)
        row.pages = shared + pool.take(need)
        if half is not None:  # the first row writes on in that page: what it adds is behind what the copy may see
            step.copies.append((half, row.pages[len(shared)]))
        row.cached, row.slot, row.started = cached, self.free_slots.pop(), True
        group.running[row] = None
        self.waiting.popleft()
        if fresh and _unstarted(group):
            group.held = list(row.pages)
            pool.share(group.held)
            self.holding[group] = None
        if row.reply and row.known - row.cached == 1:
            step.known.append((row.slot, row.reply[-1]))
            self.running[row] = None
        else:
            self.prefilling.append(row)
        self._release_if_all_started(group)
        return True

    def _prompt_pages(self, group: Group) -> tuple[list[int], int, int | None]:
        """Pages of the group's prompt that another row may share, the tokens they save it, and a half-filled page."""
        prompt, size = len(group.prompt), self.pool.page_size
        full = prompt // size
        if group.held:
            return group.held[:full], prompt, group.held[full] if prompt % size else None
        if group.running:
            return next(iter(group.running)).pages[:full], full * size, None
        return [], 0, None

    def _prefill(self, row: Row, budget: int, step: Step) -> int:
        """Add as much of the row's known tokens to the step as the budget allows; how many that is."""
        fresh, count = row.drawn == 0, min(budget, row.known - row.cached)
        draws = []
        if row.cached + count == row.known:
            self.prefilling.popleft()
            self.running[row] = None
            draws = row.group.rows if fresh else [row]
        step.spans.append(Span(row, row.cached, count, draws))
        row.cached += count
        for drawing in draws:
            drawing.drawn += 1
        if fresh:
            self.stats.prefilled += count
        else:
            self.stats.recomputed += count
        return count

    def _decode(self, row: Row, step: Step) -> None:
        """Let a running row draw one more token, if it may and if there is a page for it."""
        if row not in self.running or row.drawn >= row.cap:  # put back just now; its last token is on its way
            return
        if row.cached == len(row.pages) * self.pool.page_size:
            while not self.pool.free:
                if self.holding:
                    self._release(next(reversed(self.holding)))
                else:
                    self._put_back(youngest := next(reversed(self.running)))
                    if youngest is row:
                        return
            row.pages += self.pool.take(1)
        row.cached += 1
        row.drawn += 1
        step.rows.append(row)
        self.stats.decoded += 1

    def _put_back(self, row: Row) -> None:
        """Take the row's pages and slot; it waits to start again."""
        self._leave(row)
        self.waiting.appendleft(row)
        self.stats.preemptions += 1

    # -------------------------------------------------------------------------------------------- postprocess

    def postprocess(
        self, draws: Sequence[Row], tokens: Sequence[int], logprobs: Sequence[float], stops: Collection[int]
    ) -> list[Row]:
        """Append the drawn tokens to their rows; those that have ended with that, by a stop token or the cap."""
        ended, to_start = [], []
        for row, token, logprob in zip(draws, tokens, logprobs, strict=True):
            if row.done:  # it was computed once more before its stop token was seen
                continue
            row.reply.append(token)
            row.logprobs.append(logprob)
            row.finished = token in stops
            if row.finished or len(row.reply) == row.cap:
                self._end(row)
                ended.append(row)
            elif not row.started:
                to_start.append(row)
        self.waiting.extendleft(reversed(to_start))
        self.unfinished -= len(ended)
        return ended

    def _end(self, row: Row) -> None:
        row.done = True
        if row.slot >= 0:
            self._leave(row)
        elif row.started:  # it was put back with its last token on the way
            self.waiting.remove(row)
        self._release_if_all_started(row.group)

    def _leave(self, row: Row) -> None:
        self.pool.give_back(row.pages)
        self.free_slots.append(row.slot)
        row.pages, row.cached, row.slot = [], 0, -1
        self.running.pop(row)
        row.group.running.pop(row)

    def _release(self, group: Group) -> None:
        """Keep the prompt's pages no longer for rows to come; what running rows share of them stays."""
        self.pool.give_back(group.held)
        group.held = []
        self.holding.pop(group)

    def _release_if_all_started(self, group: Group) -> None:
        if group in self.holding and not _unstarted(group):
            self._release(group)


def _unstarted(group: Group) -> int:
    """Rows of the group that are yet to have their first page."""
    return sum(not (row.started or row.done) for row in group.rows)
