"""Sums through the cards' own memory, each rank a process with a card: `pytest -s` also prints the times."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest
import torch

from parallel.transports.peer_memory import MAX_BYTES, reach_each_other, wrap_peer_memory
from parallel.transports.selftest import sums_exactly
from parallel.units import MIB
from tests.gpu.cards import needs_two_cards
from tests.gpu.test_all_reduce_cards import run_tool
from tools.bench.card_ranks import CardRank, run_on_cards

pytestmark = [pytest.mark.gpu, needs_two_cards]
NUM_CARDS = min(4, torch.cuda.device_count())
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(autouse=True)
def peer_access(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_P2P_DISABLE", "0")
    if not reach_each_other(range(NUM_CARDS)):
        pytest.skip("the cards do not reach each other's memory, or have no atomics there")


def sum_every_length(rank: CardRank) -> None:
    """Around what a thread, a block and the grid of torch's kernel take, and what goes on to NCCL."""
    communicator = wrap_peer_memory(rank.nccl, rank.device)
    lengths = [units * 16 + more for units in (1, 31, 32, 33, 511, 512, 513, 12_287, 12_288, 12_289) for more in (0, 4)]
    for num_bytes in (*lengths, 100_000, MAX_BYTES - 16, MAX_BYTES, MAX_BYTES + 16):
        for dtype in DTYPES:
            assert sums_exactly(communicator, rank.device, num_bytes, dtype), (num_bytes, dtype)
    communicator.barrier()


def replay(rank: CardRank) -> None:
    """Each call of a graph sums what the one before left, at another length, with nothing between them."""
    communicator = wrap_peer_memory(rank.nccl, rank.device)
    counts = [8 * units for units in (1, 1024, 33, 131_072, 7, 12_289, 2)]
    buffers = [torch.zeros(count, dtype=torch.bfloat16, device=rank.device) for count in counts]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for buffer in buffers:
            communicator.all_reduce(buffer)
    for number in range(500):
        for place, buffer in enumerate(buffers):
            buffer.fill_((number + place) % 7 + rank.nccl.rank)
        if number % 3 == rank.nccl.rank:
            torch.cuda._sleep(20_000)
        graph.replay()
        for place, buffer in enumerate(buffers):
            total = sum((number + place) % 7 + each for each in range(rank.nccl.world_size))
            assert (buffer == total).all(), (number, place)
    communicator.barrier()


def open_and_close(rank: CardRank) -> None:
    def free() -> int:
        torch.cuda.synchronize()
        return torch.cuda.mem_get_info(rank.device)[0]

    # The kernel's own code is loaded by then.
    first = wrap_peer_memory(rank.nccl, rank.device)
    assert sums_exactly(first, rank.device, MAX_BYTES)
    first.barrier()
    first.close()
    rank.nccl.barrier()
    before = free()
    communicator = wrap_peer_memory(rank.nccl, rank.device)
    taken = before - free()
    assert 2 * MIB <= taken <= 8 * MIB, taken
    assert sums_exactly(communicator, rank.device, MAX_BYTES)
    communicator.barrier()
    communicator.close()
    rank.nccl.barrier()
    left = before - free()
    assert left < 2 * MIB, left


@pytest.mark.parametrize("function", (sum_every_length, replay, open_and_close), ids=lambda each: each.__name__)
def test_between_processes(function: object) -> None:
    run_on_cards(function, NUM_CARDS)  # type: ignore[arg-type]


def lose_peer(rank: CardRank) -> None:
    communicator = wrap_peer_memory(rank.nccl, rank.device)
    message = torch.ones(8192, device=rank.device)
    communicator.all_reduce(message)
    communicator.barrier()
    if rank.nccl.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    communicator.all_reduce(message)
    torch.cuda.synchronize()


def test_a_card_that_waits_for_a_killed_peer_does_not_keep_its_process() -> None:
    """It is ended by whoever started the ranks, as the launcher's parent does."""
    start = time.monotonic()
    with pytest.raises(torch.multiprocessing.ProcessExitedException, match="SIGKILL"):
        run_on_cards(lose_peer, NUM_CARDS)
    assert time.monotonic() - start < 90
    assert torch.ones(4, device="cuda:0").sum().item() == 4


def test_no_element_of_many_calls_is_wrong() -> None:
    last = run_tool("all_reduce", "--soak", "50000").splitlines()[-1]
    assert "peer_memory" in last and "wrong elements of each rank: [0, 0" in last


def test_it_is_timed_beside_the_others() -> None:
    output = run_tool("all_reduce", "--repeats", "5")
    *lines, last = output.splitlines()
    print("", *lines, sep="\n")
    at = {row["bytes"]: row["p50_us"] for row in json.loads(last)["all_reduce"]}
    assert all(at[2**i]["peer_memory"] > 0 for i in range(14, 22)) and "peer_memory" not in at[2**22]
