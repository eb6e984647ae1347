"""LoRA: train a low-rank addition to frozen weights (Hu et al., arXiv 2106.09685).

    y = W x + b + (alpha / rank) B A x        A [rank, in] random, B [out, rank] zero at the start

The base without its adapters is the reference of the KL. On one process there is one copy of the base: the sampler
calls the policy itself, and the reference is the policy with its adapters off (`WithoutAdapters`). They are never
merged into it in place, which could not be undone in bf16. The sampler's copy of a sharded policy has merged weights.
"""

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
from tooln1.io.weights import overwrite
from tooln1.model import Transformer

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoRALinear(nn.Module):
    """A linear layer with an fp32 adapter, computed in the dtype of its input; `weight` and `bias` keep their names."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.lora_A = nn.Parameter(torch.empty(rank, linear.in_features, device=linear.weight.device))
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
        return (self.weight + self.scale * self.lora_B.to(dtype) @ self.lora_A.to(dtype)).to(self.weight.dtype)


class WithoutAdapters(nn.Module):
    """The frozen base of a policy with adapters, to be called like a model."""

    def __init__(self, policy: Transformer):
        super().__init__()
        self.policy, self.vocabulary = policy, policy.vocabulary

    @property
    def head(self) -> Tensor:
        """The output matrix [V, C]."""
        return self.policy.head

    def forward(self, *inputs) -> Tensor:
        """What the policy would return if it had no adapters; for passes without gradients."""
        adapted = [module for module in self.policy.modules() if isinstance(module, LoRALinear)]
        for module in adapted:
            module.enabled = False
        try:
            return self.policy(*inputs)
        finally:
            for module in adapted:
                module.enabled = True


def add_adapters(model: Transformer, rank: int, alpha: float, targets: Collection[str], seed: int) -> Transformer:
    """Freeze `model` and give the `targets` of each block an adapter, in place."""
    model.requires_grad_(False)
    for block in model.model.layers:
        for part in (block.self_attn, block.mlp):
            for name, linear in list(part.named_children()):
                if name in targets:
                    setattr(part, name, LoRALinear(linear, rank, alpha))
    reset_adapters(model, seed)
    return model


def reset_adapters(model: nn.Module, seed: int) -> None:
    """Set all adapters, which may be sharded, to those of a new model: the same numbers whatever the device."""
    generator = torch.Generator().manual_seed(seed)
    for layer in (module for module in model.modules() if isinstance(module, LoRALinear)):
        down = torch.empty(layer.lora_A.shape)
        overwrite(layer.lora_A, nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator))  # as peft has it
        overwrite(layer.lora_B, torch.zeros(layer.lora_B.shape))


def trained_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that are not frozen, by name: without LoRA all."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def merged_parameter(module: nn.Module, name: str) -> Tensor:
    """The parameter `name` of a model, or of a part of one, with the adapter that it may have merged."""
    owner, _, last = name.rpartition(".")
    layer = module.get_submodule(owner)
    return layer.merged_weight() if isinstance(layer, LoRALinear) and last == "weight" else getattr(layer, last)


def save_adapters(adapters: Mapping[str, Tensor], alpha: float, base: str, path: Path) -> None:
    """Write adapters, by name and not sharded, in peft's layout, which peft and vLLM load onto the model `base`."""
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "lora_alpha": alpha}
    config["r"] = len(next(iter(adapters.values())))  # of the first A
    config["target_modules"] = sorted({name.split(".")[-2] for name in adapters})
    state = {f"base_model.model.{name}.weight": tensor.detach().cpu() for name, tensor in adapters.items()}
    with atomic_directory(path) as directory:
        (directory / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(state, directory / "adapter_model.safetensors", {"format": "pt"})
