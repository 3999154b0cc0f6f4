"""Cards and links, for reading: what they are, what they did in a run, and what all-reduces between them take."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from launcher.amounts import UNKNOWN, amount, number
from launcher.report.plan_text import memory_unit
from parallel.units import GIB


def cards_table(cards: list[dict[str, Any]]) -> Table:
    """Memory predicted and measured, and what the card did meanwhile."""
    unit, unit_bytes = memory_unit(max(card["peak_bytes"] or 0 for card in cards))
    names = (
        f"predicted {unit}",
        f"peak {unit}",
        f"host {unit}",
        "W",
        "J",
        "max C",
        "SM MHz",
        "PCIe",
        "replays",
        "throttled",
    )
    table = Table("card", *names)
    for card in cards:
        link = f"{card['pcie_generation']} x{card['pcie_lanes']}" if card["pcie_generation"] else UNKNOWN
        table.add_row(
            card["name"],
            amount(card["predicted_bytes"], unit_bytes),
            amount(card["peak_bytes"], unit_bytes),
            amount(card.get("host_peak_bytes"), unit_bytes),
            number(card["power_w"]),
            number(card["energy_j"]),
            number(card["temperature_c"]),
            number(card["sm_clock_mhz"]),
            link,
            number(card["pcie_replays"]),
            ", ".join(card["throttle_reasons"]) or UNKNOWN,
        )
    sources = ", ".join(sorted({card["source"] for card in cards}))
    table.caption = f"peak: {sources}; host: peak of the rank's process"
    return table


def inventory_table(inventory: dict[str, Any]) -> Table:
    table = Table("card", "name", "memory GiB", "GB/s", "PCIe", "power limit W", title="cards")
    for card in inventory["cards"]:
        table.add_row(
            str(card["index"]),
            card["name"],
            amount(card["memory_bytes"], GIB),
            number(card["memory_gb_per_sec"]),
            f"{card['pcie_generation'] or UNKNOWN} x{card['pcie_lanes'] or UNKNOWN}",
            number(card["power_limit_w"]),
        )
    return table


def links_table(inventory: dict[str, Any]) -> Table:
    table = Table("cards", "link", "path", "NVLinks", "peer access", title="links")
    for link in inventory["links"]:
        access = {True: "yes", False: "no", None: UNKNOWN}[link["peer_access"]]
        row = (f"{link['first']} - {link['second']}", link["kind"], link["path"], str(link["num_nvlinks"]), access)
        table.add_row(*row)
    return table


def all_reduce_table(transport: str, timings: list[dict[str, Any]]) -> Table:
    table = Table("bytes", "p50 us", "p99 us", "GB/s", "exact sums", title=f"all-reduce through {transport}")
    for timing in timings:
        table.add_row(
            f"{timing['num_bytes']:,}",
            f"{timing['p50_us']:.1f}",
            f"{timing['p99_us']:.1f}",
            f"{timing['gb_per_sec']:.3f}",
            "yes" if timing["exact"] else "NO",
        )
    return table
