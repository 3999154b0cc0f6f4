"""From the times that task=calibrate measured to rates."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from launcher.timing.chunks import square_pairs
from launcher.timing.load import ALL_REDUCES_PER_LAYER, Work
from launcher.timing.rates import MB, ChunkRates, Extra, Line, PowerDraw, Rates, StepRates, fit_line, interpolate


@dataclass(frozen=True)
class StepTimes:
    """Milliseconds of a decode step: at the short and at the long context, and at the short one without all-reduces."""

    short: float
    long: float
    without_all_reduce: float


@dataclass(frozen=True)
class ChunkTimes:
    """Milliseconds of a chunk of prompts: in all, until the host has queued it, and on a card that need not wait for
    the host."""

    whole: float
    queued: float
    card: float


@dataclass(frozen=True)
class Point:
    """One engine's times, by rows of a step and tokens of a chunk; `work` is what it did, its layers counted.

    Chunks are of one prompt from its start. Of as many tokens, those of `past` come after as many in the cache, and
    those of `parts` are prompts of Calibration.part_tokens. `sustained_ms`: of the largest chunk on the card, after a
    second of such passes; None where that was not timed.
    """

    size: str
    work: Work
    steps: Mapping[int, StepTimes]
    chunks: Mapping[int, ChunkTimes]
    past: Mapping[int, ChunkTimes]
    parts: Mapping[int, ChunkTimes]
    sustained_ms: float | None = None


@dataclass(frozen=True)
class Calibration:
    """What task=calibrate stores: engines of two sizes and two depths for each format, and of what machine they are."""

    card: str
    world_size: int
    versions: Mapping[str, str | None]
    short_context: int
    long_context: int
    part_tokens: int
    points: tuple[Point, ...]
    # Of each format that was timed where cards tell their energy.
    power_draws: Mapping[str, PowerDraw] = field(default_factory=dict)


@dataclass(frozen=True)
class Size:
    """One size of model in two depths: times of a layer, and of all else."""

    shallow: Point
    deep: Point

    @property
    def work(self) -> Work:
        return self.deep.work

    def layer_us(self, ms: Callable[[Point], float]) -> float:
        layers = self.deep.work.num_layers - self.shallow.work.num_layers
        return max(0.0, (ms(self.deep) - ms(self.shallow)) / layers * 1e3)

    def rest_us(self, ms: Callable[[Point], float]) -> float:
        return max(0.0, ms(self.shallow) * 1e3 - self.shallow.work.num_layers * self.layer_us(ms))


def fit_rates(calibration: Calibration) -> Rates:
    """Lines through the two sizes of each format."""
    formats = {name: sizes_of(calibration.points, name) for name in formats_of(calibration.points)}
    sizes = [size for each in formats.values() for size in each]
    pair_us = statistics.mean(fit_pairs(size) for size in sizes)
    all_reduce_us = fit_all_reduce(sizes) if calibration.world_size > 1 else {}
    return Rates(
        source=f"measured on {calibration.world_size} x {calibration.card}",
        assumptions=(),
        world_size=calibration.world_size,
        decode={name: fit_steps(calibration, each, pair_us, all_reduce_us) for name, each in formats.items()},
        prefill={name: fit_chunks(each) for name, each in formats.items()},
        all_reduce_us=all_reduce_us,
        pair_us=pair_us,
        message_us_per_mb=0.0,
        parts=fit_parts(sizes, calibration.part_tokens, pair_us),
        past=fit_past(sizes, pair_us),
        slowdown={name: fit_slowdown(each) for name, each in formats.items()},
        power_draws=calibration.power_draws,
    )


def with_older(calibration: Calibration, older: Calibration | None) -> Calibration:
    """`calibration` with the formats that only an older one has, if that was made in the same way."""
    if older is None or settings_of(calibration) != settings_of(older):
        return calibration
    timed = formats_of(calibration.points)
    kept = (point for point in older.points if point.work.format not in timed)
    kept_draws = {name: draw for name, draw in older.power_draws.items() if name not in timed}
    draws = kept_draws | dict(calibration.power_draws)
    return replace(calibration, points=(*calibration.points, *kept), power_draws=draws)


def settings_of(calibration: Calibration) -> Calibration:
    """All but what was measured, and the format."""
    return replace(calibration, points=(), power_draws={})


def formats_of(points: Iterable[Point]) -> list[str]:
    return list(dict.fromkeys(point.work.format for point in points))


def sizes_of(points: Iterable[Point], name: str) -> list[Size]:
    found = [point for point in points if point.work.format == name]
    by_size: dict[str, list[Point]] = {}
    for point in sorted(found, key=lambda point: point.work.num_layers):
        by_size.setdefault(point.size, []).append(point)
    return [Size(shallow, deep) for shallow, deep in by_size.values()]


def fit_steps(
    calibration: Calibration, sizes: list[Size], pair_us: float, all_reduce_us: Mapping[int, float]
) -> dict[int, StepRates]:
    """Of the rows that were timed, and of as many as the smallest chunk has tokens, for what lies between."""
    steps = {rows: fit_step(calibration, sizes, rows) for rows in sizes[0].deep.steps}
    tokens = min(sizes[0].deep.chunks)
    return steps | {tokens: bound_step(steps, sizes, tokens, pair_us, all_reduce_us)} if tokens > max(steps) else steps


def fit_step(calibration: Calibration, sizes: list[Size], rows: int) -> StepRates:
    def of(name: str) -> Callable[[Point], float]:
        return lambda point: float(getattr(point.steps[rows], name))

    largest = max(sizes, key=lambda size: size.work.layer_bytes)
    more_us = largest.layer_us(of("long")) - largest.layer_us(of("short"))
    token_mb = largest.work.kv_bytes_per_token * rows / MB
    per_mb = max(0.0, more_us / (token_mb * (calibration.long_context - calibration.short_context)))

    def layer(size: Size) -> tuple[float, float]:
        kv_us = per_mb * size.work.kv_bytes_per_token * rows * calibration.short_context / MB
        return size.work.layer_bytes, max(0.0, size.layer_us(of("without_all_reduce")) - kv_us)

    rest = [(size.work.head_bytes, size.rest_us(of("without_all_reduce"))) for size in sizes]
    return StepRates(through(layer(size) for size in sizes), per_mb, through(rest))


def bound_step(
    timed: Mapping[int, StepRates], sizes: list[Size], rows: int, pair_us: float, all_reduce_us: Mapping[int, float]
) -> StepRates:
    """More rows than were timed: as the largest steps go on, but with the products of a pass of as many tokens at most.
    Keys and values are read no faster, and no slower."""
    largest = timed[max(timed)]

    def layer_us(size: Size) -> float:
        call_us = interpolate(all_reduce_us, rows * size.work.message_bytes, float) if all_reduce_us else 0.0
        attention_us = pair_us * square_pairs(rows) * size.work.num_heads / 1e6
        pass_us = size.layer_us(of_chunk(rows, "card")) - attention_us - ALL_REDUCES_PER_LAYER * call_us
        goes_on_us = interpolate(timed, rows, lambda entry: entry.layer.at(size.work.layer_bytes))
        return max(largest.layer.at(size.work.layer_bytes), min(pass_us, goes_on_us))

    def rest_us(size: Size) -> float:
        return interpolate(timed, rows, lambda entry: entry.rest.at(size.work.head_bytes))

    layer = through((size.work.layer_bytes, layer_us(size)) for size in sizes)
    return StepRates(layer, largest.kv_us_per_mb, through((size.work.head_bytes, rest_us(size)) for size in sizes))


def fit_chunks(sizes: list[Size]) -> dict[int, ChunkRates]:
    return {tokens: fit_chunk(sizes, tokens) for tokens in sizes[0].deep.chunks}


def fit_chunk(sizes: list[Size], tokens: int) -> ChunkRates:
    card, queued = (of_chunk(tokens, name) for name in ("card", "queued"))
    points = [point.chunks[tokens] for size in sizes for point in (size.shallow, size.deep)]
    return ChunkRates(
        layer=through((size.work.layer_plain_bytes, size.layer_us(card)) for size in sizes),
        rest=through((size.work.head_bytes, size.rest_us(card)) for size in sizes),
        host_layer=through((size.work.layer_plain_bytes, size.layer_us(queued)) for size in sizes),
        host_rest_us=statistics.mean(size.rest_us(queued) for size in sizes),
        lead_us=statistics.mean(max(0.0, each.whole - max(each.card, each.queued)) for each in points) * 1e3,
        pairs=square_pairs(tokens),
    )


def fit_slowdown(sizes: list[Size]) -> float:
    """Of the points that were timed so, that with the longest passes tells it best."""
    points = [point for size in sizes for point in (size.shallow, size.deep)]
    timed = [(point.sustained_ms, point.chunks[max(point.chunks)].card) for point in points if point.sustained_ms]
    sustained_ms, paused_ms = max(timed, default=(1.0, 1.0))
    return max(1.0, sustained_ms / paused_ms)


def of_chunk(tokens: int, name: str, kind: str = "chunks") -> Callable[[Point], float]:
    return lambda point: float(getattr(getattr(point, kind)[tokens], name))


def fit_all_reduce(sizes: list[Size]) -> dict[int, float]:
    """Microseconds of a call by its bytes: of engines that send messages of one size, the mean."""
    found: dict[int, list[float]] = {}
    for size in sizes:
        for rows in size.deep.steps:
            with_us = size.layer_us(lambda point, rows=rows: point.steps[rows].short)  # type: ignore[misc]
            without_us = size.layer_us(lambda point, rows=rows: point.steps[rows].without_all_reduce)  # type: ignore[misc]
            call_us = max(0.0, with_us - without_us) / ALL_REDUCES_PER_LAYER
            found.setdefault(rows * size.work.message_bytes, []).append(call_us)
    return {num_bytes: sum(times) / len(times) for num_bytes, times in sorted(found.items())}


def fit_pairs(size: Size) -> float:
    """Microseconds of a million pairs of tokens, one head: what a chunk after another takes more than the first."""
    tokens = max(size.deep.past)
    more_us = size.layer_us(of_chunk(tokens, "card", "past")) - size.layer_us(of_chunk(tokens, "card"))
    return max(0.0, more_us) / (tokens * tokens * size.work.num_heads) * 1e6


def fit_past(sizes: list[Size], pair_us: float) -> Extra:
    """What a chunk after as many tokens takes more, beside its attention to them."""

    def more_us(size: Size, tokens: int, name: str) -> float:
        found = size.layer_us(of_chunk(tokens, name, "past")) - size.layer_us(of_chunk(tokens, name))
        return found - (pair_us * tokens * tokens * size.work.num_heads / 1e6 if name == "card" else 0.0)

    return fit_extra(sizes, list(sizes[0].deep.past), more_us)


def fit_parts(sizes: list[Size], part_tokens: int, pair_us: float) -> Extra:
    """What each further prompt adds to a chunk of as many tokens, whose attention gets less."""

    def more_us(size: Size, tokens: int, name: str) -> float:
        num_parts = tokens // part_tokens
        less_pairs = square_pairs(tokens) - num_parts * square_pairs(part_tokens)
        less_us = pair_us * less_pairs * size.work.num_heads / 1e6 if name == "card" else 0.0
        found = size.layer_us(of_chunk(tokens, name, "parts")) - size.layer_us(of_chunk(tokens, name))
        return max(0.0, found + less_us) / (num_parts - 1)

    return fit_extra(sizes, list(sizes[0].deep.parts), more_us)


def fit_extra(sizes: list[Size], chunks: list[int], more_us: Callable[[Size, int, str], float]) -> Extra:
    """Of layers whose linears are as large at 16 bits, the mean over formats."""

    def table(name: str) -> dict[int, dict[int, float]]:
        return {tokens: by_bytes(sizes, lambda size: more_us(size, tokens, name)) for tokens in chunks}  # noqa: B023

    return Extra(table("card"), table("queued"))


def by_bytes(sizes: list[Size], us: Callable[[Size], float]) -> dict[int, float]:
    found: dict[int, list[float]] = {}
    for size in sizes:
        found.setdefault(size.work.layer_plain_bytes, []).append(us(size))
    return {num_bytes: statistics.mean(times) for num_bytes, times in found.items()}


def through(points: Iterable[tuple[float, float]]) -> Line:
    return fit_line(list(points))
