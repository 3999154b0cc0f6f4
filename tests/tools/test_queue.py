"""The queue of runs: which cards a job gets, who is named where they are busy, and two queues on one machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pynvml as real
import pytest

from launcher.config import HardwareConfig, HardwareKind
from launcher.hardware.inventory import read_inventory
from tests.fakes.nvml import FakeNvml, two_rtx4090
from tools.cards import CardLock, CardState, lock_card, read_cards, take_cards
from tools.queue import Queue, check_cards, main, read_jobs

FACTS = HardwareConfig(kind=HardwareKind.facts, name="RTX 4090", memory_gib=24.0)
FOREIGN = "process 7 (python3) of alice, 20.00 GiB"

# Stands for the launcher: says which cards it sees, and runs until the folder holds `go`.
PROGRAM = """
import os, pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
name = sys.argv[2].partition("=")[2]
(folder / f"{name}.cards").write_text(os.environ["CUDA_VISIBLE_DEVICES"])
while not (folder / "go").exists():
    time.sleep(0.01)
print("done", name)
sys.exit(int(name == "bad"))
"""


def cards(num_cards: int, busy: Sequence[int] = ()) -> list[CardState]:
    named = (replace(card, uuid=f"GPU-{card.index}") for card in read_inventory(FACTS, num_cards).cards)
    return [CardState(card, (FOREIGN,) if card.index in busy else ()) for card in named]


@pytest.fixture
def locks(tmp_path: Path) -> Path:
    return tmp_path / "locks"


def make_queue(tmp_path: Path, text: str, states: Sequence[CardState], **options: Any) -> Queue:
    launcher = (sys.executable, "-c", PROGRAM, str(tmp_path))
    options = {"locks": tmp_path / "locks", "read_cards": lambda: states, "poll_sec": 0.01} | options
    return Queue(read_jobs(text), tmp_path / "out", launcher=launcher, **options)


def wait_for(paths: Sequence[Path]) -> list[str]:
    end = time.monotonic() + 60
    while not all(path.exists() and path.read_text() for path in paths):
        assert time.monotonic() < end, paths
        time.sleep(0.01)
    return [path.read_text() for path in paths]


# Cards


def test_first_free_cards_are_taken_and_others_holders_named(locks: Path) -> None:
    taken, held = take_cards(2, cards(4, busy=[1]), ["GPU-0"], locks)
    assert [card.index for card, _ in taken] == [2, 3]
    assert held == [f"card 1 (RTX 4090): {FOREIGN}"]


def test_too_few_cards_leave_none_locked(locks: Path) -> None:
    assert take_cards(3, cards(3, busy=[1]), [], locks)[0] == []
    assert len(take_cards(2, cards(3, busy=[1]), [], locks)[0]) == 2


def test_card_that_another_queue_has_is_not_free_until_it_is_released(locks: Path) -> None:
    program = (
        "import sys, pathlib, tools.cards as c; print(c.lock_card('GPU-1', pathlib.Path(sys.argv[1])), flush=True);"
        "sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(locks)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and "CardLock" in other.stdout.readline()
        taken, held = take_cards(2, cards(3), [], locks)
        assert [card.index for card, _ in taken] == [0, 2]
        user = psutil.Process().username()
        assert held == [f"card 1 (RTX 4090): a queue, process {other.pid} of {user}"]
        other.communicate("")
    assert isinstance(lock_card("GPU-1", locks), CardLock)


def test_lock_files_serve_every_user(locks: Path) -> None:
    before = os.umask(0o077)
    try:
        lock = lock_card("GPU-0", locks)
    finally:
        os.umask(before)
    assert isinstance(lock, CardLock)
    assert locks.stat().st_mode & 0o7777 == 0o1777
    assert (locks / "GPU-0.lock").stat().st_mode & 0o777 == 0o666


class BusyNvml(FakeNvml):
    """This test computes on the second card, and so does somebody in another container."""

    def nvmlDeviceGetComputeRunningProcesses(self, handle: Any) -> list[Any]:
        if handle is not self.cards[1]:
            return []
        mine = SimpleNamespace(pid=os.getpid(), usedGpuMemory=3 * 2**30)
        return [mine, SimpleNamespace(pid=2**22 + 1, usedGpuMemory=None)]


def test_processes_of_a_card_are_named_with_user_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    BusyNvml(two_rtx4090().cards, read=real.NVML_P2P_STATUS_NOT_SUPPORTED).install(monkeypatch)
    me = psutil.Process()
    assert [state.holders for state in read_cards()] == [
        (),
        (
            f"process {me.pid} ({me.name()}) of {me.username()}, 3.00 GiB",
            f"process {2**22 + 1} (not visible from here)",
        ),
    ]


# Jobs


def test_lines_are_command_lines_with_their_number_of_cards() -> None:
    jobs = read_jobs("# two\n\ngpus=2 prompt='a b' # why\n-m gpus=1,4 model=x\n")
    assert [(job.arguments, job.num_cards) for job in jobs] == [
        (("gpus=2", "prompt=a b"), 2),
        (("-m", "gpus=1,4", "model=x"), 4),
    ]


def test_open_quote_is_told_with_its_line() -> None:
    with pytest.raises(ValueError, match=r"line 2 cannot be read \(No closing quotation\): gpus=1 prompt='a"):
        read_jobs("gpus=1\ngpus=1 prompt='a\n")


@pytest.mark.parametrize(
    ("line", "word"), [("torchrun -m launcher gpus=2", "torchrun"), ("gpus=2 && gpus=1", "&&"), ("gpus=2 > log", ">")]
)
def test_command_of_a_shell_is_no_line(line: str, word: str) -> None:
    with pytest.raises(ValueError, match=rf"line 2: {word} is no setting. Write what comes after"):
        read_jobs(f"gpus=1 ~prompt --config-dir=x\n{line}")


@pytest.mark.parametrize("text", ["", "\n# gpus=1\n"])
def test_file_without_a_job_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="holds no job: write a launcher's command line"):
        read_jobs(text)


@pytest.mark.parametrize("line", ["model=x", "gpus=0", "gpus=two"])
def test_line_must_say_its_cards(line: str) -> None:
    with pytest.raises(ValueError, match=r"line 2 must say gpus=N"):
        read_jobs(f"gpus=1\n{line}")


def test_more_cards_than_there_are_never_come_free() -> None:
    check_cards(read_jobs("gpus=2"), 2)
    with pytest.raises(ValueError, match=r"job 0 \(gpus=4\) takes 4 cards, but CUDA shows 2 here"):
        check_cards(read_jobs("gpus=4"), 2)


def test_two_jobs_of_two_cards_share_four_and_the_next_waits(tmp_path: Path) -> None:
    queue = make_queue(tmp_path, "name=a gpus=2\nname=b gpus=2\nname=c gpus=1", cards(4))
    assert [queue.start_next() for _ in range(3)] == [True, True, False]
    assert wait_for([tmp_path / "a.cards", tmp_path / "b.cards"]) == ["GPU-0,GPU-1", "GPU-2,GPU-3"]
    (tmp_path / "go").touch()
    assert queue.run() == 0
    assert queue.exit_codes == {0: 0, 1: 0, 2: 0}
    assert (tmp_path / "out" / "2.out").read_text() == "done c\n"
    assert len(take_cards(4, cards(4), [], tmp_path / "locks")[0]) == 4


def test_job_waits_for_others_and_says_whose_process_it_is(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "go").touch()
    seen = [cards(2, busy=[1]), cards(2, busy=[1]), cards(2)]
    queue = make_queue(tmp_path, "name=a gpus=2", [], read_cards=lambda: seen.pop(0) if len(seen) > 1 else seen[0])
    assert queue.run() == 0
    words = capfd.readouterr().err
    assert words.count(f"job 0 (name=a gpus=2) waits for 2 of 2 cards. card 1 (RTX 4090): {FOREIGN}") == 1
    assert "starts on cards 0, 1" in words


def test_job_is_refused_where_others_hold_too_many(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "go").touch()
    states = cards(3, busy=[1])
    queue = make_queue(tmp_path, "name=a gpus=1\nname=b gpus=3\nname=c gpus=2", states, busy="refuse")
    assert queue.run() == 1
    # c waits for a, which is of this queue.
    assert queue.exit_codes == {0: 0, 1: None, 2: 0}
    assert f"job 1 (name=b gpus=3) refused: card 1 (RTX 4090): {FOREIGN}" in capfd.readouterr().err


def test_failed_job_stops_no_other_and_shows_in_the_exit_code(tmp_path: Path) -> None:
    (tmp_path / "go").touch()
    queue = make_queue(tmp_path, "name=bad gpus=1\nname=b gpus=1", cards(1))
    assert queue.run() == 1
    assert queue.exit_codes == {0: 1, 1: 0}


def test_job_keeps_its_cards_from_others_when_the_queue_is_gone(tmp_path: Path, locks: Path) -> None:
    queue = make_queue(tmp_path, "name=a gpus=1", cards(1))
    assert queue.start_next()
    wait_for([tmp_path / "a.cards"])
    (running,) = queue.running
    for _, lock in running.cards:
        lock.release()
    assert take_cards(1, cards(1), [], locks)[0] == []
    queue.stop()
    assert running.process.returncode == -signal.SIGTERM
    assert len(take_cards(1, cards(1), [], locks)[0]) == 1


def test_signal_ends_the_jobs_that_run_and_starts_no_other(tmp_path: Path) -> None:
    queue = make_queue(tmp_path, "name=a gpus=1\nname=b gpus=1", cards(1))
    assert queue.start_next()
    (running,) = queue.running
    queue.signal_number = int(signal.SIGTERM)
    assert queue.run() == 128 + signal.SIGTERM
    assert running.process.returncode == -signal.SIGTERM
    assert not (tmp_path / "b.cards").exists()


def test_without_cards_the_queue_refuses_to_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "jobs.txt").write_text("gpus=99")
    with pytest.raises(SystemExit) as caught:
        main([str(tmp_path / "jobs.txt")])
    assert caught.value.code == 2
    assert "takes 99 cards, but CUDA shows" in capsys.readouterr().err


def test_file_that_is_no_text_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "jobs.txt").write_bytes(b"gpus=1 prompt=\xff")
    with pytest.raises(SystemExit):
        main([str(tmp_path / "jobs.txt")])
    assert f"{tmp_path / 'jobs.txt'} is no text in UTF-8" in capsys.readouterr().err


def test_logs_of_another_queue_are_not_written_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tools.queue.read_cards", lambda: cards(1))
    monkeypatch.setattr("tools.queue.Queue.run", lambda queue: 0)
    (tmp_path / "jobs.txt").write_text("gpus=1")
    arguments = [str(tmp_path / "jobs.txt"), f"--out={tmp_path / 'out'}"]
    assert main(arguments) == 0
    with pytest.raises(SystemExit):
        main(arguments)
    assert f"--out {tmp_path / 'out'} has the logs of another queue" in capsys.readouterr().err
