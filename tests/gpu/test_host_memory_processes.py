"""Host memory between processes that take turns on one card, and what becomes of those whose peer is gone."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from parallel.communicator import TransportError
from parallel.transports.host_memory import MAX_BYTES, HostMemory
from parallel.units import KIB
from tests.gpu.one_card import DEVICE, run_on_one_card, start_on_one_card
from tests.gpu.test_host_memory import DTYPES
from tests.parallel.transports.sums import ordered_sum
from tools.local_ranks import receive_result

pytestmark = pytest.mark.gpu


def values(rank: int, step: int, count: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(count, generator=generator).to(dtype)


def use_communicator(communicator: HostMemory) -> list[str]:
    """What came out wrong, of plain calls, views, graphs and gathers."""
    wrong: list[str] = []
    world_size = communicator.world_size

    def expected(step: int, count: int, dtype: torch.dtype) -> Tensor:
        return ordered_sum([values(rank, step, count, dtype) for rank in range(world_size)])

    def note(what: str, ok: bool) -> None:
        wrong.extend([] if ok else [what])

    for step, (count, dtype) in enumerate((c, d) for d in DTYPES for c in (1, 3, 8192, 50_001)):
        tensor = values(communicator.rank, step, count, dtype).to(DEVICE)
        note(f"{count} {dtype} in place", communicator.all_reduce(tensor) is tensor)
        note(f"{count} {dtype}", torch.equal(tensor.cpu(), expected(step, count, dtype)))
    for step, count in enumerate((8 * 33_001, 8 * 100_003, 5 * 2**20), start=60):
        tensor = values(communicator.rank, step, count, torch.bfloat16).to(DEVICE)
        communicator.all_reduce(tensor)
        note(f"{count} in one hop or two steps", torch.equal(tensor.cpu(), expected(step, count, torch.bfloat16)))
    # A view that is not aligned, one that is not contiguous, and a large message that fits neither.
    base = torch.zeros(101, dtype=torch.bfloat16, device=DEVICE)
    base[1:] = values(communicator.rank, 50, 100, torch.bfloat16)
    communicator.all_reduce(base[1:])
    note("misaligned", torch.equal(base[1:].cpu(), expected(50, 100, torch.bfloat16)) and base[0].item() == 0)
    square = values(communicator.rank, 51, 100, torch.float32).view(10, 10).to(DEVICE)
    communicator.all_reduce(square.T)
    note("transposed", torch.equal(square.cpu().view(-1), expected(51, 100, torch.float32)))
    large = torch.full((MAX_BYTES // 4 + 1,), float(communicator.rank + 1), device=DEVICE)
    communicator.all_reduce(large)
    note("large", bool((large == world_size * (world_size + 1) / 2).all()))
    for dtype in (torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool):
        ours = torch.arange(15, device=DEVICE).add(communicator.rank).remainder(2).to(dtype).view(3, 5)
        rows = [torch.arange(15).add(rank).remainder(2).to(dtype).view(3, 5) for rank in range(world_size)]
        gathered = communicator.all_gather(ours.T)
        note(f"gather {dtype}", torch.equal(gathered.cpu(), torch.stack(rows).transpose(1, 2)))
    wrong += replay_graph(communicator, expected)
    communicator.barrier()
    return wrong


def replay_graph(communicator: HostMemory, expected: object) -> list[str]:
    buffers = [torch.zeros(8192, dtype=torch.bfloat16, device=DEVICE) for _ in range(3)]
    graph, wrong = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for buffer in buffers:
            communicator.all_reduce(buffer)
        gathered = communicator.all_gather(buffers[0][:2])
    for replay in range(5):
        for i, buffer in enumerate(buffers):
            buffer.copy_(values(communicator.rank, 100 + 10 * replay + i, 8192, torch.bfloat16))
        graph.replay()
        for i, buffer in enumerate(buffers):
            if not torch.equal(buffer.cpu(), expected(100 + 10 * replay + i, 8192, torch.bfloat16)):  # type: ignore[operator]
                wrong.append(f"replay {replay} buffer {i}")
        if not torch.equal(gathered, buffers[0][:2].expand_as(gathered)):
            wrong.append(f"replay {replay} gather")
    return wrong


@pytest.mark.parametrize("world_size", (2, 3, 4))
def test_processes_that_share_a_card_agree(world_size: int, tmp_path: Path) -> None:
    assert list(run_on_one_card(use_communicator, world_size, tmp_path)) == [[]] * world_size


def lose_peer(communicator: HostMemory) -> str:
    message = torch.ones(8192, device=DEVICE)
    communicator.all_reduce(message)
    communicator.barrier()
    if communicator.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    communicator.all_reduce(message)
    try:
        communicator.barrier()
    except TransportError as error:
        return str(error)
    return "nothing was noticed"


def test_a_killed_peer_becomes_an_error(tmp_path: Path) -> None:
    processes, connections = start_on_one_card(lose_peer, 2, tmp_path, timeout_sec=2)
    message = receive_result(connections[0], 0)
    assert "rank 1 did not answer rank 0 through host memory within 2 s (timeouts.collective_sec" in message
    for process in processes:
        process.join(timeout=60)
        assert not process.is_alive()


def wait_for_nobody(communicator: HostMemory) -> None:
    if communicator.rank == 0:
        communicator.all_reduce(torch.ones(16 * KIB, device=DEVICE))
    else:
        time.sleep(600)


def test_a_kernel_that_waits_does_not_keep_its_process(tmp_path: Path) -> None:
    """Rank 0's card waits ten minutes; the process ends when it is killed, as its parent would."""
    processes, connections = start_on_one_card(wait_for_nobody, 2, tmp_path, timeout_sec=600)
    receive_result(connections[0], 0)
    for process in processes:
        process.kill()
        process.join(timeout=60)
        assert not process.is_alive()
    assert torch.ones(4, device=DEVICE).sum().item() == 4
