"""task=probe: latency and bandwidth of an all-reduce over message sizes, through each transport, sums checked."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from launcher.rank import RankContext
from parallel.communicator import Communicator, open_communicator
from parallel.selftest import deadline, time_all_reduce


def run_probe(context: RankContext) -> dict[str, Any]:
    """Results: {"transport": ..., "all_reduce": {transport: [timing, ...]}}; empty for one rank."""
    timings = {}
    for name in probed_transports(context):
        timings[name] = time_sizes(context, open_transport(context, name))
    return {"transport": context.transport_summary(), "all_reduce": timings}


def probed_transports(context: RankContext) -> list[str]:
    """Those the run chose from what it found, and gloo as the yardstick that works everywhere."""
    if context.communicator.world_size == 1:
        return []
    return list(dict.fromkeys([context.communicator.name, context.job.placement.transport, "gloo"]))


def open_transport(context: RankContext, name: str) -> Communicator:
    known = {each.name: each for each in (context.communicator, getattr(context.communicator, "inner", None)) if each}
    if name in known:
        return known[name]
    return open_communicator(name, context.device, timeout_sec=context.job.run.timeouts.collective_sec)


def time_sizes(context: RankContext, communicator: Communicator) -> list[dict[str, Any]]:
    probe, timings = context.job.run.probe, []
    sizes = message_sizes(probe.min_bytes, probe.max_bytes)
    for done, num_bytes in enumerate(sizes, start=1):
        # Large messages take milliseconds each; a fifth of the repeats still gives a median.
        repeats = probe.repeats if num_bytes < 2**20 else max(1, probe.repeats // 5)
        with deadline(communicator.name, context.job.run.timeouts.collective_sec, context.abort):
            timings.append(asdict(time_all_reduce(communicator, context.device, num_bytes, repeats=repeats)))
        context.events.progress(f"all-reduce, {communicator.name}", done, len(sizes), "sizes")
    return timings


def message_sizes(smallest: int, largest: int) -> list[int]:
    sizes = [smallest]
    while sizes[-1] * 4 <= largest:
        sizes.append(sizes[-1] * 4)
    return sizes
