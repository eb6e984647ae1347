"""The key/value cache and attention over its blocks: every form equals plain attention over each sequence's own."""

import random

import pytest
import torch
from tiny import CONFIG

from tooln1.attention import attention
from tooln1.io.model_config import parse_config
from tooln1.sampler.kv_cache import KVCache, kv_bytes_per_token, plan_cache
from tooln1.sampler.paged_attention import FlexDecode, GatheredDecode, PrefillAttention
from tooln1.sampler.scheduler import Prefill, Sequence, SequenceGroup

HEADS, KV_HEADS, DIM = SHAPE = (12, 2, 64)
only_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU_SHAPES = [(28, 4, 128), (12, 2, 128), (16, 2, 128), (14, 2, 64), (40, 8, 128), (4, 4, 64)]  # those of Qwen2.5
GPU_CASES = [(*shape, groups) for shape in GPU_SHAPES for groups in (0, 14, 78)]


def config(heads, kv_heads, dim):
    shape = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "hidden_size": heads * dim}
    return parse_config({**CONFIG, "vocab_size": 259, **shape})


def filled_cache(size, num_blocks=60, shape=SHAPE, like=None):
    cache = KVCache(config(*shape), num_blocks, size, torch.zeros(1) if like is None else like)
    cache.data.copy_(torch.randn(cache.data.shape, generator=torch.Generator().manual_seed(0)))
    return cache


def decoding_sequences(cache, more_groups=0):
    """Groups of 3, 2, 1 and 1, one of 11, of which a bucket takes 4 at a time, and more of 4, in mixed order."""
    rng, size = random.Random(0), cache.block_size
    free = rng.sample(range(1, cache.num_blocks + 1), cache.num_blocks)
    seqs = []
    for count, num_shared in ((3, 4), (1, 0), (2, 1), (1, 2), (11, 1), *[(4, 2)] * more_groups):
        group = SequenceGroup(0, [0] * (num_shared * size))
        prompt = [free.pop() for _ in range(num_shared)]
        for _ in range(count):
            seq = Sequence(group, 0, 0, 99, block_table=prompt + [free.pop() for _ in range(rng.randint(1, 2))])
            seq.num_cached_tokens = (len(seq.block_table) - 1) * size + rng.randrange(size) + 1
            seqs.append(seq)
    return rng.sample(seqs, len(seqs))


def new_tokens(count, shape=SHAPE, like=None):
    heads, kv_heads, dim = shape
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn(count, n, dim, generator=generator) for n in (heads, kv_heads, kv_heads)]
    return tensors if like is None else [tensor.to(like) for tensor in tensors]


@pytest.mark.parametrize("size", [4, 32])
def test_gathered_decode_equals_plain_attention(size):
    cache = filled_cache(size)
    seqs = decoding_sequences(cache)
    q, k, v = new_tokens(len(seqs))
    out = GatheredDecode(cache, seqs)(0, q, k, v)
    for i, seq in enumerate(seqs):
        keys, values = cache.data[0, seq.block_table].flatten(0, 1)[: seq.num_cached_tokens].unbind(1)
        assert torch.equal(keys[-1], k[i]) and torch.equal(values[-1], v[i])
        plain = attention(q[i][None, None], keys[None], values[None])[0, 0]
        torch.testing.assert_close(out[i], plain, atol=2e-6, rtol=0)


def flex_and_gathered(shape, like, size, more_groups, layer):
    """Output of both, without padding, and both caches; the block table is padded as a decode graph pads it."""
    caches = [filled_cache(size, 60 + 12 * more_groups, shape, like) for _ in range(2)]
    seqs = decoding_sequences(caches[0], more_groups)
    rows, padding = len(seqs), -len(seqs) % 8
    q, k, v = new_tokens(rows + padding, shape, like)
    positions = torch.tensor([seq.num_cached_tokens - 1 for seq in seqs] + [0] * padding, device=like.device)
    table = torch.randint(0, caches[0].num_blocks, (rows + padding, caches[0].num_blocks + 1), dtype=torch.int32)
    for line, seq in zip(table, seqs, strict=False):
        line[: len(seq.block_table)] = torch.tensor(seq.block_table)  # anything may follow
    table[rows:, 0] = 0
    with torch.inference_mode():
        fast = FlexDecode(caches[0], table.to(like.device), positions)(layer, q, k, v)
        slow = GatheredDecode(caches[1], seqs)(layer, q[:rows], k[:rows], v[:rows])
    assert fast.isfinite().all()
    assert torch.equal(caches[0].data[:, 1:], caches[1].data[:, 1:])
    return fast[:rows], slow


@pytest.mark.slow
def test_flex_decode_equals_gathered_decode():
    try:
        fast, slow = flex_and_gathered(SHAPE, torch.zeros(1), size=32, more_groups=0, layer=1)
    except torch._inductor.exc.InductorError as error:  # there is no C++ compiler
        pytest.skip(f"torch.compile does not work here: {error}")
    torch.testing.assert_close(fast, slow, atol=2e-6, rtol=0)


@only_gpu
@pytest.mark.parametrize("heads,kv_heads,dim,more_groups", GPU_CASES)
def test_flex_decode_equals_gathered_decode_on_a_gpu(heads, kv_heads, dim, more_groups):
    like = torch.zeros(1, dtype=torch.bfloat16, device="cuda")
    fast, slow = flex_and_gathered((heads, kv_heads, dim), like, size=128, more_groups=more_groups, layer=1)
    torch.testing.assert_close(fast, slow, atol=2e-2, rtol=2e-2)


def test_a_prefill_in_spans_equals_one_causal_pass():
    """A sequence in spans of 5, 1 and 6 tokens over scattered blocks, packed beside one in a single span."""
    q, k, v = new_tokens(12)
    want = attention(q[None], k[None], v[None], causal=True)[0]
    cache, out = filled_cache(4), []
    other = Sequence(SequenceGroup(0, [0] * 12), 0, 0, 99, block_table=[11, 12, 13])
    for start, end in ((0, 5), (5, 6), (6, 12)):
        seq = Sequence(SequenceGroup(0, [0] * end), 0, 0, 99, block_table=[9, 2, 30][: -(-end // 4)])
        attend = PrefillAttention(cache, [Prefill(other, 0, 1), Prefill(seq, start, 1)])
        both = attend(0, *(torch.cat((x, x[start:end])) for x in (q, k, v)))
        torch.testing.assert_close(both[:12], want, atol=2e-6, rtol=0)
        out.append(both[12:])
    torch.testing.assert_close(torch.cat(out), want, atol=2e-6, rtol=0)


def test_the_size_of_the_cache():
    model_config = config(*SHAPE)
    token = kv_bytes_per_token(model_config, 4)
    assert token == KVCache(model_config, 1, 16, torch.zeros(1)).data[:, 1:].nbytes // 16
    plenty, half = 10**12, 2 * token * 16

    def num_blocks(free_bytes, max_num_seqs, cache_tokens=0, lengths=((30, 10), (30, 20), (5, 3))):
        return plan_cache(model_config, 4, free_bytes, 16, max_num_seqs, cache_tokens, lengths)

    assert num_blocks(plenty, 3) == 3 + 4 + 1
    assert num_blocks(plenty, 1) == 4 + 2  # the longest, and the longest prompt
    assert num_blocks(5 * half, 3) == 5  # half of the memory
    assert num_blocks(0, 3, cache_tokens=163) == 10 and num_blocks(0, 3) == 1
    assert num_blocks(plenty, 2, lengths=None) == 2 * 4096 // 16  # any call: the model's context
    assert num_blocks(700 * half, 99, lengths=None) == 640  # a multiple of 64
