"""Transports add and gather exactly; wrappers and swaps do what they say and no more."""

import random
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from parallel.communicator import Communicator, ElidedAllReduce, open_communicator
from parallel.layers.linear import ShardedLayer, swapped_communicator
from parallel.transports.solo import Solo
from tests.parallel import ranks
from tests.parallel.ranks import CPU, build
from tools.local_ranks import run_on_ranks

# Of as many ranks: what they talk through, and what starts them.
RANKS = {
    "solo": (1, run_on_ranks),
    "gloo": (2, run_on_ranks),
    "gloo of three": (3, run_on_ranks),
    "shared memory": (2, ranks.run_on_ranks),
    "shared memory of three": (3, ranks.run_on_ranks),
}


def values_of(rank: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[7, 33] whole numbers of up to 20 bits: their sums are exact in float32, whatever the order."""
    return torch.randint(-(2**20), 2**20, (7, 33), generator=torch.Generator().manual_seed(rank)).to(dtype)


def reduce_values(communicator: Communicator) -> tuple[Tensor, bool, str]:
    tensor = values_of(communicator.rank)
    result = communicator.all_reduce(tensor)
    return result, result is tensor, communicator.name


@pytest.mark.parametrize("kind", RANKS)
def test_all_reduce_is_the_exact_sum_in_place(kind: str) -> None:
    world_size, run = RANKS[kind]
    expected = sum(values_of(rank) for rank in range(world_size))
    for result, in_place, name in run(reduce_values, world_size):
        assert torch.equal(result, expected)
        assert in_place
        assert name == kind.removesuffix(" of three")


def reduce_fractions(communicator: Communicator) -> list[Tensor]:
    generator = torch.Generator().manual_seed(communicator.rank)
    return [
        communicator.all_reduce(torch.randn(*shape, generator=generator).to(dtype))
        for shape in ((1,), (1, 1, 80), (4, 8, 80), (3, 50_001))
        for dtype in (torch.float32, torch.bfloat16)
    ]


@pytest.mark.parametrize("kind", RANKS)
def test_every_rank_gets_the_same_bits(kind: str) -> None:
    world_size, run = RANKS[kind]
    first, *others = run(reduce_fractions, world_size)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def reduce_in_turn(communicator: Communicator) -> list[list[float]]:
    """Of many sums one upon another, to which each rank is late now and then."""
    draw, found = random.Random(communicator.rank), []
    for number in range(200):
        time.sleep(0.001 * (draw.random() < 0.1))
        total = communicator.all_reduce(torch.tensor([float(number), communicator.rank]))
        found.append([*total.tolist(), *communicator.all_gather(total).sum(0).tolist()])
    return found


@pytest.mark.parametrize("kind", RANKS)
def test_collectives_do_not_mix(kind: str) -> None:
    n, run = RANKS[kind]
    ranks_sum = n * (n - 1) // 2
    for found in run(reduce_in_turn, n):
        assert found == [[n * number, ranks_sum, n * n * number, n * ranks_sum] for number in range(200)]


def gather_values(communicator: Communicator) -> tuple[Tensor, Tensor]:
    values = values_of(communicator.rank)
    return communicator.all_gather(values), communicator.all_gather(values.T)


@pytest.mark.parametrize("kind", RANKS)
def test_all_gather_is_in_rank_order(kind: str) -> None:
    world_size, run = RANKS[kind]
    expected = torch.stack([values_of(rank) for rank in range(world_size)])
    for gathered, of_a_view in run(gather_values, world_size):
        assert torch.equal(gathered, expected)
        assert torch.equal(of_a_view, expected.transpose(1, 2))


def pass_barrier(communicator: Communicator) -> tuple[float, float]:
    time.sleep(0.2 * communicator.rank)
    arrived = time.monotonic()
    communicator.barrier()
    return arrived, time.monotonic()


@pytest.mark.parametrize("kind", RANKS)
def test_nobody_passes_a_barrier_before_the_last_has_come(kind: str) -> None:
    world_size, run = RANKS[kind]
    arrivals, departures = zip(*run(pass_barrier, world_size), strict=True)
    assert min(departures) >= max(arrivals)


def elide(communicator: Communicator) -> tuple[Tensor, Tensor, tuple[str, int, int]]:
    elided = ElidedAllReduce(communicator)
    tensor = values_of(communicator.rank)
    elided.barrier()
    gathered = elided.all_gather(torch.tensor([communicator.rank]))
    return elided.all_reduce(tensor), gathered, (elided.name, elided.rank, elided.world_size)


def test_elided_all_reduce_leaves_values_and_still_gathers() -> None:
    for rank, (values, gathered, identity) in enumerate(run_on_ranks(elide, 2)):
        assert torch.equal(values, values_of(rank))
        assert gathered.tolist() == [[0], [1]]
        assert identity == ("gloo without all-reduce", rank, 2)


def swap(communicator: Communicator, folder: Path) -> None:
    model = build(communicator, folder).module
    layers = [layer for layer in model.modules() if isinstance(layer, ShardedLayer)]
    # Per layer q, k, v, o, gate, up and down; and embedding and head.
    assert len(layers) == 3 * 7 + 2
    other = ElidedAllReduce(communicator)
    with pytest.raises(KeyError), swapped_communicator(model, other):
        assert all(layer.communicator is other for layer in layers)
        raise KeyError
    assert all(layer.communicator is communicator for layer in layers)


def test_swapped_communicator_is_restored_even_after_an_error(folders: dict[str, Path]) -> None:
    run_on_ranks(swap, 1, folders["llama"])


def test_unknown_transport_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="transport 'mpi' is unknown; there are nccl, host_memory, gloo, solo"):
        open_communicator("mpi", CPU, timeout_sec=1)


def test_solo_needs_no_process_group() -> None:
    assert isinstance(open_communicator("solo", CPU, timeout_sec=1), Solo)
