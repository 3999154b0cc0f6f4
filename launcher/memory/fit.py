"""Whether what a run takes fits, and how much of it would."""

from __future__ import annotations

from collections.abc import Callable

from launcher.memory.demand import Demand


def group_lines(lines: dict[str, int]) -> dict[str, int]:
    """The lines with those of one group (weights.*) added up."""
    groups: dict[str, int] = {}
    for name, size in lines.items():
        group = name.partition(".")[0]
        groups[group] = groups.get(group, 0) + size
    return groups


def fits(demand: Demand, budgets: tuple[int, ...], max_context: int) -> bool:
    """Whether every rank stays inside its budget, in bytes."""
    each = zip(demand.each_lines(max_context), budgets, strict=True)
    return all(sum(lines.values()) <= budget for lines, budget in each)


def largest_context(demand: Demand, budgets: tuple[int, ...], limit: int) -> int:
    """The most tokens, up to `limit`, that fit on every rank; 0 where none do. No sum shrinks as the context grows."""
    return largest(lambda tokens: fits(demand, budgets, tokens), limit)


def largest(is_possible: Callable[[int], bool], limit: int) -> int:
    """The largest number up to `limit` that is possible, as all below it are; 0 where none is."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        if is_possible(middle):
            low = middle
        else:
            high = middle - 1
    return low
