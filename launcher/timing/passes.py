"""The passes of a batch of requests one after another, as the engine's scheduler orders them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from launcher.timing.chunks import Part, PassCost, parts_of
from launcher.timing.load import Workload

# Parts of prompts, and sequences, of a pass.
ChunkCost = Callable[[list[Part]], PassCost]


@dataclass(frozen=True)
class StepCost:
    """Milliseconds of a step; `waits`, of them: for what is copied to the card."""

    ms: float
    waits: float = 0.0


@dataclass
class Answers:
    """When each prompt has its first token, and how long the others take: (milliseconds, tokens that took as long).

    `passes_ms` and `steps_ms`: what the card computes, of `end_ms`.
    """

    first_ms: list[float] = field(default_factory=list)
    gaps: list[tuple[float, int]] = field(default_factory=list)
    end_ms: float = 0.0
    passes_ms: float = 0.0
    steps_ms: float = 0.0

    @property
    def waits_ms(self) -> float:
        """In which the card computes nothing."""
        return max(0.0, self.end_ms - self.passes_ms - self.steps_ms)


@dataclass
class Clocks:
    """When the host and the card are next free, and what the host has still to see: (when it is there, first tokens,
    others). `stepped`: when it saw the last step's tokens; `fresh`: first ones since, as (when, how many)."""

    host: float = 0.0
    card: float = 0.0
    stepped: float = 0.0
    fresh: list[tuple[float, int]] = field(default_factory=list)
    pending: deque[tuple[float, int, int]] = field(default_factory=deque)

    def add_chunk(self, cost: PassCost, num_started: int) -> None:
        """A pass that the host queues while the card works: each may wait for the other."""
        begun, self.host = max(self.card, self.host + cost.lead), self.host + cost.queue
        self.card = max(begun + cost.card, self.host + cost.lead)
        if num_started:
            self.pending.append((self.card, num_started, 0))

    def add_step(self, step_ms: float, num_running: int) -> None:
        """A captured one: the host is done with it at once."""
        self.card = max(self.card, self.host) + step_ms
        self.pending.append((self.card, 0, num_running))

    def take(self, answers: Answers, num_left: int) -> None:
        """The host waits for all that is pending but the newest `num_left`, and sees it."""
        while len(self.pending) > num_left:
            there, num_first, num_others = self.pending.popleft()
            self.host = answers.end_ms = max(self.host, there)
            if num_first:
                answers.first_ms += [self.host] * num_first
                self.fresh.append((self.host, num_first))
            if num_others:
                answers.gaps += [(self.host - since, num) for since, num in self.newest(num_others)]
                self.stepped, self.fresh = self.host, []

    def newest(self, num_running: int) -> list[tuple[float, int]]:
        """When the newest token of each of so many answers was seen, and of how many."""
        num_others = num_running - sum(num for _, num in self.fresh)
        return [*self.fresh, *([(self.stepped, num_others)] if num_others else [])]


def run_through(load: Workload, chunk_cost: ChunkCost, step_cost: Callable[[int], StepCost]) -> Answers:
    """Chunks are filled in order. Once answers are under way they are shorter, and a step follows each.

    As parallel/engine/generate.py goes on and measures: the host queues a pass, then waits for the one before it, and a
    token's time starts when the one before it in its answer was seen.
    """
    answers, clocks, read, left = Answers(), Clocks(), 0, list[int]()
    while read < load.num_tokens:
        size = min(load.prefill_chunk_while_decoding, load.prefill_chunk) if left else load.prefill_chunk
        tokens = min(size, load.num_tokens - read)
        started = (read + tokens) // load.prompt_tokens - read // load.prompt_tokens
        cost = chunk_cost(parts_of(read, tokens, load.prompt_tokens))
        clocks.add_chunk(cost, started)
        answers.passes_ms += cost.card - cost.waits
        read += tokens
        left = [num for num in (*left, *[load.output_tokens - 1] * started) if num]
        if left:
            step = step_cost(len(left))
            clocks.add_step(step.ms, len(left))
            answers.steps_ms += step.ms - step.waits
            left = [num - 1 for num in left if num > 1]
        clocks.take(answers, num_left=1)
    clocks.take(answers, num_left=0)
    while left:
        num_steps, step = min(left), step_cost(len(left))
        answers.gaps.append((step.ms, num_steps * len(left)))
        answers.end_ms += num_steps * step.ms
        answers.steps_ms += num_steps * (step.ms - step.waits)
        left = [num - num_steps for num in left if num > num_steps]
    return answers


def median_of(gaps: list[tuple[float, int]]) -> float | None:
    """Of all tokens; None where there are none."""
    half, seen = sum(num for _, num in gaps) / 2, 0
    for each_ms, num in sorted(gaps):
        seen += num
        if seen >= half:
            return each_ms
    return None
