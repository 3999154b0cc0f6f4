"""What is said of served requests, against a clock that only passes move, and a log of when each token was there."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, cast

import pytest
from tokenizers import Tokenizer
from torch import Tensor

from launcher.config import WorkloadConfig
from launcher.report.bench_text import requests_text
from launcher.tasks.requests import arrival_times
from launcher.tasks.serving import serving
from launcher.tasks.summary import MeasuredRun
from parallel.engine import generate as generation
from parallel.engine.answer import RequestTimes, StopRules
from parallel.engine.engine import Engine
from parallel.engine.generate import Prompt, Result, generate
from parallel.engine.limits import EngineLimits
from parallel.engine.pending import Pending
from parallel.engine.sequence import Part, TokenSequence
from tests.parallel.engine.test_generate import EOS, TOKENIZER, ScriptedEngine

MODULES = ("arrivals", "generate", "pending")


class Clock:
    """Goes on where someone sleeps, computes or waits for a card."""

    now = 1000.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, sec: float) -> None:
        self.now += sec


@dataclass(frozen=True)
class Event:
    """What a card passes at `done`."""

    clock: Clock
    done: float

    def synchronize(self) -> None:
        self.clock.now = max(self.clock.now, self.done)


@dataclass
class TimedEngine(ScriptedEngine):
    """A pass takes 0.1 s and a millisecond a token, a step 20 and 1 a row: of the host, or of a card beside it."""

    clock: Clock = field(default_factory=Clock)
    has_card: bool = False
    card_free: float = 0.0
    # (index, when it was computed) of each token
    log: list[tuple[int, float]] = field(default_factory=list)

    def work(self, sec: float) -> None:
        self.card_free = max(self.card_free, self.clock.now) + sec
        if not self.has_card:
            self.clock.now = self.card_free

    def prefill(self, parts: Sequence[Part]) -> Tensor:
        self.work(0.1 + sum(map(len, parts)) / 1e3)
        return super().prefill(parts)

    def step(self, sequences: Sequence[TokenSequence]) -> Tensor:
        self.work(0.02 + len(sequences) / 1e3)
        return super().step(sequences)

    def next_tokens(self, sequences: Sequence[TokenSequence]) -> Tensor:
        self.log += [(sequence.index, self.card_free) for sequence in sequences]
        return super().next_tokens(sequences)


def open_engine(
    monkeypatch: pytest.MonkeyPatch, lengths: Sequence[int], limits: EngineLimits, *, has_card: bool
) -> TimedEngine:
    """That answers prompt i with so many tokens."""
    engine = TimedEngine([[*[5] * (num - 1), EOS] for num in lengths], limits, has_card=has_card)
    for name in MODULES:
        monkeypatch.setattr(f"parallel.engine.{name}.time", engine.clock)
    if has_card:

        def fetch(sequences: list[TokenSequence], tokens: Tensor, *, is_step: bool, plan: Any = None) -> Pending:
            event = cast(Any, Event(engine.clock, engine.card_free))
            return Pending(sequences, tokens.clone(), event, is_step, plan)

        monkeypatch.setattr(generation, "Pending", type("Fetched", (), {"fetch": staticmethod(fetch)}))
    return engine


def answer(engine: TimedEngine, prompts: list[Prompt]) -> tuple[Result, float]:
    """And the seconds that it took."""
    start = engine.clock.now
    rules = StopRules(99, frozenset({EOS}))
    result = generate(cast(Engine, engine), prompts, cast(Tokenizer, TOKENIZER), rules)
    return result, engine.clock.now - start


def quantile(times: list[float], share: float) -> float:
    """The time that as many exceed, at most."""
    return min(each for each in times if sum(other > each for other in times) <= (1 - share) * len(times))


@pytest.mark.parametrize("has_card", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_waits_and_rates_are_those_of_a_log_of_tokens(
    monkeypatch: pytest.MonkeyPatch, seed: int, has_card: bool
) -> None:
    draw, num = random.Random(seed), 120
    lengths = [draw.randint(1, 30) for _ in range(num)]
    engine = open_engine(monkeypatch, lengths, EngineLimits(2000, 6, 512, 128), has_card=has_card)
    # The longer prompts are read in several chunks, between which others are answered.
    sizes = [draw.choice((1, 20, 200, 1500)) for _ in range(num)]
    arrivals = arrival_times(num, (0.4, 0.7, 1.0, 1.3)[seed], seed)
    prompts = [Prompt(row, [0] * size, at) for row, (size, at) in enumerate(zip(sizes, arrivals, strict=True))]
    start = engine.clock.now
    result, sec = answer(engine, prompts)
    workload = WorkloadConfig(arrival_rate=2.0, max_ttft_ms=900.0, max_tpot_ms=60.0)
    run = MeasuredRun(result.ttft_ms, result.token_ms, sum(lengths), sec, 1.0, requests=result.requests)
    found = serving([run], workload)

    there = [[at for index, at in engine.log if index == row][: lengths[row]] for row in range(num)]
    ttft = [(times[0] - start - arrival) * 1e3 for times, arrival in zip(there, arrivals, strict=True)]
    gaps = [(b - a) * 1e3 for times in there for a, b in pairwise(times)]
    means = [(times[-1] - times[0]) * 1e3 / (len(times) - 1) if len(times) > 1 else None for times in there]
    good = sum(a <= 900 and (b is None or b <= 60) for a, b in zip(ttft, means, strict=True))
    assert 0 < good < num
    assert found["ttft_ms"]["p50"] == pytest.approx(statistics.median(ttft))
    assert found["ttft_ms"]["p99"] == pytest.approx(quantile(ttft, 0.99))
    assert found["itl_ms"]["p50"] == pytest.approx(statistics.median(gaps))
    assert found["itl_ms"]["p99"] == pytest.approx(quantile(gaps, 0.99))
    assert found["tpot_ms"]["p50"] == pytest.approx(statistics.median(each for each in means if each is not None))
    last = max(times[-1] for times in there) - start
    # A card may have begun a step more than was needed, which nobody waits for.
    assert sec == pytest.approx(last, abs=0.03) and sec >= last - 1e-9
    assert found["per_sec"] == pytest.approx(num / sec)
    assert found["good_share"] == pytest.approx(good / num)
    assert found["good_per_sec"] == pytest.approx(good / sec)
    assert run.tokens_per_sec == pytest.approx(sum(lengths) / sec)


@pytest.mark.parametrize("chunk", [64, 128, 512])
def test_no_token_waits_longer_than_a_chunk_and_a_step(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """However long the prompts are that come meanwhile: one chunk at a time."""
    lengths = [40] * 30
    engine = open_engine(monkeypatch, lengths, EngineLimits(2000, 4, 512, chunk), has_card=True)
    prompts = [Prompt(row, [0] * (1500 if row % 3 else 30), at) for row, at in enumerate(arrival_times(30, 1.0, 7))]
    result, _ = answer(engine, prompts)
    assert max(result.token_ms) == pytest.approx((0.1 + chunk / 1e3 + 0.02 + 4 / 1e3) * 1e3, abs=4)
    assert max(result.token_ms) <= (0.1 + chunk / 1e3 + 0.02 + 4 / 1e3) * 1e3 + 1e-6


def test_rates_are_medians_of_runs_and_limits_are_kept_or_not() -> None:
    def run(sec: float, *times: tuple[float, float | None]) -> MeasuredRun:
        return MeasuredRun([], [7.0, 9.0, 8.0], 1, sec, 1.0, requests=[RequestTimes(*each) for each in times])

    workload = WorkloadConfig(arrival_rate=3.0, max_ttft_ms=100.0, max_tpot_ms=10.0)
    runs = [
        run(1.0, (100.0, 10.0), (100.1, 1.0)),
        run(2.0, (1.0, 10.1), (1.0, None), (50.0, 2.0)),
        run(4.0, (500.0, 50.0)),
    ]
    found = serving(runs, workload)
    assert (found["offered_per_sec"], found["per_sec"]) == (3.0, 1.5)
    assert (found["good_share"], found["good_per_sec"]) == (0.5, 1.0)
    assert found["ttft_ms"] == {"p50": 75.0, "p99": 500.0}
    assert found["tpot_ms"] == {"p50": 10.0, "p99": 50.0}
    assert found["itl_ms"] == {"p50": 8.0, "p99": 9.0}
    assert requests_text(found) == [
        "1.5 of 3 requests/s answered; first token 75 ms (p99 500); next 8 ms (p99 9); mean of an answer 10 ms "
        "(p99 50); 50.0 %, 1 a second, within 100 ms and 10 ms a token"
    ]
    assert requests_text(found | {"offered_per_sec": None}) == []


def test_answers_of_one_token_have_no_time_a_token() -> None:
    found = serving([MeasuredRun([3.0], [], 1, 1.0, 1.0, requests=[RequestTimes(3.0, None)])], WorkloadConfig())
    assert (found["itl_ms"], found["tpot_ms"]) == ({"p50": None, "p99": None},) * 2
    assert (found["good_share"], found["offered_per_sec"]) == (1.0, None)
