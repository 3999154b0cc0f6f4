"""What one rank does, from its job file to its results.

Run as `python -m launcher.rank.worker JOB` (launcher/processes/ranks.py), or called by a process that torchrun made a
rank.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.events import EventWriter
from launcher.failures import describe_exception, write_first_failure
from launcher.hardware import host
from launcher.job import Job, build_environment, load_job
from launcher.processes.ranks import PARENT, STORE_SOCKET
from launcher.processes.start import die_with_parent, end_process, rank_log
from launcher.rank.imports import begin_context, lean_imports
from launcher.whole_file import write_whole

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore


def main(job_file: Path) -> int:
    """A rank that is a process of its own: ends with its parent, writes its own log, returns the exit code."""
    die_with_parent(signal.SIGKILL)
    if has_lost_parent():
        return 1
    # A rank blocked in a collective cannot run Python's handler; the default action ends it at once.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    rank = int(os.environ["RANK"])
    log = rank_log(job_file.parent, rank)
    redirect_output(log)
    try:
        run_rank(load_job(job_file))
        return 0
    except Exception as error:
        traceback.print_exc()
        write_first_failure(job_file.parent, describe_exception(error, rank, str(log)))
        return 1


def has_lost_parent() -> bool:
    """Whether the parent ended before `die_with_parent` was called, which then does nothing."""
    return os.environ.pop(PARENT, str(os.getppid())) != str(os.getppid())


def redirect_output(log: Path) -> None:
    """Sends this process's stdout and stderr, those of C libraries too, to `log`."""
    with log.open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]


def run_rank(job: Job) -> None:
    """The life of a rank.

    1. environment, before torch is imported      4. self-test of the links
    2. its pid, for telemetry                      5. the task (model, cache, answers)
    3. device and process group                    6. its results, as ranks/RANK.json
    """
    os.environ.update(build_environment(job))
    run_dir, rank = Path(job.run_dir), int(os.environ["RANK"])
    (run_dir / "ranks").mkdir(exist_ok=True)
    (run_dir / "ranks" / f"{rank}.pid").write_text(str(os.getpid()))

    run = run_task if job.baseline is None else run_baseline
    results = run(job, rank, EventWriter(run_dir, rank=rank))
    results |= {"host_peak_bytes": host.peak_bytes()}
    write_whole(run_dir / "ranks" / f"{rank}.json", json.dumps(results))


def serve_store() -> TCPStore | None:
    """The store through which ranks find one another, on the socket that their parent has opened for it: to be held
    until they are done. None in ranks that were given none: all but the first, and those of a torchrun, which has one.
    """
    number = os.environ.pop(STORE_SOCKET, None)
    if number is None:
        return None
    from torch._C._distributed_c10d import TCPStore

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=int(number))


def run_task(job: Job, rank: int, events: EventWriter) -> dict[str, Any]:
    startup = {"rank_started_sec": job.elapsed_sec}
    card = job.placement.cards[rank]
    if card is not None:
        begin_context(card)
    with lean_imports():
        store = serve_store()
        from launcher.rank.context import joined_rank
        from launcher.tasks import TASKS

    startup["imported_sec"] = job.elapsed_sec
    with joined_rank(job, rank, events, startup) as context:
        results = TASKS[job.run.task.kind](context)
        context.communicator.barrier()
    del store
    return results


def run_baseline(job: Job, rank: int, events: EventWriter) -> dict[str, Any]:
    """Joins no process group of ours: a baseline makes its own."""
    store = serve_store()
    from launcher import baselines

    results = baselines.run_baseline(job, rank, events)
    del store
    return results


if __name__ == "__main__":
    end_process(main(Path(sys.argv[1])))
