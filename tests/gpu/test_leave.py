"""What ranks wait for when they leave NCCL: two of them on one card, each of which NCCL takes for another host's."""

from __future__ import annotations

import gc
import multiprocessing
import os
import threading
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from launcher.rank import context
from parallel.cuda_graph import record_graph
from tests.gpu.one_card import DEVICE

pytestmark = pytest.mark.gpu

WORLD_SIZE = 2
LEAVE_SEC = 5.0
SOCKETS = {
    "NCCL_MULTI_RANK_GPU_ENABLE": "1",
    "NCCL_NET": "Socket",
    "NCCL_SOCKET_IFNAME": "lo",
    "NCCL_IB_DISABLE": "1",
}


class Cyclic:
    """Refers to itself, as an engine does; `replay` is its graph's."""

    def __init__(self, replay: Callable[[], None]) -> None:
        self.replay, self.own = replay, self


def leave(answer: Connection, rank: int, store: Path, collects: bool) -> None:
    """Answers whether NCCL has let this rank go, with a captured sum in garbage that is collected before, or not."""
    os.environ |= SOCKETS | {"NCCL_HOSTID": f"rank{rank}"}
    torch.cuda.set_device(DEVICE)
    shared, limit = dist.FileStore(str(store), WORLD_SIZE), timedelta(seconds=60)
    dist.init_process_group("nccl", store=shared, rank=rank, world_size=WORLD_SIZE, timeout=limit)
    ones = torch.ones(1024, device=DEVICE)
    dist.all_reduce(ones)
    graph = record_graph(lambda: dist.all_reduce(ones))
    graph.replay()
    torch.cuda.synchronize()
    assert ones[0].item() == WORLD_SIZE**2
    gc.disable()
    Cyclic(graph.replay)
    del graph
    context.LEAVE_SEC = LEAVE_SEC
    if not collects:
        context.gc = SimpleNamespace(collect=lambda: None)  # type: ignore[attr-defined]
    context.leave_process_group()
    answer.send(all(thread.name != "leave" for thread in threading.enumerate()))


@pytest.mark.parametrize("collects", [True, False])
def test_nccl_lets_a_rank_go_once_graphs_with_its_sums_are_collected(collects: bool, tmp_path: Path) -> None:
    """And not before, or there would be no need to."""
    spawn, pipes = multiprocessing.get_context("spawn"), [multiprocessing.Pipe() for _ in range(WORLD_SIZE)]
    processes = [
        spawn.Process(target=leave, args=(theirs, rank, tmp_path / "store", collects), daemon=True)
        for rank, (_, theirs) in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    try:
        assert all(ours.poll(100) for ours, _ in pipes), "no answer: see the errors of its processes"
        assert [ours.recv() for ours, _ in pipes] == [collects] * WORLD_SIZE
    finally:
        # One that NCCL holds would not end by itself.
        for process in processes:
            process.kill()
            process.join()
