"""When torchrun started this process: alone, it is the parent of the ranks; as one of several, it is a rank.

Rank 0 of several composes the run and publishes the path of its job file in torchrun's own store; the others wait for
it there. So Hydra runs once, and one run folder is made.
"""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.config import ConfigError
from launcher.job import Job
from launcher.start import die_with_parent

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore

JOB_KEY = "launch70b/job"
NO_JOB = "none"
# Rank 0 may download a model first.
WAIT_FOR_JOB = timedelta(hours=24)


def world_size() -> int | None:
    """Processes that torchrun started, None without torchrun."""
    value = os.environ.get("WORLD_SIZE")
    return int(value) if value else None


def is_rank() -> bool:
    return (world_size() or 1) > 1


def is_follower() -> bool:
    return is_rank() and os.environ.get("RANK") != "0"


def open_store() -> TCPStore:
    """Torchrun's store.

    Raises:
        ConfigError: the ranks are spread over machines.
    """
    from torch._C._distributed_c10d import TCPStore

    if os.environ.get("LOCAL_WORLD_SIZE") != os.environ["WORLD_SIZE"]:
        raise ConfigError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} spans machines; tensor parallelism here stays in one machine."
        )
    return TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=WAIT_FOR_JOB)


def run_as_rank(job: Job, job_file: Path) -> None:
    """Rank 0: tells the others, then is a rank in this process, and waits until all have written their results."""
    from launcher.worker import run_rank

    open_store().set(JOB_KEY, str(job_file))
    (job_file.parent / "logs").mkdir(exist_ok=True)
    run_rank(job)
    results = [Path(job.run_dir) / "ranks" / f"{rank}.json" for rank in range(job.plan.world_size)]
    while not all(path.exists() for path in results):
        time.sleep(0.01)


def release_followers() -> None:
    """Rank 0 at its end: those that still wait for a job get to know that none will come."""
    if is_rank() and not open_store().check([JOB_KEY]):
        open_store().set(JOB_KEY, NO_JOB)


def follow() -> int:
    """Every other rank: waits for the job and runs its part. Returns the exit code."""
    die_with_parent(signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    job_file = open_store().get(JOB_KEY).decode()
    if job_file == NO_JOB:
        return 0
    from launcher.worker import main

    return main(Path(job_file))
