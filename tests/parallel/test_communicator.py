"""Transports add and gather exactly; wrappers and swaps do what they say and no more."""

import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from parallel.communicator import Communicator, ElidedAllReduce, open_communicator
from parallel.layers.linear import ShardedLayer, swapped_communicator
from parallel.transports.solo import Solo
from tests.parallel.ranks import CPU, build, run_on_ranks

WORLD_SIZES = (1, 2, 3)


def values_of(rank: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[7, 33] whole numbers of up to 20 bits: their sums are exact in float32, whatever the order."""
    return torch.randint(-(2**20), 2**20, (7, 33), generator=torch.Generator().manual_seed(rank)).to(dtype)


def reduce_values(communicator: Communicator) -> tuple[Tensor, bool, str]:
    tensor = values_of(communicator.rank)
    result = communicator.all_reduce(tensor)
    return result, result is tensor, communicator.name


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_all_reduce_is_the_exact_sum_in_place(world_size: int) -> None:
    expected = sum(values_of(rank) for rank in range(world_size))
    for result, in_place, name in run_on_ranks(reduce_values, world_size):
        assert torch.equal(result, expected)
        assert in_place
        assert name == ("solo" if world_size == 1 else "gloo")


def reduce_fractions(communicator: Communicator) -> list[Tensor]:
    generator = torch.Generator().manual_seed(communicator.rank)
    return [
        communicator.all_reduce(torch.randn(*shape, generator=generator).to(dtype))
        for shape in ((1,), (1, 1, 80), (4, 8, 80), (3, 50_001))
        for dtype in (torch.float32, torch.bfloat16)
    ]


def test_every_rank_gets_the_same_bits() -> None:
    first, *others = run_on_ranks(reduce_fractions, 3)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def gather_values(communicator: Communicator) -> tuple[Tensor, Tensor]:
    values = values_of(communicator.rank)
    return communicator.all_gather(values), communicator.all_gather(values.T)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_all_gather_is_in_rank_order(world_size: int) -> None:
    expected = torch.stack([values_of(rank) for rank in range(world_size)])
    for gathered, of_a_view in run_on_ranks(gather_values, world_size):
        assert torch.equal(gathered, expected)
        assert torch.equal(of_a_view, expected.transpose(1, 2))


def pass_barrier(communicator: Communicator) -> tuple[float, float]:
    time.sleep(0.2 * communicator.rank)
    arrived = time.monotonic()
    communicator.barrier()
    return arrived, time.monotonic()


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_nobody_passes_a_barrier_before_the_last_has_come(world_size: int) -> None:
    arrivals, departures = zip(*run_on_ranks(pass_barrier, world_size), strict=True)
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
