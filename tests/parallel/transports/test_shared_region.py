"""The memory that ranks share has no name, and what goes wrong with it is told on every rank."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from parallel.communicator import Communicator, TransportError
from parallel.transports import shared_region
from parallel.transports.host_memory import wrap_host_memory
from parallel.transports.region_layout import PAGE_BYTES
from parallel.transports.shared_region import gather_texts, open_region, share_region
from parallel.units import KIB
from tests.parallel.ranks import CPU
from tools.local_ranks import run_on_ranks

SMALL = 2 * KIB


def share(communicator: Communicator) -> tuple[list[int], list[int]]:
    """What each rank wrote, as all see it; how many names each of the memory's descriptors has that is still open."""
    region = share_region(communicator, CPU, PAGE_BYTES)
    region.word(64 * communicator.rank).value = 7 + communicator.rank
    communicator.barrier()
    seen = [region.word(64 * rank).value for rank in range(communicator.world_size)]
    # Other processes put names into /dev/shm at any time: the memory itself is asked for its own.
    entries = [entry for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
    return seen, [entry.stat().st_nlink for entry in entries if "launch70b" in str(entry.readlink())]


@pytest.mark.parametrize("world_size", (2, 3))
def test_all_ranks_see_one_memory_that_has_no_name(world_size: int) -> None:
    for seen, names_by_descriptor in run_on_ranks(share, world_size):
        assert seen == list(range(7, 7 + world_size))
        # The mapping itself keeps one, Python's own.
        assert names_by_descriptor == [0]


def fail_on_rank_0(communicator: Communicator) -> str:
    os.memfd_create = refuse  # type: ignore[assignment]
    with pytest.raises(TransportError) as caught:
        share_region(communicator, CPU, PAGE_BYTES)
    communicator.barrier()
    return str(caught.value)


def refuse(name: str, flags: int) -> int:
    raise OSError(12, "Cannot allocate memory")


def test_memory_that_cannot_be_made_is_told_on_every_rank() -> None:
    messages = run_on_ranks(fail_on_rank_0, 3)
    assert len(set(messages)) == 1
    assert messages[0].startswith(f"rank 0 cannot create {PAGE_BYTES} bytes of shared memory: ")
    assert "Cannot allocate memory" in messages[0]


def fail_to_open(communicator: Communicator) -> str:
    if communicator.rank == 1:
        # In another pid namespace, rank 0's number is nobody's.
        shared_region.open_region = lambda pid, *rest: open_region(2**22 + 1, *rest)
    with pytest.raises(TransportError) as caught:
        share_region(communicator, CPU, PAGE_BYTES)
    communicator.barrier()
    return str(caught.value)


def test_memory_that_one_rank_cannot_open_is_told_on_every_rank() -> None:
    messages = run_on_ranks(fail_to_open, 3)
    assert len(set(messages)) == 1
    assert "rank 1 cannot open rank 0's memory" in messages[0]
    assert "must share a machine, a user and a pid namespace" in messages[0]


def wrap(communicator: Communicator) -> str:
    with pytest.raises(TransportError) as caught:
        wrap_host_memory(communicator, CPU, timeout_sec=1, max_bytes=SMALL)
    communicator.barrier()
    return str(caught.value)


def test_a_machine_without_a_driver_is_an_error_with_a_reason() -> None:
    messages = run_on_ranks(wrap, 2)
    assert len(set(messages)) == 1
    assert messages[0].startswith("rank 0 c")


def texts(communicator: Communicator) -> list[str]:
    return gather_texts(communicator, CPU, ("short", "", "ä" * 400)[communicator.rank])


def test_texts_of_all_ranks_are_gathered_and_cut() -> None:
    for result in run_on_ranks(texts, 3):
        assert result == ["short", "", "ä" * 128]
