"""Many processes as one: launch, FSDP2 sharding, sums over ranks, gathering, whole copies of sharded weights.

The same code runs from one process to many, on CPU (gloo) and GPU (NCCL). One CPU process is not sharded: it has
nothing to share and computes in fp32. Everything else is FSDP2 with fp32 master weights: bf16 compute and fp32
gradient sums on GPU, fp32 throughout on CPU.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
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
from tooln1.model import Transformer, load_model
from tooln1.run.lifeline import WAY_ON, Lifeline, connect, end_with_torchrun

T = TypeVar("T")


Reduce = Callable[[list[float], str], list[float]]
"""(numbers, "sum" | "min" | "max") -> those numbers, each reduced over all ranks; `World.reduce` is one."""


def local_reduce(values: list[float], op: str) -> list[float]:
    """The `Reduce` of a single process."""
    return list(values)


@dataclass(frozen=True)
class World:
    """This process among its peers."""

    rank: int
    size: int
    device: torch.device
    lifeline: Lifeline | None = None  # to the other processes; None where there are none
    job: dist.Store | None = None  # torchrun's own store, which outlives its restarts; None without one

    @property
    def is_main(self) -> bool:
        """The one rank that prints and writes."""
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        """Whether weights are FSDP2 shards: always, but for a single CPU process."""
        return self.size > 1 or self.device.type == "cuda"

    def gather(self, things: list[T]) -> list[T]:
        """Every rank's `things` on every rank, in rank order."""
        if self.size == 1:
            return list(things)
        everyone: list[list[T]] = [[] for _ in range(self.size)]
        dist.all_gather_object(everyone, things)
        return [thing for one in everyone for thing in one]

    def all_reduce(self, values: Sequence[float], op: str) -> list[float]:
        """Elementwise "sum", "min" or "max" of a list of numbers over ranks."""
        if self.size == 1 or not len(values):
            return list(values)
        vector = torch.tensor(list(values), dtype=torch.float64, device=self.device)
        dist.all_reduce(vector, {"sum": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX}[op])
        return vector.tolist()

    def broadcast(self, value: T) -> T:
        """Rank 0's `value` on every rank."""
        return _from_rank_0(value) if self.size > 1 else value

    def barrier(self) -> None:
        """Until every rank is here."""
        if self.size > 1:
            dist.barrier()

    def run_on_all_ranks(self, work: Callable[[], T], what: str) -> T:
        """Do `work` on this rank. Where a UserError or the disk stops it on any rank, all raise the same UserError.

        The disk's failures become "`what`: why".
        """
        done, failures = None, []
        try:
            done = work()
        except UserError as error:
            failures = [str(error)]
        except (OSError, SafetensorError) as error:
            failures = [f"{what}: {getattr(error, 'strerror', None) or error}."]
        if failures := self.gather(failures):
            raise UserError(failures[0])
        return done

    def remember(self, what: str) -> None:
        """Note, for the next start of this job if torchrun restarts it, that `what` is so."""
        if self.job and self.is_main:
            self.job.set(f"tooln1/{what}", "so")

    def remembers(self, what: str) -> bool:
        """Whether an earlier start of this job noted `what`."""
        return self.broadcast(bool(self.is_main and self.job and self.job.check([f"tooln1/{what}"])))

    def note(self, doing: str) -> None:
        """Say what this process turns to, for the words of others when something goes wrong."""
        if self.lifeline:
            self.lifeline.note(doing)


@contextmanager
def launch(device: str = "auto", timeout: int = 600) -> Iterator[World]:
    """Join the processes that torchrun started (or be alone without it) for the length of the block.

    `device` is "auto" (a GPU where there is one), "cpu" or "cuda". `timeout`: seconds that a process waits for the
    others in a collective. Raises UserError where the device is not to be had. A process that dies ends the others.
    """
    rank, size = _from_torchrun("RANK", 0), _from_torchrun("WORLD_SIZE", 1)
    if not rank < size:
        raise UserError(f"RANK is {rank}, but WORLD_SIZE {size}: a rank is below it; start with torchrun.")
    limit, lifeline = timedelta(seconds=timeout), None
    try:
        where = _device(device)
        job, store = _stores(rank, limit) if "RANK" in os.environ else (None, dist.HashStore())
        backend = "cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
        if "TORCHELASTIC_RUN_ID" in os.environ:
            end_with_torchrun()
        lifeline = connect(rank, _from_rank_0) if size > 1 else None
        yield World(rank, size, where, lifeline, job)
        _leave(lifeline)
    except BaseException as error:
        if isinstance(error, Stopped):
            _leave(lifeline)
        elif size > 1 and isinstance(error, Exception):
            _explain(error, rank, lifeline, timeout)
        elif dist.is_initialized():
            dist.destroy_process_group()
        raise


