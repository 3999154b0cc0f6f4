"""What decides how ranks start and how their end is told: environment, run folder, causes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import psutil
import pytest
from torch.distributed import HashStore

from launcher.cli import handle_signals
from launcher.config import ConfigError, PeerAccess
from launcher.failures import ERROR_FILE, Failure, RunFailed, read_first_failure, write_first_failure
from launcher.job import Job, build_environment, load_job, save_job
from launcher.processes import ranks as rank_processes
from launcher.processes import torchrun
from launcher.processes.peers import GONE, GONE_OR_ZOMBIE, find_dead_peer, wait_for_dead_peer
from launcher.processes.ranks import plain_environment, run_ranks
from launcher.processes.start import FORWARDED_SIGNALS, find_cause, interrupted, prepare_run_dir
from launcher.prompts import Prompt
from tests.launcher.cli import wait_until
from tests.launcher.jobs import make_job, make_run

# In place of launcher/rank/worker.py.
RANK = """
import json, os, pathlib, signal, socket, subprocess, sys, time
rank, folder = int(os.environ["RANK"]), pathlib.Path(sys.argv[1]).parent
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
(folder / f"{rank}.env").write_text(json.dumps({name: os.environ[name] for name in names}))
number, port = os.environ.get("LAUNCH70B_STORE_SOCKET"), int(os.environ["MASTER_PORT"])
if number is not None:
    time.sleep(0.2)
    connection, _ = socket.socket(fileno=int(number)).accept()
    connection.sendall(b"here")
else:
    with socket.create_connection((os.environ["MASTER_ADDR"], port), timeout=60) as connection:
        (folder / f"{rank}.heard").write_bytes(connection.recv(4))
