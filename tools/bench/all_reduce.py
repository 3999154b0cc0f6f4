"""Times the all-reduces through host memory: `python -m tools.bench.all_reduce`.

With `--cards N`, or as ranks of torchrun, between cards without peer access, each rank a process, NCCL beside them;
there `--soak N` makes so many calls instead, all compared. Without, ranks are streams of one card: they share its link,
so latencies of small messages are those of a pair of cards and large messages are slower than there.

For each message: microseconds of a call in a replayed CUDA graph, the slowest rank's. Sums are checked against float64
before any timing. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

import torch
from torch import Tensor

from parallel.transports import host_memory
from parallel.transports.host_memory import choose_launch
from parallel.units import KIB
from tools.bench.all_reduce_cards import bench
from tools.bench.all_reduce_soak import soak
from tools.bench.card_ranks import is_started_by_torchrun, run_on_cards
from tools.bench.ranks_on_one_card import RanksOnOneCard, dense_on_one_card, ranks_on_one_card, two_step_on_one_card

SIZES = tuple(KIB * 2**i for i in range(11))
MAX_BYTES = SIZES[-1]
# What --tune tries for each message, where all ranks' blocks fit the card at once.
TUNED = tuple((blocks, threads) for blocks in (1, 2, 4, 8, 16, 32, 64) for threads in (128, 256, 512))
CALLS_PER_GRAPH = 80
DENSE_SIZES = tuple(KIB * 2**i for i in range(6, 12))
# Two steps: from where slots end to a chunk of prefill, 2048 tokens of a 70B.
LARGE_SIZES = tuple(KIB * 2**i for i in range(9, 16))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.all_reduce", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--tune", action="store_true", help="time every launch instead of the one that is used")
    parser.add_argument("--cards", type=int, default=0, help="ranks that are processes with a card each")
    parser.add_argument("--soak", type=int, default=0, help="between cards: so many calls, all compared")
    args = parser.parse_args()
    if args.soak:
        run_on_cards(soak, args.cards, args.soak)
    elif args.cards or is_started_by_torchrun():
        run_on_cards(bench, args.cards, args.repeats, args.tune)
    else:
        bench_one_card(args)


def bench_one_card(args: argparse.Namespace) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    rows: list[dict[str, Any]] = []
    for world_size in args.ranks:
        # Above the largest that is used, to see where it ends being worth it.
        with ranks_on_one_card(world_size, device, max_bytes=MAX_BYTES) as ranks:
            for num_bytes in SIZES:
                launches = tuned(num_bytes, ranks) if args.tune else [launch_for(num_bytes)]
                rows += [measure(ranks, num_bytes, launch, args.repeats) for launch in launches]
                best = min((row for row in rows if row["ranks"] == world_size and row["bytes"] == num_bytes),
                           key=lambda row: row["p50_us"])  # fmt: skip
                print(f"{world_size} ranks {num_bytes:>8} bytes {best['p50_us']:7.2f} us {best['launch']}", flush=True)
        for opened, name, sizes in (
            (dense_on_one_card, "dense", DENSE_SIZES),
            (two_step_on_one_card, "two steps", LARGE_SIZES),
        ):
            with opened(world_size, device) as others:
                for num_bytes in sizes:
                    rows.append(measure_other(others, num_bytes, name, args.repeats))
                    print(f"{world_size} ranks {num_bytes:>8} bytes {rows[-1]['p50_us']:7.2f} us {name}", flush=True)
    card = {"name": torch.cuda.get_device_name(device), "torch": torch.__version__}
    print(json.dumps({"card": card, "all_reduce": rows}))


def launch_for(num_bytes: int) -> tuple[int, int]:
    """The launch in use, or for messages beyond those the largest."""
    return choose_launch(num_bytes) if num_bytes <= host_memory.MAX_BYTES else host_memory.LAUNCHES[-1][1:]


def tuned(num_bytes: int, ranks: RanksOnOneCard[Any]) -> list[tuple[int, int]]:
    lines = num_bytes // host_memory.DATA_BYTES
    processors = torch.cuda.get_device_properties(ranks.device).multi_processor_count
    most = processors // len(ranks.channels)
    return [(b, t) for b, t in TUNED if b <= most and lines / 16 <= b * t <= lines]


def measure(ranks: RanksOnOneCard[Any], num_bytes: int, launch: tuple[int, int], repeats: int) -> dict[str, Any]:
    before = host_memory.LAUNCHES
    host_memory.LAUNCHES = ((MAX_BYTES, *launch),)
    try:
        check_sums(ranks, num_bytes)
        times = time_replays(ranks, num_bytes, repeats)
    finally:
        host_memory.LAUNCHES = before
    return row(ranks, num_bytes, f"{launch[0]}x{launch[1]}", times)


def measure_other(ranks: RanksOnOneCard[Any], num_bytes: int, name: str, repeats: int) -> dict[str, Any]:
    check_sums(ranks, num_bytes)
    return row(ranks, num_bytes, name, time_replays(ranks, num_bytes, repeats, calls_per_graph=8))


def row(ranks: RanksOnOneCard[Any], num_bytes: int, launch: str, times: list[float]) -> dict[str, Any]:
    return {
        "ranks": len(ranks.channels),
        "bytes": num_bytes,
        "launch": launch,
        "p50_us": round(statistics.median(times), 3),
        "min_us": round(min(times), 3),
        "max_us": round(max(times), 3),
    }


def messages(ranks: RanksOnOneCard[Any], num_bytes: int) -> list[Tensor]:
    return [torch.randn(num_bytes // 2, device=ranks.device).bfloat16() for _ in ranks.channels]


def check_sums(ranks: RanksOnOneCard[Any], num_bytes: int) -> None:
    """Raises AssertionError where a sum is further from float64's than bfloat16 rounds."""
    sources = messages(ranks, num_bytes)
    targets = [torch.full_like(source, float("nan")) for source in sources]
    ranks.run(lambda channel: channel.all_reduce(sources[channel.rank], targets[channel.rank]))
    ranks.check()
    exact = torch.stack([source.double() for source in sources]).sum(dim=0)
    for target in targets:
        torch.testing.assert_close(target.double(), exact, rtol=2**-8, atol=1e-5)


def time_replays(
    ranks: RanksOnOneCard[Any], num_bytes: int, repeats: int, calls_per_graph: int = CALLS_PER_GRAPH
) -> list[float]:
    """Microseconds a call of the slowest rank, for each replay of a graph of so many."""
    buffers = [torch.zeros_like(message) for message in messages(ranks, num_bytes)]

    def calls(channel: Any) -> None:
        for _ in range(calls_per_graph):
            channel.all_reduce(buffers[channel.rank], buffers[channel.rank])

    graphs = ranks.capture(calls)
    begins = [torch.cuda.Event(enable_timing=True) for _ in graphs]
    ends = [torch.cuda.Event(enable_timing=True) for _ in graphs]

    def replay(channel: Any) -> None:
        begins[channel.rank].record()
        graphs[channel.rank].replay()
        ends[channel.rank].record()

    times = []
    for _ in range(repeats + 2):
        ranks.run(replay)
        ranks.check()
        slowest = max(begin.elapsed_time(end) for begin, end in zip(begins, ends, strict=True))
        times.append(slowest * 1e3 / calls_per_graph)
    # The first replays upload the graphs.
    return times[2:]


if __name__ == "__main__":
    main()
