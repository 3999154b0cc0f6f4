"""What all-reduces by copy engines cost, alone and beside products: `python -m tools.bench_copies`.

One process a card, or those of torchrun. It shows:
- the link: pinned copies each way and both at once;
- all-reduces of bfloat16 alone, by copies, by the two-step kernel and by NCCL: microseconds of a call among several, by
  itself, and of the host's part in it; with `--tune` copies in other segments and pieces;
- products of 2048 rows with an 8192 x 8192 weight alone, and with as many all-reduces on another stream as take as
  long: what either takes then. Less than the two added up is what running them at once saves.
Sums are checked first. Figures are the slowest rank's; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from parallel.communicator import Communicator
from parallel.transports.copies import CopiedHostMemory, wrap_copies
from parallel.transports.copy_layout import CopyLayout, choose_layout
from parallel.transports.two_step import TwoStepHostMemory, wrap_two_step
from parallel.units import MIB
from tools.all_reduce_cards import say
from tools.card_ranks import CardRank, run_on_cards

SIZES = tuple(MIB * 2**i for i in range(7))
# Half a chunk of prefill and a whole one: 2048 tokens of a 70B.
BESIDE_BYTES = (16 * MIB, 32 * MIB)
ROWS, WIDTH = 2048, 8192
NUM_PRODUCTS = 40
CALLS, REPEATS = 8, 5
# What --tune tries: MiB of segments and pieces, segments under way.
TUNED = ((8, 1, 2), (8, 2, 2), (8, 4, 2), (8, 8, 2), (4, 1, 4), (4, 2, 4), (4, 4, 4), (16, 4, 2), (2, 2, 8))
LINK_BYTES, LINK_COPIES = 32 * MIB, 8
# Streams beyond so many share queues of the card, eight unless it is set, and may then wait for one another.
CONNECTIONS = os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS")
TIMEOUT_SEC = 10.0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count(), help="cards")
    parser.add_argument("--tune", action="store_true", help="also other segments and pieces")
    args = parser.parse_args()
    run_on_cards(bench, args.ranks, args.tune)


def bench(rank: CardRank, tune: bool) -> None:
    link = measure_link(rank)
    free, _ = torch.cuda.mem_get_info(rank.device)
    copies = wrap_copies(rank.nccl, rank.device, timeout_sec=TIMEOUT_SEC)
    [taken] = slowest(rank, free - torch.cuda.mem_get_info(rank.device)[0])
    say(rank, f"opening copies takes {taken / MIB:.1f} MiB of a card")
    opened: dict[str, Communicator] = {
        CopiedHostMemory.name: copies,
        TwoStepHostMemory.name: wrap_two_step(rank.nccl, rank.device, timeout_sec=TIMEOUT_SEC),
        rank.nccl.name: rank.nccl,
    }
    alone = [measure_alone(rank, name, each, size) for size in SIZES for name, each in opened.items()]
    beside = [measure_beside(rank, name, each, size) for size in BESIDE_BYTES for name, each in opened.items()]
    tuned = measure_layouts(rank) if tune else []
    card = {"name": torch.cuda.get_device_name(rank.device), "torch": torch.__version__}
    result = {
        "card": card,
        "ranks": rank.nccl.world_size,
        "link": link,
        "card_bytes": taken,
        "connections": CONNECTIONS,
    }
    say(rank, json.dumps({**result, "alone": alone, "beside": beside, "tuned": tuned}))


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


def measure_alone(rank: CardRank, name: str, communicator: Communicator, num_bytes: int) -> dict[str, Any]:
    check_sums(rank, communicator, num_bytes)
    message = torch.zeros(num_bytes // 2, dtype=torch.bfloat16, device=rank.device)
    timed = [time_calls(rank, communicator, message, CALLS) for _ in range(REPEATS + 1)][1:]
    once = statistics.median(time_calls(rank, communicator, message, 1)[0] for _ in range(REPEATS))
    call_us, host_us = (statistics.median(times) for times in zip(*timed, strict=True))
    row = {"name": name, "bytes": num_bytes, "call_us": call_us, "single_us": once, "host_us": host_us}
    say(
        rank,
        f"{name:22} {num_bytes // MIB:3} MiB {call_us:8.1f} us a call, {once:8.1f} us by itself, "
        f"host {host_us:6.1f} us, {num_bytes / call_us / 1e3:5.1f} GB/s",
    )
    return row


def check_sums(rank: CardRank, communicator: Communicator, num_bytes: int) -> None:
    """Raises AssertionError where a sum is further from float64's than bfloat16 rounds."""
    generators = [torch.Generator(rank.device).manual_seed(each) for each in range(communicator.world_size)]
    shape = (num_bytes // 2,)
    values = [torch.randn(shape, generator=each, device=rank.device).bfloat16() for each in generators]
    exact = torch.stack([value.double() for value in values]).sum(dim=0)
    found = communicator.all_reduce(values[communicator.rank])
    communicator.check()
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-5)


