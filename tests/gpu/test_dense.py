"""Messages of a batch through host memory in one hop, with ranks as streams of one card."""

from __future__ import annotations

import os
import random

import pytest
import torch

from parallel.communicator import TransportError
from parallel.transports.dense import EXACT, INT8, MAX_BYTES, NUM_TAGS, DenseChannel
from parallel.transports.rounded import round_to_int8
from parallel.units import KIB
from tests.gpu.one_card import DEVICE
from tests.gpu.test_host_memory import DTYPES, assert_missing_rank_is_named, assert_sums, fresh, poisoned
from tests.parallel.transports.sums import ordered_sum
from tools.bench.ranks_on_one_card import RanksOnOneCard, dense_on_one_card

pytestmark = pytest.mark.gpu

TILE_UNITS = EXACT.tile_bytes // 16


def reduce(ranks: RanksOnOneCard[DenseChannel], count: int, dtype: torch.dtype) -> None:
    """Into poisoned memory, whose neighbours stay poisoned, and in place."""
    sources = fresh(ranks, count, dtype)
    wide = [torch.full((count + 16,), float("nan"), dtype=dtype, device=DEVICE) for _ in sources]
    targets = [each[:count] for each in wide]
    in_place = [source.clone() for source in sources]
    ranks.run(lambda channel: channel.all_reduce(sources[channel.rank], targets[channel.rank]))
    ranks.run(lambda channel: channel.all_reduce(in_place[channel.rank], in_place[channel.rank]))
    ranks.check()
    assert_sums(sources, targets)
    assert_sums(sources, in_place)
    assert all(each[count:].isnan().all() for each in wide), count


