"""Ranks as processes of this machine: started together, watched, and ended together.

What torch's elastic agent would do for one machine and one attempt, without importing torch before any rank starts.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from launcher.job import Job

HOST = "127.0.0.1"
# The socket of this number is what rank 0 is to serve the store of all ranks on (launcher/rank/worker.py).
STORE_SOCKET = "LAUNCH70B_STORE_SOCKET"
# The id of the process that started a rank, without which it is not to run (launcher/rank/worker.py).
PARENT = "LAUNCH70B_PARENT"
POLL_SEC = 0.02
# A rank that was asked to end has so long before it is killed.
GRACE_SEC = 10.0
# How ranks end that lose a peer or are asked to end: what killed them was not the first to fail.
CONSEQUENCES = (-signal.SIGTERM, -signal.SIGABRT)
# Of a torchrun that started this process: not for the ranks that it starts.
HIDDEN_PREFIXES = ("TORCHELASTIC_", "GROUP_", "ROLE_", "LOCAL_")
HIDDEN_NAMES = (
    "RANK",
    "WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "OMP_NUM_THREADS",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING",
)

Process = subprocess.Popen[bytes]


def run_ranks(job: Job, job_file: Path) -> dict[int, int]:
    """Runs all ranks of `job` to their end, or until one fails, which ends the others; none is left however this ends.

    Returns the exit codes of those that failed by themselves; negative: the signal that killed it.
    """
    with started_ranks(job, job_file) as processes:
        failed = wait_for_ranks(processes)
        # A rank that is killed loses its connections first: one that complains of that may have ended before it.
        return failed | stop_ranks(processes)


@contextlib.contextmanager
def started_ranks(job: Job, job_file: Path) -> Iterator[Sequence[Process]]:
    """A process for each rank, none of them left afterwards."""
    processes: list[Process] = []
    try:
        # Open from now on, so that no rank has to try again until rank 0, which serves it, has come so far.
        with socket.create_server((HOST, 0)) as store:
            for rank in range(job.placement.world_size):
                processes.append(start_rank(job, job_file, rank, store))
        yield processes
    finally:
        stop_ranks(processes)


def start_rank(job: Job, job_file: Path, rank: int, store: socket.socket) -> Process:
    """In a session of its own: what is typed at a terminal ends this process, which then ends the ranks."""
    environment = plain_environment() | rank_environment(rank, job.placement.world_size, store.getsockname()[1])
    environment[PARENT] = str(os.getpid())
    passed = []
    if rank == 0:
        passed = [store.fileno()]
        environment[STORE_SOCKET] = str(store.fileno())
    command = [sys.executable, "-m", "launcher.rank.worker", str(job_file)]
    return subprocess.Popen(command, env=environment, pass_fds=passed, start_new_session=True)


def plain_environment() -> dict[str, str]:
    """This process's variables but for those of a torchrun that started it."""
    return {k: v for k, v in os.environ.items() if k not in HIDDEN_NAMES and not k.startswith(HIDDEN_PREFIXES)}


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What torch.distributed reads; the last tells it that rank 0 does not open the store itself."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": HOST,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def wait_for_ranks(processes: Sequence[Process]) -> dict[int, int]:
    """Returns once all have ended, or one badly: the exit codes of those that did."""
    while True:
        codes = {rank: process.poll() for rank, process in enumerate(processes)}
        failed = {rank: code for rank, code in codes.items() if code}
        if failed or None not in codes.values():
            return failed
        time.sleep(POLL_SEC)


def stop_ranks(processes: Sequence[Process]) -> dict[int, int]:
    """Ends those that still run, with what they have started, and what those that ended badly have left.

    Returns the exit codes of those that had been killed meanwhile, and not by what others did.
    """
    running = {rank: process for rank, process in enumerate(processes) if process.poll() is None}
    for process in processes:
        if process.returncode:
            send(process, signal.SIGKILL)
    for process in running.values():
        send(process, signal.SIGTERM)
    end, killed = time.monotonic() + GRACE_SEC, {}
    for rank, process in running.items():
        try:
            code = process.wait(max(0.0, end - time.monotonic()))
            if code < 0 and code not in CONSEQUENCES:
                killed[rank] = code
        except subprocess.TimeoutExpired:
            send(process, signal.SIGKILL)
            process.wait()
    return killed


def send(process: Process, sig: signal.Signals) -> None:
    """To the process and all others of its session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, sig)
