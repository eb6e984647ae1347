"""LoRA: train a low-rank addition to frozen weights (Hu et al., arXiv 2106.09685).

    y = W x + b + (alpha / rank) B A x        A [rank, in] random, B [out, rank] zero at the start

The base without its adapters is the reference of the KL. On one process there is one copy of the base: the sampler
calls the policy itself, and the reference is the policy with its adapters off (`WithoutAdapters`). They are never
merged into it in place, which could not be undone in bf16. The sampler's copy of a sharded policy has merged weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from tooln1.grpo import at_least_fp32
from tooln1.io.files import atomic_directory
from tooln1.model import Attend, Transformer

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoRALinear(nn.Module):
    """A linear layer with an adapter in fp32, computed in the dtype of its input; `weight` and `bias` keep their names.

    A's distribution is that of peft: uniform, of variance 1 / (3 in).
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, generator: torch.Generator):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        # on the CPU, so that all ranks and devices begin with the same numbers
        start = nn.init.kaiming_uniform_(torch.empty(rank, linear.in_features), a=math.sqrt(5), generator=generator)
        self.lora_A = nn.Parameter(start.to(linear.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank, device=linear.weight.device))
        self.scale, self.enabled = alpha / rank, True

    def forward(self, x: Tensor) -> Tensor:
        """[T, in] -> [T, out]."""
        y = F.linear(x, self.weight, self.bias)
        if not self.enabled:
            return y
        return torch.addmm(y, x @ self.lora_A.to(x.dtype).T, self.lora_B.to(x.dtype).T, alpha=self.scale)

    def merged_weight(self) -> Tensor:
        """W + (alpha / rank) B A [out, in], computed in at least fp32."""
        dtype = at_least_fp32(self.lora_A.dtype)
        update = self.scale * self.lora_B.to(dtype) @ self.lora_A.to(dtype)
        return (self.weight + update).to(self.weight.dtype)


class WithoutAdapters(nn.Module):
    """The frozen base of a model with adapters, to be called like a model: no weight is copied."""

    def __init__(self, policy: Transformer):
        super().__init__()
        self.policy, self.config, self.vocabulary = policy, policy.config, policy.vocabulary
        self.adapted = [module for module in policy.modules() if isinstance(module, LoRALinear)]

    @property
    def head(self) -> Tensor:
        """The output matrix [V, C]."""
        return self.policy.head

    def forward(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Hidden states [T, C] of the base, without gradients."""
        try:
            self._switch(False)
            return self.policy(tokens, positions, attend)
        finally:
            self._switch(True)

    def _switch(self, on: bool) -> None:
        for module in self.adapted:
            module.enabled = on


def add_adapters(model: Transformer, rank: int, alpha: float, targets: Collection[str], seed: int) -> Transformer:
    """Freeze `model` and give the `targets` of each block an adapter, in place; the first numbers depend on `seed`."""
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for block in model.model.layers:
        for part in (block.self_attn, block.mlp):
            for name in [name for name in TARGETS if name in targets and hasattr(part, name)]:
                setattr(part, name, LoRALinear(getattr(part, name), rank, alpha, generator))
    return model


def merged_parameter(module: nn.Module, name: str) -> Tensor:
    """The parameter `name` of a plain model, or of its part, from one that may have an adapter there."""
    owner, _, last = name.rpartition(".")
    adapted = module.get_submodule(owner)
    return adapted.merged_weight() if isinstance(adapted, LoRALinear) and last == "weight" else getattr(adapted, last)


@torch.no_grad()
def merged_model(model: Transformer) -> Transformer:
    """A plain model on the CPU with the weights of `model`, which is not sharded, its adapters merged."""
    with torch.device("meta"):
        plain = Transformer(model.config)
    state = {name: merged_parameter(model, name).detach().cpu() for name in plain.state_dict()}
    plain.load_state_dict(state, assign=True)
    plain.source, plain.vocabulary = model.source, model.vocabulary
    return plain


def save_adapter(
    adapters: Mapping[str, Tensor], path: Path, base: str, rank: int, alpha: float, targets: Collection[str]
) -> None:
    """Write adapters (by name in the model, not sharded) in peft's layout, which peft and vLLM load onto `base`."""
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(targets),
        "lora_dropout": 0.0,
        "bias": "none",
    }
    state = {f"base_model.model.{name}.weight": tensor.detach().cpu() for name, tensor in adapters.items()}
    with atomic_directory(path) as directory:
        (directory / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(state, directory / "adapter_model.safetensors", {"format": "pt"})
