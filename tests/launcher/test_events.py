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
from launcher.events import EVENTS_FILE, EventFollower, EventWriter, amount_text


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
    writer = EventWriter(tmp_path, enabled=True)
    for done in range(1, 1001):
        clock.now += 0.001
        writer.progress("loading weights", done, 2000, "bytes")
    assert 18 <= len(lines_of(tmp_path)) <= 21


def test_end_of_a_stage_and_a_new_stage_are_always_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    writer = EventWriter(tmp_path, enabled=True)
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
    writer = EventWriter(tmp_path, enabled=True)
    for text in ("a", "é\u2028", "a"):
        writer.text(text)
    assert [event["text"] for event in lines_of(tmp_path)] == ["a", "é\u2028", "a"]


def test_other_ranks_say_nothing(tmp_path: Path) -> None:
    writer = EventWriter(tmp_path, enabled=False)
    writer.text("a")
    writer.progress("prefill", 1, 1, "tokens")
    assert list(tmp_path.iterdir()) == []


# Showing


def test_answer_goes_to_stdout_as_it_appears_and_bars_to_stderr(tmp_path: Path) -> None:
    shown, out, err = follower(tmp_path)
    with shown:
        writer = EventWriter(tmp_path, enabled=True)
        writer.progress("loading weights", 1_500_000, 3_000_000, "bytes")
        writer.progress("loading weights", 3_000_000, 3_000_000, "bytes")
        writer.text("def ")
        wait_for(out, "def ")
        writer.text("mean")
        wait_for(out, "def mean")
    assert out.getvalue() == "def mean\n"
    assert "loading weights" in err.getvalue() and "3.0 MB of 3.0 MB" in err.getvalue()
    assert "mean" not in err.getvalue()


def test_all_that_was_written_is_shown_when_the_follower_is_left(tmp_path: Path) -> None:
    shown, out, _ = follower(tmp_path)
    texts = [f"{number}, é\n" for number in range(2000)]
    with shown:
        writer = EventWriter(tmp_path, enabled=True)
        for text in texts:
            writer.text(text)
    assert out.getvalue() == "".join(texts) + "\n"


def test_word_at_the_last_moment_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 writes after the follower's last read and just before the stop."""
    shown, out, _ = follower(tmp_path)
    writer = EventWriter(tmp_path, enabled=True)

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
        EventWriter(tmp_path, enabled=True).text("one, ")
        file.write(line[:middle])
        wait_for(out, "one, ")
        time.sleep(4 * events.POLL_SEC)
        file.write(line[middle:])
    assert out.getvalue() == "one, né\n"


def test_stdout_stays_empty_without_an_answer(tmp_path: Path) -> None:
    shown, out, _ = follower(tmp_path)
    with shown:
        EventWriter(tmp_path, enabled=True).progress("answering", 1, 1, "prompts")
    assert out.getvalue() == ""


def test_what_an_earlier_run_said_in_this_folder_is_not_said_again(tmp_path: Path) -> None:
    EventWriter(tmp_path, enabled=True).text("old")
    shown, out, _ = follower(tmp_path)
    with shown:
        EventWriter(tmp_path, enabled=True).text("new")
    assert out.getvalue() == "new\n"


@pytest.mark.parametrize(
    ("amount", "unit", "text"),
    [(7, "tokens", "7 tokens"), (1_200_000, "bytes", "1.2 MB"), (35_000_000_000, "bytes", "35.00 GB")],
)
def test_amounts_read_well(amount: int, unit: str, text: str) -> None:
    assert amount_text(amount, unit) == text
