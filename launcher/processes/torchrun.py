"""When torchrun started this process: alone, it is the parent of the ranks; as one of several, it is a rank.

Rank 0 of several composes the run and publishes the path of its job file in torchrun's own store; the others wait for
it there. So Hydra runs once, and one run folder is made.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.config import ConfigError
from launcher.failures import (
    Failure,
    RunFailed,
    describe_exception,
    is_lost_connection,
    read_first_failure,
    write_first_failure,
)
from launcher.job import Job
from launcher.processes.peers import GONE, find_dead_peer, wait_for_dead_peer
from launcher.processes.start import (
    FORWARDED_SIGNALS,
    SIGNAL_EXIT_CODE,
    die_with_parent,
    ignore_signals,
    interrupted,
    rank_log,
)
from launcher.report.outcome import report_failure

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore

JOB_KEY = "launch70b/job"
NO_JOB = "none"
# Rank 0 may download a model first.
WAIT_FOR_JOB = timedelta(hours=24)
# Torchrun's store is in this machine and answers at once.
STORE_TIMEOUT = timedelta(seconds=5)
# A signal's handler has this long before the process ends without it.
GRACE_SEC = 2.0


def world_size() -> int | None:
    """The number of processes that WORLD_SIZE tells, None where it is not set.

    Raises:
        ConfigError: it is no number.
    """
    value = os.environ.get("WORLD_SIZE")
    if value and not value.isdecimal():
        raise ConfigError(f"WORLD_SIZE={value} must be a whole number. Unset it; torchrun sets it where it is needed.")
    return int(value) if value else None


def started_by_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def check_environment() -> None:
    """Whether the variables of this process describe a start that works.

    Raises:
        ConfigError: WORLD_SIZE without torchrun, or ranks that are spread over machines.
    """
    num_processes = world_size() or 1
    if num_processes > 1 and not started_by_torchrun():
        raise ConfigError(
            f"WORLD_SIZE={num_processes} is set, but torchrun did not start this process. Unset it, or use "
            f"`torchrun --nproc-per-node {num_processes} -m launcher`."
        )
    if is_rank() and os.environ["LOCAL_WORLD_SIZE"] != os.environ["WORLD_SIZE"]:
        raise ConfigError(
            f"WORLD_SIZE={num_processes} spans machines; tensor parallelism here stays in one machine. "
            "Use torchrun --nnodes 1."
        )


def follow_torchrun() -> None:
    """A process that torchrun started ends with it, in order if it is the parent of ranks."""
    if started_by_torchrun():
        die_with_parent(signal.SIGTERM)


def is_rank() -> bool:
    return started_by_torchrun() and (world_size() or 1) > 1


def is_follower() -> bool:
    return is_rank() and os.environ.get("RANK") != "0"


def open_store(timeout: timedelta) -> TCPStore:
    """Torchrun's store."""
    from torch._C._distributed_c10d import TCPStore

    return TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timeout)


def run_as_rank(job: Job, job_file: Path) -> None:
    """Rank 0: tells the others, then is a rank in this process, and waits until all have written their results.

    Raises:
        RunFailed: a rank failed or died, or a signal ended this one; torchrun then ends the others.
    """
    run_dir, torchrun_pid = Path(job.run_dir), os.getppid()

    def find_cause(failure: Failure) -> Failure:
        """Torchrun ends all ranks when one has failed; a signal that comes from elsewhere is a cause itself."""
        dead = find_dead_peer(job, GONE) if os.getppid() == torchrun_pid else None
        return read_first_failure(run_dir) or dead or failure

    stdout = sys.stdout

    def report_signal(number: int) -> None:
        # The main thread, which hangs, may have sent stdout to its log.
        with contextlib.redirect_stdout(stdout):
            report_failure(find_cause(interrupted(number)), job.run, run_dir)

    end_if_blocked(report_signal)
    open_store(STORE_TIMEOUT).set(JOB_KEY, str(job_file))
    try:
        lead_ranks(job)
    except RunFailed as error:
        # Torchrun's, which hears of a failed rank about now.
        ignore_signals()
        raise RunFailed(find_cause(error.failure), error.exit_code) from None


def lead_ranks(job: Job) -> None:
    """Rank 0's own part, its errors and what libraries print recorded as those of every rank are.

    Raises:
        RunFailed: this rank failed, or a signal ended it.
    """
    from launcher.rank.worker import run_rank

    run_dir = Path(job.run_dir)
    log = rank_log(run_dir, 0)
    try:
        with log.open("a", buffering=1) as file, contextlib.redirect_stdout(file):
            run_rank(job)
    except RunFailed:
        raise
    except Exception as error:
        with contextlib.suppress(OSError), log.open("a") as file:
            traceback.print_exc(file=file)
        dead = wait_for_dead_peer(job) if is_lost_connection(error) else None
        failure = dead or describe_exception(error, 0, str(log))
        write_first_failure(run_dir, failure)
        raise RunFailed(read_first_failure(run_dir) or failure) from None
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
        os._exit(SIGNAL_EXIT_CODE + number)

    threading.Thread(target=watch, name="signals", daemon=True).start()


def release_followers() -> None:
    """Rank 0 at its end: those that still wait for a job get to know that none will come."""
    if not is_rank():
        return
    # RuntimeError: torchrun has ended, and its processes end with it.
    with contextlib.suppress(RuntimeError):
        store = open_store(STORE_TIMEOUT)
        if not store.check([JOB_KEY]):
            store.set(JOB_KEY, NO_JOB)


def follow() -> int:
    """Every other rank: waits for the job and runs its part. Returns the exit code."""
    die_with_parent(signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    job_file = open_store(WAIT_FOR_JOB).get(JOB_KEY).decode()
    if job_file == NO_JOB:
        return 0
    from launcher.rank.worker import main

    return main(Path(job_file))
