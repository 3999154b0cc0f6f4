"""What SLURM's own commands say and do about jobs."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence

# States that a job stays in; REQUEUED and COMPLETING, among others, pass.
ENDS = (
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT",
)  # fmt: skip
# The controller forgets jobs minutes after their end.
FORGOTTEN = "Invalid job id"
COMMAND_SEC = 60


def job_states(jobs: Sequence[str]) -> dict[str, str] | None:
    """State of each job (12, or 12_3 of an array) that the controller knows; None where it did not answer."""
    if not jobs:
        return {}
    words = ("--noheader", "--states=all", "--array", "--format=%i %T", f"--jobs={','.join(jobs)}")
    done = run("squeue", *words)
    if done is None or (done.returncode and FORGOTTEN not in done.stderr):
        return None
    rows = (line.split() for line in done.stdout.splitlines())
    return {row[0]: row[1] for row in rows if len(row) == 2}


def cancel(jobs: Sequence[str]) -> None:
    """Sends SIGTERM to all that runs in the jobs, and SIGKILL after the cluster's KillWait."""
    run("scancel", *jobs)


def requeue_if_out_of_time(max_restarts: int) -> bool:
    """Puts the job that this process is in back into the queue, unless it was cancelled or has been there too often."""
    job = os.environ["SLURM_JOB_ID"]
    if num_restarts() >= max_restarts or (job_states([job]) or {}).get(own_name()) != "RUNNING":
        return False
    done = run("scontrol", "requeue", job)
    return done is not None and done.returncode == 0


def own_name() -> str:
    """How squeue calls the job of this process."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array else os.environ["SLURM_JOB_ID"]


def num_restarts() -> int:
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def run(*command: str) -> subprocess.CompletedProcess[str] | None:
    """None where the command hangs or is missing."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_SEC, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return None
