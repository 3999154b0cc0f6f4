"""Host memory carries exact sums: with ranks as streams of one card, side by side, and as processes that take turns."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from parallel.communicator import TransportError
from parallel.transports.host_memory import KIB, MAX_BYTES, HostMemory, SlotChannel
from tests.gpu.one_card import DEVICE, run_on_one_card, start_on_one_card
from tools.local_ranks import receive_result
from tools.ranks_on_one_card import RanksOnOneCard, ordered_sum, ranks_on_one_card, two_step_on_one_card

pytestmark = pytest.mark.gpu

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Steps of each type, for the distance to a sum in float64.
EPSILON = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 2.0**-22}


@pytest.fixture(scope="module", params=(2, 3, 4))
def ranks(request: pytest.FixtureRequest) -> Iterator[RanksOnOneCard[SlotChannel]]:
    with ranks_on_one_card(request.param, DEVICE) as opened:
        yield opened


def fresh(ranks: RanksOnOneCard[Any], count: int, dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(count, device=DEVICE).to(dtype) for _ in ranks.channels]


def poisoned(sources: list[Tensor]) -> list[Tensor]:
    return [torch.full_like(source, float("nan")) for source in sources]


def assert_sums(sources: list[Tensor], targets: list[Tensor]) -> None:
    """The same bits on every rank, those of the sum in rank order, and near float64's."""
    expected = ordered_sum(sources)
    exact = torch.stack([source.double() for source in sources]).sum(dim=0)
    size = torch.stack([source.double().abs() for source in sources]).sum(dim=0)
    for target in targets:
        assert torch.equal(target.view(torch.uint8), expected.view(torch.uint8))
        assert ((target.double() - exact).abs() <= EPSILON[expected.dtype] * size + 1e-7).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_length_is_summed(ranks: RanksOnOneCard[Any], dtype: torch.dtype) -> None:
    """Around lines, blocks and grids, and the largest; each into poisoned memory, whose neighbours stay poisoned."""
    largest = MAX_BYTES // dtype.itemsize
    for count in (*range(1, 20), 511, 512, 1023, 4097, 8192, 16385, 99_991, largest - 1, largest):
        sources = fresh(ranks, count, dtype)
        wide = [torch.full((count + 16,), float("nan"), dtype=dtype, device=DEVICE) for _ in sources]
        targets = [each[:count] for each in wide]
        ranks.run(lambda channel, s=sources, t=targets: channel.all_reduce(s[channel.rank], t[channel.rank]))  # type: ignore[misc]
        ranks.check()
        assert_sums(sources, targets)
        assert all(each[count:].isnan().all() for each in wide), count


def test_bytes_are_gathered_in_rank_order(ranks: RanksOnOneCard[SlotChannel]) -> None:
    for num_bytes in (*range(1, 26), 1000, 4096, 65_537, MAX_BYTES):
        sources = [torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, device=DEVICE) for _ in ranks.channels]
        expected = torch.stack(sources)
        wide = [torch.full((expected.numel() + 16,), 165, dtype=torch.uint8, device=DEVICE) for _ in sources]
        targets = [each[: expected.numel()] for each in wide]
        ranks.run(lambda channel, s=sources, t=targets: channel.all_gather(s[channel.rank], t[channel.rank]))  # type: ignore[misc]
        ranks.check()
        assert all(torch.equal(target.view_as(expected), expected) for target in targets), num_bytes
        assert all((each[expected.numel() :] == 165).all() for each in wide), num_bytes


def test_special_values_survive(ranks: RanksOnOneCard[SlotChannel]) -> None:
    """A sum of minus zeros is minus zero, infinities and NaN pass, and what is too large becomes infinity."""
    for dtype in DTYPES:
        large = torch.finfo(dtype).max
        row = torch.tensor([-0.0, float("inf"), float("nan"), large, 1.0, 2.0**-130, -large, 3.0], device=DEVICE)
        sources = [row.to(dtype) * (1 if dtype != torch.float32 or rank == 0 else 0.5)
                   for rank in range(len(ranks.channels))]  # fmt: skip
        targets = poisoned(sources)
        ranks.run(lambda channel, s=sources, t=targets: channel.all_reduce(s[channel.rank], t[channel.rank]))  # type: ignore[misc]
        ranks.check()
        for target in targets:
            torch.testing.assert_close(target, ordered_sum(sources), rtol=0, atol=0, equal_nan=True)
            assert target[0].signbit()


