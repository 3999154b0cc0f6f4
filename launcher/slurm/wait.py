"""Waits for the jobs of a sweep, and says of each what became of it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from launcher.config import RunConfig
from launcher.failures import Failure, RunFailed
from launcher.report.console import print_note
from launcher.report.outcome import REPORT, report_failure
from launcher.slurm.commands import ENDS, cancel, job_states

POLL_SEC = 2.0
# A shared disk shows what another machine wrote so much later.
DISK_SEC = 10.0
# For the answers of jobs that are cancelled; SLURM kills them meanwhile.
CANCEL_SEC = 60.0


@dataclass(frozen=True)
class SlurmJob:
    """One job of a sweep: its number there, its name in SLURM, its folder, and where SLURM puts what it prints."""

    number: int
    name: str
    run: RunConfig | None
    run_dir: Path
    log: Path

    @property
    def report(self) -> Path:
        return self.run_dir / REPORT


@dataclass
class Waiting:
    """Jobs that have not ended. `states` are those that were told last."""

    left: list[SlurmJob]
    states: dict[str, str] = field(default_factory=dict)

    def wait(self) -> None:
        """Returns when all jobs have ended. A signal that ends this process ends them, too.

        Raises:
            RunFailed: the signal.
        """
        try:
            self.poll(None)
        except RunFailed:
            self.cancel()
            raise

    def cancel(self) -> None:
        print_note(f"cancelled: SLURM jobs {', '.join(job.name for job in self.left)}")
        cancel([job.name for job in self.left])
        self.poll(time.monotonic() + CANCEL_SEC)

    def poll(self, end: float | None) -> None:
        """Until all have ended, or the clock is at `end`."""
        while self.left and (end is None or time.monotonic() < end):
            states = job_states([job.name for job in self.left])
            if states is not None:
                self.look_at(states)
            if self.left:
                time.sleep(POLL_SEC)

    def look_at(self, states: dict[str, str]) -> None:
        """The jobs that the controller has forgotten ended long ago."""
        for job in list(self.left):
            state = states.get(job.name, "forgotten")
            if state != self.states.get(job.name):
                print_note(f"job {job.number}: SLURM job {job.name} is {state}")
            self.states[job.name] = state
            if state in ENDS or state == "forgotten":
                self.left.remove(job)
                tell_end(job, state)


def tell_end(job: SlurmJob, state: str) -> None:
    """The job's report on stdout, as of a job that ran here; one that died without says so in its stead."""
    wait_for_file(job.report, DISK_SEC if state != "CANCELLED" else 0.0)
    if job.report.exists():
        print(job.report.read_text(encoding="utf-8").strip(), flush=True)
        return
    job.run_dir.mkdir(parents=True, exist_ok=True)
    message = f"SLURM job {job.name} ended as {state} without a report. Log: {job.log}"
    report_failure(Failure("SlurmJobFailed", message, HINTS.get(state, "")), job.run, job.run_dir)


HINTS = {
    "TIMEOUT": "Give it more time: hydra.launcher.timeout_min=MINUTES.",
    "OUT_OF_MEMORY": "Give it more host memory: hydra.launcher.mem_gb=GIB.",
}


def wait_for_file(path: Path, timeout_sec: float) -> None:
    end = time.monotonic() + timeout_sec
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.2)
