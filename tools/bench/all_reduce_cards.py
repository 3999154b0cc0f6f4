"""All-reduces between cards by every transport, side by side: sums checked, then timed in replayed CUDA graphs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from parallel.communicator import Communicator
from parallel.transports import dense, host_memory
from parallel.transports.copies import CopiedHostMemory, wrap_copies
from parallel.transports.dense import EXACT, INT8, DenseHostMemory, wrap_dense, wrap_int8
from parallel.transports.host_memory import HostMemory, wrap_host_memory
from parallel.transports.rounded import time_rounded
from parallel.transports.selftest import EAGER_BYTES, time_all_reduce
from parallel.transports.two_step import TwoStepHostMemory, wrap_two_step
from parallel.units import KIB
from tools.bench.card_ranks import CardRank
from tools.bench.norm_cards import bench_norms, describe

SIZES = tuple(KIB * 2**i for i in range(16))
TIMEOUT_SEC = 10.0
# Which sizes each carries.
TRANSPORTS: dict[str, tuple[Callable[..., Communicator], int, int]] = {
    HostMemory.name: (wrap_host_memory, 1, host_memory.MAX_BYTES),
    EXACT.name: (wrap_dense, 16 * KIB, dense.MAX_BYTES),
    INT8.name: (wrap_int8, 16 * KIB, dense.MAX_BYTES),
    TwoStepHostMemory.name: (wrap_two_step, 64 * KIB, SIZES[-1]),
    CopiedHostMemory.name: (wrap_copies, EAGER_BYTES, SIZES[-1]),
}
# What --tune tries of the dense kernels: blocks and warps a block.
TUNED_NAMES = (EXACT.name, INT8.name)
TUNED_BYTES = (64 * KIB, 128 * KIB, 256 * KIB, 512 * KIB, 1024 * KIB, 2048 * KIB)
TUNED = tuple((blocks, warps) for warps in (1, 2, 4, 8) for blocks in (8, 16, 32, 64) if 16 <= blocks * warps <= 256)


def bench(rank: CardRank, repeats: int, tune: bool) -> None:
    opened = {name: wrap(rank.nccl, rank.device, timeout_sec=TIMEOUT_SEC) for name, (wrap, _, _) in TRANSPORTS.items()}
    opened["nccl"] = rank.nccl
    say(rank, f"{'bytes':>9}" + "".join(f"{name:>22}" for name in opened))
    rows = [measure(rank, opened, num_bytes, repeats) for num_bytes in SIZES]
    norms = bench_norms(rank, opened, TIMEOUT_SEC)
    say(rank, "\n".join(describe(row) for row in norms))
    launches = [row for name in TUNED_NAMES for row in tune_dense(rank, opened[name], repeats)] if tune else []
    card = {"name": torch.cuda.get_device_name(rank.device), "torch": torch.__version__}
    result = {"card": card, "ranks": rank.nccl.world_size}
    say(rank, json.dumps({**result, "all_reduce": rows, "norms": norms, "dense_launches": launches}))


def say(rank: CardRank, text: str) -> None:
    if rank.control.rank == 0:
        print(text, flush=True)


def measure(rank: CardRank, opened: dict[str, Communicator], num_bytes: int, repeats: int) -> dict[str, Any]:
    times = {}
    for name, communicator in opened.items():
        _, least, most = TRANSPORTS.get(name, (None, 1, SIZES[-1]))
        if least <= num_bytes <= most:
            times[name] = slowest_us(rank, communicator, num_bytes, repeats)
    say(rank, f"{num_bytes:>9}" + "".join(f"{times[name]:>22.2f}" if name in times else " " * 22 for name in opened))
    return {"bytes": num_bytes, "p50_us": {name: round(time, 3) for name, time in times.items()}}


def slowest_us(rank: CardRank, communicator: Communicator, num_bytes: int, repeats: int) -> float:
    """Of the slowest rank, the median of a call's microseconds in replayed graphs.

    Raises AssertionError on every rank where a sum was wrong on any, before or after the timing.
    """
    fewer = repeats if num_bytes <= 1024 * KIB else max(3, repeats // 5)
    if communicator.name == INT8.name:
        # Its sums are compared with those of rounded numbers, in bfloat16, the only way it has of its own.
        timing = time_rounded(communicator, rank.device, num_bytes, repeats=fewer)
    else:
        assert_sums(rank, communicator, num_bytes)
        timing = time_all_reduce(communicator, rank.device, num_bytes, repeats=fewer)
    found = rank.control.all_gather(torch.tensor([timing.p50_us, float(timing.exact)], dtype=torch.float64))
    assert found[:, 1].all(), f"{communicator.name}: {num_bytes} bytes were wrong after many calls"
    return float(found[:, 0].max())


def assert_sums(rank: CardRank, communicator: Communicator, num_bytes: int) -> None:
    """Fresh values of each rank, against float64's sum of all, within what bfloat16 rounds; the same bits on all."""
    source = torch.randn(num_bytes // 2, device=rank.device).bfloat16()
    sources = rank.nccl.all_gather(source)
    result = communicator.all_reduce(source.clone())
    exact, size = sources.double().sum(dim=0), sources.double().abs().sum(dim=0)
    # NCCL rounds after each addition.
    near = ((result.double() - exact).abs() <= 2**-7 * size + 1e-9).all()
    same = (rank.nccl.all_gather(result) == result).all()
    found = rank.control.all_gather(torch.stack([near, same]).float().cpu())
    assert found.all(), f"{communicator.name}: {num_bytes} bytes: near, same bits of each rank: {found.tolist()}"


def tune_dense(rank: CardRank, communicator: Communicator, repeats: int) -> list[dict[str, Any]]:
    """Every launch of `TUNED` at the sizes that the dense kernels are for; the best ones are printed."""
    assert isinstance(communicator, DenseHostMemory)
    channel, rows = communicator.channel, []
    before = channel.layout
    for num_bytes in TUNED_BYTES:
        times = {}
        for launch in TUNED:
            lines = replace(before.lines, launches=((dense.MAX_BYTES, *launch),))
            channel.layout = replace(before, lines=lines)
            times[launch] = slowest_us(rank, communicator, num_bytes, repeats)
        best = sorted(times, key=lambda launch: times[launch])[:4]
        say(
            rank,
            f"{communicator.name} {num_bytes:>9} " + ", ".join(f"{b} x {w} warps {times[b, w]:.2f}" for b, w in best),
        )
        rows += [
            {"name": communicator.name, "bytes": num_bytes, "blocks": b, "warps": w, "p50_us": round(t, 3)}
            for (b, w), t in times.items()
        ]
    channel.layout = before
    return rows
