"""One function on several ranks of this machine: CPU processes over gloo, for tests and small measurements."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

# Ranks compute on the CPU, whatever the machine has.
ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
# Imported once, in the server that ranks are forked from: a start takes milliseconds instead of seconds.
PRELOADED = (
    *("torch", "transformers", "deepspeed", "deepspeed.comm", "parallel.checkpoint.load", "parallel.shard"),
    # What building a model imports.
    *("deepspeed.module_inject.auto_ep_layer", "deepspeed.module_inject.tp_plan_converter"),
    *(f"transformers.models.{name}.modeling_{name}" for name in ("gpt2", "llama", "mistral", "qwen2", "qwen3")),
)
# So much longer than the caller of ranks their collectives wait: who hangs is told, not what it does to the others.
COLLECTIVE_SEC = 60.0


class RankError(RuntimeError):
    """A rank raised, or ended without a result; the message has its traceback."""


def run_on_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout_sec: float = 120) -> list[Any]:
    """Calls `function(communicator, *args)` in `world_size` new processes, one thread each.

    What ranks print goes to stderr: stdout is the caller's.

    Args:
        function: of a module, so that a process can import it; its result must be picklable.

    Returns:
        One result per rank, in rank order.

    Raises:
        RankError: a rank failed; the other ranks were killed.
        TimeoutError: a rank has not answered in time; all were killed.
    """
    context = fork_server()
    with tempfile.TemporaryDirectory() as folder:
        processes, connections = [], []
        try:
            for rank in range(world_size):
                ours, theirs = context.Pipe(duplex=False)
                limit_sec = timeout_sec + COLLECTIVE_SEC
                job = (theirs, function, rank, world_size, Path(folder) / "store", limit_sec, args)
                processes.append(context.Process(target=rank_main, args=job, daemon=True))
                processes[-1].start()
                theirs.close()
                connections.append(ours)
            results = collect_results(connections, timeout_sec)
        except BaseException:
            for process in processes:
                process.kill()
            raise
        finally:
            for process in processes:
                process.join()
        return results


def fork_server() -> ForkServerContext:
    """Processes forked from one that has imported torch and DeepSpeed, for a CPU, and done nothing else."""
    from multiprocessing import forkserver

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    before = dict(os.environ)
    os.environ.update(ENVIRONMENT)
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


def collect_results(connections: Sequence[Connection], timeout_sec: float) -> list[Any]:
    results: dict[int, Any] = {}
    end = time.monotonic() + timeout_sec
    while len(results) < len(connections):
        waiting = {connection: rank for rank, connection in enumerate(connections) if rank not in results}
        ready = wait(list(waiting), max(0.0, end - time.monotonic()))
        if not ready:
            raise TimeoutError(f"no answer within {timeout_sec:g} s from ranks {list(waiting.values())}.")
        for connection in ready:
            rank = waiting[connection]
            results[rank] = receive_result(connection, rank)
    return [results[rank] for rank in range(len(connections))]


def receive_result(connection: Connection, rank: int) -> Any:
    try:
        error, result = pickle.loads(connection.recv_bytes())
    except EOFError:
        raise RankError(f"rank {rank} ended without a result.") from None
    if error is not None:
        raise RankError(f"rank {rank} failed:\n{error}")
    return result


def rank_main(
    connection: Connection,
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    store: Path,
    timeout_sec: float,
    args: tuple[Any, ...],
) -> None:
    os.dup2(2, 1)
    try:
        with joined(rank, world_size, store, timeout_sec) as communicator:
            result = function(communicator, *args)
            communicator.barrier()
        answer = (None, result)
    except BaseException:
        answer = (traceback.format_exc(), None)
    # Not by the connection's own pickling, which sends tensors as handles that end with this process.
    connection.send_bytes(pickle.dumps(answer))


@contextmanager
def joined(rank: int, world_size: int, store: Path, timeout_sec: float) -> Iterator[Any]:
    """What launcher/rank/context.py does for a rank on the CPU, without a job and without a port."""
    import torch
    import torch.distributed as dist

    from parallel.communicator import open_communicator
    from parallel.shard import share_process_group

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(store), world_size),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_sec),
    )
    device = torch.device("cpu")
    share_process_group(device)
    try:
        kind = "solo" if world_size == 1 else "gloo"
        yield open_communicator(kind, device, timeout_sec=timeout_sec)
    finally:
        dist.destroy_process_group()
