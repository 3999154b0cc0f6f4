"""What rank 0 says while it works, and what of it is shown where."""

from __future__ import annotations

import io
import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from launcher import events
from launcher.events import EVENTS_FILE, EventFollower, EventWriter


class Clock:
    """Time that a test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(events, "time", SimpleNamespace(monotonic=lambda: self.now))


def lines_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / EVENTS_FILE).read_text(encoding="utf-8").split("\n") if line]


def follower(run_dir: Path) -> tuple[EventFollower, io.StringIO, io.StringIO]:
    """A follower with its stdout and its stderr."""
    out, err = io.StringIO(), io.StringIO()
    return EventFollower(run_dir, stdout=out, console=Console(file=err, width=120)), out, err


def wait_for(stream: io.StringIO, text: str) -> None:
    end = time.monotonic() + 60
    while text not in stream.getvalue():
        assert time.monotonic() < end, stream.getvalue()
        time.sleep(0.01)


# Writing


def test_progress_is_written_at_most_20_times_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    writer = EventWriter(tmp_path, rank=0)
    for done in range(1, 1001):
        clock.now += 0.001
        writer.progress("loading weights", done, 2000, "bytes")
    assert 18 <= len(lines_of(tmp_path)) <= 21


def test_end_of_a_stage_and_a_new_stage_are_always_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    writer = EventWriter(tmp_path, rank=0)
    writer.progress("loading weights", 1, 3, "bytes")
    writer.progress("loading weights", 2, 3, "bytes")
    writer.progress("loading weights", 3, 3, "bytes")
    writer.progress("prefill", 1, 2, "tokens")
    assert [(event["stage"], event["done"]) for event in lines_of(tmp_path)] == [
        ("loading weights", 1),
        ("loading weights", 3),
        ("prefill", 1),
    ]


def test_text_is_never_held_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    writer = EventWriter(tmp_path, rank=0)
    for text in ("a", "é\u2028", "a"):
        writer.text(text)
    assert [event["text"] for event in lines_of(tmp_path)] == ["a", "é\u2028", "a"]


def test_other_ranks_say_how_far_they_are_themselves_and_nothing_else(tmp_path: Path) -> None:
    writer = EventWriter(tmp_path, rank=1)
    writer.text("a")
    writer.progress("prefill", 1, 1, "tokens")
    assert list(tmp_path.iterdir()) == []
    writer.progress("loading weights", 1, 3, "bytes", each_rank=True)
    assert [(event["stage"], event["rank"]) for event in lines_of(tmp_path)] == [("loading weights", 1)]


def test_lines_of_several_ranks_do_not_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "POLL_SEC", 0.0)
    writers = [EventWriter(tmp_path, rank=rank) for rank in range(4)]

    def write(writer: EventWriter) -> None:
        for done in range(500):
            writer.progress("loading weights", done, 1000, "bytes", each_rank=True)

    threads = [threading.Thread(target=write, args=(writer,)) for writer in writers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    said = [(event["rank"], event["done"]) for event in lines_of(tmp_path)]
    assert sorted(said) == [(rank, done) for rank in range(4) for done in range(500)]


# Showing


def test_answer_goes_to_stdout_as_it_appears_and_bars_to_stderr(tmp_path: Path) -> None:
    shown, out, err = follower(tmp_path)
    with shown:
        writer = EventWriter(tmp_path, rank=0)
        writer.progress("loading weights", 1_500_000, 3_000_000, "bytes")
        writer.progress("loading weights", 3_000_000, 3_000_000, "bytes")
        writer.text("def ")
        wait_for(out, "def ")
        writer.text("mean")
        wait_for(out, "def mean")
    assert out.getvalue() == "def mean\n"
    assert "loading weights" in err.getvalue() and "3.0 MB of 3.0 MB" in err.getvalue()
    assert "mean" not in err.getvalue()


def test_bar_is_that_of_the_slowest_rank(tmp_path: Path) -> None:
    shown, _, err = follower(tmp_path)
    with shown:
        for rank, done in enumerate((9_000_000, 2_000_000, 5_000_000)):
            EventWriter(tmp_path, rank=rank).progress("loading weights", done, 10_000_000, "bytes", each_rank=True)
    assert "rank 1: 2.0 MB of 10.0 MB" in err.getvalue()


def test_without_a_terminal_there_is_a_line_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    shown, _, err = follower(tmp_path)
    for number in range(1, 101):
        shown._show_progress("loading weights", number * 10**8, 10**10, "bytes", rank=0)
        clock.now += 0.5
    said = err.getvalue().splitlines()
    assert len(said) == 4, said
    assert said[0] == "loading weights 2.10 GB of 10.00 GB, 0.20 GB/s, 0:40 left"


def test_all_that_was_written_is_shown_when_the_follower_is_left(tmp_path: Path) -> None:
    shown, out, _ = follower(tmp_path)
    texts = [f"{number}, é\n" for number in range(2000)]
    with shown:
        writer = EventWriter(tmp_path, rank=0)
        for text in texts:
            writer.text(text)
    assert out.getvalue() == "".join(texts) + "\n"


def test_word_at_the_last_moment_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 writes after the follower's last read and just before the stop."""
    shown, out, _ = follower(tmp_path)
    writer = EventWriter(tmp_path, rank=0)

    class LastMoment(threading.Event):
        def is_set(self) -> bool:
            if super().is_set():
                writer.text("last")
            return super().is_set()

    monkeypatch.setattr(shown, "_stop", LastMoment())
    with shown:
        writer.text("first, ")
    assert out.getvalue().startswith("first, last")


def test_half_a_line_waits_for_its_rest_even_inside_a_character(tmp_path: Path) -> None:
    line = (json.dumps({"kind": "text", "text": "né"}, ensure_ascii=False) + "\n").encode()
    middle = line.index("é".encode()) + 1
    shown, out, _ = follower(tmp_path)
    with shown, (tmp_path / EVENTS_FILE).open("ab", buffering=0) as file:
        EventWriter(tmp_path, rank=0).text("one, ")
        file.write(line[:middle])
        wait_for(out, "one, ")
        time.sleep(4 * events.POLL_SEC)
        file.write(line[middle:])
    assert out.getvalue() == "one, né\n"


def test_stdout_stays_empty_without_an_answer(tmp_path: Path) -> None:
    shown, out, _ = follower(tmp_path)
    with shown:
        EventWriter(tmp_path, rank=0).progress("answering", 1, 1, "prompts")
    assert out.getvalue() == ""


def test_what_an_earlier_run_said_in_this_folder_is_not_said_again(tmp_path: Path) -> None:
    EventWriter(tmp_path, rank=0).text("old")
    shown, out, _ = follower(tmp_path)
    with shown:
        EventWriter(tmp_path, rank=0).text("new")
    assert out.getvalue() == "new\n"
