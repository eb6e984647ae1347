"""Processes: launch, collectives on Python values, FSDP2 sharding, copies of sharded weights.

The same code runs as one process or many, on CPU (gloo) and GPU (NCCL). A single CPU process is not sharded and
computes in fp32. Everything else is FSDP2 with fp32 master weights: bf16 compute and fp32 gradient sums on GPU, fp32
throughout on CPU.
"""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from tooln1.io.errors import Stopped, UserError
from tooln1.lora import merged_parameter
from tooln1.model import Transformer

T = TypeVar("T")
PR_SET_PDEATHSIG = 1  # linux/prctl.h

Reduce = Callable[[list[float], str], list[float]]
"""(numbers, "sum" | "min" | "max") -> those numbers, each reduced over all ranks; `World.all_reduce` is one."""


def local_reduce(values: list[float], op: str) -> list[float]:
    """The `Reduce` of a single process."""
    return list(values)


@dataclass(frozen=True)
class World:
    """This process's rank and device, and the collectives on Python values."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which prints and writes."""
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        """Whether `shard` shards: always, except in a single CPU process. LoRA in a single process does not call it."""
        return self.size > 1 or self.device.type == "cuda"

    def gather(self, items: list[T]) -> list[T]:
        """Every rank's `items` on every rank, in rank order."""
        if self.size == 1:
            return list(items)
        lists: list[list[T]] = [[] for _ in range(self.size)]
        dist.all_gather_object(lists, items)
        return [item for one in lists for item in one]

    def all_reduce(self, values: Sequence[float], op: str) -> list[float]:
        """Elementwise "sum", "min" or "max" of a list of numbers over ranks."""
        if self.size == 1 or not len(values):
            return list(values)
        vector = torch.tensor(list(values), dtype=torch.float64, device=self.device)
        dist.all_reduce(vector, {"sum": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX}[op])
        return vector.tolist()

    def broadcast(self, value: T) -> T:
        """Rank 0's `value` on every rank."""
        return self.gather([value])[0]

    def run_on_all_ranks(self, work: Callable[[], T], what: str) -> T:
        """Run `work`, which holds no collective; if it fails on any rank, raise the same UserError on all of them.

        Failures are UserErrors and those of the disk, which become "`what`: reason". Rank 0 prints the error.
        """
        result, failures = None, []
        try:
            result = work()
        except UserError as error:
            failures = [str(error)]
        except (OSError, SafetensorError) as error:
            failures = [f"{what}: {getattr(error, 'strerror', None) or error}."]
        if failures := self.gather(failures):
            raise UserError(failures[0], printed_here=self.is_main)
        return result


