"""Which other rank died, as rank 0 sees it where torchrun, which alone knows exit codes, says nothing to its ranks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from launcher.failures import Failure, read_first_failure
from launcher.job import Job
from launcher.processes.start import rank_death

GONE = ("gone",)
GONE_OR_ZOMBIE = (*GONE, psutil.STATUS_ZOMBIE)
# From the end of its connections to its end as a process; large ones take their time.
DYING_SEC = 10.0


def wait_for_dead_peer(job: Job) -> Failure | None:
    """The peer that closed its connection: it dies a moment later, unless it has said why it ends."""
    end = time.monotonic() + DYING_SEC
    while time.monotonic() < end and read_first_failure(Path(job.run_dir)) is None:
        dead = find_dead_peer(job, GONE_OR_ZOMBIE)
        if dead is not None:
            return dead
        time.sleep(0.01)
    return None


def find_dead_peer(job: Job, states: Sequence[str]) -> Failure | None:
    """The first other rank without results whose process is in one of `states`, as the failure of the run.

    A rank that ended before torchrun did anything is gone; one that torchrun is just ending remains a zombie until
    rank 0 has ended too, for torchrun waits for its processes in their order.
    """
    folder = Path(job.run_dir) / "ranks"
    for rank in range(1, job.placement.world_size):
        pid_file = folder / f"{rank}.pid"
        if pid_file.exists() and not (folder / f"{rank}.json").exists() and process_state(pid_file) in states:
            return rank_death(job, rank, None)
    return None


def process_state(pid_file: Path) -> str:
    """A process's state as the system tells it, or "gone"."""
    try:
        return psutil.Process(int(pid_file.read_text())).status()
    except psutil.NoSuchProcess:
        return GONE[0]
    except ValueError:
        # The file was just created.
        return psutil.STATUS_RUNNING
