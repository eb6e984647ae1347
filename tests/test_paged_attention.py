"""Decoding over pages: both forms equal plain attention over each row's own keys and values."""

import random

import pytest
import torch

from tooln1.attention import attention
from tooln1.sampler.paged_attention import FlexPages, GatheredPages, PagedCache, PagedSpan, PrefillAttention

HEADS, KV_HEADS, DIM, PAGES = 12, 2, 64, 40


def filled_cache(size):
    cache = PagedCache(1, PAGES, size, KV_HEADS, DIM, torch.zeros(1))
    cache.data.copy_(torch.randn(cache.data.shape, generator=torch.Generator().manual_seed(0)))
    return cache


def rows_of_pages(size, seed=0):
    """Two families of three and two rows, and three rows alone: (tables, pages shared, positions of the new tokens)."""
    rng = random.Random(seed)
    free = rng.sample(range(1, PAGES + 1), PAGES)
    tables, shared, positions = [], [], []
    for family, common in ((3, 4), (1, 0), (2, 1), (1, 2), (1, 0)):
        prompt = [free.pop() for _ in range(common)]
        for _ in range(family):
            tables.append(prompt + [free.pop() for _ in range(rng.randint(1, 3))])
            shared.append(common)
            positions.append((len(tables[-1]) - 1) * size + rng.randrange(size))
    order = rng.sample(range(len(tables)), len(tables))  # siblings need not be neighbours
    return [tables[i] for i in order], [shared[i] for i in order], torch.tensor([positions[i] for i in order])


def new_tokens(rows):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(rows, heads, DIM, generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS)]


def plain(cache, tables, positions, q):
    """Each row by itself: softmax over the places up to its new token."""
    out = []
    for row, table in enumerate(tables):
        keys, values = cache.data[0, table].flatten(0, 1)[: positions[row] + 1].unbind(1)
        out.append(attention(q[row][None, None], keys[None], values[None])[0, 0])
    return torch.stack(out)


@pytest.mark.parametrize("size", [4, 32])
def test_gathered_pages_equal_plain_attention(size):
    cache = filled_cache(size)
    tables, shared, positions = rows_of_pages(size)
    q, k, v = new_tokens(len(tables))
    out = GatheredPages(cache, tables, shared, positions)(0, q, k, v)
    newest = [table[p // size] for table, p in zip(tables, positions.tolist(), strict=True)]
    assert torch.equal(cache.data[0, newest, positions % size], torch.stack((k, v), 1))
    torch.testing.assert_close(out, plain(cache, tables, positions, q), atol=2e-6, rtol=0)


def test_a_large_family_is_cut_and_stays_the_same():
    cache = filled_cache(4)
    tables = [[1, 2, 3 + row] for row in range(11)]
    positions = torch.tensor([8 + row % 4 for row in range(11)])
    q, k, v = new_tokens(11)
    out = GatheredPages(cache, tables, [2] * 11, positions)(0, q, k, v)
    torch.testing.assert_close(out, plain(cache, tables, positions, q), atol=2e-6, rtol=0)


def test_flex_attention_over_the_page_table_equals_gathered_pages():
    size = 32
    caches = [filled_cache(size), filled_cache(size)]
    tables, shared, positions = rows_of_pages(size)
    q, k, v = new_tokens(len(tables))
    table = torch.zeros((len(tables), PAGES + 1), dtype=torch.int32)
    for line, pages in zip(table, tables, strict=True):
        line[: len(pages)] = torch.tensor(pages)
    try:
        with torch.inference_mode():
            fast = FlexPages(caches[0], table, positions)(0, q, k, v)
    except torch._inductor.exc.InductorError as error:  # there is no C++ compiler
        pytest.skip(f"torch.compile does not work here: {error}")
    slow = GatheredPages(caches[1], tables, shared, positions)(0, q, k, v)
    torch.testing.assert_close(fast, slow, atol=2e-6, rtol=0)
    assert torch.equal(caches[0].data, caches[1].data)


def test_a_prefill_in_spans_equals_one_causal_pass():
    """A sequence in chunks of 5, 1 and 6 tokens, packed beside a whole one; its pages lie scattered."""
    size, generator = 4, torch.Generator().manual_seed(2)
    q, k, v = [torch.randn(12, heads, DIM, generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    want = attention(q[None], k[None], v[None], causal=True)[0]
    cache, table, out = filled_cache(size), [9, 2, 30], []
    for start, count in ((0, 5), (5, 1), (6, 6)):
        own = torch.arange(start, start + count)
        places = torch.tensor(table)[own // size] * size + own % size
        whole = torch.arange(12)
        other = torch.tensor([11, 12, 13])[whole // size] * size + whole % size
        spans = [PagedSpan(0, 12, 0, [11, 12, 13]), PagedSpan(12, count, start, table[: -(-(start + count) // size)])]
        attend = PrefillAttention(cache, spans, torch.cat((other, places)))
        both = attend(0, *(torch.cat((x, x[own])) for x in (q, k, v)))
        torch.testing.assert_close(both[:12], want, atol=2e-6, rtol=0)
        out.append(both[12:])
    torch.testing.assert_close(torch.cat(out), want, atol=2e-6, rtol=0)