@contextmanager
def launch(device: str = "auto", timeout: int = 600) -> Iterator[World]:
    """Join the processes that torchrun started, or run as a single one without it, for the length of the block.

    device: "auto" (a GPU where there is one), "cpu" or "cuda". timeout: seconds that a collective waits for the other
    processes before it raises. A process that fails does not wait for the others: torchrun ends them. Raises UserError
    where the device is not available.
    """
    _exit_with_torchrun()
    rank, size, limit = int(os.environ.get("RANK", 0)), 1, timedelta(seconds=timeout)
    torchrun_store, store = None, dist.HashStore()
    try:
        if "RANK" in os.environ:
            if missing := [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
                raise UserError(f"RANK is set, but {missing[0]} is not set: start with torchrun, or unset RANK.")
            size = int(os.environ["WORLD_SIZE"])
            torchrun_store, store = _stores(rank, limit)
        computes_on = _device(device)
        backend = "cpu:gloo,cuda:nccl" if computes_on.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
        yield World(rank, size, computes_on)
        _leave()
    except BaseException as error:
        if torchrun_store and isinstance(error, UserError) and error.printed_here is None:
            # Most mistakes stop all ranks with the same sentence: the first of them prints it.
            key = f"tooln1/start {os.environ['TORCHELASTIC_RESTART_COUNT']}/{error}"
            error.printed_here = torchrun_store.add(key, 1) == 1
        if dist.is_initialized() and (size == 1 or isinstance(error, Stopped)):
            _leave()
        raise


def _exit_with_torchrun() -> None:
    """Have Linux kill this process when torchrun, its parent, is gone: nothing else would end it."""
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        parent = os.getppid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the call
            os._exit(1)


def _stores(rank: int, timeout: timedelta) -> tuple[dist.Store | None, dist.Store]:
    """(torchrun's store or None, the store in which the processes of this start of the job find each other).

    Rank 0 holds the second, and publishes its port in the first. torchrun's store outlives a restart (--max-restarts),
    and the addresses that dead processes left there would mislead their successors; a dead store refuses connections.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None, dist.TCPStore(host, port, is_master=rank == 0, timeout=timeout, wait_for_workers=False)
    torchrun_store = dist.TCPStore(host, port, is_master=False, timeout=timeout)
    if rank == 0:
        store = dist.TCPStore(host, 0, is_master=True, timeout=timeout, wait_for_workers=False)
        torchrun_store.set("tooln1/port", str(store.port))
        return torchrun_store, store
    until = time.monotonic() + timeout.total_seconds()
    while True:
        port = int(torchrun_store.get("tooln1/port"))
        try:
            store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=2))
        except RuntimeError:  # the port of a dead rank 0: the new one will overwrite it
            if time.monotonic() > until:
                raise
        else:
            store.set_timeout(timeout)
            return torchrun_store, store


def _device(name: str) -> torch.device:
    """The device of this process, from "auto", "cpu" or "cuda"; raises UserError where it is not available.

    A GPU that torch cannot use is an error with "auto", too: days of training would run on the CPU.
    """
    available = torch.cuda.is_available()
    if name == "cpu" or (name == "auto" and not available and not os.path.exists("/dev/nvidiactl")):
        return torch.device("cpu")
    if not available:
        why = f"no driver for CUDA {torch.version.cuda}, or none visible" if torch.version.cuda else "it is a CPU build"
        raise UserError(f"device = {name!r}, but torch finds no GPU ({why}); mend that, or use --device cpu.")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def _leave() -> None:
    """Leave the process group when all ranks do: one that left earlier would fail the collectives of the others."""
    dist.barrier()
    dist.destroy_process_group()


def shard(
    model: Transformer,
    world: World,
    dtype: torch.dtype | None = None,
    offload: bool = False,
    accumulate_unsharded: bool = True,
    hybrid: bool = False,
) -> Transformer:
    """Shard `model` over all ranks with FSDP2, block by block, in place; it computes in `dtype` (None: as stored).

    Gradients are summed over ranks, not averaged: every loss is already divided by the count of the global mini-batch
    (forced sums, because gloo has no pre-multiplied ones). offload: on CUDA the shards, their gradients and so the
    optimizer's state stay in host memory. accumulate_unsharded: see `next_microbatch`. hybrid: shard over the ranks of
    a node, each node a replica; gradients are scattered in the node and summed over the nodes.
    """
    if not world.sharded:
        return model
    in_node = int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
    shape = (world.size // in_node, in_node) if hybrid else (world.size,)
    options = {
        "mesh": init_device_mesh(world.device.type, shape, mesh_dim_names=("replicate", "shard")[-len(shape) :]),
        "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32),
    }
    if offload and world.device.type == "cuda":
        options["offload_policy"] = CPUOffloadPolicy()
    for module in _blocks_then_rest(model):
        fully_shard(module, **options)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    model.accumulate_unsharded = accumulate_unsharded
    return model


def reshard(model: nn.Module) -> None:
    """Free the unsharded weights that remain after a pass without gradients, or after one that was interrupted."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def next_microbatch(model: nn.Module, last: bool) -> None:
    """Prepare the passes of a micro-batch, which is the `last` one of its optimizer step or not.

    With `accumulate_unsharded`, gradients stay unsharded until the last one, and weights from each backward pass to the
    next forward pass: one reduce-scatter per optimizer step and one all-gather less per micro-batch, for 6 bytes per
    parameter (bf16 weights, fp32 gradients). Otherwise both are resharded after each micro-batch. Replicas (hybrid) add
    up their gradients once per optimizer step either way.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(last)
        if model.accumulate_unsharded:
            model.set_requires_gradient_sync(last)
            model.set_reshard_after_backward(last)


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor of a shard (a collective), or the tensor itself if it is not sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def copy_weights(policy: Transformer, target: Transformer) -> None:
    """Overwrite the unsharded `target` with the policy's weights, adapters merged, cast to its dtype, in place.

    Block by block: one all-gather each, in the dtype that the policy computes in, and one full block in memory at once.
    With LoRA on one process the policy is its own target, and nothing is copied. A target whose weights were released
    (`Sampler.release_weights`) gets memory again.
    """
    if target is policy:
        return
    for parameter in target.parameters():
        if parameter.untyped_storage().size() == 0:
            parameter.untyped_storage().resize_(parameter.nbytes)
    for source, copy in zip(_blocks_then_rest(policy), _blocks_then_rest(target), strict=True):
        if isinstance(source, FSDPModule):
            source.unshard()
        for name, parameter in copy.named_parameters():
            if source is not policy or not name.startswith("model.layers."):
                parameter.copy_(merged_parameter(source, name))
        reshard(source)


def _blocks_then_rest(model: Transformer) -> list[nn.Module]:
    """The modules that `shard` shards: each block, then the model, for its embedding, final norm and head."""
    return [*model.model.layers, model]
