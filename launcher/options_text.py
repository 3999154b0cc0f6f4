"""The options of topology=all, for reading."""

from __future__ import annotations

from rich.table import Table

from launcher.amounts import UNKNOWN, amount, number
from launcher.config import Aim
from launcher.options import Option
from launcher.units import GIB

COLUMNS = ("ms a token", "TTFT ms", "tokens/s, all copies", "KV tokens, all copies", "GiB a card")


def options_table(options: list[Option], aim: Aim, batch_size: int) -> Table:
    """`batch_size`: of each copy."""
    title = f"Ways to run it, {batch_size} at a time in each copy, predicted; the best for {aim.value} first"
    table = Table("cards x copies", "weights", title=title)
    for name in COLUMNS:
        table.add_column(name, justify="right")
    table.add_column("", no_wrap=True)
    for option in options:
        table.add_row(f"{option.world_size} x {option.replicas}", option.format, *cells(option), option.reason)
    return table


def cells(option: Option) -> tuple[str, ...]:
    if not option.fits:
        return (UNKNOWN,) * len(COLUMNS)
    return (
        number(option.tpot_ms),
        number(option.ttft_ms),
        number(option.tokens_per_sec),
        f"{option.kv_tokens:,}",
        amount(option.predicted_bytes, GIB),
    )
