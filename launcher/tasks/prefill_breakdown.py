"""Where the time of a pass of prompts goes, part by part, and how much of its all-reduces other parts hide.

As the breakdown of a decode step, but for two things: dequantising is a part by itself, and all-reduces may run beside
other kernels.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from launcher.tasks.breakdown import (
    COPIES,
    NUM_LISTED,
    OTHER,
    PARTS,
    Piece,
    part_of,
    problem_text,
    profile_steps,
    split_steps,
)
from parallel.communicator import Communicator, ElidedAllReduce
from parallel.engine.chunk_timer import prepared_chunk, time_chunks
from parallel.engine.engine import Engine

NUM_PASSES = 2
NUM_TIMED = 3
ALL_REDUCE = "all_reduce"
# Of a pass, copies between host and card are those of all-reduces, but for its tokens: a few microseconds.
PREFILL_PARTS = {
    ALL_REDUCE: (*PARTS[ALL_REDUCE], "memcpy htod", "memcpy dtoh"),
    "dequantize": ("dequantize",),
    # Before products: flash attention's kernels have cutlass in their names too.
    "attention": PARTS["attention"],
    "products": PARTS["linears"],
    **{name: PARTS[name] for name in ("norms", "rotary", "activation")},
}


def prefill_breakdown(engine: Engine, lengths: Sequence[int], communicator: Communicator) -> dict[str, Any]:
    """Of a pass that reads prompts of `lengths` tokens; on all ranks at once. See `break_down_passes`.

    `pass_ms`: a pass by itself, and without all-reduces (null on one rank), which tells what they cost in all: beside
    the time in which other parts wait for them, that by which they slow those down.
    """
    pass_ms = {"measured": median_ms(engine, lengths, communicator), "without_all_reduce": None}
    if communicator.world_size > 1:
        pass_ms["without_all_reduce"] = median_ms(engine, lengths, ElidedAllReduce(communicator))
    with prepared_chunk(engine, lengths, communicator) as run:
        run()
        communicator.barrier()
        pieces = profile_steps(run, engine.device, NUM_PASSES)
    if engine.streamer is not None:
        # Copies of layers run from one pass into the next, and cannot be told from those of all-reduces.
        pieces = [piece for piece in pieces if COPIES not in piece.name.lower()]
    return {"tokens": sum(lengths), "pass_ms": pass_ms} | break_down_passes(pieces)


def median_ms(engine: Engine, lengths: Sequence[int], communicator: Communicator) -> float | None:
    communicator.barrier()
    return statistics.median(time_chunks(engine, lengths, NUM_TIMED, communicator))


def break_down_passes(pieces: Sequence[Piece], num_passes: int = NUM_PASSES) -> dict[str, Any]:
    """Microseconds a pass and share of each part, of `num_passes` passes and one before them.

    `all_reduce` is the time in which all-reduces went on, `all_reduce_alone` that in which nothing else did; the other
    parts and `all_reduce_alone` make up the pass, with `between`, in which nothing ran.
    `problem` as of `break_down_steps`.
    """
    passes = split_steps(pieces, num_passes)
    if passes is None:
        return {"parts": None, "problem": problem_text(pieces, num_passes)}
    kept = [piece for each in passes for piece in each]
    by_part: dict[str, list[Piece]] = {name: [] for name in (*PREFILL_PARTS, OTHER)}
    for piece in kept:
        by_part[part_of(piece.name, PREFILL_PARTS)].append(piece)
    pass_us = (max(piece.start_us + piece.us for piece in kept) - kept[0].start_us) / num_passes
    parts = {name: busy_us(found) / num_passes for name, found in by_part.items()}
    hidden_by = [piece for name, found in by_part.items() if name != ALL_REDUCE for piece in found]
    parts["all_reduce_alone"] = (busy_us(kept) - busy_us(hidden_by)) / num_passes
    parts["between"] = pass_us - busy_us(kept) / num_passes
    return {
        "pass_us": pass_us,
        "parts": {name: {"us": us, "share": us / pass_us} for name, us in parts.items()},
        "other_us": longest(by_part[OTHER], num_passes),
        "problem": None,
    }


def busy_us(pieces: Iterable[Piece]) -> float:
    """The time in which at least one of them ran."""
    busy, until = 0.0, 0.0
    for piece in sorted(pieces, key=lambda piece: piece.start_us):
        end = piece.start_us + piece.us
        busy += max(0.0, end - max(until, piece.start_us))
        until = max(until, end)
    return busy


def longest(pieces: Iterable[Piece], num_passes: int) -> dict[str, float]:
    """Microseconds a pass of the names with the most time."""
    by_name: dict[str, float] = {}
    for piece in pieces:
        by_name[piece.name] = by_name.get(piece.name, 0.0) + piece.us / num_passes
    return dict(sorted(by_name.items(), key=lambda item: -item[1])[:NUM_LISTED])
