"""How a rank leaves its peers: NCCL waits for graphs with its sums, so nobody may hold an engine by then."""

from __future__ import annotations

import gc
import os
import threading
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from launcher.rank import context
from tests.launcher.cli import SHORT
from tests.launcher.forked import ForkedProcess, run
from tests.launcher.jobs import make_job


def watch_engines() -> None:
    """In ranks: no garbage is collected unasked, and who leaves while an engine lives, or had none, fails."""
    from parallel.engine.engine import Engine

    gc.set_threshold(0)
    engines, begin, leave = [], Engine.__init__, context.dist.destroy_process_group

    def opened(self: Engine, *args: Any, **options: Any) -> None:
        engines.append(weakref.ref(self))
        begin(self, *args, **options)

    def left() -> None:
        if not engines or any(engine() is not None for engine in engines):
            os._exit(1)
        leave()

    Engine.__init__ = opened  # type: ignore[method-assign]
    context.dist.destroy_process_group = left


@pytest.mark.parametrize(
    "task",
    [
        ["prompt=Why"],
        ["task=bench", "workload.prompt_tokens=40", "workload.repeats=1", "workload.warm_up=1"],
        ["prompt=Why", "speculation.kind=ngram"],
        ["prompt=Why", "offload.resident_layers=2"],
    ],
    ids=["generate", "bench", "drafts", "streamed"],
)
def test_no_engine_is_held_when_a_rank_leaves(task: list[str], tmp_path: Path) -> None:
    launcher = partial(ForkedProcess, before=watch_engines)
    report = run("gpus=2", *SHORT, *task, folder=tmp_path / "run", launcher=launcher).report
    assert report.get("error") is None


class Cyclic:
    """Refers to itself, as an engine does."""

    def __init__(self) -> None:
        self.step = self.run

    def run(self) -> None: ...


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], tuple[Any, list[str]]]:
    """A rank on such a device, which has joined nobody; and what it does in order."""

    def join(device: str) -> tuple[Any, list[str]]:
        done: list[str] = []
        choice = SimpleNamespace(communicator=None, ranges=())
        monkeypatch.setattr(context, "open_device", lambda job, rank: torch.device(device))
        monkeypatch.setattr(context, "join_process_group", lambda job, device: None)
        monkeypatch.setattr(context, "open_transport", lambda *args: choice)
        monkeypatch.setattr(context.dist, "destroy_process_group", lambda: done.append("left"))
        return context.joined_rank(make_job(tmp_path, cards=device == "cuda"), 0, None), done  # type: ignore[arg-type]

    return join


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_garbage_goes_before_a_rank_leaves(device: str, rank: Callable[[str], tuple[Any, list[str]]]) -> None:
    joined, done = rank(device)
    gc.disable()
    try:
        with joined:
            weakref.finalize(Cyclic(), done.append, "gone")
    finally:
        gc.enable()
    assert done == ["gone", "left"]


def test_who_cannot_leave_ends_all_the_same(
    rank: Callable[[str], tuple[Any, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    joined, _ = rank("cuda")
    released, begun = threading.Event(), threading.Event()
    monkeypatch.setattr(context, "LEAVE_SEC", 0.05)
    monkeypatch.setattr(context.dist, "destroy_process_group", lambda: begun.set() or released.wait(60))
    with joined:
        pass
    assert begun.is_set()
    released.set()


@pytest.mark.parametrize(("device", "expected"), [("cpu", ["left"]), ("cuda", [])])
def test_a_rank_that_fails_on_a_card_does_not_wait_for_nccl(
    device: str, expected: list[str], rank: Callable[[str], tuple[Any, list[str]]]
) -> None:
    """Its error may hold the engine."""
    joined, done = rank(device)
    with pytest.raises(ValueError, match="full"), joined:
        raise ValueError("full")
    assert done == expected
