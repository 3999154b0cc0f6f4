"""The options of topology=all, for reading."""

from __future__ import annotations

from rich.table import Table

from launcher.amounts import UNKNOWN, amount, count, number
from launcher.config import Aim
from launcher.plan.options import Option
from parallel.units import GIB

# Narrow, so that reasons beside them have room.
COLUMNS = ("ms a\ntoken", "floor", "TTFT ms", "tokens/s,\nall copies", "KV tokens,\nall copies", "GiB a\ncard")


def options_table(options: list[Option], aim: Aim, batch_size: int) -> Table:
    """`batch_size`: of each copy."""
    title = f"Ways to run it, {batch_size} at a time in each copy, predicted; {order(options, aim)}"
    table = Table(title=title)
    for name in ("cards x\ncopies", "weights"):
        table.add_column(name, no_wrap=True)
    for name in COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for option in options:
        table.add_row(f"{option.world_size} x {option.replicas}", option.format, *cells(option), remarks(option))
    return table


def remarks(option: Option) -> str:
    """What sets it apart from runs whose weights are all on the cards, and why it has no times, or does not fit."""
    streamed = f"streams {count(option.streamed_layers, 'layer')}" if option.streamed_layers else ""
    return "; ".join(text for text in (streamed, option.reason) if text)


def order(options: list[Option], aim: Aim) -> str:
    """What the first row is, which is not the best for times that nobody knows."""
    is_known = aim == Aim.context or any(option.tpot_ms is not None for option in options)
    return f"the best for {aim.value} first" if is_known else f"no times to rank by plan.aim={aim.value}"


def bases(options: list[Option]) -> list[str]:
    """What the times rest on, a line for each number of cards of a copy."""
    found = {option.world_size: "; ".join(option.basis) for option in options if option.basis}
    return [f"predicted on {count(cards, 'card')} from {found[cards]}." for cards in sorted(found)]


def cells(option: Option) -> tuple[str, ...]:
    if not option.fits:
        return (UNKNOWN,) * len(COLUMNS)
    return (
        number(option.tpot_ms),
        number(option.tpot_floor_ms),
        number(option.ttft_ms),
        number(option.tokens_per_sec),
        f"{option.kv_tokens:,}",
        amount(option.predicted_bytes, GIB),
    )
