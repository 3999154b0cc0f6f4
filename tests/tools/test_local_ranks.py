"""Functions on ranks: results in order, and errors, deaths and hangs that reach the caller."""

import multiprocessing
import os
import signal
import threading
import time
from multiprocessing.connection import Connection, wait

import pytest
import torch

from parallel.communicator import Communicator
from tools import local_ranks
from tools.local_ranks import RankError, run_on_ranks


def describe(communicator: Communicator, factor: int) -> dict[str, object]:
    import deepspeed

    total = communicator.all_reduce(torch.tensor([float(communicator.rank)]))
    return {
        "rank": communicator.rank * factor,
        "name": communicator.name,
        "sum": total,
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.is_available(),
        "compiles": deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"],
    }


@pytest.mark.parametrize(("world_size", "name"), [(1, "solo"), (2, "gloo"), (4, "gloo")])
def test_results_come_in_rank_order(world_size: int, name: str) -> None:
    for rank, result in enumerate(run_on_ranks(describe, world_size, 10)):
        assert (result["rank"], result["name"]) == (rank * 10, name)
        assert result["sum"].tolist() == [sum(range(world_size))]
        assert (result["threads"], result["cuda"], result["compiles"]) == (1, False, False)


def fail_on_one(communicator: Communicator) -> None:
    if communicator.rank == 1:
        raise KeyError("what went wrong")
    time.sleep(600)


def test_error_of_a_rank_is_raised_with_its_traceback_whatever_the_others_do() -> None:
    with pytest.raises(RankError, match=r"(?s)rank 1 failed:.*in fail_on_one.*KeyError: 'what went wrong'"):
        run_on_ranks(fail_on_one, 2, timeout_sec=180)
    assert multiprocessing.active_children() == []


def die_on_one(communicator: Communicator) -> None:
    if communicator.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)


def test_death_of_a_rank_is_told() -> None:
    with pytest.raises(RankError, match="rank 1 ended without a result"):
        run_on_ranks(die_on_one, 2)
    assert multiprocessing.active_children() == []


def hang_on_one(communicator: Communicator) -> None:
    if communicator.rank == 1:
        threading.Event().wait()


def test_hang_is_ended_and_names_who_did_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the caller is held up for a second before it looks."""

    def wait_late(connections: list[Connection], timeout_sec: float) -> list[object]:
        time.sleep(timeout_sec + 1)
        return list(wait(connections, 0))

    monkeypatch.setattr(local_ranks, "wait", wait_late)
    with pytest.raises(TimeoutError, match=r"no answer within 1 s from ranks \[.*1\]"):
        run_on_ranks(hang_on_one, 2, timeout_sec=1)
    assert multiprocessing.active_children() == []


def print_line(communicator: Communicator) -> None:
    print("from a rank", flush=True)


def test_what_ranks_print_is_not_the_callers_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    run_on_ranks(print_line, 2)
    assert capfd.readouterr().out == ""


def test_environment_of_the_caller_is_left_alone() -> None:
    before = dict(os.environ)
    run_on_ranks(print_line, 1)
    assert dict(os.environ) == before
