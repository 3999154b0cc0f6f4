"""Starts the ranks of a job, waits for them, and tells why they ended.

Every rank is ended when one fails or a signal ends this process, and ranks die with it (`die_with_parent`), so nothing
stays running.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import NoReturn

from launcher.failures import ERROR_FILE, FULL_DISK_HINT, Failure, RunFailed, read_first_failure
from launcher.job import Job
from launcher.processes.ranks import run_ranks

# (job, its file) -> when all ranks have ended well.
StartRanks = Callable[[Job, Path], None]

FORWARDED_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
# Shells add the number of the signal that ended a process to this.
SIGNAL_EXIT_CODE = 128
PR_SET_PDEATHSIG = 1


def rank_log(run_dir: Path, rank: int) -> Path:
    return run_dir / "logs" / f"rank{rank}.log"


def prepare_run_dir(run_dir: Path) -> None:
    """Makes room for what ranks write, and removes what those of an earlier run in this folder left."""
    (run_dir / "logs").mkdir(exist_ok=True)
    for old in (run_dir / ERROR_FILE, *(run_dir / "ranks").glob("*")):
        old.unlink(missing_ok=True)


def die_with_parent(sig: signal.Signals) -> None:
    """Asks Linux to send `sig` to this process when its parent ends, however that ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, sig.value)


def catch_signals(signals: Iterable[signal.Signals], handler: Callable[[int, FrameType | None], object]) -> None:
    """Has `handler` called at these signals, but not at the end of a terminal under nohup: the run outlives that."""
    for sig in signals:
        if sig != signal.SIGHUP or signal.getsignal(sig) != signal.SIG_IGN:
            signal.signal(sig, handler)


def ignore_signals() -> None:
    """For a process that is ending: a second signal must not interrupt its clean-up nor hide the first cause."""
    for sig in FORWARDED_SIGNALS:
        signal.signal(sig, signal.SIG_IGN)


def end_process(exit_code: int) -> NoReturn:
    """Ends this process without waiting for torch's threads, in a rank and in its parent.

    Their destructors abort some ranks that did their work ("terminate called without an active exception", 1 of 36 on
    two busy cores, torch 2.13 with gloo).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def start_ranks(job: Job, job_file: Path) -> None:
    """Runs all ranks of `job` as child processes; returns when all have ended well.

    Raises:
        RunFailed: a rank failed or died, or a signal ended the run; every rank has been stopped.
    """
    failed = run_ranks(job, job_file)
    if failed:
        raise RunFailed(find_cause(job, failed))


def find_cause(job: Job, exit_codes: dict[int, int]) -> Failure:
    """Why a run ended, from the exit codes of the ranks that failed (negative: the signal that killed them).

    A rank that a signal killed could not say so, and its peers' complaints are consequences. SIGTERM is how torchrun
    stops the peers.
    """
    killed = {rank: code for rank, code in exit_codes.items() if code < 0 and code != -signal.SIGTERM}
    first = read_first_failure(Path(job.run_dir))
    if first is not None and not killed:
        return first
    rank, code = min((killed or exit_codes).items())
    return rank_death(job, rank, code)


def rank_death(job: Job, rank: int, exit_code: int | None) -> Failure:
    """A rank that ended without saying why; `exit_code` is None where only its parent knows it."""
    how = "died" if exit_code is None else f"exited with code {exit_code}"
    log = rank_log(Path(job.run_dir), rank)
    hint = "The end of its log may say more." if log.exists() else "It had no log yet; what it printed is above."
    if exit_code is not None and exit_code < 0:
        how = f"was killed by {signal.Signals(-exit_code).name}"
    if exit_code in (None, -signal.SIGKILL):
        hint = "If nobody killed it, the kernel did for want of host memory: see dmesg."
    elif exit_code == -signal.SIGBUS:
        hint = (
            "Memory that it mapped was not there: /dev/shm is full (docker run --shm-size 1g), or a file of the model "
            "was cut while it was read."
        )
    elif is_cut_short(Path(job.run_dir) / ERROR_FILE):
        hint = f"The rank could not write what failed, as on a full disk. {FULL_DISK_HINT}"
    card, name = job.placement.cards[rank], job.placement.names[rank]
    where = name if card is None else f"card {card}, {name}"
    message = f"rank {rank} ({where}) {how}; every rank was stopped. Log: {log}"
    return Failure("RankDied", message, hint, rank, str(log))


def is_cut_short(file: Path) -> bool:
    return file.is_file() and file.stat().st_size == 0


def interrupted(sig: int) -> Failure:
    return Failure("Interrupted", f"the run was ended by {signal.Signals(sig).name}; every rank was stopped.")
