"""Very many all-reduces through host memory, in graphs and eager, each compared on the card with a sum in float64.

Sizes are spread over all that a transport carries, types and transports are mixed, and ranks are late at random, each
at its own calls. Nothing waits for the host but once in so many graphs.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from parallel.communicator import Communicator
from parallel.kernels.launch import load_kernel
from parallel.transports import dense
from parallel.transports.dense import wrap_dense
from parallel.transports.host_memory import wrap_host_memory
from parallel.transports.two_step import wrap_two_step
from tools.bench.all_reduce_cards import TIMEOUT_SEC, say
from tools.bench.card_ranks import CardRank

SOURCE = Path(__file__).with_name("all_reduce_soak.cu")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
NUM_GRAPHS, CALLS_PER_GRAPH, EAGER_CALLS = 16, 200, 40
GRAPHS_PER_LOOK = 32
THREADS = 256
# Up to ten microseconds on a card of 2 GHz, at one call in eight.
LATE_CYCLES, LATE_SHARE = 20_000, 0.125


@dataclass(frozen=True)
class SoakCall:
    """One all-reduce: through which transport, of what."""

    communicator: Communicator
    kind: str
    count: int


class Soak:
    """The calls of one rank on one buffer, whose values follow from rank, call and place."""

    def __init__(self, rank: CardRank, communicators: Sequence[tuple[Communicator, int, int]], seed: int) -> None:
        """`communicators`: each with the least and the most bytes that it is given. `seed`: the same on all ranks."""
        self.rank, self.communicators = rank.nccl.rank, communicators
        self.device, self.world_size = rank.device, rank.nccl.world_size
        # All ranks draw the same calls, each is late at its own.
        self.shared, self.own = random.Random(seed), random.Random(seed + 1 + self.rank)
        self.done = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.wrong = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.buffer = torch.empty(max(most for _, _, most in communicators), dtype=torch.uint8, device=self.device)

    def draw(self) -> SoakCall:
        communicator, least, most = self.shared.choice(self.communicators)
        dtype = self.shared.choice(list(DTYPES))
        num_bytes = int(least * (most / least) ** self.shared.random())
        # Whole units mostly; the rest goes on to another transport.
        unit = 16 if self.shared.random() < 0.9 else 4
        return SoakCall(communicator, dtype, max(unit, num_bytes // unit * unit) // DTYPES[dtype].itemsize)

    def run(self, number: int, call: SoakCall) -> None:
        """Makes call `number` after those that `done` counts."""
        message = self.buffer.view(DTYPES[call.kind])[: call.count]
        grid = (min(128, -(-call.count // (4 * THREADS))), 1, 1)
        kernels = load_kernels(call.kind, self.world_size, self.device.index)
        kernels["fill"](grid, THREADS, message, self.done, call.count, number, self.rank)
        if self.own.random() < LATE_SHARE:
            torch.cuda._sleep(self.own.randrange(LATE_CYCLES))
        call.communicator.all_reduce(message)
        kernels["check"](grid, THREADS, message, self.done, self.wrong, call.count, number)

    def run_all(self, calls: Sequence[SoakCall]) -> None:
        for number, call in enumerate(calls):
            self.run(number, call)
        self.done += len(calls)

    def capture(self) -> Callable[[], None]:
        calls, graph = [self.draw() for _ in range(CALLS_PER_GRAPH)], torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self.run_all(calls)
        return graph.replay


def load_kernels(kind: str, world_size: int, index: int) -> dict[str, Callable[..., None]]:
    options = (f"-DWORLD={world_size}",)
    return {
        "fill": load_kernel(SOURCE, f"fill_{kind}", options, "PPiii", index),
        "check": load_kernel(SOURCE, f"check_{kind}", options, "PPPii", index),
    }


def soak(rank: CardRank, num_calls: int) -> None:
    """Raises AssertionError on every rank where an element was wrong on any."""
    small = wrap_host_memory(rank.nccl, rank.device, timeout_sec=TIMEOUT_SEC)
    middle = wrap_dense(small, rank.device, timeout_sec=TIMEOUT_SEC)
    large = wrap_two_step(small, rank.device, timeout_sec=TIMEOUT_SEC)
    # Twice, so that it is half of the calls.
    shares = [(small, 4, 64 * 1024), (large, 64 * 1024, 2**22), *[(middle, 16, dense.MAX_BYTES)] * 2]
    seed = int(rank.control.all_gather(torch.tensor([random.randrange(2**31)]))[0])
    work = Soak(rank, shares, seed)
    start, looks = time.monotonic(), 0
    # Loads kernels and opens NCCL's links, which a capture must not.
    work.run_all([work.draw() for _ in range(CALLS_PER_GRAPH)])
    middle.barrier()
    done = CALLS_PER_GRAPH
    graphs = [work.capture() for _ in range(NUM_GRAPHS)]
    while done < num_calls:
        for _ in range(GRAPHS_PER_LOOK):
            work.shared.choice(graphs)()
        work.run_all([work.draw() for _ in range(EAGER_CALLS)])
        middle.barrier()
        done += GRAPHS_PER_LOOK * CALLS_PER_GRAPH + EAGER_CALLS
        looks += 1
        if looks % 20 == 0:
            say(rank, f"{done} calls in {time.monotonic() - start:.0f} s, {work.wrong.item()} elements wrong")
    large.check()
    wrong = rank.control.all_gather(work.wrong.cpu()).flatten().tolist()
    assert work.done.item() == done
    say(rank, f"{done} calls in {time.monotonic() - start:.0f} s; seed {seed}; wrong elements of each rank: {wrong}")
    assert not any(wrong)
