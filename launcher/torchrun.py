"""When torchrun started this process: alone, it is the parent of the ranks; as one of several, it is a rank.

Rank 0 of several composes the run and publishes the path of its job file in torchrun's own store; the others wait for
it there. So Hydra runs once, and one run folder is made.
"""

from __future__ import annotations

import os
import signal
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.config import ConfigError
from launcher.failures import RunFailed, describe_exception, read_first_failure, write_first_failure
from launcher.job import Job
from launcher.outcome import report_failure
from launcher.start import FORWARDED_SIGNALS, die_with_parent, interrupted

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore

JOB_KEY = "launch70b/job"
NO_JOB = "none"
# Rank 0 may download a model first.
WAIT_FOR_JOB = timedelta(hours=24)
# A signal's handler has this long before the process ends without it.
GRACE_SEC = 2.0


def world_size() -> int | None:
    """Processes that torchrun started, None without torchrun."""
    value = os.environ.get("WORLD_SIZE")
    return int(value) if value else None


def follow_torchrun() -> None:
    """A process that torchrun started ends with it, in order if it is the parent of ranks."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent(signal.SIGTERM)


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
    """Rank 0: tells the others, then is a rank in this process, and waits until all have written their results.

    Raises:
        RunFailed: this rank failed; torchrun then ends the others.
    """
    from launcher.worker import run_rank

    run_dir = Path(job.run_dir)
    (run_dir / "logs").mkdir(exist_ok=True)
    end_if_blocked(lambda number: report_failure(interrupted(number), job.run, run_dir))
    open_store().set(JOB_KEY, str(job_file))
    try:
        run_rank(job)
    except RunFailed:
        raise
    except Exception as error:
        traceback.print_exc()
        failure = describe_exception(error, rank=0)
        first = write_first_failure(run_dir, failure)
        raise RunFailed(failure if first else read_first_failure(run_dir) or failure) from None
    results = [run_dir / "ranks" / f"{rank}.json" for rank in range(job.placement.world_size)]
    while not all(path.exists() for path in results):
        time.sleep(0.01)


def end_if_blocked(on_end: Callable[[int], object]) -> None:
    """Ends this process after a signal even where its main thread hangs in a collective.

    Python runs handlers in the main thread only, which then gets its chance for GRACE_SEC; the byte that the
    interpreter writes for each signal reaches this thread at once.
    """
    receiver, sender = os.pipe()
    os.set_blocking(sender, False)
    signal.set_wakeup_fd(sender, warn_on_full_buffer=False)

    def watch() -> None:
        while (number := os.read(receiver, 1)[0]) not in FORWARDED_SIGNALS:
            pass
        time.sleep(GRACE_SEC)
        on_end(number)
        os._exit(128 + number)

    threading.Thread(target=watch, name="signals", daemon=True).start()


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
