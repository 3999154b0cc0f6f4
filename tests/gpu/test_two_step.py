"""Large messages through host memory in two steps, with ranks as streams of one card."""

from __future__ import annotations

import os
import random

import pytest
import torch

from parallel.communicator import TransportError
from parallel.units import KIB
from tests.gpu.one_card import DEVICE
from tests.gpu.test_host_memory import DTYPES, assert_sums, fresh
from tools.bench.ranks_on_one_card import two_step_on_one_card

pytestmark = pytest.mark.gpu


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
