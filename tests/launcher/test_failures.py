"""Failures as people and scripts read them: real errors, their hints, and the first of several."""

from __future__ import annotations

import errno
import json
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from launcher.failures import (
    ERROR_FILE,
    Failure,
    describe_exception,
    find_hint,
    read_first_failure,
    write_first_failure,
)
from launcher.run import hint_at_answers
from tests.launcher.jobs import make_job, make_run

MEMORY = "smaller engine.max_context or workload.batch_size"


def test_full_disk_says_where_to_write_instead() -> None:
    with pytest.raises(OSError) as caught, Path("/dev/full").open("w") as file:
        file.write("x")
    failure = describe_exception(caught.value, rank=1, log="rank1.log")
    assert (failure.type, failure.rank, failure.log) == ("OSError", 1, "rank1.log")
    assert "No space left" in failure.message
    assert "output_file=FILE" in failure.hint and "hydra.run.dir=FOLDER" in failure.hint


def test_folder_below_a_file_says_where_to_write_instead(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError) as caught:
        (tmp_path / "file" / "folder").mkdir()
    assert "hydra.run.dir=FOLDER" in find_hint(caught.value)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST])
def test_folder_of_others_says_where_to_write_instead(number: int) -> None:
    assert "hydra.run.dir=FOLDER" in find_hint(OSError(number, "refused"))


def test_peer_that_does_not_come_in_time_names_the_limit(tmp_path: Path) -> None:
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with pytest.raises(RuntimeError) as caught:
        torch.distributed.ProcessGroupGloo(
            torch.distributed.PrefixStore("test", store), 0, 2, timedelta(milliseconds=100)
        )
    errors = [RuntimeError("[gloo/unbound_buffer.cc:78] Timed out waiting 8000ms for recv operation"), caught.value]
    assert ["timeouts.collective_sec" in find_hint(error) for error in errors] == [True, True]


def test_allocation_that_torch_refuses_says_what_takes_less() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert MEMORY in find_hint(caught.value)


def test_allocation_that_python_refuses_says_what_takes_less() -> None:
    with pytest.raises(MemoryError) as caught:
        bytearray(2**60)
    failure = describe_exception(caught.value)
    assert MEMORY in failure.hint
    assert failure.message


@pytest.mark.parametrize("error", [OSError(errno.ENOMEM, "Cannot allocate memory"), torch.OutOfMemoryError("CUDA")])
def test_other_kinds_of_no_memory_say_what_takes_less(error: Exception) -> None:
    assert MEMORY in find_hint(error)


def test_lost_peer_points_to_the_rank_that_ended_first() -> None:
    hints = {find_hint(RuntimeError(f"[gloo] Connection {end} by peer [127.0.0.1]:1")) for end in ("closed", "reset")}
    assert hints == {"Another rank ended first; its log says why."}


def test_broken_links_point_to_the_probe() -> None:
    assert "task=probe" in find_hint(torch.distributed.DistBackendError("NCCL error"))


def test_error_without_text_still_says_what_it_was() -> None:
    assert describe_exception(KeyError()).message == "KeyError()"
    assert find_hint(KeyError()) == ""


def test_first_failure_wins(tmp_path: Path) -> None:
    first, second = Failure("A", "cause", "hint", 1, "log"), Failure("B", "consequence", rank=0)
    assert read_first_failure(tmp_path) is None
    assert write_first_failure(tmp_path, first)
    assert not write_first_failure(tmp_path, second)
    assert read_first_failure(tmp_path) == first


def test_failure_that_cannot_be_recorded_is_no_other_failure(tmp_path: Path) -> None:
    assert not write_first_failure(tmp_path / "missing", Failure("A", "cause"))


@pytest.mark.parametrize("text", ["", "{", json.dumps({"type": "A"})[:-4]])
def test_half_written_record_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / ERROR_FILE).write_text(text)
    assert read_first_failure(tmp_path) is None


def test_hint_of_a_failed_run_says_how_to_go_on_from_its_answers(tmp_path: Path) -> None:
    failure = Failure("RankDied", "rank 0 died", "See dmesg.")
    job = make_job(tmp_path, run=make_run(prompts_file="p.txt", output_file=str(tmp_path / "answers.jsonl")))
    assert hint_at_answers(job, failure) == failure
    (tmp_path / "answers.jsonl").touch()
    assert hint_at_answers(job, failure) == failure
    (tmp_path / "answers.jsonl").write_text("{}\n")
    kept = f"Answers so far are kept: go on with resume=true output_file={tmp_path / 'answers.jsonl'}"
    assert hint_at_answers(job, failure) == replace(failure, hint=f"See dmesg. {kept}")
    assert hint_at_answers(job, replace(failure, hint="")).hint == kept
    assert hint_at_answers(make_job(tmp_path), failure) == failure
