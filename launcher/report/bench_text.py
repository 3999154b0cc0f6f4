"""What task=bench found out, for reading: this engine and its baselines in one table, then its decode step
and a pass of prompts."""

from __future__ import annotations

from typing import Any

from rich.markup import escape
from rich.table import Table

from launcher.amounts import amount, count, number, percent
from launcher.report.speed_text import disk_text
from parallel.units import GIB

ENGINE = "launch70b"
NUM_LISTED = 4
PART_NAMES = {"all_reduce_alone": "all-reduce alone"}


def bench_table(report: dict[str, Any]) -> Table:
    """A row each; what could not be run has its reason below the table."""
    where = f"{escape(report['model'])} on {report['world_size']} x {report['device']}"
    table = Table("", title=f"{where}: {workload_text(report['workload'])}")
    for name in ("TTFT ms", "ITL ms", "p99", "tokens/s", "prefill tokens/s", "communication", "GiB a card"):
        table.add_column(name, justify="right")
    baselines = report.get("baselines") or []
    engine = report | {"name": ENGINE, "peak_bytes": max(card["peak_bytes"] or 0 for card in report["cards"]) or None}
    for row in (engine, *predicted_row(report), *(row for row in baselines if row["error"] is None)):
        table.add_row(*cells(row))
    missing = [f"{row['name']}: {row['error']}" for row in baselines if row["error"] is not None]
    repeats = report["workload"]["repeats"]
    spread = [f"lowest to highest of {repeats} runs in brackets"] if repeats > 1 else []
    table.caption = "\n".join([*spread, *map(escape, missing)])
    return table


def predicted_row(report: dict[str, Any]) -> list[dict[str, Any]]:
    """What the plan said of this engine, where it could."""
    predicted = report["predicted"]
    if predicted.get("tpot_ms") is None:
        return []
    peak_bytes = max(card["predicted_bytes"] for card in predicted["cards"])
    times = predicted | {"tpot_ms": {"p50": predicted.get("itl_ms"), "p99": None}}
    return [times | {"name": "predicted", "spread": {}, "peak_bytes": peak_bytes}]


def cells(row: dict[str, Any]) -> list[str]:
    spread = row["spread"]
    return [
        row["name"],
        with_spread(row["ttft_ms"], spread.get("ttft_ms")),
        with_spread(row["tpot_ms"]["p50"], spread.get("tpot_p50_ms")),
        number(row["tpot_ms"]["p99"]),
        with_spread(row["tokens_per_sec"], spread.get("tokens_per_sec")),
        with_spread(row["prefill_tokens_per_sec"], spread.get("prefill_tokens_per_sec")),
        percent(row["comm_share"]),
        amount(row["peak_bytes"], GIB),
    ]


def workload_text(workload: dict[str, Any]) -> str:
    text = f"{workload['prompt_tokens']} + {workload['output_tokens']} tokens, {workload['batch_size']} at a time"
    rate = workload["arrival_rate"]
    return text if rate is None else f"{text}, {rate:g} requests/s"


def with_spread(value: float | None, spread: dict[str, float] | None) -> str:
    if spread is None or spread["min"] == spread["max"]:
        return number(value)
    return f"{number(value)} ({number(spread['min'])}-{number(spread['max'])})"


def breakdown_tables(report: dict[str, Any]) -> list[Table | str]:
    """How requests over time were served; the parts of a decode step, and of a pass of prompts, with what `other` is,
    or why there are none."""
    step, prefill = report["breakdown"], report["prefill_breakdown"]
    return [
        *requests_text(report["requests"]),
        *parts_table("decode step", step, step_text(report)),
        *parts_table("prefill", prefill, prefill_text(prefill)),
    ]


def requests_text(found: dict[str, Any]) -> list[str]:
    """Nothing where requests did not come over time."""
    if found["offered_per_sec"] is None:
        return []
    rates = f"{number(found['per_sec'])} of {number(found['offered_per_sec'])} requests/s answered"
    waits = [
        f"{name} {number(found[key]['p50'])} ms (p99 {number(found[key]['p99'])})"
        for name, key in (("first token", "ttft_ms"), ("next", "itl_ms"), ("mean of an answer", "tpot_ms"))
    ]
    good = f"{percent(found['good_share'])}, {number(found['good_per_sec'])} a second, within "
    good += f"{number(found['max_ttft_ms'])} ms and {number(found['max_tpot_ms'])} ms a token"
    return ["; ".join([rates, *waits, good])]


def parts_table(name: str, found: dict[str, Any], title: str) -> list[Table | str]:
    if found["parts"] is None:
        return [f"no breakdown of the {name}: {found['problem']}"]
    table = Table(name, "us", "share", title=title)
    for part, time in found["parts"].items():
        table.add_row(PART_NAMES.get(part, part.replace("_", "-")), number(time["us"]), percent(time["share"]))
    return [table, other_text(found["other_us"])]


def other_text(us_by_name: dict[str, float]) -> str:
    """What took most of the time of `other`, in us."""
    return "other: " + ", ".join(f"{name[:60]} {number(us)}" for name, us in list(us_by_name.items())[:NUM_LISTED])


def prefill_text(found: dict[str, Any]) -> str:
    """The pass by itself."""
    measured, without = found["pass_ms"]["measured"], found["pass_ms"]["without_all_reduce"]
    text = f"prefill of {count(found['tokens'], 'token')} {number(measured)} ms"
    return text if without is None else f"{text}, {number(without)} without all-reduces"


def step_text(report: dict[str, Any]) -> str:
    """The step by itself: its time, and how near that is to reading what must be read."""
    text = f"decode step {number(report['decode_step_ms']['measured'])} ms"
    share, found = report["bandwidth_share"], report["bandwidth"]
    offload = report["offload"]
    if offload is not None and offload["disk"] is not None:
        near = "" if share is None else f", {percent(share)} of the floor"
        return f"{text}, from the disk {disk_text(offload['disk'])}{near}; with the profiler:"
    if share is None:
        return text
    if offload is not None:
        streamed = f"{number(offload['bytes_per_pass'] / 1e9)} GB from host memory"
        text += f", {streamed} at {number(offload['gb_per_sec'])} of a copy's {number(offload['copy_gb_per_sec'])} GB/s"
        return f"{text}, {percent(share)} of the floor; with the profiler:"
    return f"{text}, {percent(share)} of a copy's {number(found['copy_gb_per_sec'])} GB/s; with the profiler:"