"""
COMPLAINT = Failure("RuntimeError", "Connection closed by peer", rank=0)


# The cause


@pytest.mark.parametrize("exit_codes", [{1: -9}, {0: 1, 1: -9}, {1: -11, 0: 1}])
def test_killed_rank_is_the_cause_whatever_its_peers_complain_of(tmp_path: Path, exit_codes: dict[int, int]) -> None:
    write_first_failure(tmp_path, COMPLAINT)
    failure = find_cause(make_job(tmp_path, cards=True), exit_codes)
    name = signal.Signals(-exit_codes[1]).name
    assert (failure.type, failure.rank) == ("RankDied", 1)
    assert f"rank 1 (card 2, NVIDIA GeForce RTX 4090) was killed by {name}" in failure.message
    assert failure.log == str(tmp_path / "logs" / "rank1.log")
    assert failure.log in failure.message


def test_rank_killed_for_want_of_memory_gets_that_hint(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    assert "host memory" in find_cause(job, {0: -signal.SIGKILL}).hint
    assert "host memory" not in find_cause(job, {0: -signal.SIGSEGV}).hint


def test_rank_that_could_not_write_its_failure_gets_the_hint_of_a_full_disk(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    assert "space" not in find_cause(job, {0: 1}).hint
    (tmp_path / ERROR_FILE).touch()
    assert "Free some space" in find_cause(job, {0: 1}).hint
    assert "host memory" in find_cause(job, {0: -signal.SIGKILL}).hint


def test_rank_that_lost_mapped_memory_is_told_where_it_may_be_short(tmp_path: Path) -> None:
    found = find_cause(make_job(tmp_path), {1: -signal.SIGBUS})
    assert "was killed by SIGBUS" in found.message and "--shm-size 1g" in found.hint


def test_rank_that_told_its_failure_is_the_cause(tmp_path: Path) -> None:
    told = Failure("CheckpointError", "bad file", "hint", 1, "log")
    write_first_failure(tmp_path, told)
    assert find_cause(make_job(tmp_path), {0: 1, 1: 1}) == told


def test_sigterm_is_how_torchrun_stops_peers_and_no_cause(tmp_path: Path) -> None:
    told = Failure("CheckpointError", "bad file", rank=1)
    write_first_failure(tmp_path, told)
    assert find_cause(make_job(tmp_path), {0: -signal.SIGTERM, 1: 1}) == told


def test_rank_that_ended_without_a_word_is_named_with_its_exit_code(tmp_path: Path) -> None:
    failure = find_cause(make_job(tmp_path), {2: 1, 1: 7})
    assert failure.message.startswith("rank 1 (CPU) exited with code 7; every rank was stopped. Log: ")
    assert failure.hint == "It had no log yet; what it printed is above."
    prepare_run_dir(tmp_path)
    (tmp_path / "logs" / "rank1.log").write_text("")
    assert find_cause(make_job(tmp_path), {1: 7}).hint == "The end of its log may say more."


def test_signal_that_ended_the_run_is_named() -> None:
    assert interrupted(signal.SIGHUP).message == "the run was ended by SIGHUP; every rank was stopped."


# Peers, as a rank of torchrun's sees them


@contextmanager
def restored_signal_handlers() -> Iterator[None]:
    before = {sig: signal.getsignal(sig) for sig in FORWARDED_SIGNALS}
    try:
        yield
    finally:
        for sig, handler in before.items():
            signal.signal(sig, handler)


def dead_process(run_dir: Path, rank: int) -> subprocess.Popen[bytes]:
    """A process that was killed and not waited for, announced as a rank."""
    (run_dir / "ranks").mkdir(exist_ok=True)
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (run_dir / "ranks" / f"{rank}.pid").write_text(str(process.pid))
    process.kill()
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    return process


def test_dead_peer_is_found_and_named(tmp_path: Path) -> None:
    job = make_job(tmp_path, world_size=3)
    assert find_dead_peer(job, GONE_OR_ZOMBIE) is None
    (tmp_path / "ranks").mkdir()
    (tmp_path / "ranks" / "1.pid").write_text(str(os.getpid()))
    process = dead_process(tmp_path, 2)
    failure = wait_for_dead_peer(job)
    assert failure is not None and failure.rank == 2
    assert "rank 2 (CPU) died; every rank was stopped. Log: " in failure.message
    assert find_dead_peer(job, GONE) is None
    process.wait()
    assert find_dead_peer(job, GONE) == failure


def test_peer_with_results_or_with_an_unfinished_pid_file_is_not_dead(tmp_path: Path) -> None:
    job = make_job(tmp_path, world_size=3)
    dead_process(tmp_path, 1).wait()
    (tmp_path / "ranks" / "1.json").write_text("{}")
    (tmp_path / "ranks" / "2.pid").write_text("")
    assert find_dead_peer(job, GONE_OR_ZOMBIE) is None


def test_signal_of_torchrun_does_not_hide_the_failure_it_follows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torchrun ends rank 0 because of rank 1's failure, just while rank 0 looks for what broke its connection."""
    told = Failure("CheckpointError", "bad file", rank=1)

    def lead_ranks(job: Job) -> None:
        raise RunFailed(COMPLAINT)

    def read_first(run_dir: Path) -> Failure:
        os.kill(os.getpid(), signal.SIGTERM)
        return told

    monkeypatch.setattr(torchrun, "lead_ranks", lead_ranks)
    monkeypatch.setattr(torchrun, "read_first_failure", read_first)
    monkeypatch.setattr(torchrun, "open_store", lambda timeout: HashStore())
    monkeypatch.setattr(torchrun, "end_if_blocked", lambda on_end: None)
    with restored_signal_handlers():
        handle_signals()
        with pytest.raises(RunFailed) as caught:
            torchrun.run_as_rank(make_job(tmp_path), tmp_path / "job.json")
    assert caught.value.failure == told


def test_peer_that_told_its_failure_is_not_waited_for(tmp_path: Path) -> None:
    write_first_failure(tmp_path, COMPLAINT)
    dead_process(tmp_path, 1).wait()
    assert wait_for_dead_peer(make_job(tmp_path)) is None


# Their processes


def write_rank(folder: Path, monkeypatch: pytest.MonkeyPatch, then: str = "") -> Path:
    """The package of a launcher whose ranks do this; the file of their job."""
    package = folder / "launcher" / "rank"
    package.mkdir(parents=True)
    for file in (package.parent / "__init__.py", package / "__init__.py"):
        file.touch()
    (package / "worker.py").write_text(RANK + then)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return folder / "job.json"


