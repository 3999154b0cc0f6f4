"""All-reduce by copy engines between processes, on as many cards as there are: sums, order, and a peer that is gone."""

from __future__ import annotations

import os
import random
import signal
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import Tensor

from parallel.communicator import TransportError
from parallel.transports.copies import CopiedHostMemory, wrap_copies
from parallel.transports.copy_layout import CopyLayout
from parallel.transports.host_memory import HostMemory
from parallel.transports.torch_distributed import open_gloo
from parallel.units import KIB, MIB
from tests.gpu.one_card import run_on_one_card, start_on_one_card
from tests.gpu.test_host_memory import DTYPES
from tests.parallel.transports.sums import ordered_sum
from tools.local_ranks import receive_result

pytestmark = pytest.mark.gpu

# Pieces that a message of some KiB fills many times over.
SMALL_LAYOUTS = {
    2: CopyLayout(2, piece_bytes=16 * KIB, num_lanes=3),
    3: CopyLayout(3, piece_bytes=64 * KIB, num_lanes=2),
    4: CopyLayout(4, piece_bytes=64 * KIB, num_lanes=4),
}
# Bytes around units, parts and pieces, and of many pieces.
SMALL_BYTES = (16, 32, 48, 80, 16 * KIB - 16, 16 * KIB + 16, 64 * KIB, 64 * KIB + 16, 100_000, 400_000, 700_016)
LARGE_BYTES = (16, 6 * MIB, 6 * MIB + 16, 8 * MIB + 16, 20 * MIB + 48, 32 * MIB)


