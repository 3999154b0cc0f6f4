"""The transports that torch brings: NCCL between cards, gloo between CPUs (or staged through host memory)."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.communicator import SeparateNorm


class TorchDistributed(SeparateNorm):
    """Collectives of one torch process group, issued on the current stream."""

    def __init__(self, name: str, group: dist.ProcessGroup, device: torch.device) -> None:
        self.name = name
        self.group = group
        self.device = device
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)
        self.capturable = name == "nccl"

    def all_reduce(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor, group=self.group)
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        gathered = tensor.new_empty(self.world_size, *tensor.shape)
        dist.all_gather(list(gathered.unbind(0)), tensor.contiguous(), group=self.group)
        return gathered

    def barrier(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        # A sum of one number instead of dist.barrier: it needs no guess about the device on any backend.
        dist.all_reduce(torch.zeros(1, device=self.device), group=self.group)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def check(self) -> None:
        """Torch's own watchdog ends a process whose collective does not finish."""


def open_nccl(device: torch.device, timeout: timedelta) -> TorchDistributed:
    group = dist.new_group(backend="nccl", timeout=timeout, device_id=device)
    return TorchDistributed("nccl", group, device)


def open_gloo(device: torch.device, timeout: timedelta) -> TorchDistributed:
    group = dist.new_group(backend="gloo", timeout=timeout)
    return TorchDistributed("gloo", group, device)