def test_ranks_know_their_places_and_find_the_first_before_it_listens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_file = write_rank(tmp_path, monkeypatch)
    assert run_ranks(make_job(tmp_path), job_file) == {}
    environments = [json.loads((tmp_path / f"{rank}.env").read_text()) for rank in range(2)]
    port = environments[0]["MASTER_PORT"]
    for rank, environment in enumerate(environments):
        assert environment == {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
    assert (tmp_path / "1.heard").read_bytes() == b"here"


FAIL_ONE = """
if rank == 1:
    sys.exit(7)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
(folder / "0.partial").write_text(f"{os.getpid()} {subprocess.Popen(['sleep', '600']).pid}")
(folder / "0.partial").rename(folder / "0.pid")
time.sleep(600)
"""


def wait_until_ended(pid: int) -> None:
    """A process that was killed goes a moment later, and one that nobody waits for stays as a zombie."""

    def has_ended() -> bool:
        try:
            return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    wait_until(has_ended, f"the end of process {pid}")


def test_rank_that_fails_ends_the_others_with_all_they_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 does not end when it is asked to."""
    monkeypatch.setattr(rank_processes, "GRACE_SEC", 0.3)
    # Rank 1 leaves only once rank 0 is deaf.
    wait = "\nwhile rank == 1 and not (folder / '0.pid').exists():\n    time.sleep(0.01)\n"
    job_file = write_rank(tmp_path, monkeypatch, wait + FAIL_ONE)
    assert run_ranks(make_job(tmp_path), job_file) == {1: 7}
    for pid in (tmp_path / "0.pid").read_text().split():
        wait_until_ended(int(pid))


COMPLAIN_FIRST = """
def die(*_):
    os.kill(os.getpid(), {sig})
signal.signal(signal.SIGTERM, die)
(folder / f"{{rank}}.pid").write_text("")
while rank or not (folder / "1.pid").exists():
    time.sleep(0.01)
sys.exit(1)
"""


@pytest.mark.parametrize(
    ("sig", "told"), [(signal.SIGKILL, {0: 1, 1: -signal.SIGKILL}), (signal.SIGABRT, {0: 1})], ids=["killed", "aborted"]
)
def test_rank_that_was_dying_when_another_complained_of_it_is_told(
    sig: signal.Signals, told: dict[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1, which a signal kills, ends after rank 0, which lost its connection; what loses a peer aborts."""
    job_file = write_rank(tmp_path, monkeypatch, COMPLAIN_FIRST.format(sig=int(sig)))
    assert run_ranks(make_job(tmp_path), job_file) == told


LEAVE_ONE = """
(folder / "0.pid").write_text(str(subprocess.Popen(["sleep", "600"]).pid))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_rank_has_started_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job_file = write_rank(tmp_path, monkeypatch, "\nif rank:\n    time.sleep(600)" + LEAVE_ONE)
    assert run_ranks(make_job(tmp_path), job_file) == {0: -signal.SIGKILL}
    wait_until_ended(int((tmp_path / "0.pid").read_text()))


def test_rank_whose_parent_was_gone_before_it_began_does_nothing(tmp_path: Path) -> None:
    """Linux tells only ranks that have asked by then."""
    (tmp_path / "logs").mkdir()
    environment = {**os.environ, "RANK": "0", rank_processes.PARENT: str(os.getpid() + 1)}
    command = [sys.executable, "-m", "launcher.rank.worker", str(tmp_path / "job.json")]
    assert subprocess.run(command, env=environment, check=False, timeout=60).returncode == 1
    assert list((tmp_path / "logs").iterdir()) == []


def test_whatever_ends_the_wait_ends_the_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job_file = write_rank(
        tmp_path, monkeypatch, "\n(folder / f'{rank}.pid').write_text(str(os.getpid()))\ntime.sleep(600)"
    )

    def interrupt(processes: Sequence[subprocess.Popen[bytes]]) -> NoReturn:
        while len(list(tmp_path.glob("*.pid"))) < 2:
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(rank_processes, "wait_for_ranks", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_ranks(make_job(tmp_path), job_file)
    assert not any(psutil.pid_exists(int(path.read_text())) for path in tmp_path.glob("*.pid"))


# The run folder


def test_what_an_earlier_run_left_is_removed(tmp_path: Path) -> None:
    write_first_failure(tmp_path, COMPLAINT)
    (tmp_path / "ranks").mkdir()
    (tmp_path / "ranks" / "1.json").write_text("{}")
    (tmp_path / "ranks" / "3.pid").write_text("1")
    prepare_run_dir(tmp_path)
    assert read_first_failure(tmp_path) is None
    assert list((tmp_path / "ranks").iterdir()) == []
    assert (tmp_path / "logs").is_dir()


def test_job_file_holds_the_whole_job(tmp_path: Path) -> None:
    run = make_run(gpus=2, prompts_file="p.jsonl")
    job = make_job(tmp_path, cards=True, run=run)
    with_prompts = type(job)(
        **{**vars(job), "prompts": (Prompt(3, messages=({"role": "user", "content": "é\u2028"},)),)}
    )
    path = save_job(with_prompts)
    assert path == tmp_path / "job.json"
    assert load_job(path) == with_prompts


# Environment


def test_ranks_on_the_cpu_see_no_card(tmp_path: Path) -> None:
    assert build_environment(make_job(tmp_path, world_size=3)) == {
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "5",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
    }


def test_ranks_on_cards_see_those_the_user_shows(tmp_path: Path) -> None:
    assert build_environment(make_job(tmp_path, cards=True)) == {
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "8",
        "DS_ACCELERATOR": "cuda",
        "CUDA_DEVICE_MAX_CONNECTIONS": "32",
    }


def test_peer_access_off_reaches_nccl(tmp_path: Path) -> None:
    run = make_run(PeerAccess.off)
    plain = build_environment(make_job(tmp_path, cards=True))
    assert build_environment(make_job(tmp_path, cards=True, run=run)) == plain | {"NCCL_P2P_DISABLE": "1"}


def test_torchruns_variables_are_hidden_from_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    torchruns = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT",
                 "TORCHELASTIC_RUN_ID", "TORCH_NCCL_ASYNC_ERROR_HANDLING", "OMP_NUM_THREADS")  # fmt: skip
    for name in torchruns:
        monkeypatch.setenv(name, "7")
    of_user = {"MY_RANK": "3", "NCCL_DEBUG": "INFO", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1", "CUDA_VISIBLE_DEVICES": "1,0"}
    for name, value in of_user.items():
        monkeypatch.setenv(name, value)
    environment = plain_environment()
    assert not set(torchruns) & set(environment)
    assert of_user.items() <= environment.items()


def set_torchrun(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("variables", "rank", "follower"),
    [
        ({}, False, False),
        ({"WORLD_SIZE": "1", "RANK": "0", "TORCHELASTIC_RUN_ID": "x"}, False, False),
        ({"WORLD_SIZE": "2", "RANK": "0", "TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "2"}, True, False),
        ({"WORLD_SIZE": "2", "RANK": "1", "TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "2"}, True, True),
    ],
)
def test_part_of_a_process_follows_from_torchruns_variables(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], rank: bool, follower: bool
) -> None:
    set_torchrun(monkeypatch, **variables)
    assert (torchrun.is_rank(), torchrun.is_follower()) == (rank, follower)
    torchrun.check_environment()


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set, but torchrun did not start this process"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two must be a whole number"),
        (
            {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "RANK": "0", "TORCHELASTIC_RUN_ID": "x"},
            "WORLD_SIZE=4 spans machines",
        ),
    ],
)
def test_start_that_cannot_work_is_refused(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], words: str
) -> None:
    set_torchrun(monkeypatch, **variables)
    with pytest.raises(ConfigError) as caught:
        torchrun.check_environment()
    assert words in str(caught.value)
