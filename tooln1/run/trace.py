"""Measured parts of a process's memory, on tensors without data: FSDP2's shards, and the passes over a micro-batch.

FSDP2 wraps the architecture on the meta device, so shards are as uneven and padded as it makes them. The passes of an
update run on fake tensors, every storage counted, with one and with two layers; a further layer costs what the second
does. (torch.distributed._tools has trackers. Their import takes seconds, and they count what DTensor only imagines.)
Two kernels of CUDA, which fake tensors on the CPU do not reach, have stand-ins that keep tensors of the same sizes:
LayerNorm for the fused RMSNorm, causal attention over the whole stream for FlexAttention.
"""

import weakref
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

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

MEAN_PROMPT, MEAN_REPLY = 728, 105  # tokens, in the paper's data


def meta_model(config: ModelConfig, settings: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> Transformer:
    """A model without data, with the adapters that the settings ask for."""
    with torch.device("meta"):
        model = Transformer(config).to(dtype)
    if settings["lora_rank"]:
        add_adapters(model, settings["lora_rank"], 1.0, settings["lora_targets"].split(","), seed=0)
    return model


def shards(config: ModelConfig, settings: Mapping[str, Any], processes: int) -> dict[str, Tensor]:
    """What a rank holds of each parameter, by name, without data; `processes`: those of the default process group."""
    world, hybrid = World(0, processes, torch.device("cpu")), settings["sharding"] == "hybrid"
    model = shard(meta_model(config, settings), world, hybrid=hybrid)
    return {name: p.to_local() if isinstance(p, DTensor) else p for name, p in model.named_parameters()}


def passes(config: ModelConfig, settings: Mapping[str, Any], cuda: bool) -> list[int]:
    """Bytes of the passes over a full micro-batch (bf16 on CUDA, else fp32), besides weights, on unsharded weights.

    The most without gradients; the activations that a forward pass leaves to the backward pass; the most until the
    head's backward pass has ended; the most in that of the blocks, whose gradients leave with each block.
    """
    one, two = (_trace(replace(config, num_hidden_layers=layers), settings, cuda) for layers in (1, 2))
    return [a + (config.num_hidden_layers - 1) * (b - a) for a, b in zip(one, two, strict=True)]


def _trace(config: ModelConfig, settings: Mapping[str, Any], cuda: bool) -> list[int]:
    found: list[int] = []
    loss = PolicyLoss(chunk=settings["logprob_chunk_tokens"], entropy_coef=settings["entropy_coef"])

    def watch_head(model: Transformer, inputs: tuple, hidden: Tensor) -> None:
        hidden.register_hook(lambda gradient: found.append(live.restart()))

    model = meta_model(config, settings, torch.bfloat16 if cuda else torch.float32)
    with FakeTensorMode(allow_non_fake_inputs=True), _LiveBytes() as live:
        model.to_empty(device="cpu")
        for block in model.model.layers:
            block.recompute, first = settings["activation_checkpointing"], block.input_layernorm.weight
            if first.requires_grad:  # the last weight of the block to get a gradient
                first.register_post_accumulate_grad_hook(lambda _, block=block: block.zero_grad())
        for norm in model.modules():
            if isinstance(norm, RMSNorm) and cuda:
                norm.forward = partial(F.layer_norm, normalized_shape=norm.weight.shape, weight=norm.weight)
        batch, weights = _microbatch(settings, cuda and settings["update_attention"] != "sdpa"), live.now
        add_logprobs([batch], model, None, 1.0, loss.chunk)
        found.append(live.restart())
        model.register_forward_hook(watch_head)
        total, _ = loss(model, batch, 1.0)
        found.append(live.now)
        total.backward()
        return [size - weights for size in (*found, live.peak)]


def _microbatch(settings: Mapping[str, Any], one_sequence: bool) -> PackedBatch:
    """A full micro-batch whose prompts and replies are to each other as those of the paper."""
    tokens, replies = settings["tokens_per_microbatch"], 1 if one_sequence else settings["group_size"]
    of_group = MEAN_PROMPT + replies * MEAN_REPLY
    groups = 1 if one_sequence else max(1, tokens // of_group)
    reply = max(1, tokens // groups * MEAN_REPLY // of_group)
    prompt, reply = [0] * max(1, tokens // groups - replies * reply), [0] * reply
    rollouts = [Rollout(i, j, prompt, reply, [0.0] * len(reply), True) for i in range(groups) for j in range(replies)]
    return pack(rollouts, range(len(rollouts)), torch.zeros(len(rollouts)), attention="sdpa")


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that exist, and answers what fake tensors cannot."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, set()

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
        for storage in (tensor.untyped_storage() for tensor in tree_leaves(out) if isinstance(tensor, Tensor)):
            if storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())
        return out

    def _forget(self, key: int, size: int) -> None:
        self.known.remove(key)
        self.now -= size
