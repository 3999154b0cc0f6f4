"""Several transports as one: each all-reduce goes the way that its length has."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import torch
from torch import Tensor

from parallel.communicator import Communicator, SeparateNorm


class BySize(SeparateNorm):
    """Hands each all-reduce to the communicator of its range; all of them must be of the ranks of `inner`.

    Args:
        inner: whose barrier it is.
        routes: the largest bytes of a range and who carries it, ascending; the last one also carries what is larger.
        gather: who carries the all-gathers.
    """

    name = "by_size"

    def __init__(
        self,
        inner: Communicator,
        routes: Sequence[tuple[int, Communicator]],
        gather: Communicator,
        device: torch.device,
    ) -> None:
        self.inner, self.gather, self.device = inner, gather, device
        self.limits = [limit for limit, _ in routes[:-1]]
        self.communicators = [communicator for _, communicator in routes]
        self.rank, self.world_size = inner.rank, inner.world_size
        self.capturable = all(each.capturable for each in self.communicators)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        # By what all ranks know.
        return self.carrier(tensor.nbytes).all_reduce(tensor)

    def carrier(self, num_bytes: int) -> Communicator:
        """Of all-reduces of so many bytes."""
        return self.communicators[bisect_left(self.limits, num_bytes)]

    def all_gather(self, tensor: Tensor) -> Tensor:
        return self.gather.all_gather(tensor)

    def barrier(self) -> None:
        # In this order a lost peer is an error here and not another wait in `inner`.
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.check()
        self.inner.barrier()

    def check(self) -> None:
        for each in {id(each): each for each in (*self.communicators, self.gather)}.values():
            each.check()
        self.inner.check()
