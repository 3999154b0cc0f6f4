"""Prompts that come over time: who is let in when, that ranks agree on it, and that answers do not depend on it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch
import torch.distributed as dist
from tokenizers import Tokenizer

from parallel.communicator import Communicator
from parallel.engine.answer import StopRules
from parallel.engine.arrivals import Agree, Arrivals, alone
from parallel.engine.engine import Engine
from parallel.engine.generate import Prompt, generate
from parallel.engine.limits import EngineLimits
from parallel.engine.sequence import TokenSequence
from tests.parallel.engine.test_generate import ScriptedEngine
from tests.parallel.ranks import demo_tokenizer, make_engine, numbered, run_on_ranks
from tests.parallel.small_models import prompts_of

LATER = 1000.0


def test_those_that_have_come_are_taken_once() -> None:
    arrivals = Arrivals([-2.0, -1.0, LATER])
    assert list(arrivals.take(wait=False)) == [0, 1]
    assert list(arrivals.take(wait=False)) == []
    assert not arrivals.all_taken


def test_waiting_takes_the_next() -> None:
    start = time.perf_counter()
    arrivals = Arrivals([0.02, 0.03, LATER])
    assert 0 in arrivals.take(wait=True)
    assert time.perf_counter() - start >= 0.02


def test_no_one_is_asked_when_all_are_here() -> None:
    def fail(decide: Callable[[], int]) -> int:
        raise AssertionError("asked")

    assert list(Arrivals([], fail).take(wait=True)) == []
    taken = Arrivals([-1.0], lambda decide: 1)
    assert (list(taken.take(wait=True)), taken.all_taken) == ([0], True)
    taken.agree = fail
    assert list(taken.take(wait=True)) == []


def test_another_rank_decides() -> None:
    """The clock here says that all have come; rank 0's says one."""
    assert list(Arrivals([-3.0, -2.0, -1.0], lambda decide: 1).take(wait=False)) == [0]


def test_requests_out_of_order_are_refused() -> None:
    with pytest.raises(AssertionError):
        Arrivals([1.0, 0.5])


def scripted(times: list[float | None], agree: Agree = alone) -> ScriptedEngine:
    engine = ScriptedEngine([[5, 6, 7, 8]] * len(times), EngineLimits(100, 8, 64))
    prompts = [Prompt(index, [0], sec) for index, sec in enumerate(times)]
    result = generate(cast(Engine, engine), prompts, cast(Tokenizer, demo_tokenizer()), StopRules(4), agree=agree)
    assert [answer.token_ids for answer in result.answers] == [[5, 6, 7, 8]] * len(times)
    assert len(result.ttft_ms) == len(times)
    return engine


def test_a_request_joins_those_that_run() -> None:
    counts = iter((1, 1, 3))
    engine = scripted([0.0, 0.0, 0.0], lambda decide: next(counts))
    assert engine.stepped == [[0], [0], [0, 1, 2], [1, 2], [1, 2]]


def test_an_idle_engine_waits_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock:
        """Stands still but for sleep."""

        now, slept = 0.0, list[float]()

        def perf_counter(self) -> float:
            return self.now

        def sleep(self, sec: float) -> None:
            self.slept.append(sec)
            self.now += sec

    clock = Clock()
    monkeypatch.setattr("parallel.engine.arrivals.time", clock)
    engine = scripted([0.0, 5.0, 5.0])
    assert clock.slept == [0.0, 5.0]
    assert engine.stepped == [[0], [0], [0], [1, 2], [1, 2], [1, 2]]


def test_first_token_is_timed_from_the_arrival() -> None:
    """One row, two requests at once: the second waits for three steps of the first, and that counts."""

    class SlowEngine(ScriptedEngine):
        def step(self, sequences: Sequence[TokenSequence]) -> torch.Tensor:
            time.sleep(0.01)
            return super().step(sequences)

    engine = SlowEngine([[5, 6, 7, 8]] * 2, EngineLimits(100, 1, 64))
    prompts = [Prompt(index, [0], 0.0) for index in range(2)]
    result = generate(cast(Engine, engine), prompts, cast(Tokenizer, demo_tokenizer()), StopRules(4))
    assert result.ttft_ms[1] >= 30


def arriving_answers(communicator: Communicator, folder: Path) -> tuple[list[list[int]], list[list[int]]]:
    """Answers to prompts that are there, and to the same ones that come over time; rank 0's clock decides."""
    group = dist.new_group(backend="gloo")

    def agree(decide: Callable[[], int]) -> int:
        count = torch.tensor([decide() if communicator.rank == 0 else -1])
        dist.broadcast(count, src=0, group=group)
        return int(count)

    engine = make_engine(communicator, folder, batch_size=2)
    prompts = numbered(prompts_of("llama"))
    # Ranks that went by their own clocks would part: the second's is far behind.
    late = [replace(prompt, arrival_sec=0.004 * at + 50 * communicator.rank) for at, prompt in enumerate(prompts)]
    both = [generate(engine, each, demo_tokenizer(), StopRules(9), agree=agree) for each in (prompts, late)]
    return tuple([answer.token_ids for answer in result.answers] for result in both)  # type: ignore[return-value]


def test_ranks_agree_and_answers_are_the_same(folders: dict[str, Path]) -> None:
    ranks = run_on_ranks(arriving_answers, 2, folders["llama"])
    for at_once, over_time in ranks:
        assert at_once == over_time == ranks[0][0]
