"""What decides how ranks start and how their end is told: environment, run folder, causes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from torch.distributed import HashStore

from launcher import torchrun
from launcher.cli import handle_signals
from launcher.config import ConfigError, PeerAccess
from launcher.failures import Failure, RunFailed, read_first_failure, write_first_failure
from launcher.job import Job, build_environment, load_job, save_job
from launcher.peers import GONE, GONE_OR_ZOMBIE, find_dead_peer, wait_for_dead_peer
from launcher.prompts import Prompt
from launcher.start import (
    FORWARDED_SIGNALS,
    find_cause,
    interrupted,
    plain_environment,
    prepare_run_dir,
    restored_signal_handlers,
)
from tests.launcher.jobs import make_job, make_run

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


def test_rank_that_told_its_failure_is_the_cause(tmp_path: Path) -> None:
    told = Failure("CheckpointError", "bad file", "hint", 1, "log")
    write_first_failure(tmp_path, told)
    assert find_cause(make_job(tmp_path), {0: 1, 1: 1}) == told


def test_sigterm_is_how_the_agent_stops_peers_and_no_cause(tmp_path: Path) -> None:
    told = Failure("CheckpointError", "bad file", rank=1)
    write_first_failure(tmp_path, told)
    assert find_cause(make_job(tmp_path), {0: -signal.SIGTERM, 1: 1}) == told


def test_rank_that_ended_without_a_word_is_named_with_its_exit_code(tmp_path: Path) -> None:
    failure = find_cause(make_job(tmp_path), {2: 1, 1: 7})
    assert failure.message.startswith("rank 1 (CPU) exited with code 7; every rank was stopped. Log: ")


def test_signal_that_ended_the_run_is_named() -> None:
    assert interrupted(signal.SIGHUP).message == "the run was ended by SIGHUP; every rank was stopped."


# Peers, as a rank of torchrun's sees them


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


def test_torchruns_variables_are_hidden_from_ranks_and_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    torchruns = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT",
                 "TORCHELASTIC_RUN_ID", "TORCH_NCCL_ASYNC_ERROR_HANDLING", "OMP_NUM_THREADS")  # fmt: skip
    for name in torchruns:
        monkeypatch.setenv(name, "7")
    monkeypatch.setenv("MY_RANK", "3")
    before = dict(os.environ)
    with pytest.raises(KeyError), plain_environment():
        assert not set(torchruns) & set(os.environ)
        assert os.environ["MY_RANK"] == "3"
        raise KeyError
    assert dict(os.environ) == before


def test_signal_handlers_come_back() -> None:
    before = {sig: signal.getsignal(sig) for sig in FORWARDED_SIGNALS}
    with restored_signal_handlers():
        for sig in FORWARDED_SIGNALS:
            signal.signal(sig, signal.SIG_IGN)
    assert {sig: signal.getsignal(sig) for sig in FORWARDED_SIGNALS} == before


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
