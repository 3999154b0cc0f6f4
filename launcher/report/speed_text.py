"""What task=generate measured, and what other tasks had when they were ended, for reading."""

from __future__ import annotations

from typing import Any

from rich.markup import escape
from rich.table import Table

from launcher.amounts import UNKNOWN, number, percent
from launcher.report.accuracy import PAGE_FILE


def speed_table(report: dict[str, Any]) -> Table:
    table = Table("measured", "", title=f"{escape(report['model'])} on {report['world_size']} x {report['device']}")
    load, tpot = report["load"] or {}, report["tpot_ms"] or {}
    token_text = f"{number(tpot.get('p50'))} ms (p99 {number(tpot.get('p99'))})"
    rate_text = f"{number(report['tokens_per_sec'])} tokens/s, prefill included"
    rows = [
        ("ready to answer", startup_text(report.get("startup"))),
        ("load", f"{number(load.get('sec'))} s, {number(load.get('gb_per_sec'))} GB/s"),
        ("time to first token", f"{number(report['ttft_ms'])} ms{predicted(report, 'ttft_ms')}"),
        ("prompt tokens reused", reuse(report["prefix_cache"])),
        ("time per output token", token_text + predicted(report, "itl_ms")),
        ("output", rate_text + predicted(report, "tokens_per_sec")),
        *accepted_row(report["speculation"]),
        *streamed_row(report["offload"]),
        ("share of communication", percent(report["comm_share"])),
        ("tokens per joule", joule_text(report)),
    ]
    for row in rows:
        table.add_row(*row)
    return table


def joule_text(report: dict[str, Any]) -> str:
    """Tokens per joule; what the plan said of them beside it, where it could."""
    return number(report["tokens_per_joule"]) + predicted(report, "tokens_per_joule")


def predicted(report: dict[str, Any], name: str) -> str:
    """What is to stand beside what was measured; empty where nothing was predicted."""
    value = report["predicted"].get(name)
    return "" if value is None else f", predicted {number(value)}"


def incomplete_text(measured: dict[str, Any]) -> str:
    """What a workload's finished repeats came to, where not all could be, or how many workloads of a grid were done."""
    if "workloads" in measured:
        return f"incomplete, {measured['workloads']} of {measured['wanted_workloads']} workloads, as in {PAGE_FILE}"
    tpot = measured["tpot_ms"]
    return (
        f"incomplete, {measured['repeats']} of {measured['wanted_repeats']} repeats: time to first token "
        f"{number(measured['ttft_ms'])} ms, per output token {number(tpot['p50'])} ms (p99 {number(tpot['p99'])}), "
        f"{number(measured['tokens_per_sec'])} tokens/s"
    )


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
    amount_text = f"{number(offload['bytes_per_pass'] / 1e9)} GB a step at {number(offload['gb_per_sec'])} GB/s"
    if offload["kv_bytes_per_pass"]:
        amount_text += f" ({number(offload['kv_bytes_per_pass'] / 1e9)} of them keys and values)"
    rows = [("from host memory", f"{amount_text}, {percent(offload['share_of_copy'])} of a plain copy's")]
    if offload["host_layers"]:
        number_text = f"{len(offload['host_layers'])} layers, in steps of up to {offload['host_rows']} rows"
        rows.append(("computed by the host", number_text))
    disk = offload["disk"]
    if disk is None:
        return rows
    return (rows if offload["streamed_layers"] else []) + [("from the disk", disk_text(disk))]


def disk_text(disk: dict[str, Any]) -> str:
    text = f"{number(disk['bytes_per_pass'] / 1e9)} GB a pass at {number(disk['gb_per_sec'])} GB/s a rank"
    share = disk["drive_share"]
    return text if share is None else f"{text}, {percent(share)} from the drive, the rest from the page cache"
