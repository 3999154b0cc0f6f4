"""Sums that a norm follows, between cards: in one kernel, by how many blocks a row has, and in a kernel each."""

from __future__ import annotations

from typing import Any

import torch

from parallel.communicator import Communicator
from parallel.transports import host_memory_norm
from parallel.transports.by_size import BySize
from parallel.transports.dense import EXACT
from parallel.transports.host_memory import HostMemory
from parallel.transports.host_memory_norm import wrap_norm
from parallel.transports.norm_trial import NORM_BYTES, find_wrong_norms, time_norm
from parallel.transports.selftest import DECODE_BYTES
from parallel.units import KIB
from tools.bench.card_ranks import CardRank

ROW_BLOCKS = (1, 2, 4, 8)
# Up to here slots of half flags are the fastest for sums, from there on the dense ones (two H200).
SMALL_BYTES = 64 * KIB


def bench_norms(rank: CardRank, opened: dict[str, Communicator], timeout_sec: float) -> list[dict[str, Any]]:
    """The slowest rank's microseconds for rows of 8192 numbers in bfloat16; all ranks call it.

    Raises AssertionError on every rank where a sum or a norm was wrong on any, before or after the timing.
    """
    routes = [(SMALL_BYTES, opened[HostMemory.name]), (NORM_BYTES[-1], opened[EXACT.name])]
    apart = BySize(rank.nccl, routes, rank.nccl, rank.device)
    joined = wrap_norm(apart, rank.device, timeout_sec=timeout_sec)
    rows = [{"rows": size // DECODE_BYTES, "apart_us": slowest_us(rank, apart, size), "us": {}} for size in NORM_BYTES]
    before = host_memory_norm.ROW_BLOCKS
    for host_memory_norm.ROW_BLOCKS in ROW_BLOCKS:
        assert_norms(rank, joined)
        for row, size in zip(rows, NORM_BYTES, strict=True):
            row["us"][host_memory_norm.ROW_BLOCKS] = slowest_us(rank, joined, size)
    host_memory_norm.ROW_BLOCKS = before
    return rows


def describe(row: dict[str, Any]) -> str:
    joined = ", ".join(f"{time:.2f} ({blocks})" for blocks, time in row["us"].items())
    return f"sum and norm of {row['rows']:>2} rows: {row['apart_us']:.2f} us apart; in one, by blocks a row: {joined}"


def slowest_us(rank: CardRank, communicator: Communicator, num_bytes: int) -> float:
    timing = time_norm(communicator, rank.device, num_bytes)
    found = rank.control.all_gather(torch.tensor([timing.p50_us, float(timing.exact)], dtype=torch.float64))
    assert found[:, 1].all(), f"norms of {num_bytes} bytes were wrong after many calls"
    return round(float(found[:, 0].max()), 3)


def assert_norms(rank: CardRank, communicator: Communicator) -> None:
    problem = find_wrong_norms(communicator, rank.device)
    found = rank.control.all_gather(torch.tensor([len(problem)]))
    assert not found.any(), problem or "another rank's norms were wrong"
