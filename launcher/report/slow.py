"""What made a run slower than it could be, as far as its report tells: a line each, with what helps."""

from __future__ import annotations

from typing import Any

from launcher.plan.limits import KEPT_FREE
from parallel.kernels.limits import PAGE_SIZE

# A link that carries less may be idle now and then, and an idle card slows its link down.
LOADED_BYTES_PER_SEC = 10**9
# A step of so many answers takes a fifth longer than one of a single answer (docs/bench.md).
SHARED_ROWS = 8


def slow_parts(report: dict[str, Any]) -> list[str]:
    """Of a run on cards."""
    if report["device"] != "cuda":
        return []
    return [*slow_kernels(report), *failed_transports(report), *poor_links(report), *waiting_prompts(report)]


def slow_kernels(report: dict[str, Any]) -> list[str]:
    """A line for everything that cards compute without our kernels."""
    lines = [
        f"{name} in plain torch: {why}" for name, why in ((report["kernels"] or {}).get("plain_torch", {})).items()
    ]
    linears = (report["load"] or {}).get("kernels", {})
    return lines + [f"{count} linears by {kind}" for kind, count in linears.items() if kind.startswith("dequantize")]


def failed_transports(report: dict[str, Any]) -> list[str]:
    """Those that did not pass their self-test, and why."""
    return [found for each in (report["transport"] or {}).values() for found in each["failed"]]


def poor_links(report: dict[str, Any]) -> list[str]:
    """Links that ran, under load, at less than card and slot can do together, and such that lose bits."""
    best = {card["index"]: card for card in report["inventory"]["cards"]}
    return [line for card in report["cards"] if card["index"] in best for line in poor_link(card, best[card["index"]])]


def poor_link(card: dict[str, Any], best: dict[str, Any]) -> list[str]:
    """`card`: what it did; `best`: what the inventory says of it."""
    name, lines = f"card {card['index']}", []
    if (card["pcie_lanes"] or 0) < (best["pcie_lanes"] or 0) and card["pcie_lanes"]:
        lines.append(
            f"{name} has {card['pcie_lanes']} of {best['pcie_lanes']} PCIe lanes: seat it anew, without a riser, and "
            "see the firmware's bifurcation."
        )
    carried = max(card["pcie_tx_peak_bytes_per_sec"] or 0, card["pcie_rx_peak_bytes_per_sec"] or 0)
    if carried >= LOADED_BYTES_PER_SEC and (card["pcie_generation"] or 99) < (best["pcie_generation"] or 0):
        lines.append(
            f"{name} ran its link at PCIe {card['pcie_generation']} under load, where card and slot can do "
            f"{best['pcie_generation']}: see the slot's setting in the firmware."
        )
    if card["pcie_replays"]:
        lines.append(
            f"{name} sent {card['pcie_replays']} packets again: a riser or slot loses bits. Without the riser, or "
            "with the slot one generation lower, it should be 0."
        )
    return lines


def waiting_prompts(report: dict[str, Any]) -> list[str]:
    """That prompts waited for one another, where a pass over the weights could have served several of them."""
    num, at_a_time = len(report.get("outputs") or ()), report.get("batch_size") or SHARED_ROWS
    if at_a_time >= SHARED_ROWS or num < 2 * at_a_time:
        return []
    more = min(num, SHARED_ROWS, rows_with_room(report))
    if more <= at_a_time:
        return []
    return [
        f"{num} prompts were answered {at_a_time} at a time: workload.batch_size={more} shares each pass among {more}."
    ]


def rows_with_room(report: dict[str, Any]) -> int:
    """Sequences as long as the longest of the run, for which there is memory; layers that are streamed make room."""
    predicted, config = report["predicted"], report["config"]
    if predicted["offload"] is not None:
        return SHARED_ROWS
    longest = max(output["num_prompt_tokens"] for output in report["outputs"]) + config["workload"]["output_tokens"]
    in_pages = -(-min(longest, report["max_context"]) // PAGE_SIZE) * PAGE_SIZE
    return int((1 - KEPT_FREE) * predicted["kv_tokens_that_fit"]) // (config["engine"]["max_context"] or in_pages)