def open_on_a_card(
    communicator: HostMemory, layout: CopyLayout | None, timeout_sec: float = 20
) -> tuple[CopiedHostMemory, torch.device]:
    """On a card of the rank's own where there are enough of them."""
    device = torch.device("cuda", communicator.rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    inner = open_gloo(device, timedelta(seconds=120))
    return wrap_copies(inner, device, timeout_sec=timeout_sec, layout=layout), device


def values(rank: int, step: int, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(1000 * step + rank)
    return torch.randn(count, generator=generator, device=device).to(dtype)


def expected_sum(world_size: int, step: int, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return ordered_sum([values(rank, step, count, dtype, device) for rank in range(world_size)])


def sum_all_sizes(communicator: HostMemory, layout: CopyLayout | None, sizes: tuple[int, ...]) -> list[str]:
    """What came out wrong, in place and out of place, of bits and of what lies behind a message."""
    copies, device = open_on_a_card(communicator, layout)
    wrong: list[str] = []
    for step, (num_bytes, dtype) in enumerate((size, dtype) for size in sizes for dtype in DTYPES):
        count = num_bytes // dtype.itemsize
        source = values(copies.rank, step, count, dtype, device)
        expected = expected_sum(copies.world_size, step, count, dtype, device)
        wide = torch.full((count + 64,), float("nan"), dtype=dtype, device=device)
        copies.channel.all_reduce(source, wide[:count])
        copies.all_reduce(source)
        copies.check()
        if not torch.equal(wide[:count], expected) or not torch.equal(source, expected):
            wrong.append(f"{num_bytes} bytes of {dtype}")
        if not wide[count:].isnan().all():
            wrong.append(f"behind {num_bytes} bytes of {dtype}")
    # A view that must be copied: only its elements change.
    square = values(copies.rank, 900, 64 * 64, torch.float32, device).view(64, 64)
    copies.all_reduce(square.T)
    if not torch.equal(square.view(-1), expected_sum(copies.world_size, 900, 64 * 64, torch.float32, device)):
        wrong.append("transposed")
    copies.barrier()
    copies.channel.close()
    return wrong


def soak(communicator: HostMemory, layout: CopyLayout) -> int:
    """How many of many calls in flight together came out wrong; they come on two streams in turn."""
    copies, device = open_on_a_card(communicator, layout)
    generator = random.Random(7)
    # Processes that share a card take turns of milliseconds.
    num_calls = 3000 if torch.cuda.device_count() >= copies.world_size else 200
    streams = [torch.cuda.Stream(device) for _ in range(2)]
    wrong = [torch.zeros(1, dtype=torch.int64, device=device) for _ in streams]
    torch.cuda.synchronize(device)
    for step in range(num_calls):
        count, turn = 8 * generator.randint(1, 2 ** generator.randint(1, 15)), step % 2
        with torch.cuda.stream(streams[turn]):
            tensor = values(copies.rank, step, count, torch.bfloat16, device)
            # Also begun before those ahead have ended.
            if step % 3:
                copies.start_all_reduce(tensor)()
            else:
                copies.all_reduce(tensor)
            wrong[turn] += (tensor != expected_sum(copies.world_size, step, count, torch.bfloat16, device)).any()
    copies.barrier()
    return int(sum(wrong).item())


def use_copies(communicator: HostMemory, layout: CopyLayout) -> tuple[list[str], int]:
    """In small segments and in those that are used, then many calls."""
    wrong = sum_all_sizes(communicator, layout, SMALL_BYTES) + sum_all_sizes(communicator, None, LARGE_BYTES)
    return wrong, soak(communicator, layout)


@pytest.mark.parametrize("world_size", (2, 3, 4))
def test_sums_are_right_of_all_sizes_and_after_thousands_of_calls(world_size: int, tmp_path: Path) -> None:
    results = run_on_one_card(use_copies, world_size, tmp_path, SMALL_LAYOUTS[world_size])
    assert list(results) == [([], 0)] * world_size


def capture(communicator: HostMemory) -> bool:
    """Whether a graph of a large message went through `inner`, and the next call is right all the same."""
    copies, device = open_on_a_card(communicator, SMALL_LAYOUTS[2])
    calls: list[int] = []
    copies.inner.all_reduce = lambda tensor: calls.append(tensor.nbytes) or tensor  # type: ignore[method-assign, func-returns-value]
    message = torch.ones(64 * KIB, device=device)
    with torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local"):
        copies.all_reduce(message)
    copies.all_reduce(message)
    return calls == [message.nbytes] and bool((message == 2).all())


def test_what_is_captured_goes_another_way(tmp_path: Path) -> None:
    assert list(run_on_one_card(capture, 2, tmp_path)) == [True, True]


def lose_peer(communicator: HostMemory) -> str:
    copies, device = open_on_a_card(communicator, None, timeout_sec=2)
    message = torch.ones(5 * MIB, device=device)
    copies.all_reduce(message)
    copies.barrier()
    if copies.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    for _ in range(3):
        copies.all_reduce(message)
    try:
        copies.barrier()
    except TransportError as error:
        # The card is free again.
        return f"{error} {torch.ones(4, device=device).sum().item()}"
    return "nothing was noticed"


@pytest.mark.parametrize("world_size", (2, 3))
def test_a_killed_peer_becomes_an_error(world_size: int, tmp_path: Path) -> None:
    processes, connections = start_on_one_card(lose_peer, world_size, tmp_path, timeout_sec=30)
    for rank in {*range(world_size)} - {1}:
        message = receive_result(connections[rank], rank)
        assert "did not answer rank" in message and "through host memory within 2 s (timeouts" in message
        assert message.endswith(" 4.0")
    for process in processes:
        process.join(timeout=60)
        assert not process.is_alive()


def wait_for_nobody(communicator: HostMemory) -> None:
    copies, device = open_on_a_card(communicator, None, timeout_sec=600)
    if copies.rank == 0:
        copies.all_reduce(torch.ones(MIB, device=device))
    else:
        signal.pause()


def test_a_card_that_waits_does_not_keep_its_process(tmp_path: Path) -> None:
    """Rank 0's card waits ten minutes; the process ends when it is killed, as its parent would."""
    processes, connections = start_on_one_card(wait_for_nobody, 2, tmp_path, timeout_sec=30)
    receive_result(connections[0], 0)
    for process in processes:
        process.kill()
        process.join(timeout=60)
        assert not process.is_alive()
    assert torch.ones(4, device="cuda").sum().item() == 4
