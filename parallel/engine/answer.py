"""One answer as it comes on: its tokens and text, what ends it, and when its tokens were there."""

from __future__ import annotations

from dataclasses import dataclass, field

from parallel.engine.text import TextStream


@dataclass(frozen=True)
class StopRules:
    """What ends an answer: its length, an end-of-sequence token, or one of some texts (which is cut off)."""

    max_tokens: int
    eos_ids: frozenset[int] = frozenset()
    texts: tuple[str, ...] = ()


@dataclass
class Answer:
    """One prompt's answer. `finish_reason` is eos, stop, length, or context where max_context was full."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None

    @property
    def has_ended(self) -> bool:
        return self.finish_reason is not None


@dataclass(frozen=True)
class RequestTimes:
    """Of one answer: milliseconds from its prompt's arrival to its first token, and from one token to the next on
    average; None where it has one."""

    ttft_ms: float
    tpot_ms: float | None


@dataclass
class Opened:
    """An answer under way: its place among the prompts, what shows its text, the tokens that it has room for, since
    when its prompt waits for it, and when its first and its newest token were there."""

    row: int
    answer: Answer
    stream: TextStream
    room: int
    since: float | None = None
    first: float = 0.0
    newest: float = 0.0

    def times(self) -> RequestTimes:
        assert self.since is not None, "admitted before its first token"
        num_later = len(self.answer.token_ids) - 1
        tpot_ms = (self.newest - self.first) * 1e3 / num_later if num_later else None
        return RequestTimes((self.first - self.since) * 1e3, tpot_ms)

    def add(self, token: int, rules: StopRules) -> str:
        """Adds one token to the answer, decides whether it ends there, and returns the text that may be shown now."""
        answer = self.answer
        answer.token_ids.append(token)
        shown = self.stream.add(token)
        if token in rules.eos_ids:
            answer.finish_reason = "eos"
        elif self.stream.stopped:
            answer.finish_reason = "stop"
        elif len(answer.token_ids) >= rules.max_tokens:
            answer.finish_reason = "length"
        elif len(answer.token_ids) >= self.room:
            answer.finish_reason = "context"
        if answer.has_ended and not self.stream.stopped:
            shown += self.stream.finish()
        answer.text += shown
        return shown
