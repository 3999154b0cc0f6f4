"""How fast the host multiplies by the 4-bit weights of layers, and the link copies others meanwhile: by trying.

Both take their bytes from the host's memory, so neither is what it is alone.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from parallel.kernels.host_int4 import host_int4
from parallel.offload.exchange import multiply_on_host
from parallel.offload.host_memory import HostBuffer
from parallel.units import MIB

# Weights of the trial, together: more than the caches of most hosts hold.
TRIAL_BYTES = 640 * MIB
TRIAL_SEC = 0.25
COPY_BYTES = 64 * MIB
# Copies that wait in the queue, so that the link never does: 59 ms at 55 GB/s, while the host takes 10 to 40 a layer.
NUM_QUEUED = 48
GROUP_SIZE = 128

# [out, in] of a linear.
Shape = tuple[int, int]


@dataclass(frozen=True)
class HostRates:
    """Of products of `num_rows` rows with `num_threads` threads of the host.

    `layer_sec`: all linears of one layer, with the rows' way from the card and back. Bytes a second over the link:
    meanwhile, and while the host does nothing. `layer_bytes`: what the host reads for a layer.
    """

    num_rows: int
    num_threads: int
    layer_bytes: int
    layer_sec: float
    link: float
    link_alone: float

    @property
    def host(self) -> float:
        """Bytes of weights a second."""
        return self.layer_bytes / self.layer_sec

    def report(self) -> dict[str, Any]:
        return {
            "num_rows": self.num_rows,
            "num_threads": self.num_threads,
            "host_layer_ms": self.layer_sec * 1e3,
            "host_gb_per_sec": self.host / 1e9,
            "copy_gb_per_sec": self.link / 1e9,
            "copy_alone_gb_per_sec": self.link_alone / 1e9,
        }


class HostTrial:
    """Weights like those of layers with linears of `shapes`, and a link that copies, on a card.

    Raises:
        RuntimeError: memory cannot be pinned.
    """

    def __init__(self, shapes: Sequence[Shape], device: torch.device) -> None:
        self.device, self.shapes = device, shapes
        self.layer_bytes = sum(num_out * num_in // 2 + num_out * num_in // GROUP_SIZE * 4 for num_out, num_in in shapes)
        num_layers = max(2, -(-TRIAL_BYTES // self.layer_bytes))
        self.layers = [[blank_weight(shape) for shape in shapes] for _ in range(num_layers)]
        self.link = Link(device)

    def measure(self, num_rows: int, num_threads: int) -> HostRates:
        link_alone = self.link.measure()
        with threads(num_threads):
            layer_sec, link = self.time_layers(num_rows)
        return HostRates(num_rows, num_threads, self.layer_bytes, layer_sec, link, link_alone)

    @torch.inference_mode()
    def time_layers(self, num_rows: int) -> tuple[float, float]:
        """Seconds of a layer, and bytes a second over the link."""
        rows = {
            num_in: torch.ones(num_rows, num_in, dtype=torch.bfloat16, device=self.device) for _, num_in in self.shapes
        }
        calls = cycle([partial(self.run_layer, layer, rows) for layer in self.layers])
        # Once through all of them: pages are mapped, and what a first call makes is made.
        for _ in self.layers:
            next(calls)()
        return self.link.beside(lambda: next(calls)())

    def run_layer(self, layer: Sequence[tuple[Tensor, Tensor]], rows: dict[int, Tensor]) -> None:
        for (num_out, num_in), (packed, scales) in zip(self.shapes, layer, strict=True):
            multiply = partial(host_int4, packed=packed, scales_and_shifts=scales, group_size=GROUP_SIZE)
            multiply_on_host(rows[num_in], num_out, multiply)


def blank_weight(shape: Shape) -> tuple[Tensor, Tensor]:
    """Packed values, scales and shifts that mean nothing; in memory of their own, not of the page of zeros."""
    num_out, num_in = shape
    packed = torch.full((num_out, num_in // 2), 0x5A, dtype=torch.uint8)
    return packed, torch.full((num_in // GROUP_SIZE, num_out, 2), 2**-7, dtype=torch.bfloat16)


class Link:
    """Copies from pinned memory to a card, as many as it takes to keep the link at work."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.source = HostBuffer(COPY_BYTES, device)
        self.source.memory.fill_(0x5A)
        self.target = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
        self.stream = torch.cuda.Stream(device)
        self.queued: deque[torch.cuda.Event] = deque()
        self.num_done = 0

    def measure(self) -> float:
        """Bytes a second, alone."""
        return self.beside(lambda: time.sleep(1e-4))[1]

    def beside(self, call: Callable[[], object]) -> tuple[float, float]:
        """Seconds of a `call`, again and again while the link copies; and the link's bytes a second."""
        torch.cuda.synchronize(self.device)
        self.queued.clear()
        self.keep_busy()
        call()
        # From the end of a copy on.
        self.queued[0].synchronize()
        self.keep_busy()
        self.num_done, num_calls, start = 0, 0, time.perf_counter()
        while time.perf_counter() - start < TRIAL_SEC or num_calls < 2:
            call()
            num_calls += 1
            self.keep_busy()
        sec = time.perf_counter() - start
        torch.cuda.synchronize(self.device)
        return sec / num_calls, self.num_done * COPY_BYTES / sec

    def keep_busy(self) -> None:
        """Counts what is done, and queues as many again."""
        while self.queued and self.queued[0].query():
            self.queued.popleft()
            self.num_done += 1
        with torch.cuda.stream(self.stream):
            while len(self.queued) < NUM_QUEUED:
                self.target.copy_(self.source.memory, non_blocking=True)
                event = torch.cuda.Event()
                event.record(self.stream)
                self.queued.append(event)


@contextmanager
def threads(number: int) -> Iterator[None]:
    """torch computes with so many inside the context."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
