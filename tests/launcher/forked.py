"""Runs of the command line in processes that are forked from one which has imported torch, as are their ranks.

They take a third of the work. Ranks are children of the launcher, in sessions of their own, which it starts, watches
and ends as it does any (launcher/processes/ranks.py); only that a program is executed is left out. Tests that start
real ones show that (test_run.py, test_signals.py, test_bad_input.py).
"""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace

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

    def send_signal(self, sig: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.process.pid, sig)

    def kill(self) -> None:
        """Its ranks die with it."""
        self.process.kill()


PR_SET_CHILD_SUBREAPER = 36
POLL_SEC = 0.01

started = partial(cli.started, launcher=ForkedProcess)
run = partial(cli.run, launcher=ForkedProcess)
run_together = partial(cli.run_together, launcher=ForkedProcess)


def run_command_line(
    args: tuple[str, ...], out: Path, err: Path, cwd: Path, env: dict[str, str], before: Callable[[], None] | None
) -> None:
    """What `python -m launcher` does, with ranks that are forked."""
    from launcher import __main__
    from launcher.processes import ranks
    from launcher.processes.start import end_process

    for number, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = ["launcher", *args]
    if before is not None:
        before()
    ranks.subprocess = SimpleNamespace(Popen=Nursery().start, TimeoutExpired=subprocess.TimeoutExpired)  # type: ignore
    end_process(__main__.run())


class ForkedRank:
    """A child of this process that it has not started itself; in the place of a subprocess.Popen."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None and (ended := os.waitpid(self.pid, os.WNOHANG))[0]:
            self.returncode = os.waitstatus_to_exitcode(ended[1])
        return self.returncode

    def wait(self, timeout: float = cli.LIMIT_SEC) -> int:
        end = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("a rank", timeout)
            time.sleep(POLL_SEC)
        return code


class Nursery:
    """Forks ranks for a parent that has threads by the time it wants them, and so should not fork itself."""

    def __init__(self) -> None:
        # Whose parent ends becomes a child of this process.
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
        self.connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        parent = os.getpid()
        if os.fork() == 0:
            self.connection.close()
            serve(theirs, parent)
        theirs.close()

    def start(
        self, command: Sequence[str], *, env: dict[str, str], pass_fds: Sequence[int], start_new_session: bool
    ) -> ForkedRank:
        assert command[1:3] == ["-m", "launcher.rank.worker"] and start_new_session
        # Few variables are not this process's own: all would be too long for a message.
        changed = {name: value for name, value in env.items() if os.environ.get(name) != value}
        hidden = [name for name in os.environ if name not in env]
        socket.send_fds(self.connection, [pickle.dumps((command[3], changed, hidden, pass_fds))], pass_fds)
        return ForkedRank(int(self.connection.recv(100)))


def serve(connection: socket.socket, parent: int) -> None:
    """Forks a rank for each request, and ends with its parent."""
    from launcher.processes.start import die_with_parent

    die_with_parent(signal.SIGKILL)
    while True:
        request, files, _, _ = socket.recv_fds(connection, 2**16, 4)
        if pid := os.fork():
            os.waitpid(pid, 0)
            for file in files:
                os.close(file)
        elif os.fork():
            os._exit(0)
        else:
            live_as_rank(connection, parent, request, files)


def live_as_rank(connection: socket.socket, parent: int, request: bytes, files: Sequence[int]) -> None:
    """What a new process would do: files as its parent numbers them, variables, and a session of its own."""
    from launcher.processes.start import end_process
    from launcher.rank import worker

    job_file, changed, hidden, numbers = pickle.loads(request)
    os.setsid()
    while os.getppid() != parent:
        time.sleep(POLL_SEC / 10)
    connection.send(b"%d" % os.getpid())
    # From here on: one of them may have the connection's number.
    for file, number in zip(files, numbers, strict=True):
        os.dup2(file, number)
    for name in hidden:
        del os.environ[name]
    os.environ.update(changed)
    end_process(worker.main(Path(job_file)))