def _device(name: str) -> torch.device:
    """Where this process computes, from "auto", "cpu" or "cuda"; raises UserError where that is not to be had."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("device = 'cuda', but torch finds no GPU; use --device cpu, or install a CUDA build of torch.")
    local_rank = _from_torchrun("LOCAL_RANK", 0)
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"local rank {local_rank} has no GPU of its own: this node shows {torch.cuda.device_count()}; "
            "lower torchrun's --nproc-per-node."
        )
    torch.cuda.set_device(local_rank)
    return torch.device(name, local_rank)


def _from_torchrun(name: str, alone: int) -> int:
    """A number that torchrun sets in the environment of its processes; `alone` without it."""
    value, needed = os.environ.get(name, str(alone)), ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    started = "RANK" in os.environ or "WORLD_SIZE" in os.environ  # job scripts export the other two for later
    missing = [other for other in needed if other not in os.environ and started]
    if not value.isdecimal() or missing:
        wrong = f"{name} is {value!r}" if not value.isdecimal() else f"{missing[0]} is not set, but others of it are"
        raise UserError(f"the environment is not torchrun's: {wrong}; start with torchrun, or unset all of it.")
    return int(value)


def _stores(rank: int, limit: timedelta) -> tuple[dist.Store | None, dist.Store]:
    """(torchrun's store, or None; the one in which the processes of this start of the job find each other).

    Rank 0 keeps the latter, and says where in the former. That one outlives torchrun's restarts (--max-restarts), and
    the addresses that dead processes left in it would mislead their successors; a dead store refuses the connection.
    """
    host, port = os.environ["MASTER_ADDR"], _from_torchrun("MASTER_PORT", 0)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None, dist.TCPStore(host, port, is_master=rank == 0, timeout=limit, wait_for_workers=False)
    torchruns = dist.TCPStore(host, port, is_master=False, timeout=limit)
    if rank == 0:
        own = dist.TCPStore(host, 0, is_master=True, timeout=limit, wait_for_workers=False)
        torchruns.set("tooln1", str(own.port))
        return torchruns, own
    until = time.monotonic() + limit.total_seconds()
    while True:
        try:
            found = dist.TCPStore(host, int(torchruns.get("tooln1")), is_master=False, timeout=timedelta(seconds=2))
        except RuntimeError:  # what a dead rank 0 left: the new one will write over it
            if time.monotonic() > until:
                raise
        else:
            found.set_timeout(limit)
            return torchruns, found


def _from_rank_0(value: T) -> T:
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _leave(lifeline: Lifeline | None) -> None:
    """End in good order: together, because one that hangs up while others still talk would bring them down."""
    dist.barrier()
    if lifeline:
        lifeline.leave()
    dist.destroy_process_group()


def _explain(error: Exception, rank: int, lifeline: Lifeline | None, timeout: int) -> None:
    """Tell the other processes why this one ends, and the user what a process alone cannot know.

    The process group is left as it is: to take it down could wait for the others.
    """
    if isinstance(error, UserError):
        if rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        if not (lifeline and lifeline.fail(str(error))) and rank:
            print(f"error: rank {rank}: {error}", file=sys.stderr, flush=True)
        error.told = True
        return
    if lifeline is None:
        return
    lifeline.wait_for_news()  # if it failed because another process is lost, this one ends in here
    if isinstance(error, RuntimeError) and "timed out" in str(error).lower():
        why = f"it waited {timeout} s for another process in vain"
        print(
            f"error: rank {rank}: {why}. {lifeline.whereabouts()}. If one is only slow, raise collective_timeout; else "
            f"it hangs: next time look where, before the time is over (py-spy dump --pid). {WAY_ON}",
            file=sys.stderr,
            flush=True,
        )
    else:
        traceback.print_exception(error)  # now: once the others know, this process may be ended at any time
        why = "".join(traceback.format_exception_only(error)).split("\n")[0]
    lifeline.fail(why)
    sys.exit(1)


def shard(
    model: Transformer,
    world: World,
    dtype: torch.dtype | None = None,
    offload: bool = False,
    accumulate_whole: bool = True,
) -> Transformer:
    """Shard `model` over all ranks, block by block, in place; `dtype` is what it computes in (None: as stored).

    Gradients are summed over ranks, never averaged: every loss is already divided by the count of the whole global
    mini-batch (forced sums, because gloo knows no pre-multiplied ones). `offload`: on CUDA the shards, their gradients
    and so the optimizer's state stay in the host's memory. `accumulate_whole`: see `next_microbatch`.
    """
    if not world.sharded:
        return model
    mesh = init_device_mesh(world.device.type, (world.size,))
    how = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)}
    if offload and world.device.type == "cuda":
        how["offload_policy"] = CPUOffloadPolicy()
    for block in model.model.layers:
        fully_shard(block, **how)
    fully_shard(model, **how)  # embedding, final norm and head: kept whole between passes
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    model.accumulate_whole = accumulate_whole
    return model


def load_models(
    path: str,
    reference_path: str,
    world: World,
    vocabulary: int,
    *,
    compile: bool,
    activation_checkpointing: bool,
    accumulate_whole: bool,
    offload_optimizer: bool,
    offload_reference: bool,
) -> tuple[Transformer, Transformer | None, Transformer]:
    """The policy, the reference (None for the path "") and the copy that samples, on this process's device.

    Policy: fp32, sharded. The others: bf16 on CUDA, else fp32; the reference sharded, the copy whole.
    """
    low = torch.bfloat16 if world.device.type == "cuda" else torch.float32
    policy = load_model(path, torch.float32, world.device, vocabulary)
    for block in policy.model.layers:
        block.recompute = activation_checkpointing
        if compile:
            block.compile_parts()
    # It is sharded before the others come, so that only one whole model is there at a time.
    policy, reference = shard(policy, world, low, offload_optimizer, accumulate_whole), None
    if reference_path:
        reference = load_model(reference_path, low, world.device, vocabulary).requires_grad_(False)
        reference = shard(reference, world, offload=offload_reference)
    return policy, reference, load_model(path, low, world.device, vocabulary)


def reshard(model: nn.Module) -> None:
    """Give back the whole weights that a pass leaves: embedding and head without gradients; more if broken off."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def next_microbatch(model: nn.Module, last: bool) -> None:
    """Prepare for the backward pass of a micro-batch, the `last` of its optimizer step or not.

    With `accumulate_whole`, gradients stay whole on every rank until the last one, and weights from one backward pass
    to the next forward: one reduce-scatter an optimizer step and an all-gather less a micro-batch, for 6 bytes a
    parameter (bf16 weights, fp32 gradients). Else both are cut up again after each micro-batch.
    """
    if isinstance(model, FSDPModule) and model.accumulate_whole:
        model.set_requires_gradient_sync(last)
        model.set_reshard_after_backward(last)


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor of a shard (a collective: every rank must ask), or the tensor itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def copy_weights(policy: Transformer, target: Transformer) -> None:
    """Overwrite the unsharded `target` with the policy's weights, cast to its dtype, in place.

    Layer by layer: one collective each, in the dtype the policy computes in, and one whole layer alive at a time.
    """
    for source, place in zip(_layers(policy), _layers(target), strict=True):
        if isinstance(source, FSDPModule):
            source.unshard()
        for parameter, copy in zip(_own_parameters(source), _own_parameters(place), strict=True):
            copy.copy_(parameter)
        reshard(source)


def _layers(model: Transformer) -> list[nn.Module]:
    """What `shard` shards one by one: each block, then all the rest."""
    return [*model.model.layers, model]


def _own_parameters(module: nn.Module) -> list[Tensor]:
    """A block's parameters, or those of the model that no block has (embedding, final norm, head)."""
    if not isinstance(module, Transformer):
        return list(module.parameters())
    return [parameter for name, parameter in module.named_parameters() if not name.startswith("model.layers.")]
