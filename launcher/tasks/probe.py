"""task=probe: latency and bandwidth of an all-reduce over message sizes, through each transport, sums checked."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from launcher.rank.context import RankContext
from parallel.communicator import Communicator, open_communicator
from parallel.transports.selftest import deadline, time_all_reduce


def run_probe(context: RankContext) -> dict[str, Any]:
    """Results: {"transport": ..., "all_reduce": {transport: [timing, ...]}}; empty for one rank."""
    timings = {}
    for name in probed_transports(context):
        timings[name] = time_sizes(context, open_transport(context, name))
    return {"transport": context.transport_summary(), "all_reduce": timings}


def probed_transports(context: RankContext) -> list[str]:
    """What the run talks through, what that is made of, and gloo as the yardstick that works everywhere."""
    if context.communicator.world_size == 1:
        return []
    return list(dict.fromkeys([*opened_transports(context), "gloo"]))


def open_transport(context: RankContext, name: str) -> Communicator:
    opened = opened_transports(context)
    if name in opened:
        return opened[name]
    return open_communicator(name, context.device, timeout_sec=context.job.run.timeouts.collective_sec)


def opened_transports(context: RankContext) -> dict[str, Communicator]:
    """The run's communicator and those within it, to which it hands on what it does not carry."""
    opened: dict[str, Communicator] = {}
    waiting = [context.communicator]
    while waiting:
        communicator = waiting.pop(0)
        opened.setdefault(communicator.name, communicator)
        waiting += getattr(communicator, "communicators", [])
        waiting += filter(None, [getattr(communicator, "inner", None)])
    return opened


def time_sizes(context: RankContext, communicator: Communicator) -> list[dict[str, Any]]:
    probe, timings = context.job.run.probe, []
    sizes = message_sizes(probe.min_bytes, probe.max_bytes)
    for done, num_bytes in enumerate(sizes, start=1):
        # Large messages take milliseconds each; a fifth of the repeats still gives a median.
        repeats = probe.repeats if num_bytes < 2**20 else max(1, probe.repeats // 5)
        limit_sec = context.job.run.timeouts.collective_sec
        with deadline(communicator.name, limit_sec, context.abort, "timeouts.collective_sec"):
            timings.append(asdict(time_all_reduce(communicator, context.device, num_bytes, repeats=repeats)))
        context.events.progress(f"all-reduce, {communicator.name}", done, len(sizes), "sizes")
    return timings


def message_sizes(smallest: int, largest: int) -> list[int]:
    sizes = [smallest]
    while sizes[-1] * 4 <= largest:
        sizes.append(sizes[-1] * 4)
    return sizes
