"""What a person sees: the plan, the report and failures, on stderr, so that stdout carries answers and JSON only."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from launcher.amounts import UNKNOWN, amount, number, percent
from launcher.config import Aim, TaskKind
from launcher.failures import Failure
from launcher.models.shape import ModelShape
from launcher.plan.options import Option
from launcher.plan.plan import Plan
from launcher.report.accuracy_text import accuracy_page
from launcher.report.bench_text import bench_table, breakdown_tables
from launcher.report.options_text import options_table
from launcher.report.passes_text import passes_table
from launcher.report.plan_text import memory_unit, plan_tables
from launcher.timing.predict import Times
from launcher.units import GIB


def stderr_console() -> Console:
    """Without a terminal (a batch job's log) lines are as long as tables need, not 80 columns."""
    console = Console(stderr=True)
    return console if console.is_terminal else Console(stderr=True, width=140)


def print_plan(plan: Plan, shape: ModelShape, times: Times | str) -> None:
    for table in plan_tables(plan, shape, times):
        stderr_console().print(table)


def print_options(options: list[Option], aim: Aim, batch_size: int) -> None:
    stderr_console().print(options_table(options, aim, batch_size))


def print_warning(message: str) -> None:
    console = stderr_console()
    console.print("[bold yellow]warning[/]", end=" ")
    console.print(message, markup=False, highlight=False, soft_wrap=True)


def print_note(message: str) -> None:
    stderr_console().print(message, markup=False, highlight=False, soft_wrap=True)


def print_failure(failure: Failure) -> None:
    console = stderr_console()
    console.print(f"[bold red]{failure.type}[/]", end=" ")
    console.print(failure.message, markup=False, highlight=False, soft_wrap=True)
    if failure.hint:
        console.print(failure.hint, markup=False, highlight=False, soft_wrap=True)
    if failure.log and failure.log not in failure.message:
        console.print(f"Log: {failure.log}", markup=False, highlight=False, soft_wrap=True)


def print_report(report: dict[str, Any]) -> None:
    console = stderr_console()
    if report["task"] == TaskKind.probe.value:
        print_inventory(console, report["inventory"])
        for transport, timings in (report.get("all_reduce") or {}).items():
            console.print(all_reduce_table(transport, timings))
    elif report["task"] == TaskKind.bench.value:
        print_bench(console, report)
    elif report["task"] == TaskKind.predictions.value:
        print_note(
            accuracy_page(
                f"{report['model']}, {report['world_size']} x {report['device']}", report["predictions"]["points"]
            )
        )
    elif report["task"] == TaskKind.calibrate.value:
        print_note(f"rates: {report['calibration_file']}")
    else:
        console.print(speed_table(report))
    console.print(cards_table(report["cards"]))
    console.print(f"report: {report['run_dir']}/report.json", markup=False, highlight=False, soft_wrap=True)


def print_bench(console: Console, report: dict[str, Any]) -> None:
    console.print(bench_table(report))
    for each in (*passes_table(report), *breakdown_tables(report)):
        if isinstance(each, str):
            console.print(each, markup=False, highlight=False, soft_wrap=True)
        else:
            console.print(each)


def print_inventory(console: Console, inventory: dict[str, Any]) -> None:
    if not inventory["cards"]:
        console.print(f"no NVIDIA card found: ranks run on the CPU ({inventory['host_cores']} cores)")
        return
    console.print(inventory_table(inventory))
    console.print(links_table(inventory))


def speed_table(report: dict[str, Any]) -> Table:
    table = Table("measured", "", title=f"{escape(report['model'])} on {report['world_size']} x {report['device']}")
    load, tpot = report["load"] or {}, report["tpot_ms"] or {}
    rows = [
        ("ready to answer", startup_text(report.get("startup"))),
        ("load", f"{number(load.get('sec'))} s, {number(load.get('gb_per_sec'))} GB/s"),
        ("time to first token", f"{number(report['ttft_ms'])} ms"),
        ("prompt tokens reused", reuse(report["prefix_cache"])),
        ("time per output token", f"{number(tpot.get('p50'))} ms (p99 {number(tpot.get('p99'))})"),
        ("output", f"{number(report['tokens_per_sec'])} tokens/s, prefill included"),
        *accepted_row(report["speculation"]),
        *streamed_row(report["offload"]),
        ("share of communication", percent(report["comm_share"])),
        ("tokens per joule", number(report["tokens_per_joule"])),
    ]
    for row in rows:
        table.add_row(*row)
    return table


def startup_text(startup: dict[str, float] | None) -> str:
    """When the engine was warm, and what came before it."""
    if startup is None:
        return UNKNOWN
    ready, joined, tested, loaded = (startup[f"{step}_sec"] for step in ("ready", "joined", "links_tested", "loaded"))
    parts = {"ranks": joined, "links": tested - joined, "model": loaded - tested, "warm-up": ready - loaded}
    return f"{number(ready)} s: " + ", ".join(f"{name} {number(sec)}" for name, sec in parts.items())


def reuse(tokens: dict[str, int] | None) -> str:
    return UNKNOWN if tokens is None else f"{tokens['reused_tokens']:,} of {tokens['prompt_tokens']:,}"


def accepted_row(speculation: dict[str, Any] | None) -> list[tuple[str, str]]:
    """None without speculation."""
    if speculation is None:
        return []
    mean, drafts, tree = speculation["accepted_per_step"], speculation["num_drafts"], speculation["tree"]
    of = f"{drafts}" if tree is None else f"a tree of {tree['size']}"
    rows = [("drafts accepted a step", f"{number(mean)} of {of} ({speculation['kind']})")]
    rows.append(("passes", f"{number(speculation['passes_per_sec'])} a second"))
    if speculation["verify_ms"] is not None:
        parts = f"{number(speculation['draft_ms'])} ms to draft, {number(speculation['verify_ms'])} ms to check"
        copies = "" if speculation["copy_ms"] is None else f", {number(speculation['copy_ms'])} ms of copies meanwhile"
        rows.append(("of a step", parts + copies))
    return rows + ([] if speculation["choices"] is None else [("steps by tree", steps_by_tree(speculation["choices"]))])


def steps_by_tree(choices: list[dict[str, Any]]) -> str:
    """Those that were chosen, as tokens and depth."""
    chosen = [each for each in choices if each["steps"]]
    names = ["no drafts" if each["size"] == 1 else f"{each['size']} of depth {each['depth']}" for each in chosen]
    return ", ".join(f"{each['steps']} x {name}" for each, name in zip(chosen, names, strict=True)) or UNKNOWN


def streamed_row(offload: dict[str, Any] | None) -> list[tuple[str, str]]:
    """None where all layers are on the cards."""
    if offload is None:
        return []
    amount_text = f"{offload['bytes_per_pass'] / 1e9:.3g} GB a step at {number(offload['gb_per_sec'])} GB/s"
    if offload["kv_bytes_per_pass"]:
        amount_text += f" ({offload['kv_bytes_per_pass'] / 1e9:.3g} of them keys and values)"
    rows = [("from host memory", f"{amount_text}, {percent(offload['share_of_copy'])} of a plain copy's")]
    if offload["host_layers"]:
        number_text = f"{len(offload['host_layers'])} layers, in steps of up to {offload['host_rows']} rows"
        rows.append(("computed by the host", number_text))
    disk = offload["disk"]
    if disk is None:
        return rows
    read_text = f"{disk['bytes_per_pass'] / 1e9:.3g} GB a pass at {number(disk['gb_per_sec'])} GB/s a rank"
    return (rows if offload["streamed_layers"] else []) + [("from the disk", read_text)]


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