def time_calls(rank: CardRank, communicator: Communicator, message: Tensor, num_calls: int) -> tuple[float, float]:
    """Microseconds of a call on the card, and of the host's part in it."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    rank.nccl.barrier()
    begin.record()
    start = time.perf_counter()
    for _ in range(num_calls):
        communicator.all_reduce(message)
    host = time.perf_counter() - start
    end.record()
    torch.cuda.synchronize(rank.device)
    communicator.check()
    call_us, host_us = slowest(rank, begin.elapsed_time(end) * 1e3 / num_calls, host * 1e6 / num_calls)
    return call_us, host_us


def measure_beside(rank: CardRank, name: str, communicator: Communicator, num_bytes: int) -> dict[str, Any]:
    """Products and all-reduces, each alone and both at once."""
    message = torch.zeros(num_bytes // 2, dtype=torch.bfloat16, device=rank.device)
    rows, weight = (torch.randn(num, WIDTH, dtype=torch.bfloat16, device=rank.device) for num in (ROWS, WIDTH))
    products = Work(lambda: torch.mm(rows, weight), NUM_PRODUCTS)
    single_us = statistics.median(time_calls(rank, communicator, message, CALLS)[0] for _ in range(REPEATS))
    products_ms = statistics.median(run_both(rank, [products])[0] for _ in range(REPEATS))
    sums = Work(lambda: communicator.all_reduce(message), max(1, round(products_ms * 1e3 / single_us)))
    sums_ms = statistics.median(run_both(rank, [sums])[0] for _ in range(REPEATS))
    timed = [run_both(rank, [products, sums]) for _ in range(REPEATS + 1)][1:]
    both = [statistics.median(times) for times in zip(*timed, strict=True)]
    communicator.check()
    say(
        rank,
        f"{name:22} {num_bytes // MIB:3} MiB: {products.num_calls} products alone {products_ms:6.2f} ms, "
        f"{sums.num_calls} all-reduces alone {sums_ms:6.2f} ms; at once {both[0]:6.2f} and {both[1]:6.2f} ms",
    )
    return {
        "name": name,
        "bytes": num_bytes,
        "num_products": products.num_calls,
        "num_sums": sums.num_calls,
        "alone_ms": [products_ms, sums_ms],
        "beside_ms": both,
    }


class Work:
    def __init__(self, call: Callable[[], Tensor], num_calls: int) -> None:
        self.call, self.num_calls = call, num_calls


def run_both(rank: CardRank, works: list[Work]) -> list[float]:
    """Milliseconds from the common start to the end of each, on a stream of its own; the second's has priority."""
    streams = [torch.cuda.Stream(rank.device, priority=-place) for place in range(len(works))]
    begins, ends = ([torch.cuda.Event(enable_timing=True) for _ in works] for _ in range(2))
    rank.nccl.barrier()
    for begin, stream in zip(begins, streams, strict=True):
        begin.record(stream)
    # The host goes from one to the other so that neither waits for it.
    most = max(work.num_calls for work in works)
    for step in range(most):
        for work, stream in zip(works, streams, strict=True):
            with torch.cuda.stream(stream):
                for _ in range((step + 1) * work.num_calls // most - step * work.num_calls // most):
                    work.call()
    for end, stream in zip(ends, streams, strict=True):
        end.record(stream)
    torch.cuda.synchronize(rank.device)
    return slowest(rank, *(begin.elapsed_time(end) for begin, end in zip(begins, ends, strict=True)))


def measure_layouts(rank: CardRank) -> list[dict[str, Any]]:
    """Other sizes of segments and pieces, and how many are under way."""
    used = choose_layout(rank.control.world_size)
    found = []
    for segment, piece, ahead in TUNED:
        layout = CopyLayout(used.world_size, segment * MIB, piece * MIB, ahead)
        say(rank, f"segments of {segment} MiB in pieces of {piece} MiB, {ahead} under way")
        copies = wrap_copies(rank.nccl, rank.device, timeout_sec=TIMEOUT_SEC, layout=layout)
        rows = [measure_alone(rank, copies.name, copies, size) for size in BESIDE_BYTES]
        copies.barrier()
        copies.channel.close()
        found += [{**row, "segment": segment, "piece": piece, "ahead": ahead} for row in rows]
    return found


if __name__ == "__main__":
    main()
