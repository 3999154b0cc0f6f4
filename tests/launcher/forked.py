"""Runs of the command line in processes that are forked from one which has imported torch, as are their ranks.

They take a third of the work, so they are for tests of what a run says and reports. How processes of a user's own
command line start and end is shown by tests that start some (test_run.py, test_signals.py, test_bad_input.py).
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

from launcher.job import Job
from tests.launcher import cli
from tools.local_ranks import fork_server


class ForkedProcess:
    """The launcher as a child of the fork server; in the place of a subprocess.Popen.

    `before`: a function of a module, called in it and so known to its ranks, before anything else.
    """

    def __init__(
        self,
        args: Sequence[str],
        out: Path,
        err: Path,
        cwd: Path,
        env: dict[str, str],
        *,
        before: Callable[[], None] | None = None,
    ) -> None:
        self.process = fork_server().Process(target=run_command_line, args=(tuple(args), out, err, cwd, env, before))
        self.process.start()

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout_sec: float) -> int:
        self.process.join(timeout_sec)
        if self.process.exitcode is None:
            raise TimeoutError(f"the run has not ended within {timeout_sec:g} s.")
        return self.process.exitcode

    def kill(self) -> None:
        """Its ranks die with it."""
        self.process.kill()


started = partial(cli.started, launcher=ForkedProcess)
run = partial(cli.run, launcher=ForkedProcess)
run_together = partial(cli.run_together, launcher=ForkedProcess)


def run_command_line(
    args: tuple[str, ...], out: Path, err: Path, cwd: Path, env: dict[str, str], before: Callable[[], None] | None
) -> None:
    """What `python -m launcher` does, with ranks that are forked."""
    from launcher import __main__
    from launcher import cli as command_line
    from launcher.processes.start import end_process

    for number, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = ["launcher", *args]
    if before is not None:
        before()
    command_line.start_ranks = Nursery().start_ranks
    end_process(__main__.run())


class Nursery:
    """Forks ranks for a parent that has threads by the time it wants them, and so should not fork itself."""

    def __init__(self) -> None:
        self.connection, theirs = Pipe()
        if os.fork() == 0:
            serve(theirs)

    def start_ranks(self, job: Job, job_file: Path) -> None:
        """What launcher.processes.start.start_ranks does; the store through which ranks find one another is here."""
        from torch.distributed import TCPStore

        from launcher.failures import RunFailed
        from launcher.processes.start import find_cause

        store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        self.connection.send((job_file, job.placement.world_size, store.port))
        exit_codes = self.connection.recv()
        if any(exit_codes.values()):
            raise RunFailed(find_cause(job, {rank: code for rank, code in exit_codes.items() if code}))


def serve(connection: Connection) -> None:
    """Starts ranks for each job that it is told of, and tells their exit codes; ends with its parent."""
    from launcher.processes.start import die_with_parent

    die_with_parent(signal.SIGKILL)
    while True:
        job_file, world_size, port = connection.recv()
        ranks = {fork_rank(job_file, rank, world_size, port): rank for rank in range(world_size)}
        connection.send(wait_for(ranks))


def fork_rank(job_file: Path, rank: int, world_size: int, port: int) -> int:
    """The process id of a rank, with the variables that torchrun gives it."""
    from launcher.processes.start import end_process
    from launcher.rank import worker

    if pid := os.fork():
        return pid
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in numbers.items()})
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    os.environ.update(TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0")
    return end_process(worker.main(job_file))


def wait_for(ranks: dict[int, int]) -> dict[int, int]:
    """Exit code of each rank; where one fails, the others are ended."""
    exit_codes: dict[int, int] = {}
    while len(exit_codes) < len(ranks):
        pid, status = os.wait()
        exit_codes[ranks[pid]] = os.waitstatus_to_exitcode(status)
        if status:
            for other, rank in ranks.items():
                if rank not in exit_codes:
                    os.kill(other, signal.SIGTERM)
    return exit_codes
