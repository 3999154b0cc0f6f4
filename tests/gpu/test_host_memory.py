"""Host memory carries exact sums, with ranks as streams of one card, side by side."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from parallel.communicator import TransportError
from parallel.transports.host_memory import MAX_BYTES, SlotChannel
from tests.gpu.one_card import DEVICE
from tests.parallel.transports.sums import ordered_sum
from tools.bench.ranks_on_one_card import RanksOnOneCard, ranks_on_one_card

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
        assert_missing_rank_is_named(ranks, 8192)


def assert_missing_rank_is_named(ranks: RanksOnOneCard[Any], count: int) -> None:
    """Rank 1 of three does not call; the others say so, of a message of `count` numbers, and wait no more."""
    sources = fresh(ranks, count, torch.bfloat16)
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
