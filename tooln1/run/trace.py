"""Measured parts of a process's memory, on tensors without data: FSDP2's shards, and the passes over a micro-batch.

`shard` wraps the architecture on the meta device, so shards are as uneven and padded as FSDP2 makes them. The passes of
an update run on fake tensors, with every storage counted: log-probs, loss and backward pass of one and of two layers;
each further layer costs what the second one does. (torch.distributed._tools has trackers; their import takes seconds,
and they count what DTensor only imagines, such as the moments of whole weights.)

Fake tensors on the CPU do not reach CUDA's kernels. Two have stand-ins that keep tensors of the same sizes: LayerNorm
for the fused RMSNorm, and causal attention over the whole stream for FlexAttention.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tooln1.batch import PackedBatch, pack
from tooln1.data import Rollout
from tooln1.distributed import World, shard
from tooln1.io.model_config import ModelConfig
from tooln1.lora import add_adapters
from tooln1.model import RMSNorm, Transformer
from tooln1.update import PolicyLoss, add_logprobs

CPU = torch.device("cpu")
MEAN_PROMPT, MEAN_REPLY = 728, 105  # tokens, in the paper's data; the traced micro-batch has them in this ratio


class Group(NamedTuple):
    """Parameters that FSDP2 gathers together: those of a block, or all others."""

    shards: tuple[int, ...]  # numbers of each parameter that a rank holds
    trained: int  # those of the trained parameters


class Passes(NamedTuple):
    """Bytes of the passes over a full micro-batch, besides weights and the gradients that last."""

    logprobs: int  # most of them at once without gradients
    stored: int  # activations that the forward pass leaves to the backward pass
    head: int  # most of them until the head's backward pass has ended
    blocks: int  # most of them in the backward pass of the blocks


def meta_model(config: ModelConfig, settings: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> Transformer:
    """A model without data, with the adapters that the settings ask for."""
    with torch.device("meta"):
        model = Transformer(config).to(dtype)
    if settings["lora_rank"]:
        add_adapters(model, settings["lora_rank"], 1.0, settings["lora_targets"].split(","), seed=0)
    return model


def groups(config: ModelConfig, settings: Mapping[str, Any], processes: int) -> tuple[Group, Group]:
    """The parameters of a block and all others, as FSDP2 shards them over the default process group's `processes`."""
    model = shard(meta_model(replace(config, num_hidden_layers=1), settings), World(0, processes, CPU))
    block, others = [], []
    for name, weight in model.named_parameters():
        size = (weight.to_local() if isinstance(weight, DTensor) else weight).numel()
        (block if name.startswith("model.layers.") else others).append((size, size * weight.requires_grad))
    return tuple(Group(tuple(size for size, _ in found), sum(own for _, own in found)) for found in (block, others))


def passes(config: ModelConfig, settings: Mapping[str, Any], cuda: bool, sharded: bool) -> Passes:
    """What the passes of an update need: in bf16 on CUDA, else in fp32; on weights that FSDP2 shards, or on others."""
    one, two = (_trace(replace(config, num_hidden_layers=layers), settings, cuda, sharded) for layers in (1, 2))
    return Passes(*(a + (config.num_hidden_layers - 1) * (b - a) for a, b in zip(one, two, strict=True)))


def _trace(config: ModelConfig, settings: Mapping[str, Any], cuda: bool, sharded: bool) -> Passes:
    model, peaks = meta_model(config, settings, torch.bfloat16 if cuda else torch.float32), []

    def watch_head(model: Transformer, inputs: tuple, hidden: Tensor) -> None:
        hidden.register_hook(lambda _: peaks.append(live.restart()))

    for block in model.model.layers:
        block.recompute = settings["activation_checkpointing"]
    with FakeTensorMode(allow_non_fake_inputs=True), _LiveBytes() as live:
        model.to_empty(device=CPU)
        for norm in model.modules():
            if isinstance(norm, RMSNorm) and cuda:
                norm.forward = partial(F.layer_norm, normalized_shape=norm.weight.shape, weight=norm.weight)
        _drop_gradients(model, sharded)
        batch = _microbatch(settings, one_sequence=cuda and settings["update_attention"] != "sdpa")
        before = live.now
        add_logprobs([batch], model, None, 1.0, settings["logprob_chunk_tokens"])
        peaks.append(live.restart())
        model.register_forward_hook(watch_head)
        loss = PolicyLoss(chunk=settings["logprob_chunk_tokens"], entropy_coef=settings["entropy_coef"])
        sum_of_losses, _ = loss(model, batch, 1.0)
        peaks.append(live.now)
        sum_of_losses.backward()
        logprobs, stored, head, blocks = (peak - before for peak in (*peaks, live.peak))
    return Passes(logprobs, stored, head, blocks)


def _drop_gradients(model: Transformer, sharded: bool) -> None:
    """Drop new gradients when they go: with FSDP2 those of a block at its end, else each, added to what is there."""
    for module in model.model.layers if sharded else model.modules():
        for weight in [module.input_layernorm.weight] if sharded else module.parameters(recurse=False):
            if weight.requires_grad:
                weight.register_post_accumulate_grad_hook(lambda _, module=module: module.zero_grad())


def _microbatch(settings: Mapping[str, Any], one_sequence: bool) -> PackedBatch:
    """A full micro-batch of groups whose prompt and replies are as long as the paper's are to each other."""
    tokens, replies = settings["tokens_per_microbatch"], settings["group_size"]
    per_group = MEAN_PROMPT + replies * MEAN_REPLY
    count = 1 if one_sequence else max(1, tokens // per_group)
    reply = max(1, tokens // count * MEAN_REPLY // per_group)
    prompt = max(1, tokens // count - replies * reply)
    lengths = [replies * reply] if one_sequence else [reply] * replies
    rollouts = [
        Rollout(group, sample, [0] * prompt, [0] * length, [0.0] * length, True)
        for group in range(count)
        for sample, length in enumerate(lengths)
    ]
    return pack(rollouts, range(len(rollouts)), torch.zeros(len(rollouts)), attention="sdpa")


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that exist, and answers what fake tensors cannot."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.sizes = 0, 0, {}

    def restart(self) -> int:
        """The peak, which then starts anew from what exists now."""
        peak, self.peak = self.peak, self.now
        return peak

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:  # tensor.item()
            return 1.0
        if func is torch.ops.aten.index.Tensor and args[1][0].dtype == torch.bool:  # values[mask]
            return torch.empty_like(args[0])
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._remove, storage._cdata)

    def _remove(self, key: int) -> None:
        self.now -= self.sizes.pop(key)
