"""What all-reduces by copy engines cost card and host: `python -m tools.bench.copies`.

One process a card, or those of torchrun. For copies, the two-step kernel, also as a graph, and NCCL:
- all-reduces of bfloat16 alone: microseconds of a call on the card where each begins after the one ahead, and where
  several are under way, and of the host's part in it, from 50 calls that are queued without waiting;
- beside products, as a pass in four sections has them: three products of 8192 x 8192 for each sum, which is waited for
  four sums later; milliseconds on the card of products and of both, and of the host.
With `--tune` also copies in other pieces and lanes. Sums of fresh values are compared bit for bit first (NCCL's as far
as bfloat16 rounds). Figures are the slowest rank's; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from parallel.communicator import Communicator
from parallel.engine.prefill.side_stream import Sum, side_stream
from parallel.transports.copies import wrap_copies
from parallel.transports.copy_layout import CopyLayout
from parallel.transports.two_step import wrap_two_step
from parallel.units import MIB
from tools.bench.all_reduce_cards import say
from tools.bench.card_ranks import CardRank, run_on_cards

SIZES = (4 * MIB, 8 * MIB, 11 * MIB, 16 * MIB, 32 * MIB)
TUNED_SIZES = (8 * MIB, 11 * MIB)
WIDTH = 8192
PRODUCTS_PER_SUM, NUM_SUMS, SECTIONS = 3, 24, 4
CALLS, QUEUED_CALLS, REPEATS = 8, 50, 5
# What --tune tries: MiB of a piece, lanes.
TUNED = ((2, 4), (3, 4), (4, 3), (4, 4), (6, 2), (6, 4), (8, 3), (12, 3))
LINK_BYTES, LINK_COPIES = 32 * MIB, 8
# Streams beyond so many share queues of the card, eight unless it is set, and may then wait for one another.
CONNECTIONS = os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS")
TIMEOUT_SEC = 6.0


@dataclass(frozen=True)
class Row:
    """Of a transport and a size; microseconds of a call, milliseconds beside products."""

    name: str
    num_bytes: int
    call_us: float
    started_us: float
    host_us: float
    products_ms: float
    beside_ms: float
    beside_host_ms: float


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.bench.copies", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count(), help="cards")
    parser.add_argument("--tune", action="store_true", help="also other pieces and lanes")
    args = parser.parse_args()
    run_on_cards(bench, args.ranks, args.tune)


def bench(rank: CardRank, tune: bool) -> None:
    link = measure_link(rank)
    free, _ = torch.cuda.mem_get_info(rank.device)
    copies = wrap_copies(rank.nccl, rank.device, timeout_sec=TIMEOUT_SEC)
    [taken] = slowest(rank, free - torch.cuda.mem_get_info(rank.device)[0])
    say(rank, f"opening copies takes {taken / MIB:.1f} MiB of a card")
    two_step = wrap_two_step(rank.nccl, rank.device, timeout_sec=TIMEOUT_SEC)
    rows: list[Row] = []
    for name, each in (("copies", copies), ("two steps", two_step), ("NCCL", rank.nccl)):
        rows += [measure(rank, name, each, size, Launched) for size in SIZES]
    rows += [measure(rank, "two steps, graph", two_step, size, Graphed) for size in SIZES]
    if tune:
        rows += measure_layouts(rank)
    card = {"name": torch.cuda.get_device_name(rank.device), "torch": torch.__version__, "connections": CONNECTIONS}
    found = {"card": card, "ranks": rank.nccl.world_size, "link": link, "card_bytes": taken}
    say(rank, json.dumps({**found, "rows": [asdict(row) for row in rows]}))


def slowest(rank: CardRank, *values: float) -> list[float]:
    found: list[float] = rank.control.all_gather(torch.tensor(values, dtype=torch.float64)).amax(dim=0).tolist()
    return found


def measure_link(rank: CardRank) -> dict[str, float]:
    """GB/s of pinned memory: each way by itself, and of each when both go at once; on all cards together."""
    on_host = [torch.empty(LINK_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    on_card = [torch.empty(LINK_BYTES, dtype=torch.uint8, device=rank.device) for _ in range(2)]
    to_card = lambda: on_card[0].copy_(on_host[0], non_blocking=True)  # noqa: E731
    to_host = lambda: on_host[1].copy_(on_card[1], non_blocking=True)  # noqa: E731
    found = {"to_card": [to_card], "to_host": [to_host], "both": [to_card, to_host]}
    times = {name: min(time_streams(rank, copies) for _ in range(3)) for name, copies in found.items()}
    rates = {name: round(LINK_BYTES * LINK_COPIES / sec / 1e9, 1) for name, sec in times.items()}
    say(
        rank,
        f"link, GB/s: to the card {rates['to_card']}, to the host {rates['to_host']}, each of both {rates['both']}",
    )
    return rates


def time_streams(rank: CardRank, copies: list[Callable[[], Tensor]]) -> float:
    """Seconds until each of `copies` was done often enough on a stream of its own."""
    streams = [torch.cuda.Stream(rank.device) for _ in copies]
    rank.nccl.barrier()
    start = time.perf_counter()
    for _ in range(LINK_COPIES):
        for stream, copy in zip(streams, copies, strict=True):
            with torch.cuda.stream(stream):
                copy()
    torch.cuda.synchronize(rank.device)
    return slowest(rank, time.perf_counter() - start)[0]


class Launched:
    """Work that is queued each time."""

    def __init__(self, work: Callable[[], None]) -> None:
        self.run = work


class Graphed:
    """Work that is captured once, and repeated."""

    def __init__(self, work: Callable[[], None]) -> None:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            work()
        self.run = graph.replay


Way = type[Launched] | type[Graphed]


def measure(rank: CardRank, name: str, communicator: Communicator, num_bytes: int, way: Way) -> Row:
    check_sums(rank, communicator, num_bytes, way)
    side = side_stream(rank.device)
    messages = [torch.zeros(num_bytes // 2, dtype=torch.bfloat16, device=rank.device) for _ in range(SECTIONS)]

    def calls() -> None:
        for place in range(CALLS):
            communicator.all_reduce(messages[place % SECTIONS])

    def started() -> None:
        for place in range(CALLS):
            side.start_all_reduce(communicator, messages[place % SECTIONS])
        side.join()

    def queued() -> None:
        for place in range(QUEUED_CALLS):
            side.start_all_reduce(communicator, messages[place % SECTIONS]).wait()

    rows = torch.randn(num_bytes // 2 // WIDTH, WIDTH, dtype=torch.bfloat16, device=rank.device)
    weight = torch.randn(WIDTH, WIDTH, dtype=torch.bfloat16, device=rank.device)
    outputs = torch.empty_like(rows)

    def products() -> None:
        for _ in range(PRODUCTS_PER_SUM * NUM_SUMS):
            torch.mm(rows, weight, out=outputs)

    def beside() -> None:
        sums: list[Sum] = []
        for place in range(NUM_SUMS):
            if place >= SECTIONS:
                sums[place - SECTIONS].wait()
            for _ in range(PRODUCTS_PER_SUM):
                torch.mm(rows, weight, out=outputs)
            sums.append(side.start_all_reduce(communicator, messages[place % SECTIONS]))
        side.join()

    products()
    times = [timed(rank, communicator, way(work)) for work in (calls, started, queued, products, beside)]
    (calls_ms, _), (started_ms, _), (_, queued_ms), (products_ms, _), (beside_ms, host_ms) = times
    each = (calls_ms * 1e3 / CALLS, started_ms * 1e3 / CALLS, queued_ms * 1e3 / QUEUED_CALLS)
    row = Row(
        name,
        num_bytes,
        *(round(value, 1) for value in each),
        *(round(ms, 2) for ms in (products_ms, beside_ms, host_ms)),
    )
    say(rank, describe(row))
    return row


def describe(row: Row) -> str:
    return (
        f"{row.name:24} {row.num_bytes // MIB:3} MiB {row.call_us:8.1f} us a call, {row.started_us:8.1f} among others, "
        f"host {row.host_us:6.1f}; {PRODUCTS_PER_SUM * NUM_SUMS} products {row.products_ms:6.2f} ms, "
        f"with {NUM_SUMS} sums {row.beside_ms:6.2f}, host {row.beside_host_ms:6.2f}"
    )


def timed(rank: CardRank, communicator: Communicator, work: Launched | Graphed) -> tuple[float, float]:
    """Medians of the slowest rank: milliseconds on the card, and of the host until all is queued."""
    found = [time_once(rank, communicator, work.run) for _ in range(REPEATS + 1)][1:]
    card_ms, host_ms = (statistics.median(times) for times in zip(*found, strict=True))
    return card_ms, host_ms


def time_once(rank: CardRank, communicator: Communicator, work: Callable[[], None]) -> tuple[float, float]:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    rank.nccl.barrier()
    begin.record()
    start = time.perf_counter()
    work()
    host_ms = (time.perf_counter() - start) * 1e3
    end.record()
    torch.cuda.synchronize(rank.device)
    communicator.check()
    card_ms, host_ms = slowest(rank, begin.elapsed_time(end), host_ms)
    return card_ms, host_ms


def check_sums(rank: CardRank, communicator: Communicator, num_bytes: int, way: Way) -> None:
    """Raises AssertionError where one of several sums under way at once is wrong, in any of some rounds."""
    side, generator = side_stream(rank.device), torch.Generator(rank.device).manual_seed(num_bytes)
    messages = [torch.zeros(num_bytes // 2, dtype=torch.bfloat16, device=rank.device) for _ in range(SECTIONS)]

    def work() -> None:
        for message in messages:
            side.start_all_reduce(communicator, message)
        side.join()

    run = way(work).run
    for _ in range(3):
        # All ranks draw what all of them have.
        values = [
            [torch.randn(num_bytes // 2, generator=generator, device=rank.device).bfloat16() for _ in messages]
            for _ in range(communicator.world_size)
        ]
        for message, mine in zip(messages, values[communicator.rank], strict=True):
            message.copy_(mine)
        run()
        communicator.check()
        tolerance = 2**-8 if communicator is rank.nccl else 0.0
        for message, *theirs in zip(messages, *values, strict=True):
            # In float32, in rank order, rounded once.
            expected = sum(each.float() for each in theirs).bfloat16()
            torch.testing.assert_close(message, expected, rtol=tolerance, atol=tolerance)
    torch.cuda.synchronize(rank.device)
    communicator.check()


def measure_layouts(rank: CardRank) -> list[Row]:
    """Other pieces, and how many are under way."""
    rows = []
    for piece, lanes in TUNED:
        layout = CopyLayout(rank.control.world_size, piece * MIB, lanes)
        copies = wrap_copies(rank.nccl, rank.device, timeout_sec=TIMEOUT_SEC, layout=layout)
        name = f"copies, {piece} MiB x {lanes}"
        rows += [measure(rank, name, copies, size, Launched) for size in TUNED_SIZES]
        copies.barrier()
        copies.channel.close()
    return rows


if __name__ == "__main__":
    main()
