"""What to say when a run does not fit: the sizes on every rank, and what would."""

from __future__ import annotations

from collections.abc import Sequence

from launcher.config import HardwareKind
from launcher.memory.demand import Demand
from launcher.memory.fit import group_lines
from launcher.memory.kv import host_kv_bytes
from launcher.memory.streamed import ring_bytes
from launcher.plan.remedies import Refused, kv_on_host, other_runs, smaller_runs, streaming
from launcher.plan.topology import PlanError
from parallel.units import GIB


def refuse_memory(refused: Refused) -> PlanError:
    """The error for a run whose sequences do not fit the cards, or whose weights alone do not."""
    demand, budgets, max_context = refused.demand, refused.budgets, refused.max_context
    fixed = demand.fixed_lines()
    weights_fit = all(sum(lines.values()) <= budget for lines, budget in zip(fixed, budgets, strict=True))
    what = _sequences(demand, max_context) if weights_fit else f"the weights in {refused.format}"
    remedies = [*smaller_runs(refused)] if weights_fit else []
    remedies += [*other_runs(refused), *streaming(refused), *kv_on_host(refused)]
    lines = demand.lines(max_context) if weights_fit else fixed
    sizes = [_rank_text(rank, lines[rank], refused) for rank in range(demand.world_size)]
    remedies = remedies or ["a smaller model, or more memory"]
    what_fits = f"What would fit: {'; or '.join(remedies)}."
    worst = max(range(demand.world_size), key=lambda rank: sum(lines[rank].values()) - budgets[rank])
    summary = f"{what} do not fit: {_total_text(lines[worst], budgets[worst])}"
    return PlanError("\n".join([f"{what} do not fit (predicted):", *sizes, *_no_cards(refused), what_fits]), summary)


def refuse_host_memory(
    refused: Refused, max_context: int, needed_bytes: int, free_bytes: int, own_remedies: Sequence[str]
) -> PlanError:
    """The error for a run whose streamed layers do not fit into host memory.

    Args:
        max_context: of the sequences whose keys and values are counted where they lie there, too.
        needed_bytes: of host memory, for the layers and all else of the ranks.
        own_remedies: settings by which less lies there.
    """
    demand, inventory = refused.demand, refused.inventory
    num_hosted, num_layers = demand.num_streamed - demand.num_disk, demand.shape.num_layers
    if num_hosted:
        what = f"{num_hosted} of {num_layers} layers in {refused.format} do not fit the cards and would be streamed " \
            "from host memory, which does not suffice"  # fmt: skip
        parts = f"{sum(demand.host_bytes()) / GIB:.2f} GiB for them and the embedding"
    else:
        what = "host memory does not suffice, with every layer that is not on a card on the disk (offload.disk)"
        parts = f"{sum(demand.host_bytes()) / GIB:.2f} GiB for the embedding"
    if demand.num_disk:
        parts += f" and {sum(ring_bytes(demand)) / GIB:.2f} to read others ahead"
    if demand.num_kv_hosted:
        kv_bytes = sum(host_kv_bytes(demand, max_context))
        parts += f", {kv_bytes / GIB:.2f} for keys and values of {_sequences(demand, max_context)}"
    remedies = [*other_runs(refused), *own_remedies, "more free host memory"]
    is_free = free_bytes in (inventory.host_memory_bytes, inventory.host_free_bytes)
    state = "are free" if is_free else "may be used (limits.host_memory_gib)"
    # Cards that are described by facts are not in this host.
    total = f" of {inventory.host_memory_bytes / GIB:.2f}" if inventory.source == "nvml" else ""
    return PlanError(
        f"{what}: with {parts} the run needs {needed_bytes / GIB:.2f} (predicted), and {free_bytes / GIB:.2f}"
        f"{total} {state}.\nWhat would fit: {'; or '.join(remedies)}.",
        f"host memory does not suffice: {needed_bytes / GIB:.2f} GiB of {free_bytes / GIB:.2f}",
    )


def _sequences(demand: Demand, max_context: int) -> str:
    return f"sequences of {max_context} tokens with workload.batch_size={demand.batch_size}"


def _no_cards(refused: Refused) -> list[str]:
    """Why ranks are on the CPU, where nobody asked for that."""
    if refused.inventory.cards or refused.run.hardware.kind != HardwareKind.local:
        return []
    return [
        "No NVIDIA card was found: python -m tools.health says more; task=plan hardware=rtx4090 plans for such cards."
    ]


def _rank_text(rank: int, lines: dict[str, int], refused: Refused) -> str:
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in group_lines(lines).items() if size)
    cards, budget = refused.inventory.cards, refused.budgets[rank]
    where = f"rank {rank} on card {cards[rank].index} ({cards[rank].name})" if cards else f"rank {rank} on the CPU"
    return f"  {where}: {_total_text(lines, budget)}{_bound(rank, refused)}: {parts}"


def _bound(rank: int, refused: Refused) -> str:
    """What leaves a rank no more, where that is not the size of its card."""
    inventory, limit_gib = refused.inventory, refused.run.limits.card_memory_gib
    if inventory.cards and inventory.cards[rank].free_bytes == refused.budgets[rank]:
        return " free"
    host_bytes = inventory.host_memory_bytes // refused.demand.world_size
    size = inventory.cards[rank].memory_bytes if inventory.cards else host_bytes
    is_limited = limit_gib is not None and (not size or limit_gib * GIB < size)
    return f" (limits.card_memory_gib={limit_gib:g})" if is_limited else ""


def _total_text(lines: dict[str, int], budget: int) -> str:
    return f"{sum(lines.values()) / GIB:.2f} GiB of {budget / GIB:.2f}"
