"""Timed passes go the way that is asked for, and others as before."""

from __future__ import annotations

from launcher.config import ModelFacts
from parallel.communicator import Communicator
from parallel.engine.engine import Engine
from parallel.engine.prefill import overlap, section_sizes
from parallel.engine.prefill.halves import PassInHalves
from tests.parallel.ranks import CPU, run_on_ranks
from tools.bench.sections import Way, open_engine, time_way

FACTS = ModelFacts(256, 512, 80, 4, 2, 64, 512, 1024)
WAYS = (Way((1,), False, False), Way((1, 1), True, False), Way((1, 1, 1), False, False), Way((1, 2), False, False))


def timed(communicator: Communicator, quantize: str) -> tuple[list[set[tuple[bool, tuple[int, ...]]]], bool, bool]:
    """Of each way, the passes that were made: whether in halves, and how many sections attend at once."""
    engine = open_engine(communicator, CPU, FACTS, quantize, 300, depth=8)
    made: set[tuple[bool, tuple[int, ...]]] = set()
    init = overlap.PassInSections.__init__

    def traced(run: overlap.PassInSections, decoder: object, joined: list[overlap.Joined]) -> None:
        made.add((isinstance(run, PassInHalves), tuple(len(each.sections) for each in joined)))
        init(run, decoder, joined)

    overlap.PassInSections.__init__ = traced
    found, before, is_timed = [], settings(engine), True
    for way in WAYS:
        made.clear()
        times = time_way(engine, communicator, 300, way, 1)
        is_timed &= times.ms > 0 and times.without_sums_ms > 0
        found.append(set(made))
    return found, is_timed, before == settings(engine)


def settings(engine: Engine) -> tuple[object, ...]:
    return section_sizes.SECTIONS, section_sizes.MOST_SECTIONS, engine.decoder.dequantizing


def test_passes_go_the_way_that_is_timed() -> None:
    for quantize in ("none", "int4"):
        for found, is_timed, is_as_before in run_on_ranks(timed, 2, quantize):
            assert found == [set(), {(True, (1, 1))}, {(False, (1, 1, 1))}, {(False, (1, 2))}]
            assert is_timed and is_as_before
