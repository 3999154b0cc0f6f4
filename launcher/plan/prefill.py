"""How passes of prompts go, as far as memory depends on it: captured or not, by packed weights or dequantised ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from launcher.config import RunConfig, TransportKind
from launcher.config.engine import PrefillGraphs
from launcher.hardware.inventory import Card, Inventory
from launcher.memory.demand import Demand
from launcher.memory.fit import fits
from launcher.plan.topology import Placement
from parallel.engine.limits import CAPTURED_PASSES, graphed_rows
from parallel.footprint import MIN_FUSED_ROWS, sure_fused_rows

# From such a rate of memory on a pass of a few hundred tokens waits for the host: on two H200, 512 tokens of a 70B took
# 118 ms captured, and else 123 to 220 by the host's speed. On an RTX 4090, 1008 GB/s, it takes several times as long.
GRAPHED_GB_PER_SEC = 2000.0


def wanted_passes(run: RunConfig, placement: Placement, inventory: Inventory) -> int:
    """Small passes of prompts that are captured at a time where they fit, by engine.prefill_graphs and the slowest
    card."""
    asked = run.engine.prefill_graphs
    if placement.device != "cuda" or asked == PrefillGraphs.off or not graphed_rows(run.engine.prefill_chunk):
        return 0
    rates = [card.memory_gb_per_sec or 0.0 for card in inventory.cards[: placement.world_size]]
    is_fast = min(rates, default=0.0) >= GRAPHED_GB_PER_SEC
    return CAPTURED_PASSES if is_fast or asked == PrefillGraphs.on else 0


def hides_sums(run: RunConfig, *, over_nvlink: bool) -> bool:
    """Whether sums between ranks are worth hiding behind products, in sections of long passes.

    Over NVLink they are not: of 512 and 1024 tokens of a 70B in 4 bits on two H200 they took 8 and 11 ms, and two
    sections 12 and 16 more for the products (results/LOG.md).
    """
    return not over_nvlink or run.engine.transport == TransportKind.host_memory


def planned_fused_rows(run: RunConfig, demand: Demand, cards: Sequence[Card]) -> int:
    """Up to how many rows packed weights are never dequantised: as asked for, else what such cards are known for."""
    asked = run.engine.fused_prefill_rows
    if asked is not None:
        return asked
    known = {card.compute_capability for card in cards}
    capability = known.pop() if len(known) == 1 else None
    shapes = [demand.shape, *([] if demand.draft_shape is None else [demand.draft_shape])]
    schemes = [shape.scheme for shape in shapes if shape.scheme is not None]
    found = (sure_fused_rows(scheme, demand.device, demand.dtype, capability) for scheme in schemes)
    return min(found, default=MIN_FUSED_ROWS)


def capture_passes(run: RunConfig, demand: Demand, budgets: tuple[int, ...]) -> Demand:
    """`demand` without captured passes where it fits only so, or not at all, unless engine.prefill_graphs=on."""
    needed = run.engine.max_context or run.needed_tokens
    if run.engine.prefill_graphs == PrefillGraphs.on or fits(demand, budgets, needed):
        return demand
    return replace(demand, captured_passes=0)
