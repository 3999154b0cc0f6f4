"""What a calibration keeps cards at for a while, one thing after the other, so that it is seen what they draw."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from launcher.rank.context import RankContext
from launcher.tasks.prompt_pass import prompt_pass
from launcher.timing.power_draw import PASSES, STEPS, WAITING, Load
from parallel.engine.chunk_timer import SUSTAINED_MS, sustained_milliseconds
from parallel.engine.engine import Engine
from parallel.engine.step_timer import prepared_step


@dataclass
class Loads:
    """Of cards that run one engine; `done` grows with each. All ranks are to call the same."""

    context: RankContext
    engine: Engine
    format: str
    done: list[Load] = field(default_factory=list)

    def steps(self, rows: int, context_tokens: int, step_ms: float) -> None:
        """Steps of about `step_ms`."""
        contexts = [context_tokens] * rows
        with prepared_step(self.engine, contexts, self.context.communicator) as run, self._noted(STEPS, rows):
            self._repeat(run, step_ms)

    def passes(self, tokens: int, vocab_size: int, pass_ms: float) -> float:
        """Passes over so many tokens, of about `pass_ms`; how long one takes the card by the end."""
        with prompt_pass(self.engine, vocab_size, [tokens]) as run, self._noted(PASSES):
            return self._repeat(run, pass_ms)

    def waiting(self) -> None:
        with self._noted(WAITING):
            time.sleep(SUSTAINED_MS / 1e3)

    def _repeat(self, run: Callable[[], object], one_ms: float) -> float:
        return sustained_milliseconds(run, one_ms, self.context.communicator, self.context.device)

    @contextmanager
    def _noted(self, kind: str, rows: int = 0) -> Iterator[None]:
        start = time.time()
        yield
        self.done.append(Load(self.format, kind, start, time.time(), rows))
