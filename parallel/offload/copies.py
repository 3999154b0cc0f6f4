"""Copies from host memory on a stream of their own, in step with what computes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

# What is copied, and where to.
Pairs = Iterable[tuple[Tensor, Tensor]]


class CopyQueue(Protocol):
    """Copies into numbered buffers, in order, beside what computes on the current stream."""

    def copy(self, pairs: Pairs, buffer: int) -> None:
        """Queues copies into `buffer`, after what the last `mark_used` of it covers."""
        ...

    def wait_copied(self, buffer: int) -> None:
        """What is queued to compute from here on follows the last copies into `buffer`."""
        ...

    def mark_used(self, buffer: int) -> None:
        """All that reads `buffer` has been queued."""
        ...


class CardCopies:
    """On a card: the copy engine works while kernels run, and events keep them in order."""

    def __init__(self, device: torch.device, num_buffers: int) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.copied, self.used = ([torch.cuda.Event() for _ in range(num_buffers)] for _ in range(2))

    def copy(self, pairs: Pairs, buffer: int) -> None:
        self.stream.wait_event(self.used[buffer])
        with torch.cuda.stream(self.stream):
            for source, target in pairs:
                target.copy_(source, non_blocking=True)
            self.copied[buffer].record(self.stream)

    def wait_copied(self, buffer: int) -> None:
        torch.cuda.current_stream(self.device).wait_event(self.copied[buffer])

    def mark_used(self, buffer: int) -> None:
        self.used[buffer].record(torch.cuda.current_stream(self.device))


class HostCopies:
    """On a CPU, where everything is done once it is called."""

    def copy(self, pairs: Pairs, buffer: int) -> None:
        for source, target in pairs:
            target.copy_(source)

    def wait_copied(self, buffer: int) -> None:
        """It was done at once."""

    def mark_used(self, buffer: int) -> None:
        """Nothing is queued."""


def open_copy_queue(device: torch.device, num_buffers: int) -> CopyQueue:
    return CardCopies(device, num_buffers) if device.type == "cuda" else HostCopies()