def test_soak_of_random_sizes(ranks: RanksOnOneCard[SlotChannel]) -> None:
    """Many calls in flight, sizes, types and kinds mixed, all verified; nothing waits for the host in between."""
    generator = random.Random(int.from_bytes(os.urandom(4), "little"))
    for _ in range(12):
        batch = []
        for _ in range(100):
            dtype = generator.choice(DTYPES)
            count = max(1, int(2 ** generator.uniform(0, 17)) // generator.choice((1, 1, 3)))
            sources = fresh(ranks, count, dtype)
            gather = generator.random() < 0.2
            shape = (len(sources), count) if gather else (count,)
            targets = [torch.full(shape, float("nan"), dtype=dtype, device=DEVICE) for _ in sources]
            batch.append((gather, sources, targets))
        torch.cuda.synchronize()
        for gather, sources, targets in batch:
            for channel, stream in zip(ranks.channels, ranks.streams, strict=True):
                with torch.cuda.stream(stream):
                    call = channel.all_gather if gather else channel.all_reduce
                    call(sources[channel.rank], targets[channel.rank])
        ranks.check()
        for gather, sources, targets in batch:
            if gather:
                assert all(torch.equal(target, torch.stack(sources)) for target in targets)
            else:
                assert_sums(sources, targets)


def test_graphs_replay_right(ranks: RanksOnOneCard[SlotChannel]) -> None:
    """An odd number of calls of several sizes, in place, replayed on fresh values between plain calls."""
    counts = (8192, 1, 131, 8192, 60_000, 8192, 7)
    buffers = [[torch.zeros(count, device=DEVICE).bfloat16() for count in counts] for _ in ranks.channels]

    def calls(channel: SlotChannel) -> None:
        for buffer in buffers[channel.rank]:
            channel.all_reduce(buffer, buffer)

    graphs = ranks.capture(calls)
    for _ in range(40):
        sources = [fresh(ranks, count, torch.bfloat16) for count in counts]
        for i, of_ranks in enumerate(sources):
            for rank, source in enumerate(of_ranks):
                buffers[rank][i].copy_(source)
        ranks.run(lambda channel: graphs[channel.rank].replay())
        ranks.check()
        for i, of_ranks in enumerate(sources):
            assert_sums(of_ranks, [buffers[rank][i] for rank in range(len(graphs))])
        plain = fresh(ranks, 33, torch.float32)
        targets = poisoned(plain)
        ranks.run(lambda channel, s=plain, t=targets: channel.all_reduce(s[channel.rank], t[channel.rank]))  # type: ignore[misc]
        ranks.check()
        assert_sums(plain, targets)


def test_epochs_wrap(ranks: RanksOnOneCard[SlotChannel]) -> None:
    """The largest slot lines were never written: they still carry zero, which no epoch may be."""
    for channel in ranks.channels:
        channel.state[0] = -4 << 32
    torch.cuda.synchronize()
    for _ in range(9):
        sources = fresh(ranks, 5000, torch.bfloat16)
        targets = poisoned(sources)
        ranks.run(lambda channel, s=sources, t=targets: channel.all_reduce(s[channel.rank], t[channel.rank]))  # type: ignore[misc]
        ranks.check()
        assert_sums(sources, targets)
    epochs = {channel.state[0].item() for channel in ranks.channels}
    # -4 is 0xfffffffc: three more to 0xffffffff, then 2 and on to 7.
    assert epochs == {7 << 32}


def test_a_rank_that_does_not_answer_is_named() -> None:
    with ranks_on_one_card(3, DEVICE, timeout_sec=0.3) as ranks:
        sources = fresh(ranks, 8192, torch.bfloat16)
        targets = poisoned(sources)
        call = lambda channel: channel.all_reduce(sources[channel.rank], targets[channel.rank])  # noqa: E731
        ranks.run(call, ranks=(0, 2))
        torch.cuda.synchronize()
        for rank in (0, 2):
            with pytest.raises(TransportError, match=f"rank 1 did not answer rank {rank} through host memory within"):
                ranks.channels[rank].check()
        assert all(targets[rank].isnan().all() for rank in (0, 2))
        # The first time-out ends all further waiting: a queue of calls drains at once, and not in ten minutes.
        for _ in range(2000):
            ranks.run(call, ranks=(0, 2))
        torch.cuda.synchronize()


# --- Large messages -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", (2, 3, 4))
def test_large_messages_are_summed_in_two_steps(world_size: int) -> None:
    """Pieces of 256 KiB: messages around units, chunks, pieces, and several of them; in place and not."""
    with two_step_on_one_card(world_size, DEVICE, piece_bytes=256 * KIB) as ranks:
        for dtype in DTYPES:
            unit = 16 // dtype.itemsize
            for units in (1, 2, 3, 5, 2047, 2048, 2049, 4 * 2048, 4 * 2048 + 1, 16_384, 16_385, 50_001, 200_003):
                sources = fresh(ranks, units * unit, dtype)
                wide = [torch.full((units * unit + 16,), float("nan"), dtype=dtype, device=DEVICE) for _ in sources]
                targets = [each[: units * unit] for each in wide]
                ranks.run(lambda channel, s=sources, t=targets: channel.all_reduce(s[channel.rank], t[channel.rank]))  # type: ignore[misc]
                ranks.check()
                assert_sums(sources, targets)
                assert all(each[units * unit :].isnan().all() for each in wide), units
                in_place = [source.clone() for source in sources]
                ranks.run(lambda channel, b=in_place: channel.all_reduce(b[channel.rank], b[channel.rank]))  # type: ignore[misc]
                ranks.check()
                assert_sums(sources, in_place)


@pytest.mark.parametrize("world_size", (2, 4))
def test_two_steps_soak(world_size: int) -> None:
    """Messages of prefill and smaller ones in flight together, and in a graph, in pieces as they are used."""
    generator = random.Random(int.from_bytes(os.urandom(4), "little"))
    with two_step_on_one_card(world_size, DEVICE) as ranks:
        for _ in range(10):
            counts = [8 * generator.randint(1, 2 ** generator.randint(0, 21)) for _ in range(10)]
            batch = [fresh(ranks, count, torch.bfloat16) for count in counts]
            buffers = [[source.clone() for source in sources] for sources in batch]
            torch.cuda.synchronize()
            for buffer in buffers:
                for channel, stream in zip(ranks.channels, ranks.streams, strict=True):
                    with torch.cuda.stream(stream):
                        channel.all_reduce(buffer[channel.rank], buffer[channel.rank])
            ranks.check()
            for sources, buffer in zip(batch, buffers, strict=True):
                assert_sums(sources, buffer)
        graphs = ranks.capture(lambda channel: channel.all_reduce(buffers[0][channel.rank], buffers[0][channel.rank]))
        for _ in range(10):
            sources = fresh(ranks, counts[0], torch.bfloat16)
            for target, source in zip(buffers[0], sources, strict=True):
                target.copy_(source)
            ranks.run(lambda channel: graphs[channel.rank].replay())
            ranks.check()
            assert_sums(sources, buffers[0])


def test_a_rank_missing_from_two_steps_is_named() -> None:
    with two_step_on_one_card(2, DEVICE, timeout_sec=0.3) as ranks:
        buffers = fresh(ranks, 2**20, torch.bfloat16)
        ranks.run(lambda channel: channel.all_reduce(buffers[channel.rank], buffers[channel.rank]), ranks=(1,))
        torch.cuda.synchronize()
        with pytest.raises(TransportError, match="rank 0 did not answer rank 1 through host memory within"):
            ranks.channels[1].check()


# --- Ranks as processes -------------------------------------------------------------------------------------------


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
    for step, count in enumerate((8 * 100_003, 5 * 2**20), start=60):
        tensor = values(communicator.rank, step, count, torch.bfloat16).to(DEVICE)
        communicator.all_reduce(tensor)
        note(f"{count} in two steps", torch.equal(tensor.cpu(), expected(step, count, torch.bfloat16)))
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
    """Rank 0's card waits ten minutes; the process ends when it is killed, as the elastic agent would."""
    processes, connections = start_on_one_card(wait_for_nobody, 2, tmp_path, timeout_sec=600)
    receive_result(connections[0], 0)
    for process in processes:
        process.kill()
        process.join(timeout=60)
        assert not process.is_alive()
    assert torch.ones(4, device=DEVICE).sum().item() == 4
