"""What ranks say to each other: the protocol every transport implements, and the factory that opens one.

The engine and the sharded layers know only `Communicator`; which wires carry it is chosen once, at start.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Protocol

import torch
from torch import Tensor

from parallel.kernels.fused import add_rms_norm


class TransportError(RuntimeError):
    """A transport gave wrong sums or did not answer; the message names it and what to try."""


class Communicator(Protocol):
    """Collectives over the ranks of one run. Every rank calls the same methods in the same order."""

    name: str
    rank: int
    world_size: int
    # Whether its collectives can be captured in a CUDA graph.
    capturable: bool

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sums `tensor` over the ranks, in place, and returns it. Any shape; every rank gets the same bits."""
        ...

    def all_reduce_add_norm(self, update: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Adds the sum over the ranks of `update` [tokens, H] to `residual` in place; returns fused.rms_norm of that.

        What is in `update` afterwards is not defined. The bits are those of all_reduce and fused.add_rms_norm.
        """
        ...

    def all_gather(self, tensor: Tensor) -> Tensor:
        """[...] on every rank -> [world_size, ...] on every rank. Shapes must be equal."""
        ...

    def barrier(self) -> None:
        """Returns once every rank has called it and this rank's device has done its queued work."""
        ...

    def check(self) -> None:
        """Raises TransportError if a collective that the device has run was given up. Costs next to nothing.

        To be called before results that came to the host are believed.
        """
        ...


class SeparateNorm:
    """A communicator's all_reduce_add_norm as two steps: its own all-reduce, then the norm's kernel."""

    def all_reduce(self, tensor: Tensor) -> Tensor:
        raise NotImplementedError

    def all_reduce_add_norm(self, update: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """As Communicator's."""
        normed: Tensor = add_rms_norm(self.all_reduce(update), residual, weight, eps)
        return normed


class Around(SeparateNorm):
    """A communicator around `inner`, whose own all-reduce is what differs."""

    def __init__(self, inner: Communicator) -> None:
        self.inner = inner
        self.rank, self.world_size = inner.rank, inner.world_size
        self.capturable = inner.capturable

    def all_gather(self, tensor: Tensor) -> Tensor:
        return self.inner.all_gather(tensor)

    def barrier(self) -> None:
        self.inner.barrier()

    def check(self) -> None:
        self.inner.check()


class ElidedAllReduce(Around):
    """A communicator whose all-reduce does nothing: what a step would cost if talking were free.

    The values it leaves are wrong (each rank keeps its partial sum); it exists to be timed.
    """

    def __init__(self, inner: Communicator) -> None:
        super().__init__(inner)
        self.name = f"{inner.name} without all-reduce"

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return tensor


def open_communicator(kind: str, device: torch.device, *, timeout_sec: float) -> Communicator:
    """Opens transport `kind` ("nccl", "host_memory", "gloo" or "solo") over all ranks of the default process group.

    Raises:
        ValueError: an unknown kind; the message lists the known ones.
    """
    from parallel.transports import host_memory, solo, torch_distributed

    openers: dict[str, Callable[[torch.device, timedelta], Communicator]] = {
        "nccl": torch_distributed.open_nccl,
        "host_memory": host_memory.open_host_memory,
        "gloo": torch_distributed.open_gloo,
        "solo": solo.open_solo,
    }
    if kind not in openers:
        raise ValueError(f"transport {kind!r} is unknown; there are {', '.join(openers)}.")
    return openers[kind](device, timedelta(seconds=timeout_sec))
