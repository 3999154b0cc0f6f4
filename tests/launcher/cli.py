"""Runs the command line as a user does, in processes of its own, and reads what it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil

PYTHON = (sys.executable, "-m", "launcher")
TORCHRUN = (str(Path(sys.executable).with_name("torchrun")), "-m", "launcher")
# A short run on any machine: ranks on the CPU, few tokens, communication hardly measured.
SHORT = ("hardware=cpu", "workload.output_tokens=8", "engine.comm_share_steps=1")
# Far above what a run takes on two busy cores, so that only one that hangs reaches it.
LIMIT_SEC = 120.0
POLL_SEC = 0.02
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")


def torchrun(num_processes: int) -> tuple[str, ...]:
    """The launcher in as many processes as there are ranks."""
    return (TORCHRUN[0], "--nproc-per-node", str(num_processes), *TORCHRUN[1:])


@dataclass(frozen=True)
class Result:
    """What a finished run left: its exit code and its output."""

    returncode: int
    stdout: str
    stderr: str

    @property
    def reports(self) -> list[dict[str, Any]]:
        """The JSON lines on stdout, one a job."""
        return [json.loads(line) for line in self.stdout.splitlines() if line.startswith('{"task"')]

    @property
    def report(self) -> dict[str, Any]:
        """The last line on stdout, whatever it is: scripts read no other."""
        lines = self.stdout.splitlines()
        assert lines, self.stderr
        report: dict[str, Any] = json.loads(lines[-1])
        return report

    @property
    def error(self) -> dict[str, Any]:
        """The error of a run that failed as it should: exit code 1, JSON last, the same message for people."""
        assert self.returncode == 1, self
        # Torchrun shows one of its own.
        assert "Traceback" not in self.stderr or "torchrun" in self.stderr, self.stderr
        error: dict[str, Any] = self.report["error"]
        assert error["message"] in self.stderr
        return error


def environment(env: dict[str, str] | None = None) -> dict[str, str]:
    """This process's variables without a trace of torchrun or of the hub, and with those of `env`."""
    hidden = ("TORCHELASTIC_", "HF_", "CUDA_VISIBLE_DEVICES")
    kept = {k: v for k, v in os.environ.items() if k not in RANK_VARIABLES and not k.startswith(hidden)}
    # Several runs share the cores: threads that spin while they wait keep others from their work.
    return kept | {"OMP_WAIT_POLICY": "passive"} | (env or {})


# (arguments, file for stdout, file for stderr, folder, environment) -> a subprocess.Popen, or what has its methods.
StartProcess = Callable[[Sequence[str], Path, Path, Path, dict[str, str]], Any]


@dataclass
class Running:
    """A run that goes on while the test looks at it."""

    process: Any
    folder: Path

    def processes(self) -> list[psutil.Process]:
        """Every live process of the run: its folder is in their command lines, or they write there. No zombies."""
        folder = str(self.folder)
        return [each for each in psutil.process_iter() if folder in " ".join(command_line(each)) + stdout(each)]

    def rank(self, rank: int) -> psutil.Process:
        """A rank that has begun to announce itself."""
        file = self.folder / "ranks" / f"{rank}.pid"
        wait_until(lambda: file.read_text() != "", f"a number in {file}")
        return psutil.Process(int(file.read_text()))

    def wait_for(self, path: str, text: str = "") -> None:
        """Returns when a file of the run folder is there and holds `text`."""
        wait_until(lambda: self.has(path, text), f"{text!r} in {self.folder / path}")

    def has(self, path: str, text: str = "") -> bool:
        """Whether a file of the run folder is there and holds `text`; the run must go on."""
        assert self.process.poll() is None, self.output("stderr") + self.output("stdout")
        file = self.folder / path
        return file.exists() and text in file.read_text(encoding="utf-8", errors="replace")

    def finish(self, timeout_sec: float = LIMIT_SEC) -> Result:
        returncode = self.process.wait(timeout_sec)
        return Result(returncode, self.output("stdout"), self.output("stderr"))

    def output(self, name: str) -> str:
        return Path(f"{self.folder}.{name}").read_text(encoding="utf-8")


def command_line(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


def stdout(process: psutil.Process) -> str:
    """The file that takes what a process prints: a forked one has the command line of another."""
    try:
        return str(Path(f"/proc/{process.pid}/fd/1").readlink())
    except OSError:
        return ""


def wait_until(
    is_true: Callable[[], bool], what: str, timeout_sec: float = LIMIT_SEC, *, poll_sec: float = POLL_SEC
) -> None:
    end = time.monotonic() + timeout_sec
    while not is_true():
        assert time.monotonic() < end, f"waited {timeout_sec} s in vain for {what}"
        time.sleep(poll_sec)


def start_program(
    program: Sequence[str],
    limits: Callable[[], None] | None,
    args: Sequence[str],
    out: Path,
    err: Path,
    cwd: Path,
    env: dict[str, str],
) -> subprocess.Popen[str]:
    with out.open("w") as stdout, err.open("w") as stderr:
        return subprocess.Popen(
            [*program, *args],
            stdout=stdout,
            stderr=stderr,
            stdin=subprocess.DEVNULL,
            text=True,
            cwd=cwd,
            env=env,
            start_new_session=True,
            preexec_fn=limits,
        )


@contextmanager
def started(
    *args: str,
    folder: Path,
    launcher: Sequence[str] | StartProcess = PYTHON,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
    limits: Callable[[], None] | None = None,
    sweep: bool = False,
) -> Iterator[Running]:
    """Starts a run in `folder` (of a job, or of a sweep); its output goes beside it. Nothing of it survives the test.

    Args:
        args: the command line; one that sets hydra.run.dir itself has its way.
        launcher: what comes before them, or what starts the process.
        limits: called in the new process before the program starts, for resource limits.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    place = f"hydra.{'sweep' if sweep else 'run'}.dir="
    places = [] if any(arg.startswith(place) for arg in args) else [f"{place}{folder}"]
    start = launcher if callable(launcher) else partial(start_program, launcher, limits)
    files = Path(f"{folder}.stdout"), Path(f"{folder}.stderr")
    process = start([*args, *places], *files, cwd or folder.parent, environment(env))
    running = Running(process, folder)
    try:
        yield running
    finally:
        process.kill()
        for left in running.processes():
            with suppress(psutil.NoSuchProcess):
                left.kill()
        process.wait(LIMIT_SEC)


def run(*args: str, folder: Path, **options: Any) -> Result:
    """Runs to the end; see `started`."""
    with started(*args, folder=folder, **options) as running:
        return running.finish()


def run_together(folder: Path, *commands: Sequence[str], **options: Any) -> list[Result]:
    """Runs several command lines at the same time, number N in `folder`/N."""
    with ExitStack() as stack:
        contexts = [started(*args, folder=folder / str(n), **options) for n, args in enumerate(commands)]
        return [running.finish() for running in [stack.enter_context(each) for each in contexts]]


def texts(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
