"""Kernels that fetch weights meanwhile compute what they compute without, whatever the pieces that are fetched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from parallel.communicator import Communicator
from parallel.engine.ahead import LayerAhead, look_ahead
from parallel.kernels import fused, prefetch
from parallel.kernels.launch import load_kernel
from parallel.transports import dense
from parallel.transports.host_memory import MAX_BYTES
from tests.gpu.one_card import DEVICE, run_on_one_card
from tests.gpu.test_engine import SAMPLED, answers_on_the_card
from tests.gpu.test_fused import make_rotation, random
from tests.gpu.test_host_memory import assert_sums, fresh, poisoned
from tools.ranks_on_one_card import RanksOnOneCard, dense_on_one_card, ranks_on_one_card

pytestmark = pytest.mark.gpu

MIB = 2**20
# Bytes from an odd address on, for values and scales: none, a few, around lines and pages, and many.
PIECES = ((0, 0), (1, 0), (0, 3), (127, 129), (4095, 1), (4097, 65_537), (3 * MIB + 5, 77_777), (24 * MIB - 1, MIB + 1))
# Numbers in bf16; the dense kernel takes whole pieces of 8.
COUNTS = {"slots": (1, 131, 8192, 60_000, MAX_BYTES // 2), "dense": (8, 136, 8192, 60_000, dense.MAX_BYTES // 2)}
OPENERS: dict[str, Callable[..., Any]] = {"slots": ranks_on_one_card, "dense": dense_on_one_card}


@pytest.fixture(scope="module")
def memory() -> Tensor:
    return torch.randint(0, 256, (32 * MIB,), dtype=torch.uint8, device=DEVICE)


def cut(memory: Tensor, sizes: tuple[int, int]) -> tuple[Tensor, ...]:
    """Pieces that do not begin with a line; the second ends where the memory does."""
    first, second = memory[3 : 3 + sizes[0]], memory[len(memory) - sizes[1] :]
    return tuple(piece for piece in (first, second) if len(piece))


@pytest.fixture(scope="module", params=product(OPENERS, (2, 4)), ids=str)
def opened(request: pytest.FixtureRequest) -> Iterator[tuple[RanksOnOneCard[Any], tuple[int, ...]]]:
    """Ranks, and numbers of a message."""
    kind, world_size = request.param
    with OPENERS[kind](world_size, DEVICE) as ranks:
        yield ranks, COUNTS[kind]


def test_sums_are_exact_under_replay_whatever_is_fetched(
    opened: tuple[RanksOnOneCard[Any], tuple[int, ...]], memory: Tensor
) -> None:
    """Every size of message with every pair of pieces, an odd number of calls, on fresh values each time."""
    ranks, counts = opened
    calls = [(count, cut(memory, sizes)) for sizes in PIECES for count in counts]
    before = memory.clone()
    buffers = [[torch.zeros(count, device=DEVICE).bfloat16() for count, _ in calls] for _ in ranks.channels]

    def queue(channel: Any) -> None:
        for buffer, (_, ahead) in zip(buffers[channel.rank], calls, strict=True):
            channel.all_reduce(buffer, buffer, ahead)
        channel.all_reduce(buffers[channel.rank][0], buffers[channel.rank][0], calls[-1][1])

    torch.cuda.synchronize()
    epochs = [int(channel.state[0]) >> 32 for channel in ranks.channels]
    graphs = ranks.capture(queue)
    for _ in range(10):
        sources = [fresh(ranks, count, torch.bfloat16) for count, _ in calls]
        for i, of_ranks in enumerate(sources):
            for rank, source in enumerate(of_ranks):
                buffers[rank][i].copy_(source)
        ranks.run(lambda channel: graphs[channel.rank].replay())
        ranks.check()
        for i, of_ranks in enumerate(sources[1:], start=1):
            assert_sums(of_ranks, [buffers[rank][i] for rank in range(len(graphs))])
    # One epoch a call, and no arrival left over: blocks that fetch are not counted.
    assert [int(channel.state[0]) for channel in ranks.channels] == [
        epoch + 10 * (len(calls) + 1) << 32 for epoch in epochs
    ]
    assert torch.equal(memory, before)


def test_calls_that_fetch_and_calls_that_do_not_may_follow_one_another(
    opened: tuple[RanksOnOneCard[Any], tuple[int, ...]], memory: Tensor
) -> None:
    ranks, counts = opened
    batch = []
    for index in range(200):
        dtype = torch.float32 if index % 3 == 0 else torch.bfloat16
        sources = fresh(ranks, min(counts[index % len(counts)], counts[-1] * 2 // dtype.itemsize), dtype)
        batch.append((sources, poisoned(sources), cut(memory, PIECES[index % 7]) if index % 2 else ()))
    torch.cuda.synchronize()
    for sources, targets, ahead in batch:
        for channel, stream in zip(ranks.channels, ranks.streams, strict=True):
            with torch.cuda.stream(stream):
                # Each rank fetches other pieces, or none.
                channel.all_reduce(sources[channel.rank], targets[channel.rank], ahead[channel.rank :])
    ranks.check()
    for sources, targets, _ in batch:
        assert_sums(sources, targets)


@pytest.mark.parametrize("tokens", [1, 8, 33])
def test_activations_and_rotations_are_the_same(memory: Tensor, tokens: int) -> None:
    gate_up, rotation = random(tokens, 2 * 14336), make_rotation(32, 4, 128, tokens, 64, torch.bfloat16, False, 0)
    pages = [page for page in rotation[5:7] if isinstance(page, Tensor)]
    expected = [fused.silu_mul(gate_up), fused.rotary_and_cache(*rotation), *(page.clone() for page in pages)]
    for sizes in PIECES:
        for page in pages:
            page.fill_(7.0)
        ahead = cut(memory, sizes)
        found = [fused.silu_mul(gate_up, *ahead), fused.rotary_and_cache(*rotation, *ahead), *pages]
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True)), sizes


@pytest.mark.parametrize("way", prefetch.WAYS)
def test_each_way_to_fetch_is_compiled_and_touches_nothing(memory: Tensor, way: str) -> None:
    path = Path(prefetch.__file__).parents[2] / "tools" / "wait.cu"
    kernel = load_kernel(path, "wait", prefetch.options(DEVICE.index, way), "q" + prefetch.PARAMETERS, DEVICE.index)
    before = memory.clone()
    for sizes in PIECES:
        grid, fetched = prefetch.beside((8, 1), *cut(memory, sizes))
        kernel(grid, 256, 1000, *fetched)
    torch.cuda.synchronize()
    assert torch.equal(memory, before)


def test_a_card_says_what_it_delivers() -> None:
    """Between cards of 300 GB/s and of 10 TB/s, and never more than its share of the cache."""
    cache = torch.cuda.get_device_properties(DEVICE).L2_cache_size
    assert prefetch.ask_card(prefetch.CACHE_BYTES, DEVICE.index) == cache
    for place, (us, _) in prefetch.IDLE_US.items():
        assert us * 300e3 < prefetch.idle_bytes(place, 1, DEVICE) <= min(us * 10e6, cache * prefetch.CACHE_SHARE)


def answers_and_aheads(communicator: Communicator, share: float) -> tuple[list[list[int]], int]:
    """Answers of the demo model, and how many parts of captured steps were told of something to fetch."""
    prefetch.CACHE_SHARE = share
    found: list[prefetch.Ahead] = []

    def counted(*arguments: Any) -> Iterator[LayerAhead]:
        for ahead in look_ahead(*arguments):
            found.extend(filter(None, vars(ahead).values()))
            yield ahead

    answers = with_look_ahead(counted, lambda: answers_on_the_card(communicator, torch.bfloat16, SAMPLED))
    return answers, len(found)


def with_look_ahead(replaced: Callable[..., Any], run: Callable[[], Any]) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("parallel.engine.decoder.look_ahead", replaced)
        return run()


def test_captured_steps_fetch_and_answer_the_same(tmp_path: Path) -> None:
    outcomes = []
    for share in (0.0, 1 / 3):
        folder = tmp_path / f"{share}"
        folder.mkdir()
        outcomes.append(run_on_one_card(answers_and_aheads, 2, folder, share))
    for (plain, without), (answers, fetched) in zip(*outcomes, strict=True):
        assert answers == plain
        assert without == 0 and fetched > 0
