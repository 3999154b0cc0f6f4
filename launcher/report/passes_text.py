"""Passes over trees of several sizes, as task=bench timed them, for reading."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from launcher.amounts import count, number, percent


def passes_table(report: dict[str, Any]) -> list[Table]:
    """None where bench.tree_sizes named none."""
    rows = report["passes"]
    if not rows:
        return []
    sequences = count(report["workload"]["batch_size"], "sequence")
    table = Table("tree", title=f"passes over trees of drafts, {sequences} at a time")
    for name in (
        "depth",
        "pass ms",
        "draft ms",
        "both",
        "passes/s",
        "GB over the link",
        "of its floor",
        *assumed_names(rows),
    ):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*cells(row))
    if rows[0]["assumed"]["acceptance"] is not None:
        table.caption = "tokens are what bench.acceptance would give: assumed, not measured"
    return [table]


def assumed_names(rows: list[dict[str, Any]]) -> tuple[str, ...]:
    chance = rows[0]["assumed"]["acceptance"]
    return () if chance is None else (f"tokens a pass at {chance:g}", "tokens/s")


def cells(row: dict[str, Any]) -> list[str]:
    found = [
        str(row["tree_size"]),
        str(row["depth"]),
        number(row["pass_ms"]),
        number(row["draft_ms"] or None),
        number(row["step_ms"]),
        number(row["passes_per_sec"]),
        number(row["link_bytes"] / 1e9 or None),
        percent(row["share_of_floor"]),
    ]
    assumed = row["assumed"]
    if assumed["acceptance"] is None:
        return found
    return [*found, number(assumed["tokens_per_pass"]), number(assumed["tokens_per_sec"])]
