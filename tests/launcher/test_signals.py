"""However a run is ended, nothing of it stays, and it says what ended it: every process, exit code and cause."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import psutil
import pytest
from omegaconf import OmegaConf

from tests.launcher.cli import (
    LIMIT_SEC,
    PYTHON,
    SHORT,
    TORCHRUN,
    Result,
    Running,
    StartProcess,
    command_line,
    started,
    torchrun,
    wait_until,
)
from tests.launcher.forked import ForkedProcess, run

# What torchrun says where it kills processes that it has asked to end, and how long it waits for them before: much
# longer than they take on a busy machine. Older versions wait for 30 s whatever is set.
FORCED, PATIENCE = "forcefully exiting", {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "90"}
SHM = Path("/dev/shm")
# Minutes of work even for one rank on a free machine, so that a run ends only because it is ended.
NUM_PROMPTS = 5000
ANSWERING = ("outputs.jsonl", "\n")
STARTING = ("ranks/1.pid", "")


@dataclass(frozen=True)
class Ending:
    """How a run is ended. `when`: a file of the run folder and what it must hold by then.

    Ranks and the launcher are forked but where torchrun is in it, or where ranks are to be caught importing torch.
    """

    end: Callable[[Running], None]
    launcher: Sequence[str] | StartProcess = ForkedProcess
    when: tuple[str, str] = ANSWERING
    args: tuple[str, ...] = ("gpus=2",)


@dataclass(frozen=True)
class Outcome:
    result: Result
    folder: Path
    # Of the whole group.
    shared_memory: set[Path]

    @property
    def error(self) -> dict[str, Any]:
        """The error in the last line on stdout, which is also what the run folder says."""
        assert self.result.returncode != 0
        report = self.result.report
        assert json.loads((self.folder / "report.json").read_text()) == report
        error: dict[str, Any] = report["error"]
        assert error["message"] in self.result.stderr
        return error


def send(sig: signal.Signals) -> Callable[[Running], None]:
    """To the process that the user started."""
    return lambda running: running.process.send_signal(sig)


def send_twice(sig: signal.Signals) -> Callable[[Running], None]:
    """A user who does not wait for the first to take effect."""

    def end(running: Running) -> None:
        running.process.send_signal(sig)
        time.sleep(0.03)
        running.process.send_signal(sig)

    return end


def kill_rank(rank: int) -> Callable[[Running], None]:
    return lambda running: running.rank(rank).kill()


def send_in_a_collective(sig: signal.Signals) -> Callable[[Running], None]:
    """Rank 0 waits for rank 1, which stands still, and cannot run a handler; rank 1 moves again three seconds later."""

    def end(running: Running) -> None:
        rank = running.rank(1)
        rank.suspend()
        time.sleep(0.5)
        running.process.send_signal(sig)
        time.sleep(3)
        rank.resume()

    return end


SIGINT, SIGTERM, SIGKILL = signal.SIGINT, signal.SIGTERM, signal.SIGKILL
ENDINGS = {
    "python, SIGINT twice": Ending(send_twice(SIGINT)),
    "python, rank 1 killed": Ending(kill_rank(1)),
    "python, killed": Ending(send(SIGKILL)),
    "sweep, SIGTERM": Ending(send(SIGTERM), when=("0/outputs.jsonl", "\n"), args=("-m", "gpus=1,2")),
    "python, SIGTERM while ranks start": Ending(send(SIGTERM), PYTHON, STARTING),
    "torchrun, SIGINT": Ending(send(SIGINT), TORCHRUN, args=("gpus=1",)),
    "torchrun, rank 0 killed": Ending(kill_rank(0), TORCHRUN),
    "torchrun, killed": Ending(send(SIGKILL), TORCHRUN, args=("gpus=1",)),
    "torchrun of two, SIGTERM": Ending(send_in_a_collective(SIGTERM), torchrun(2)),
    "torchrun of two, rank 1 killed": Ending(kill_rank(1), torchrun(2)),
    "torchrun of two, rank 1 killed at its start": Ending(kill_rank(1), torchrun(2), STARTING),
    "torchrun of two, killed": Ending(send(SIGKILL), torchrun(2)),
}
# So many at a time keep two cores busy and do not starve each other.
GROUP_SIZE = 4
GROUPS = [list(ENDINGS)[start : start + GROUP_SIZE] for start in range(0, len(ENDINGS), GROUP_SIZE)]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """Every ending, in groups that run at the same time."""
    return {}


@pytest.fixture
def ended(outcomes: dict[str, Outcome], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Outcome]:
    """The outcome of an ending; its whole group is run when the first of them is asked for."""

    def end(name: str) -> Outcome:
        if name not in outcomes:
            group = next(group for group in GROUPS if name in group)
            outcomes.update(end_group(group, tmp_path_factory.mktemp("signals")))
        return outcomes[name]

    return end


def end_group(names: list[str], folder: Path) -> dict[str, Outcome]:
    (folder / "prompts.txt").write_text("import os\n" * NUM_PROMPTS)
    shared_memory_before = shared_memory()
    with ExitStack() as stack:
        running = {}
        for number, name in enumerate(names):
            ending = ENDINGS[name]
            args = (*ending.args, *SHORT, f"prompts_file={folder / 'prompts.txt'}")
            place = {"folder": folder / str(number), "sweep": "-m" in args}
            running[name] = stack.enter_context(started(*args, launcher=ending.launcher, env=PATIENCE, **place))
        ends = end_runs(running)
    left = forgotten_since(shared_memory_before)
    return {name: Outcome(end, running[name].folder, left) for name, end in ends.items()}


def end_runs(running: dict[str, Running]) -> dict[str, Result]:
    """Ends each run as soon as it has come to its point; the result of each, of which no process is left."""
    going_on = dict(running)

    def have_all_come() -> bool:
        for name in [name for name, each in going_on.items() if each.has(*ENDINGS[name].when)]:
            ENDINGS[name].end(going_on.pop(name))
        return not going_on

    wait_until(have_all_come, f"the points at which {list(running)} are ended")
    results = {name: each.finish() for name, each in running.items()}
    for each in running.values():
        wait_until_gone(each)
    return results


def wait_until_gone(running: Running) -> None:
    end = time.monotonic() + LIMIT_SEC
    while left := running.processes():
        assert time.monotonic() < end, f"waited in vain for the end of {[command_line(each) for each in left]}"
        psutil.wait_procs(left, timeout=1)


def forgotten_since(before: set[Path]) -> set[Path]:
    """Shared memory that stays: what another test has there, or is just about to remove, goes."""
    left = shared_memory() - before
    end = time.monotonic() + LIMIT_SEC / 2
    while left and time.monotonic() < end:
        time.sleep(0.5)
        left &= shared_memory()
    return left


def shared_memory() -> set[Path]:
    """Files of shared memory that no process has mapped or open: what a run forgot."""
    if not SHM.is_dir():
        return set()
    files = set(SHM.rglob("*"))
    held = {Path(name) for process in psutil.process_iter() for name in files_of(process)}
    return {file for file in files - held if file.exists()}


def files_of(process: psutil.Process) -> set[str]:
    try:
        mapped = {each.path for each in process.memory_maps()}
        return mapped | {each.path for each in process.open_files()}
    except (psutil.Error, OSError):
        return set()


@pytest.mark.parametrize("name", ENDINGS)
def test_all_processes_of_the_run_end_by_themselves_and_the_exit_code_says_so(
    ended: Callable[[str], Outcome], name: str
) -> None:
    outcome = ended(name)
    assert FORCED not in outcome.result.stderr
    assert outcome.result.returncode != 0


@pytest.mark.parametrize("name", [name for name in ENDINGS if "SIG" in name and "sweep" not in name])
def test_signal_that_ended_the_run_is_named(ended: Callable[[str], Outcome], name: str) -> None:
    error = ended(name).error
    sig = "SIGTERM" if "SIGTERM" in name else "SIGINT"
    assert (error["type"], error["message"]) == ("Interrupted", f"the run was ended by {sig}; every rank was stopped.")


@pytest.mark.parametrize("name", [name for name in ENDINGS if "rank" in name and "SIG" not in name])
def test_rank_that_was_killed_is_named_with_its_card_and_its_log(ended: Callable[[str], Outcome], name: str) -> None:
    outcome = ended(name)
    rank = int(name.partition("rank ")[2][0])
    assert (outcome.error["type"], outcome.error["rank"]) == ("RankDied", rank)
    assert f"rank {rank} (CPU) " in outcome.error["message"]
    assert outcome.error["log"] == str(outcome.folder / "logs" / f"rank{rank}.log")
    assert outcome.error["log"] in outcome.error["message"]
    assert "start" in name or Path(outcome.error["log"]).exists()


@pytest.mark.parametrize("name", ["python, SIGINT twice", "python, SIGTERM while ranks start"])
def test_exit_code_is_that_of_a_shell(ended: Callable[[str], Outcome], name: str) -> None:
    assert ended(name).result.returncode == 128 + (SIGTERM if "SIGTERM" in name else SIGINT)


def test_sweep_does_not_go_on_after_a_signal(ended: Callable[[str], Outcome]) -> None:
    outcome = ended("sweep, SIGTERM")
    assert outcome.result.returncode == 128 + SIGTERM
    assert [report["error"]["type"] for report in outcome.result.reports] == ["Interrupted"]
    assert not (outcome.folder / "1").exists()


def test_sweep_that_a_signal_ended_leaves_its_table_and_no_plots(ended: Callable[[str], Outcome]) -> None:
    outcome = ended("sweep, SIGTERM")
    jobs = json.loads((outcome.folder / "sweep.json").read_text())["jobs"]
    assert [job["status"] for job in jobs] == ["failed", "not run"]
    assert jobs[0]["reason"].startswith("Interrupted: ")
    assert f"-m resume={outcome.folder}" in outcome.result.stderr
    assert not (outcome.folder / "plots").exists()


@pytest.mark.parametrize("name", [group[0] for group in GROUPS])
def test_no_shared_memory_is_left(ended: Callable[[str], Outcome], name: str) -> None:
    assert ended(name).shared_memory == set()


@pytest.mark.skipif(not SHM.is_dir(), reason="no shared memory here")
def test_shared_memory_counts_as_left_once_nobody_holds_it() -> None:
    segment = SharedMemory(create=True, size=16)
    path = SHM / segment.name
    try:
        assert path not in shared_memory()
        segment.close()
        assert path in shared_memory()
    finally:
        segment.unlink()


IGNORING = """
import os, signal, sys
signal.signal(signal.SIGHUP, signal.SIG_IGN)
from launcher.cli import handle_signals
handle_signals()
os.kill(os.getpid(), signal.SIGHUP)
print("goes on")
os.kill(os.getpid(), signal.SIGTERM)
"""


def test_run_under_nohup_outlives_its_terminal_and_ends_by_other_signals() -> None:
    result = subprocess.run([sys.executable, "-c", IGNORING], capture_output=True, text=True, timeout=LIMIT_SEC)
    assert result.stdout == "goes on\n"
    assert "RunFailed: the run was ended by SIGTERM" in result.stderr


def end_in_a_download() -> None:
    """By a signal that comes while the hub's client works."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def snapshot_download(name: str, *, local_files_only: bool = False, **options: Any) -> None:
        if local_files_only:
            raise LocalEntryNotFoundError(name)
        os.kill(os.getpid(), signal.SIGTERM)

    huggingface_hub.constants.HF_HUB_OFFLINE = False
    huggingface_hub.snapshot_download = snapshot_download


def end_in_a_config() -> None:
    """By a signal that comes while values are resolved."""
    OmegaConf.register_new_resolver("end", lambda: os.kill(os.getpid(), signal.SIGTERM))


@pytest.mark.parametrize(
    ("before", "setting"), [(end_in_a_download, "model.path=org/name"), (end_in_a_config, "model.path='${end:}'")]
)
def test_signal_is_no_error_of_what_it_interrupts(tmp_path: Path, before: Callable[[], None], setting: str) -> None:
    """Libraries make errors of their own of those that pass through them; the sweep would go on."""
    folder, launcher = tmp_path / "sweep", partial(ForkedProcess, before=before)
    result = run("-m", "gpus=1,2", "hardware=cpu", "model=local", setting, folder=folder,
                 sweep=True, launcher=launcher)  # fmt: skip
    assert result.returncode == 128 + signal.SIGTERM, result.stderr
    assert [report["error"]["type"] for report in result.reports] == ["Interrupted"]
    assert not (folder / "1").exists()
