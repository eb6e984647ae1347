"""Do the attention kernels compile for an H100, and do they compute the right thing? Asked without a GPU.

    python perf/kernels.py compile      # machine code for sm_90: seconds, registers, bytes spilled, bytes shared
    python perf/kernels.py interpret    # the same generated code in Triton's interpreter, against the plain forms

Needs a CUDA build of torch, 2.11 to 2.13 (2.11 interprets with numpy below 2.4 only). Prints a table and one JSON line;
exits with 1 if a kernel fails. Graph capture, speed and bf16, which the interpreter cannot multiply, remain open.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": str(int("interpret" in sys.argv))}  # before triton

import torch
from shapes import print_table, qwen2

from tooln1 import attention
from tooln1.attention import FlexPackedAttention, PackedAttention, Segment
from tooln1.sampler import paged_attention
from tooln1.sampler.kv_cache import CUDA_BLOCK_SIZE, KVCache
from tooln1.sampler.paged_attention import FlexDecode, GatheredDecode
from tooln1.sampler.scheduler import Sequence, SequenceGroup

Shape = tuple[int, int, int]  # query heads, key/value heads, head dim
SHAPES = {"0.5B": (14, 2, 64), "1.5B": (12, 2, 128), "3B": (16, 2, 128), "7B": (28, 4, 128), "14B": (40, 8, 128)}
SHAPES["LLaMA-8B"] = (32, 8, 128)


def run(cases: Iterable[tuple], kernels: list) -> list[dict]:
    """Results of the cases (name, work, arguments): what `work` returns, or the figures of FlexAttention's kernels.

    The small kernels around those only have to compile. A case that raises is reported and leaves an "error".
    """
    results = []
    for name, work, *args in cases:
        torch.manual_seed(0)
        torch._dynamo.reset()
        kernels.clear()
        start = time.perf_counter()
        try:
            found = work(*args) or [one.figures for one in kernels if one.figures["kernel"].startswith("tem_")]
        except Exception as error:
            traceback.print_exc()
            found = [{"error": type(error).__name__}]
        results += [{"case": name, "seconds": time.perf_counter() - start} | one for one in found]
    return results


def new_tokens(count: int, shape: Shape, dtype: torch.dtype, grad: bool = False) -> list[torch.Tensor]:
    """Random q [T, H, D], k and v [T, K, D]."""
    heads, kv_heads, dim = shape
    return [torch.randn(count, n, dim, dtype=dtype, requires_grad=grad) for n in (heads, kv_heads, kv_heads)]


def new_cache(shape: Shape, blocks: int, dtype: torch.dtype) -> KVCache:
    """The cache of a model with one layer."""
    heads, kv_heads, dim = shape
    config = qwen2(heads * dim, 1, heads, kv_heads, 64, 64, True)
    return KVCache(config, blocks, CUDA_BLOCK_SIZE, torch.empty(1, dtype=dtype))


def packed(form: type, segments: tuple[Segment, ...], tokens: list[torch.Tensor]) -> list[torch.Tensor]:
    """One layer of packed attention: the output and, if q, k and v require them, their gradients of (q · output)."""
    out = form(segments, "cpu")(0, *tokens)
    return [out, *(torch.autograd.grad(out, tokens, tokens[0].detach()) if out.requires_grad else ())]


def compile_decode(shape: Shape, rows: int, blocks: int = 2816) -> None:
    """One layer of a decode step, over as many blocks as 7B's cache has on one card."""
    block_table, positions = torch.zeros(rows, blocks + 1, dtype=torch.int32), torch.zeros(rows).long()
    with torch.inference_mode():
        attend = FlexDecode(new_cache(shape, blocks, torch.bfloat16), block_table, positions)
        attend(0, *new_tokens(rows, shape, torch.bfloat16))


def compile_packed(shape: Shape, grad: bool) -> None:
    """One layer over a packed stream, which is padded to 4,096 tokens; with its backward if `grad`."""
    segments = (Segment(0, 700, (100, 120, 90, 60, 130)), Segment(1200, 300, (100, 50)))
    with torch.set_grad_enabled(grad):
        packed(FlexPackedAttention, segments, new_tokens(1650, shape, torch.bfloat16, grad))


def compile_cases() -> Iterator[tuple]:
    """Decoding and packed attention of all shapes."""
    for name, shape in SHAPES.items():
        for rows in (8, 16, 64, 320, 512) if name == "7B" else (320,):
            yield f"decode {name}, {rows} rows", compile_decode, shape, rows
        yield f"packed {name}, no gradients", compile_packed, shape, False
        yield f"packed {name}, gradients", compile_packed, shape, True


