"""What a machine's cards do in what time: lines over bytes, from which predict.py adds up a model's steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

MB = 1e6

T = TypeVar("T")


@dataclass(frozen=True)
class Line:
    """Microseconds over megabytes (of 10**6 bytes)."""

    start_us: float
    us_per_mb: float

    def at(self, num_bytes: float) -> float:
        return self.start_us + self.us_per_mb * num_bytes / MB


@dataclass(frozen=True)
class StepRates:
    """A decode step of some rows on one rank, its all-reduces left out.

    `layer` runs over the bytes of a layer's linears as they are held, at no context; `kv_us_per_mb` is what a layer
    takes for the keys and values it reads; `rest` is all but the layers, over the bytes of the head.
    """

    layer: Line
    kv_us_per_mb: float
    rest: Line


@dataclass(frozen=True)
class ChunkRates:
    """A chunk of some tokens of one prompt on one rank, with what all-reduces add to it.

    `layer` and `rest` are what the card takes, `host_layer` and `host_rest_us` what the host takes to queue it, which
    goes on beside; `lead_us` is what neither hides: before the first kernel, or after the last. Lines run over the
    bytes that the weights (of a layer's linears; of the head) have at 16 bits. `layer` holds the attention of `pairs`
    of tokens in every head.
    """

    layer: Line
    rest: Line
    host_layer: Line = Line(0.0, 0.0)
    host_rest_us: float = 0.0
    lead_us: float = 0.0
    pairs: float = 0.0


@dataclass(frozen=True)
class Extra:
    """Microseconds that something adds to a layer of a chunk, on the card and to queue: by the chunk's tokens, then by
    the bytes of the layer's linears at 16 bits. Nothing, where there are none."""

    card_us: Mapping[int, Mapping[int, float]] = field(default_factory=dict)
    queue_us: Mapping[int, Mapping[int, float]] = field(default_factory=dict)

    @property
    def largest(self) -> Extra:
        """That of chunks of most tokens alone."""
        return Extra(*({max(table): table[max(table)]} if table else {} for table in (self.card_us, self.queue_us)))


@dataclass(frozen=True)
class PowerDraw:
    """Watts of a card: in steps, by their rows; in passes of prompts; and while it has nothing to do."""

    steps: Mapping[int, float]
    passes: float
    waiting: float

    def of_steps(self, num_rows: float) -> float:
        """Passes are held by the card's limit, which steps of more rows than were measured do not exceed either."""
        return min(self.passes, interpolate(self.steps, num_rows, float))


@dataclass(frozen=True)
class Rates:
    """`decode` and `prefill` by format (RATED_FORMATS), then by rows of the step and by tokens of the chunk.

    `all_reduce_us` is one call's, in a captured step, by its bytes. `pair_us`: in a layer of prefill, a million pairs
    of a token and one that it attends to, of one query head. `parts`: what each prompt in a chunk but the first adds
    to a layer; `past`: what a chunk adds that begins within a prompt, beside its pairs. `slowdown`, by format: how
    many times as long a chunk takes the card once its power holds it (power.py).
    `message_us_per_mb`: of the all-reduces of prefill, where `prefill` leaves them out since they run beside the
    products. `power_draws`, by format, where they are known. Empty and 0 where there is nothing of the kind.
    """

    source: str
    assumptions: tuple[str, ...]
    world_size: int
    decode: Mapping[str, Mapping[int, StepRates]]
    prefill: Mapping[str, Mapping[int, ChunkRates]]
    all_reduce_us: Mapping[int, float]
    pair_us: float
    message_us_per_mb: float
    parts: Extra = Extra()
    past: Extra = Extra()
    slowdown: Mapping[str, float] = field(default_factory=dict)
    power_draws: Mapping[str, PowerDraw] = field(default_factory=dict)

    def check_format(self, name: str) -> None:
        """Raises ValueError: nothing is known of weights in that format."""
        if name not in self.decode:
            known = ", ".join(self.decode)
            raise ValueError(f"rates of {self.source} are of weights in {known}, and these are in {name}")


def fit_line(points: Sequence[tuple[float, float]]) -> Line:
    """(bytes, microseconds) of two sizes -> the line through them, kept from starting or falling below zero."""
    (small, small_us), (large, large_us) = sorted(points)
    slope = max(0.0, (large_us - small_us) / (large - small) * MB)
    start = small_us - slope * small / MB
    # Times less than proportional are usual (a start); more than proportional ones go through the larger point.
    return Line(start, slope) if start >= 0 else Line(0.0, large_us / large * MB)


def interpolate(table: Mapping[int, T], at: float, value: Callable[[T], float]) -> float:
    """`value` of the entries on both sides of `at`, in proportion; of the nearest two, beyond the ends.

    Raises:
        ValueError: the table is empty.
    """
    keys = sorted(table)
    if not keys:
        raise ValueError("there is nothing to interpolate between")
    if len(keys) == 1:
        return value(table[keys[0]])
    above = next((i for i, key in enumerate(keys) if key >= at), len(keys) - 1)
    low, high = keys[max(above, 1) - 1], keys[max(above, 1)]
    first, second = value(table[low]), value(table[high])
    # Below the smallest nothing is faster than it.
    share = max(0.0, (at - low) / (high - low))
    return first + share * (second - first)
