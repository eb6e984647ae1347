"""FlexAttention as an H100 would run it, on CPU tensors and without a GPU, by replacing private functions of torch.

Inductor takes the tensors for CUDA ones and generates the GPU's code. It runs with CPU buffers, and with kernels that
are a CompiledKernel (machine code for sm_90, never launched) or an InterpretedKernel (Triton's interpreter runs it).
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from unittest.mock import Mock

import torch
import torch.nn.attention.flex_attention as flex
import triton
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import config
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import PyCodeCache
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.runtime.triton_heuristics import GridExpr
from torch.utils._pytree import tree_map_only

CUDA = torch.device("cuda", 0)
H100 = SimpleNamespace(name="H100", major=9, minor=0, multi_processor_count=132, shared_memory_per_block_optin=232448)


class Driver:
    """What Inductor asks of Triton's driver if nothing is launched."""

    is_active = staticmethod(lambda: True)
    get_current_target = staticmethod(lambda: triton.backends.compiler.GPUTarget("cuda", 90, 32))


class CompiledKernel:
    """A kernel in machine code, with the compiler's figures; `run` does nothing."""

    def __init__(self, name: str, source: str):
        tuner = getattr(PyCodeCache.load(source), name)
        with contextlib.redirect_stdout(io.StringIO()) as log:  # where Triton prints the log of ptxas
            tuner.precompile(warm_cache_only=True)
        compiled = [result.kernel for result in tuner.compile_results]  # a small kernel has several configurations
        self.figures = {
            "kernel": name.removeprefix("triton_"),
            "registers": max(map(int, re.findall(r"Used (\d+) registers", log.getvalue()))),
            "bytes spilled": max(map(int, re.findall(r"(\d+) bytes spill stores", log.getvalue()))),
            "bytes shared": max(kernel.metadata.shared for kernel in compiled),
            "bytes of cubin": max(len(kernel.asm["cubin"]) for kernel in compiled),
        }
        assert self.figures["bytes shared"] <= H100.shared_memory_per_block_optin, self.figures

    run = staticmethod(lambda *args, stream: None)


class InterpretedKernel:
    """A kernel that Triton's interpreter runs: TRITON_INTERPRET=1 must be set before triton is imported."""

    def __init__(self, name: str, source: str):
        libdevice = triton.language.extra.libdevice  # its functions return None in the interpreter
        libdevice.exp2, libdevice.isnan = lambda x: triton.language.exp2(x), lambda x: x != x
        libdevice.isinf = lambda x: triton.language.abs(x) == float("inf")
        self.tuner = getattr(PyCodeCache.load(source), name)

    def run(self, *args, stream: int) -> None:
        config, function, meta = self.tuner.configs[0], self.tuner.fn, self.tuner.inductor_meta
        names = [name for name in function.arg_names if name not in config.kwargs]
        values = dict(zip(names + meta.get("extra_launcher_args", []), args, strict=True)) | config.kwargs
        grid = GridExpr.from_meta(meta, config).eval_slow(values)
        function[grid](**{name: values[name] for name in function.arg_names})


def flex_attention_for_h100(kernel_class: type) -> tuple[Callable, list]:
    """FlexAttention for CPU tensors that is compiled for an H100, and the list that each kernel made is appended to."""
    kernels = []
    answers = {"_lazy_init": None, "current_device": 0, "device_count": 1, "get_device_properties": H100}
    answers |= {"is_bf16_supported": True, "set_device": None, "_DeviceGuard": contextlib.nullcontext()}
    for name, answer in answers.items():
        for owner in (torch.cuda, CudaInterface):
            setattr(owner, name, Mock(return_value=answer))
    CudaInterface.is_available = Mock(return_value=True)
    triton.backends.backends["nvidia"] = dataclasses.replace(triton.backends.backends["nvidia"], driver=Driver)
    torch._C._cuda_getCurrentRawStream = Mock(return_value=0)
    torch._C._dynamo.guards._empty_strided_cuda = torch._C._dynamo.guards._empty_strided_cpu

    config.compile_threads = 1  # no other processes
    config.use_static_cuda_launcher = False  # its kernels do not tell their shared memory
    config.fx_graph_cache = False
    triton.knobs.compilation.always_compile = triton.knobs.nvidia.dump_ptxas_log = True

    # FlexDecode has options for CUDA only. On the CPU, FlexAttention refuses gradients and saves nothing for them.
    torch.Tensor.is_cuda = property(lambda self: True)
    flex._validate_device = lambda query, key, value: None
    apply_options = flex._apply_kernel_options
    flex._apply_kernel_options = lambda *args: apply_options(*args) | {"OUTPUT_LOGSUMEXP": torch.is_grad_enabled()}

    def new_kernel(self: AsyncCompile, name: str, source: str, device_str: str = "cuda"):
        kernels.append(kernel_class(name, source))
        return kernels[-1]

    AsyncCompile.triton = new_kernel
    backend = partial(compile_fx, inner_compile=_compile_for_cuda)
    return torch.compile(flex.flex_attention, dynamic=False, backend=backend), kernels


def _compile_for_cuda(graph: torch.fx.GraphModule, inputs: list, **options) -> Callable:
    """compile_fx_inner of a graph that was traced on the CPU, since tracing gradients on CUDA wants a real GPU."""

    def to_cuda(values):
        return tree_map_only(torch.Tensor, lambda x: x.new_empty_strided(x.shape, x.stride(), device=CUDA), values)

    with torch._guards.detect_fake_mode(inputs):
        for node in (node for module in graph.modules() for node in module.graph.nodes):  # the mask's graph too
            node.meta["val"] = to_cuda(node.meta.get("val"))
            if "device" in node.kwargs:
                node.update_kwarg("device", CUDA)
        inputs = to_cuda(inputs)
    return compile_fx_inner(graph, inputs, **options)
