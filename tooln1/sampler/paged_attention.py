"""Attention over a paged key/value cache: prefill, and one new token per row in two forms that are asserted equal.

    PrefillAttention   packed spans of rows; a span that starts a row looks at itself, any other at its row's pages too
    GatheredPages      decoding by plain SDPA: rows that share pages form one small batch, so a shared page is read once
    FlexPages          decoding by FlexAttention on CUDA: the block mask's indices are the page table, nothing is copied

Like those of attention.py, each is a callable (layer, q [T, H, D], k [T, K, D], v [T, K, D]) -> [T, H, D].
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from tooln1.attention import attention, compiled_flex_attention


class PagedCache:
    """Keys and values of every layer in pages: [L, pages + 1, page_size, 2, K, D]; page 0 is scratch space.

    A token's key and value stand side by side, so that both are stored, gathered and copied at once. All places start
    finite (zero): attention weighs what a row may not see with 0, and 0 · NaN would still be NaN.
    """

    def __init__(self, layers: int, pages: int, page_size: int, kv_heads: int, head_dim: int, like: Tensor):
        self.pages, self.page_size = pages, page_size
        self.data = like.new_zeros((layers, pages + 1, page_size, 2, kv_heads, head_dim))

    def write(self, layer: int, places: Tensor, k: Tensor, v: Tensor) -> None:
        """Store k and v [T, K, D] at `places` [T], counted in tokens from the pool's begin."""
        self.data[layer].flatten(0, 1).index_copy_(0, places, torch.stack((k, v), dim=1))

    def read(self, layer: int, pages: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of the keys and values in `pages` [N, S], each [N, S · page_size, K, D]."""
        _, size, _, heads, dim = self.data[layer].shape
        flat = self.data[layer].view(self.pages + 1, -1)  # whole pages as rows: plain memory copies
        both = flat.index_select(0, pages.view(-1)).view(len(pages), pages.shape[1] * size, 2, heads, dim)
        return both[:, :, 0], both[:, :, 1]

    def places(self, layer: int) -> tuple[Tensor, Tensor]:
        """All keys and all values as they lie, each [places, K, D]."""
        return self.data[layer].flatten(0, 1).unbind(1)

    def copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole pages, (from, to), in all layers; no page is both."""
        source, target = torch.tensor(pairs, device=self.data.device).unbind(1)
        for layer in self.data:  # one by one: the copies of all layers at once may be large
            layer[target] = layer[source]


class PagedSpan(NamedTuple):
    """Tokens of one row in a packed prefill."""

    offset: int  # of the first in the stream
    count: int
    start: int  # position of the first in its row
    pages: list[int]  # the row's pages, up to the span's last token


class PrefillAttention:
    """Packed spans: their keys and values are stored at `places` [T], then each span looks at its row so far."""

    def __init__(self, cache: PagedCache, spans: Sequence[PagedSpan], places: Tensor):
        self.cache, self.places = cache, places
        self.spans = [
            (span, torch.tensor([span.pages], device=places.device) if span.start else None) for span in spans
        ]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.cache.write(layer, self.places, k, v)  # all of them first: a span may look at pages another one fills
        out = torch.empty_like(q)
        for (offset, count, start, _), pages in self.spans:
            own = slice(offset, offset + count)
            if pages is None:
                out[own] = attention(q[None, own], k[None, own], v[None, own], causal=True)[0]
                continue
            keys, values = (x[:, : start + count] for x in self.cache.read(layer, pages))
            seen = torch.ones(count, start + count, dtype=torch.bool, device=q.device).tril(start)
            out[own] = attention(q[None, own], keys, values, seen)[0]
        return out


# ------------------------------------------------------------------------------------------------ decoding


class GatheredPages:
    """Decoding by SDPA over copies of the pages, one batch of small matrices per family of rows.

    Rows with the same first page share their first `shared` pages: the family's pages are gathered once, the shared
    ones first, and a mask lets each row see those and its own:

                  shared      row 0       row 1
        row 0   x x x x x   x x x x .   . . . . .
        row 1   x x x x x   . . . . .   x x . . .

    `rows`: the page tables; `shared`: how many of its pages a row may share; `positions`: of the rows' new tokens.
    """

    def __init__(self, cache: PagedCache, rows: Sequence[list[int]], shared: Sequence[int], positions: Tensor):
        self.cache = cache
        last_pages = torch.tensor([pages[-1] for pages in rows], device=positions.device)
        self.places = last_pages * cache.page_size + positions % cache.page_size
        families = defaultdict(list)
        for row, pages in enumerate(rows):
            families[pages[0] if shared[row] else ~row].append(row)
        self.batches = [
            _Batch(cache, batch, rows, shared, positions)
            for batch in _alike(list(families.values()), rows, shared, cache.page_size)
        ]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.cache.write(layer, self.places, k, v)
        if len(self.batches) == 1 and self.batches[0].in_order:
            return self.batches[0](layer, q)
        out = torch.empty_like(q)
        for batch in self.batches:
            out[batch.rows] = batch(layer, q[batch.rows])
        return out


MOST_ROWS = 4  # of a family: a larger one is cut, because each row's pages are weighed against all of its rows
PADDING = 1024  # places of padding in a batch; beyond them another batch costs less


def _alike(families: list[list[int]], rows: Sequence[list[int]], shared: Sequence[int], size: int) -> list:
    """Batches of families, those of like size together, so that little of a batch is padding."""
    families = [family[i : i + MOST_ROWS] for family in families for i in range(0, len(family), MOST_ROWS)]
    pages = {family[0]: _pages_of(family, rows, shared) for family in families}
    batches, padding = [], PADDING
    for family in sorted(families, key=lambda family: -pages[family[0]]):
        padding += (pages[batches[-1][0][0]] - pages[family[0]]) * size if batches else 0
        if padding >= PADDING:
            batches.append([])
            padding = 0
        batches[-1].append(family)
    return batches


def _pages_of(family: list[int], rows: Sequence[list[int]], shared: Sequence[int]) -> int:
    return shared[family[0]] + sum(len(rows[row]) - shared[row] for row in family)


class _Batch:
    """N families of at most R rows and S pages each."""

    def __init__(self, cache, families, rows, shared, positions: Tensor):
        device, size = positions.device, cache.page_size
        most_rows = max(len(family) for family in families)
        most_pages = max(_pages_of(family, rows, shared) for family in families)
        pages = np.zeros((len(families), most_pages), dtype=np.int64)
        begins = np.zeros((len(families), most_pages), dtype=np.int64)  # position of each page's first place
        owner = np.full((len(families), most_pages), -2, dtype=np.int64)  # the row that sees it; -1 all, -2 none
        for n, family in enumerate(families):
            common = shared[family[0]]
            pages[n, :common], begins[n, :common] = rows[family[0]][:common], np.arange(common)
            owner[n, :common], filled = -1, common
            for r, row in enumerate(family):
                own = slice(filled, filled + len(rows[row]) - common)
                pages[n, own], begins[n, own] = rows[row][common:], np.arange(common, len(rows[row]))
                owner[n, own], filled = r, own.stop
        self.cache, self.pages = cache, torch.from_numpy(pages).to(device)
        order = [row for family in families for row in family]
        self.rows, self.in_order = torch.tensor(order, device=device), order == list(range(len(rows)))
        self.shape = (len(families), most_rows)
        self.place = None  # of each row in the padded batch; None: no family is short of rows
        if len(order) < len(families) * most_rows:
            place = [n * most_rows + r for n, family in enumerate(families) for r in range(len(family))]
            self.place = torch.tensor(place, device=device)
        position = self._padded(positions[self.rows]).view(self.shape)  # [N, R]
        owner, begins = (torch.from_numpy(x).to(device)[:, None] for x in (owner, begins))  # [N, 1, S]
        mine = (owner == -1) | (owner == torch.arange(most_rows, device=device)[:, None])  # [N, R, S]
        left = (position[..., None] - begins * size).masked_fill(~mine, -1)  # last place it sees in each page
        self.seen = (left[..., None] >= torch.arange(size, device=device)).flatten(2)  # [N, R, S · page_size]
        self.mask = None

    def _padded(self, x: Tensor) -> Tensor:
        if self.place is None:
            return x
        return x.new_zeros((self.shape[0] * self.shape[1], *x.shape[1:])).index_copy_(0, self.place, x)

    def __call__(self, layer: int, q: Tensor) -> Tensor:
        keys, values = self.cache.read(layer, self.pages)  # [N, S · page_size, K, D]
        (families, rows), (heads, dim), each = self.shape, keys.shape[2:], q.shape[1] // keys.shape[2]
        if self.mask is None:  # the same in every layer
            seen = self.seen.repeat_interleave(each, dim=1)[:, None]
            self.mask = torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill_(~seen, -torch.inf)
        # The H/K query heads of a key head stand beside the rows as that head's queries.
        grouped = self._padded(q).view(families, rows, heads, each, dim).transpose(2, 3)
        out = attention(grouped.reshape(families, rows * each, heads, dim), keys, values, self.mask)
        out = out.view(families, rows, each, heads, dim).transpose(2, 3)
        out = out.reshape(families * rows, -1, dim)  # [N · R, H, D]
        return out if self.place is None else out[self.place]


class FlexPages:
    """Decoding by FlexAttention over the pool itself: a row's blocks are the pages of its table.

    table, int [B, pages of the pool]: the row's pages in order, then anything; positions [B]: of the rows' new tokens.
    Compiled once per number of rows. Only what a page holds beyond the newest token is masked.
    """

    def __init__(self, cache: PagedCache, table: Tensor, positions: Tensor):
        size = cache.page_size
        newest = table.gather(1, (positions // size)[:, None])[:, 0]  # [B] the row's last page
        offset = positions % size
        self.cache, self.table, self.places = cache, table, newest * size + offset
        self.counts = (positions // size + 1).to(torch.int32)

        def seen(row: Tensor, head: Tensor, query: Tensor, place: Tensor) -> Tensor:
            return (place // size != newest[row]) | (place % size <= offset[row])

        self.seen = seen

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.cache.write(layer, self.places, k, v)
        keys, values = (x.transpose(0, 1)[None] for x in self.cache.places(layer))  # [1, K, places, D]
        # The H/K query heads of a key head stand as its queries: FlexAttention's own grouping wants a power of two.
        grouped = q.unflatten(1, (k.shape[1], -1))  # [B, K, H/K, D]
        mask = BlockMask.from_kv_blocks(
            self.counts[:, None, None],
            self.table[:, None, None],
            BLOCK_SIZE=(128, self.cache.page_size),
            mask_mod=self.seen,
            seq_lengths=(grouped.shape[2], keys.shape[2]),
            compute_q_blocks=False,
        )
        # Its own choice on Hopper is a single stage, which leaves memory waiting.
        options = {"BLOCK_N": min(64, self.cache.page_size), "num_stages": 3} if q.is_cuda else None
        return compiled_flex_attention()(grouped, keys, values, block_mask=mask, kernel_options=options).flatten(1, 2)
