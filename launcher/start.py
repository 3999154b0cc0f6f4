"""Starts the ranks of a job through torch's elastic agent and waits for them.

The agent ends every rank when one fails. It forwards the signals that end this process, and ranks die with it
(`die_with_parent`), so nothing stays running.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn
from uuid import uuid4

from launcher.failures import ERROR_FILE, Failure, RunFailed, read_first_failure
from launcher.job import Job

if TYPE_CHECKING:
    from torch.distributed.launcher.api import LaunchConfig

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


def ignore_signals() -> None:
    """For a process that is ending: a second signal must not interrupt its clean-up nor hide the first cause."""
    for sig in FORWARDED_SIGNALS:
        signal.signal(sig, signal.SIG_IGN)


def end_process(exit_code: int) -> NoReturn:
    """Ends this process without waiting for torch's threads, in a rank and in its parent.

    Their destructors abort some ranks that did their work ("terminate called without an active exception", 1 of 36 on
    two busy cores, torch 2.13 with gloo), and the elastic agent can leave threads that never end when a signal ends it.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def start_ranks(job: Job, job_file: Path) -> None:
    """Runs all ranks of `job` as child processes; returns when all have ended well.

    Raises:
        RunFailed: a rank failed or died, or a signal ended the run; every rank has been stopped.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    prepare_run_dir(Path(job.run_dir))
    quieten_agent()
    with restored_signal_handlers(), plain_environment():
        try:
            elastic_launch(launch_config(job), sys.executable)("-m", "launcher.worker", str(job_file))
        except ChildFailedError as error:
            raise RunFailed(find_cause(job, {rank: f.exitcode for rank, f in error.failures.items()})) from None
        except SignalException as error:
            raise RunFailed(interrupted(error.sigval), SIGNAL_EXIT_CODE + error.sigval) from None


def launch_config(job: Job) -> LaunchConfig:
    """One machine, one attempt, a port that the OS chooses."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig

    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=job.placement.world_size,
        run_id=uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        # Ranks redirect their own output (one file each), so the agent keeps no logs.
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
    )


def quieten_agent() -> None:
    """The agent reports each step of a shutdown, through loggers with levels of their own; we say it in a sentence."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def find_cause(job: Job, exit_codes: dict[int, int]) -> Failure:
    """Why a run ended, from the exit codes of the ranks that failed (negative: the signal that killed them).

    A rank that a signal killed could not say so, and its peers' complaints are consequences. SIGTERM is how the agent
    itself stops the peers.
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
    hint = "The end of its log may say more."
    if exit_code is not None and exit_code < 0:
        how = f"was killed by {signal.Signals(-exit_code).name}"
    if exit_code in (None, -signal.SIGKILL):
        hint = "If nobody killed it, the kernel did for want of host memory: see dmesg."
    card, name = job.placement.cards[rank], job.placement.names[rank]
    where = name if card is None else f"card {card}, {name}"
    log = str(rank_log(Path(job.run_dir), rank))
    return Failure("RankDied", f"rank {rank} ({where}) {how}; every rank was stopped. Log: {log}", hint, rank, log)


def interrupted(sig: int) -> Failure:
    return Failure("Interrupted", f"the run was ended by {signal.Signals(sig).name}; every rank was stopped.")


@contextmanager
def restored_signal_handlers() -> Iterator[None]:
    """The agent installs handlers and leaves them; a sweep's next job must not inherit them."""
    before = {sig: signal.getsignal(sig) for sig in FORWARDED_SIGNALS}
    try:
        yield
    finally:
        for sig, handler in before.items():
            signal.signal(sig, handler)


@contextmanager
def plain_environment() -> Iterator[None]:
    """Hides the rank variables of a torchrun that started this process from the ranks that it starts."""
    prefixes = ("TORCHELASTIC_", "TORCH_NCCL_", "GROUP_", "ROLE_", "LOCAL_")
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
    hidden = {k: v for k, v in os.environ.items() if k in names or k.startswith(prefixes)}
    for name in hidden:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(hidden)
