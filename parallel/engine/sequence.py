"""One prompt on its way to an answer: what the engine needs to know of it, and of a part of it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(eq=False)
class TokenSequence:
    """A prompt and how far it has come. Tokens are counted when their computation is queued, before the host sees them.

    `key` seeds its draws, made of its own `seed` where it has one. `max_tokens` bounds the answer, and `pages` hold the
    keys and values of both; of the prompt's first `num_reused` tokens they held them before.
    """

    index: int
    prompt: list[int]
    max_tokens: int
    seed: int | None = None
    key: int = 0
    pages: list[int] = field(default_factory=list)
    num_reused: int = 0
    num_prefilled: int = 0
    num_sampled: int = 0

    @property
    def num_tokens(self) -> int:
        """The most tokens that it puts into the cache: all but the answer's last."""
        return len(self.prompt) + self.max_tokens - 1

    @property
    def next_position(self) -> int:
        """Where the newest token of the answer stands, which the next step puts into the cache."""
        return len(self.prompt) + self.num_sampled - 1

    @property
    def is_prefilled(self) -> bool:
        return self.num_prefilled == len(self.prompt)

    @property
    def is_sampled(self) -> bool:
        """Whether every token that the answer may have has been computed."""
        return self.num_sampled >= self.max_tokens


@dataclass(frozen=True)
class Part:
    """Neighbouring tokens of a prompt, `start` to `end`, all before them being in the cache or in earlier parts."""

    sequence: TokenSequence
    start: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start
