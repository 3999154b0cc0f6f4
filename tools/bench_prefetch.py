"""Times linears whose weights are fetched into L2 while the card waits: `python -m tools.bench_prefetch`, on a card.

For each linear of a layer of Llama-70B in 4 bits on two cards, number of rows, time of waiting (a kernel of a few
blocks, as an all-reduce is), way to fetch (prefetch.cuh) and MiB fetched: microseconds of the wait and the linear after
it, in replays of a CUDA graph that cycles through more weights than L2 holds. Then what the wait alone takes with what
it fetches, and an all-reduce through host memory between two ranks on this card, of which one fetches. The last line on
stdout is JSON; its times lie in the order of its "mib".
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parallel.kernels import fused, prefetch
from parallel.kernels.launch import Kernel, load_kernel
from parallel.kernels.prefetch import WAYS, Ahead
from parallel.transports import channel
from parallel.transports.host_memory import GATHER
from tools import bench_all_reduce, bench_linears
from tools.linear_formats import FORMATS
from tools.ranks_on_one_card import ranks_on_one_card

LINEARS = dict(zip(("qkv", "o", "gate_up", "down"), bench_linears.SHAPES[2], strict=True))
NUM_ROWS = (1, 8, 32)
WAITS_US = (3, 6, 12)
MIB = (0, 4, 8, 16, 24, 32, 48)
# As of the all-reduce of a row.
WAITING_BLOCKS, THREADS = 8, 256
FORMAT = "w4"
# All-reduces of a row and of 8.
MESSAGES = (16 * 1024, 128 * 1024)
# Pieces that follow one another in a graph: of the smallest, together several times what L2 holds.
MOST_PIECES = 60


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=list(NUM_ROWS))
    parser.add_argument("--linears", nargs="+", default=list(LINEARS), choices=LINEARS)
    parser.add_argument("--norm", action="store_true", help="a norm between the wait and the linear, as in a layer")
    args = parser.parse_args()
    torch.manual_seed(0)
    compile_all(args.linears, args.rows)
    result: dict[str, Any] = {"card": torch.cuda.get_device_name(), "torch": torch.__version__, "mib": MIB}
    used = {place: [prefetch.idle_bytes(place, rows, device()) for rows in args.rows] for place in prefetch.IDLE_US}
    result["used_mib"] = {place: [round(each / 2**20, 1) for each in sizes] for place, sizes in used.items()}
    print(result, flush=True)
    result["linears"] = [
        describe(name, num_rows, wait_us, has_norm=args.norm)
        for name, num_rows, wait_us in product(args.linears, args.rows, WAITS_US)
    ]
    result["alone"] = [describe_alone(way, wait_us) for way, wait_us in product(WAYS, WAITS_US)]
    result["all_reduce"] = [row for way in WAYS for row in describe_all_reduces(way)]
    print(json.dumps(result, separators=(",", ":")))


def compile_all(names: list[str], row_counts: list[int]) -> None:
    """In threads: a kernel takes a second or two."""
    own = FORMATS[FORMAT]
    launches = {own.choose(num_rows, LINEARS[name][0] // 16) for name, num_rows in product(names, row_counts)}

    def compile_in_thread(compile_one: Callable[[], object]) -> None:
        # Makes the card's context current in this thread, which the driver asks for.
        torch.zeros((), device="cuda")
        compile_one()

    with ThreadPoolExecutor(8) as pool:
        jobs = [*(partial(wait_kernel, way) for way in WAYS), *(partial(own.compile, each) for each in launches)]
        sums = [partial(load_sum, way, name) for way, name in product(WAYS, (*channel.REDUCTIONS.values(), GATHER))]
        list(pool.map(compile_in_thread, [*jobs, *sums]))


def load_sum(way: str, name: str) -> Kernel:
    """A kernel of a channel of two ranks, as the channel asks for it later."""
    path, parameters = channel.FOLDER / "host_memory.cu", channel.PARAMETERS + prefetch.PARAMETERS
    index = torch.cuda.current_device()
    return load_kernel(path, name, ("-DWORLD=2", *prefetch.options(index, way)), parameters, index)


def describe(name: str, num_rows: int, wait_us: float, *, has_norm: bool) -> dict[str, Any]:
    """One row of the result, printed too: for each way to fetch microseconds by MiB."""
    row: dict[str, Any] = {"linear": name, "rows": num_rows, "wait_us": wait_us}
    plain = time_linear(name, num_rows, wait_us, "lines", 0, has_norm=has_norm)
    for way in WAYS:
        row[way] = [plain, *(time_linear(name, num_rows, wait_us, way, mib, has_norm=has_norm) for mib in MIB[1:])]
    best_us, way, mib = min((us, way, mib) for way in WAYS for us, mib in zip(row[way], MIB, strict=True))
    print(f"{name:8} rows {num_rows:2} wait {wait_us:2} us: {plain:6.1f} us, {best_us:6.1f} with {mib} MiB by {way}; "
          + ", ".join(f"{way} {row[way][1:]}" for way in WAYS), flush=True)  # fmt: skip
    return row


def time_linear(name: str, num_rows: int, wait_us: float, way: str, mib: int, *, has_norm: bool) -> float:
    """Microseconds of a wait and a linear, of whose weight `mib` are fetched meanwhile."""
    num_out, num_in = LINEARS[name]
    weights = bench_linears.cycle(FORMAT, num_out, num_in)
    linears = bench_linears.own_calls(FORMAT, num_out, num_in)
    norm = torch.ones(num_in, device=device(), dtype=torch.bfloat16)

    def call(rows: Tensor, index: int) -> Tensor:
        weight = weights[index]
        wait(wait_us, way, prefetch.beginning((weight.packed, weight.scales), mib * 2**20))
        return linears[index](fused.rms_norm(rows, norm, 1e-5) if has_norm else rows)

    calls = [partial(call, index=index) for index in range(len(linears))]
    return round(bench_linears.time_calls(calls, num_rows, num_in), 2)


def describe_alone(way: str, wait_us: float) -> dict[str, Any]:
    """The wait without a linear."""

    def call(rows: Tensor, piece: Ahead) -> Tensor:
        wait(wait_us, way, piece)
        return rows

    times = [bench_linears.time_calls([partial(call, piece=each) for each in pieces(mib)], 1, 8) for mib in MIB]
    times = [round(us, 2) for us in times]
    print(f"wait {wait_us:2} us alone, {way}: {times}", flush=True)
    return {"way": way, "wait_us": wait_us, "us": times}


def describe_all_reduces(way: str) -> list[dict[str, Any]]:
    """Microseconds of each message by MiB."""
    before, prefetch.WAY = prefetch.WAY, way
    try:
        with ranks_on_one_card(2, device()) as ranks:
            times = {num_bytes: [time_sums(ranks, num_bytes, mib) for mib in MIB] for num_bytes in MESSAGES}
    finally:
        prefetch.WAY = before
    for num_bytes, us in times.items():
        print(f"all-reduce of {num_bytes} bytes, {way}: {us}", flush=True)
    return [{"way": way, "bytes": num_bytes, "us": us} for num_bytes, us in times.items()]


def time_sums(ranks: Any, num_bytes: int, mib: int) -> float:
    """Microseconds of an all-reduce during which the first rank fetches `mib`."""
    fetched = pieces(mib)
    buffers = [torch.zeros_like(message) for message in bench_all_reduce.messages(ranks, num_bytes)]

    def calls(end: Any) -> None:
        buffer = buffers[end.rank]
        for piece in fetched:
            end.all_reduce(buffer, buffer, () if end.rank else piece)

    return round(statistics.median(bench_all_reduce.time_graphs(ranks, calls, len(fetched), repeats=8)), 2)


def pieces(mib: int) -> list[Ahead]:
    """Pieces of so many MiB, each of other memory."""
    memory = [weight.packed.view(-1) for weight in bench_linears.cycle(FORMAT, *LINEARS["gate_up"])]
    size = mib * 2**20 // memory[0].element_size()
    if size == 0:
        return [()] * MOST_PIECES
    found = [(each,) for weight in memory for each in weight.split(size) if len(each) == size]
    return list(found[:MOST_PIECES])


def wait(wait_us: float, way: str, ahead: Ahead) -> None:
    clocks = round(wait_us * prefetch.ask_card(prefetch.CLOCK, device().index) / 1e3)
    grid, fetched = prefetch.beside((WAITING_BLOCKS, 1), *ahead)
    wait_kernel(way)(grid, THREADS, clocks, *fetched)


@cache
def wait_kernel(way: str) -> Kernel:
    path, index = Path(__file__).parent / "wait.cu", torch.cuda.current_device()
    return load_kernel(path, "wait", prefetch.options(index, way), "q" + prefetch.PARAMETERS, index)


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


if __name__ == "__main__":
    main()