@pytest.mark.parametrize("world_size", (2, 3, 4))
def test_every_length_is_summed(world_size: int) -> None:
    """Around lanes, tiles and grids, and the largest."""
    largest = MAX_BYTES // 16
    tiles = [tiles * TILE_UNITS + more for tiles in (1, 2, 32, 64, 65, 128, 300) for more in (-1, 0, 1, 31)]
    with dense_on_one_card(world_size, DEVICE) as ranks:
        for dtype in DTYPES:
            for units in (1, 2, 31, 32, 33, *tiles, 8192, 50_001, largest - 1, largest):
                reduce(ranks, units * (16 // dtype.itemsize), dtype)


@pytest.mark.parametrize("world_size", (2, 4))
def test_special_values_survive(world_size: int) -> None:
    """Every pattern of 16 bits in every place of a line; tags are told from data by their place alone."""
    with dense_on_one_card(world_size, DEVICE) as ranks:
        patterns = torch.arange(2**16, device=DEVICE).to(torch.int16).view(torch.bfloat16)
        for shift in range(8):
            sources = [patterns.roll(shift + 8 * rank) for rank in range(world_size)]
            targets = poisoned(sources)
            ranks.run(lambda channel, s=sources, t=targets: channel.all_reduce(s[channel.rank], t[channel.rank]))  # type: ignore[misc]
            ranks.check()
            total = ordered_sum(sources)
            for target in targets:
                torch.testing.assert_close(target, total, rtol=0, atol=0, equal_nan=True)
                assert torch.equal(target.view(torch.int16), targets[0].view(torch.int16))


@pytest.mark.parametrize("world_size", (2, 3, 4))
def test_soak_of_random_sizes(world_size: int) -> None:
    """Many calls in flight, sizes and types mixed, and the same in a graph; nothing waits for the host in between."""
    generator = random.Random(int.from_bytes(os.urandom(4), "little"))
    with dense_on_one_card(world_size, DEVICE) as ranks:
        for _ in range(10):
            batch = []
            for _ in range(60):
                dtype = generator.choice(DTYPES)
                units = int(2 ** generator.uniform(0, 17))
                sources = fresh(ranks, units * (16 // dtype.itemsize), dtype)
                batch.append((sources, [source.clone() for source in sources]))
            torch.cuda.synchronize()

            def calls(channel: DenseChannel, batch: object = batch) -> None:
                for _, buffers in batch:  # type: ignore[attr-defined]
                    channel.all_reduce(buffers[channel.rank], buffers[channel.rank])

            ranks.run(calls)
            ranks.check()
            for sources, buffers in batch:
                assert_sums(sources, buffers)
            graphs = ranks.capture(calls)
            for sources, buffers in batch:
                for source, buffer in zip(sources, buffers, strict=True):
                    buffer.copy_(source)
            ranks.run(lambda channel, g=graphs: g[channel.rank].replay())  # type: ignore[misc]
            ranks.check()
            for sources, buffers in batch:
                assert_sums(sources, buffers)


def test_old_lines_are_not_taken_for_new_ones_when_their_tag_comes_again() -> None:
    """A long message in both slots, short ones until every row was renewed, a long one whose tag is the first one's.

    Its peer stays away: a rank that finds what it waits for found old lines.
    """
    with dense_on_one_card(2, DEVICE, max_bytes=64 * KIB, timeout_sec=0.5) as ranks:
        for count in (32 * KIB, 32 * KIB, *[8] * 2 * ranks.channels[0].layout.slot_rows):
            buffers = fresh(ranks, count, torch.bfloat16)
            ranks.run(lambda channel, b=buffers: channel.all_reduce(b[channel.rank], b[channel.rank]))  # type: ignore[misc]
        ranks.check()
        for channel in ranks.channels:
            # The next call is 1 + 2 * NUM_TAGS, the first one was 1.
            channel.state[0] = 2 * NUM_TAGS << 32
        sources = fresh(ranks, 32 * KIB, torch.bfloat16)
        targets = poisoned(sources)
        call = lambda channel: channel.all_reduce(sources[channel.rank], targets[channel.rank])  # noqa: E731
        ranks.run(call, ranks=(1,))
        torch.cuda.synchronize()
        with pytest.raises(TransportError, match="rank 0 did not answer rank 1"):
            ranks.channels[1].check()
        assert targets[1].isnan().all()


def test_epochs_and_tags_wrap() -> None:
    for before in (-4 << 32, (NUM_TAGS - 4) << 32):
        with dense_on_one_card(2, DEVICE) as ranks:
            for channel in ranks.channels:
                channel.state[0] = before
            for _ in range(5):
                reduce(ranks, 40_000, torch.bfloat16)
            assert {channel.state[0].item() for channel in ranks.channels} == {
                8 << 32 if before < 0 else NUM_TAGS + 6 << 32
            }


def test_a_rank_that_does_not_answer_is_named() -> None:
    with dense_on_one_card(3, DEVICE, timeout_sec=0.3) as ranks:
        assert_missing_rank_is_named(ranks, 2**19)


@pytest.mark.parametrize("world_size", (2, 3, 4))
def test_rounded_numbers_are_summed_as_plain_torch_does(world_size: int) -> None:
    """Bit for bit on every rank: eagerly into poisoned memory, and replayed in place."""
    with dense_on_one_card(world_size, DEVICE, lines=INT8) as ranks:
        for dtype in INT8.dtypes:
            for units in (1, 33, 383, 384, 385, 5000, 32768, MAX_BYTES // 16):
                sources = fresh(ranks, units * 8, dtype)
                for source in sources:
                    source[: units * 2] *= 1e-3
                total = torch.zeros(units * 8, device=DEVICE)
                for source in sources:
                    total += round_to_int8(source)
                targets, buffers = poisoned(sources), [source.clone() for source in sources]
                ranks.run(lambda channel, s=sources, t=targets: channel.all_reduce(s[channel.rank], t[channel.rank]))  # type: ignore[misc]
                graphs = ranks.capture(lambda channel, b=buffers: channel.all_reduce(b[channel.rank], b[channel.rank]))  # type: ignore[misc]
                ranks.run(lambda channel, g=graphs: g[channel.rank].replay())  # type: ignore[misc]
                ranks.check()
                for found in (*targets, *buffers):
                    assert torch.equal(found, total.to(dtype)), (dtype, units)
