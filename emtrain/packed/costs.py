"""What a pass costs whatever its size, and how large it may be, estimated from a model's linear layers."""

import os

import psutil
import torch
from torch import nn

HOST_FLOP = {"cpu": 3e7, "cuda": 1.9e11}
"""Arithmetic that a device does while the host deals with one linear layer and all that comes with it, forward and
backward. CPU, per thread: 0.37 ms at 80 GFLOP/s, measured with transformers 5 at width 128; half of that at width 64,
four times at 576. GPU: 0.5 ms at 400 TFLOP/s, an H200 in bf16, estimated from the number of kernels."""

CPU_TOKENS = 4096
"""On a CPU the activations of larger passes leave the cache: 32 runs of 512 tokens (hidden size 64, 4 layers) take 17 %
longer in one pass than in four."""
CPU_BYTES = 2**30
"""Activations of a pass on a CPU. Models for which this is few tokens gain nothing from larger passes."""


def overhead_tokens(model: nn.Module, device: torch.device) -> int:
    """The tokens that could be computed in the time that a pass takes beside its tokens.

    A frozen layer does 4 FLOP per weight and token: 2 forward, 2 backward to its input.
    """
    linears = _linears(model)
    weights = sum(linear.in_features * linear.out_features for linear in linears) / len(linears)
    host_flop = HOST_FLOP["cuda"] if device.type != "cpu" else HOST_FLOP["cpu"] * torch.get_num_threads()
    return max(1, round(host_flop / (4 * weights)))


def most_tokens(model: nn.Module, device: torch.device, itemsize: int) -> int:
    """Tokens of a pass, padding included, whose activations fit: into 1 GiB of a CPU's memory and into its cache, or
    into half of what is free on a GPU.

    Autograd keeps about the inputs and outputs of every linear layer (0.9 to 1.1 of them for llama, qwen2 and gemma3
    shapes). Twice that leaves room for logits, which are fp32, and for what is in work.
    """
    bytes_per_token = 2 * itemsize * sum(linear.in_features + linear.out_features for linear in _linears(model))
    if device.type == "cpu":
        return max(1, min(CPU_TOKENS, CPU_BYTES // bytes_per_token))
    return max(1, free_bytes(device) // 2 // bytes_per_token)


def free_bytes(device: torch.device) -> int:
    """Memory that this process may still take: what is free on a GPU, or a processor's share of what is free."""
    if device.type == "cpu":
        return int(psutil.virtual_memory().available) // (os.cpu_count() or 1)
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _linears(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]