def difference(got: torch.Tensor, want: torch.Tensor, limit: float) -> float:
    """The largest difference, relative to the largest number where that is above 1. AssertionError above `limit`."""
    worst = ((got - want).abs().max() / want.abs().max().clamp(min=1)).item()
    assert worst <= limit, f"differs by {worst}"
    return worst


def new_sequences(cache: KVCache, count: int) -> list[Sequence]:
    """Groups of 3 sequences whose prompts fill 0, 1 or 2 blocks; the blocks are scattered."""
    size, free, seqs = cache.block_size, iter((torch.randperm(cache.num_blocks) + 1).tolist()), []
    for i in range(count):
        if i % 3 == 0:
            prompt = [next(free) for _ in range(i // 3 % 3)]
            group = SequenceGroup(0, [0] * (len(prompt) * size))
        blocks = prompt + [next(free) for _ in range(1 + i % 2)]
        cached = len(blocks) * size - 37 * i % size  # the last block is filled to varying degrees
        seqs.append(Sequence(group, 0, 0, 99, block_table=blocks, num_cached_tokens=cached))
    return seqs


def interpret_decode(shape: Shape, rows: int, dtype: torch.dtype, limit: float) -> list[dict]:
    """FlexDecode against GatheredDecode in fp32; as in a run, anything follows a table and two rows are padding."""
    cache, plain_cache = (new_cache(shape, 3 * rows, kind) for kind in (dtype, torch.float32))
    plain_cache.data.copy_(cache.data.normal_())
    seqs = new_sequences(cache, rows - 2)
    positions = torch.tensor([seq.num_cached_tokens - 1 for seq in seqs] + [0, 0])
    block_table = torch.randint(0, cache.num_blocks + 1, (rows, cache.num_blocks + 1), dtype=torch.int32)
    block_table[len(seqs) :, 0] = 0
    for line, seq in zip(block_table, seqs, strict=False):
        line[: len(seq.block_table)] = torch.tensor(seq.block_table)
    tokens = new_tokens(rows, shape, dtype)
    with torch.inference_mode():
        out = FlexDecode(cache, block_table, positions)(0, *tokens).float()
        plain = GatheredDecode(plain_cache, seqs)(0, *(x[: len(seqs)].float() for x in tokens))
    assert out.isfinite().all(), "padding rows are not finite"
    return [{"output": difference(out[: len(seqs)], plain, limit)}]


def interpret_packed(shape: Shape) -> list[dict]:
    """FlexPackedAttention against PackedAttention in fp32: the output and the gradients of q, k and v."""
    attention.FLEX_TOKENS = 256  # the interpreter is slow, so the stream is padded to less
    segments = (Segment(0, 40, (25, 30, 20)), Segment(115, 70, (30, 15)))
    tokens = new_tokens(230, shape, torch.float32, grad=True)
    forms = (packed(form, segments, tokens) for form in (FlexPackedAttention, PackedAttention))
    limits = {"output": 1e-6, "q grad": 1e-5, "k grad": 1e-5, "v grad": 1e-5}
    return [dict(zip(limits, map(difference, *forms, limits.values()), strict=True))]


INTERPRET_CASES = [  # 8 rows are few for 132 multiprocessors: the blocks of a sequence are split over programs
    ("decode 14/2 heads of 64, 8 rows, fp32", interpret_decode, (14, 2, 64), 8, torch.float32, 1e-6),
    ("decode 14/2 heads of 64, 8 rows, fp16", interpret_decode, (14, 2, 64), 8, torch.float16, 1e-3),
    ("decode 14/2 heads of 16, 68 rows, fp32", interpret_decode, (14, 2, 16), 68, torch.float32, 1e-6),
    ("packed 7/1 heads of 32, fp32", interpret_packed, (7, 1, 32)),
]


def main() -> None:
    """Compile or interpret, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("compile", "interpret"))
    what = parser.parse_args().what
    if torch.version.cuda is None:
        print(f"torch {torch.__version__} is a CPU build, without Triton: install a CUDA build.", file=sys.stderr)
        sys.exit(2)
    from mock_gpu import CompiledKernel, InterpretedKernel, flex_attention_for_h100

    flex, kernels = flex_attention_for_h100(CompiledKernel if what == "compile" else InterpretedKernel)
    attention.compiled_flex_attention = paged_attention.compiled_flex_attention = lambda: flex
    results = run(compile_cases() if what == "compile" else INTERPRET_CASES, kernels)
    columns = list(dict.fromkeys(key for one in results for key in one))
    print_table([tuple(columns), *(tuple(one.get(key, "-") for key in columns) for one in results)])
    print(json.dumps({"torch": torch.__version__, what: results}))
    sys.exit(any("error" in one for one in results))


if __name__ == "__main__":
    main()
