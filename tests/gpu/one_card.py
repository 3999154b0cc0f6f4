"""Ranks that are processes of their own on one card; they take turns on it, so each call may take milliseconds."""

from __future__ import annotations

import multiprocessing
import pickle
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from parallel.communicator import Communicator
from parallel.transports.dense import wrap_dense
from parallel.transports.host_memory import wrap_host_memory
from parallel.transports.solo import Solo
from parallel.transports.torch_distributed import open_gloo
from parallel.transports.two_step import wrap_two_step
from tools.local_ranks import collect_results

DEVICE = torch.device("cuda", 0)


def start_on_one_card(
    function: Callable[..., Any], world_size: int, folder: Path, *args: Any, timeout_sec: float
) -> tuple[list[SpawnProcess], list[Connection]]:
    """Starts `function(host_memory, *args)` in `world_size` processes; a peer may be waited for `timeout_sec`."""
    context = multiprocessing.get_context("spawn")
    processes, connections = [], []
    for rank in range(world_size):
        ours, theirs = context.Pipe(duplex=False)
        job = (theirs, function, rank, world_size, folder / "store", timeout_sec, args)
        processes.append(context.Process(target=rank_main, args=job, daemon=True))
        processes[-1].start()
        theirs.close()
        connections.append(ours)
    return processes, connections


def run_on_one_card(
    function: Callable[..., Any], world_size: int, folder: Path, *args: Any, timeout_sec: float = 30
) -> Sequence[Any]:
    processes, connections = start_on_one_card(function, world_size, folder, *args, timeout_sec=timeout_sec)
    try:
        return collect_results(connections, 200)
    finally:
        for process in processes:
            process.kill()
            process.join()


def rank_main(
    connection: Connection,
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    store: Path,
    timeout_sec: float,
    args: tuple[Any, ...],
) -> None:
    torch.cuda.set_device(DEVICE)
    limit = timedelta(seconds=120)
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(store), world_size), rank=rank, world_size=world_size, timeout=limit
    )
    try:
        answer = (None, function(open_communicator(world_size, limit, timeout_sec), *args))
    except BaseException:
        answer = (traceback.format_exc(), None)
    connection.send_bytes(pickle.dumps(answer))


def open_communicator(world_size: int, limit: timedelta, timeout_sec: float) -> Communicator:
    if world_size == 1:
        return Solo(DEVICE)
    large = wrap_two_step(open_gloo(DEVICE, limit), DEVICE, timeout_sec=timeout_sec)
    middle = wrap_dense(large, DEVICE, timeout_sec=timeout_sec)
    return wrap_host_memory(middle, DEVICE, timeout_sec=timeout_sec)
