"""Markdown of measured runs: `python -m tools.results_table results/NAME.json > results/NAME.md`.

The input is one JSON object: {name of a run: its report.json, ...}, or what tools.bench.linears, load or read,
or tools.demo.perplexity or draft_acceptance made. Tables under results/ are made by this alone.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launcher.amounts import UNKNOWN, number
from launcher.report.accuracy_text import accuracy_page
from parallel.units import MIB

RUN_COLUMNS = (
    "run", "cards", "dtype", "load s", "GB/s", "TTFT ms", "ms/token p50", "p99", "tokens/s", "communication",
    "tokens/J", "predicted MiB", "peak MiB",
)  # fmt: skip

BENCH_COLUMNS = (
    "run", "cards", "weights", "prompt + answer, at a time", "load s", "GB/s", "TTFT ms", "ms/token p50", "p99",
    "prefill tokens/s", "of the bandwidth floor", "tokens/J", "predicted", "predicted MiB", "peak MiB", "off by",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.results_table", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="results/NAME.json")
    path = parser.parse_args().file
    result = json.loads(path.read_text(encoding="utf-8"))
    print(choose_render(result)(path.stem, result), end="")


def choose_render(result: dict[str, Any]) -> Callable[[str, dict[str, Any]], str]:
    """The page for what a file holds: that of a benchmark's tool, or reports of runs."""
    renders = {
        "linears": render_linears,
        "runs": render_loads,
        "reads": render_reads,
        "perplexity": render_perplexity,
        "acceptance": render_acceptance,
    }
    return next((draw for key, draw in renders.items() if key in result), render)


def render_loads(title: str, result: dict[str, Any]) -> str:
    """The page of tools.bench.load: what each rank read and held."""
    columns = (
        "page cache", "ranks", "rank", "read MB", "seconds", "of them disk", "decoding", "GB/s",
        "peak anonymous MB above the start", "peak mapped MB",
    )  # fmt: skip
    rows = [
        [
            "cold" if run["cold"] else "warm",
            str(run["num_ranks"]),
            str(rank),
            number(load["bytes_read"] / 1e6),
            number(load["sec"]),
            number(load["disk_wait_sec"]),
            number(load["decode_sec"]),
            number(load["gb_per_sec"]),
            number(load["peak_anonymous_bytes"] / 1e6),
            number(load["peak_file_bytes"] / 1e6),
        ]
        for run in result["runs"]
        for rank, load in enumerate(run["ranks"])
    ]
    where = f"Measured on a CPU of two cores: {result['folder']}."
    return page(title, where, table(columns, rows), result["commands"])


def render_reads(title: str, result: dict[str, Any]) -> str:
    """The page of tools.bench.read: rates by method, threads and size."""
    columns = ("method", "threads", "MiB a read", "GB/s from the disk", "GB/s from the page cache")
    rows = [
        [
            row["method"],
            str(row["threads"]),
            str(row["chunk_mib"]),
            number(row["cold_gb_per_sec"]),
            number(row["warm_gb_per_sec"]),
        ]
        for row in result["reads"]
    ]
    where = (
        f"Measured on {result['where']}: a file of {number(result['file_bytes'] / 1e6)} MB, the best of "
        f"{result['repeats']} reads."
    )
    return page(title, where, table(columns, rows), result["commands"])


def page(title: str, where: str, body: str, commands: list[str]) -> str:
    listed = "\n".join(f"- `{command}`" for command in commands)
    return "\n\n".join([f"# {title}", where, body, "## Commands", listed]) + "\n"


def render_linears(title: str, result: dict[str, Any]) -> str:
    """The page of tools.bench.linears: milliseconds by kernel and number of rows."""
    columns = ("TP", "kernel", "rows", "ms, 80 layers", "GB/s", "of copy")
    rows = [
        [str(row["tp"]), row["kernel"], str(row["rows"]), number(row["ms_80_layers"]), number(row["gb_per_sec"]),
         f"{row['share_of_copy']:.0%}"]
        for row in result["linears"]
    ]  # fmt: skip
    where = (
        f"Measured on one {result['card']} with torch {result['torch']}, copy {number(result['copy_gb_per_sec'])} GB/s."
    )
    return page(title, where, table(columns, rows), result["commands"])


def render_perplexity(title: str, result: dict[str, Any]) -> str:
    """The page of tools.demo.perplexity: what each format costs the demo model."""
    columns = ("format", "bits a weight", "perplexity", "more than bf16")
    rows = [
        [row["format"], f"{row['linear_bits']:.3f}", f"{row['perplexity']:.3f}", f"{row['increase']:+.2%}"]
        for row in result["perplexity"]
    ]
    where = (
        f"Measured on a CPU with torch {result['torch']}, products in float32: the demo model, weights rounded to the "
        f"nearest, on {result['num_tokens']:,} held-out tokens of Python {result['corpus']['python']}'s standard "
        "library. Bits are of the layers' linears in the file."
    )
    return page(title, where, table(columns, rows), result["commands"])


def render_acceptance(title: str, result: dict[str, Any]) -> str:
    """The page of tools.demo.draft_acceptance: how many drafts of each kind came true."""
    columns = ("drafts", "temperature", "tokens a pass checks", "drafts a pass", "tokens a pass gives")
    rows = [
        [
            f"{row['kind']}: {draft_shape(row)}",
            f"{row['temperature']:g}",
            str(row["rows"]),
            f"{row['drafted_per_pass']:.2f}",
            f"{row['tokens_per_pass']:.2f}",
        ]
        for row in result["acceptance"]
    ]
    draft, work = result["draft"], result["workload"]
    where = (
        f"Measured on a CPU with torch {result['torch']}: the demo model over {work['prompts']} held-out prompts of "
        f"{work['prompt_tokens']} tokens of Python {result['corpus']['python']}'s standard library, answers of "
        f"{work['answer_tokens']}. Its draft model is its first {draft['num_layers']} layers, trained on for "
        f"{draft['training']['steps']} steps ({draft['nats_per_token']:.2f} nats a held-out token). All answers "
        "are those without drafts, token for token. Greedy ones of so small a model soon repeat themselves, which is "
        "what looking up lives on.\n\nHow often drafts come true is a fact about two models and a text. These figures "
        "say that trees work and how they compare; they do not carry over to a 70B and its draft model."
    )
    return page(title, where, table(columns, rows), result["commands"])


def draft_shape(row: dict[str, Any]) -> str:
    tree = row["tree"]
    if tree is None:
        return f"chain of {row['rows'] - 1}"
    widths = f", {tree['top_k']} children of {tree['top_k']} nodes a level" if row["kind"] == "draft" else ""
    return f"tree of {tree['size']}, depth {tree['depth']}{widths}"


def render(title: str, reports: dict[str, Any]) -> str:
    """The whole page: where it ran, generation runs, all-reduce timings, and the command of each run."""
    first = next(iter(reports.values()))
    runs = {name: report for name, report in reports.items() if report["task"] == "generate"}
    probes = {name: report for name, report in reports.items() if report["task"] == "probe"}
    benches = {name: report for name, report in reports.items() if report["task"] == "bench"}
    parts = [f"# {title}", place(first)]
    if runs:
        parts.append(table(RUN_COLUMNS, [run_row(name, report) for name, report in runs.items()]))
    if benches:
        parts.append(table(BENCH_COLUMNS, [bench_row(name, report) for name, report in benches.items()]))
        parts += [baselines_section(name, report) for name, report in benches.items() if report["baselines"]]
    parts += [probe_section(name, report) for name, report in probes.items()]
    parts += [
        accuracy_page(f"## {name}", report["predictions"]["points"]).rstrip()
        for name, report in reports.items()
        if report["task"] == "predictions"
    ]
    commands = [f"- {name}: `launcher {' '.join(report['command'])}`" for name, report in reports.items()]
    parts += ["## Commands", "\n".join(commands)]
    return "\n\n".join(parts) + "\n"


def place(report: dict[str, Any]) -> str:
    """Cards, driver and versions."""
    inventory = report["inventory"]
    names = ", ".join(card["name"] for card in inventory["cards"]) or f"CPU, {inventory['host_cores']} cores"
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items() if version)
    driver = f", driver {inventory['driver']}" if inventory["driver"] else ""
    return f"Measured on {names}{driver}; {versions}. Memory is of the fullest card."


def run_row(name: str, report: dict[str, Any]) -> list[str]:
    load, tpot = report["load"] or {}, report["tpot_ms"] or {}
    cards = report["cards"]
    share = report["comm_share"]
    return [
        name,
        f"{report['world_size']} x {report['device']}",
        report["dtype"],
        number(load.get("sec")),
        number(load.get("gb_per_sec")),
        number(report["ttft_ms"]),
        number(tpot.get("p50")),
        number(tpot.get("p99")),
        number(report["tokens_per_sec"]),
        UNKNOWN if share is None else f"{share * 100:.0f} %",
        number(report["tokens_per_joule"]),
        number(max(card["predicted_bytes"] for card in cards) / MIB),
        number(max(card["peak_bytes"] for card in cards) / MIB),
    ]


def bench_row(name: str, report: dict[str, Any]) -> list[str]:
    load, tpot, workload = report["load"] or {}, report["tpot_ms"] or {}, report["workload"]
    predicted, peak = (max(card[size] for card in report["cards"]) / MIB for size in ("predicted_bytes", "peak_bytes"))
    limit_gib = report["limits"]["card_memory_gib"]
    return [
        name,
        f"{report['world_size']} x {report['device']}" + (f" of {limit_gib:g} GiB" if limit_gib else ""),
        report["weights"],
        f"{workload['prompt_tokens']} + {workload['output_tokens']}, {workload['batch_size']}",
        number(load.get("sec")),
        number(load.get("gb_per_sec")),
        number(report["ttft_ms"]),
        number(tpot.get("p50")),
        number(tpot.get("p99")),
        number(report["prefill_tokens_per_sec"]),
        UNKNOWN if report["bandwidth_share"] is None else f"{report['bandwidth_share'] * 100:.0f} %",
        number(report["tokens_per_joule"]),
        number(report["predicted"].get("tokens_per_joule")),
        number(predicted),
        number(peak),
        f"{(peak / predicted - 1) * 100:+.1f} %",
    ]


def baselines_section(name: str, report: dict[str, Any]) -> str:
    """Other engines on the same workload beside this one; memory is of the fullest card and host."""
    columns = ("engine", "TTFT ms", "ms/token p50", "p99", "prefill tokens/s", "peak MiB of a card", "of the host")
    ours = {
        **report,
        "name": "launch70b",
        "error": None,
        "peak_bytes": max(card["peak_bytes"] for card in report["cards"]),
        "host_peak_bytes": max(card["host_peak_bytes"] for card in report["cards"]),
    }
    rows = [baseline_row(each, len(columns)) for each in (ours, *report["baselines"])]
    return f"## {name}: other engines\n\n{table(columns, rows)}"


def baseline_row(result: dict[str, Any], num_columns: int) -> list[str]:
    name = " ".join(filter(None, (result["name"], result.get("version"))))
    if result["error"]:
        return [name, result["error"], *[UNKNOWN] * (num_columns - 2)]
    tpot = result["tpot_ms"] or {}
    return [
        name,
        number(result["ttft_ms"]),
        number(tpot.get("p50")),
        number(tpot.get("p99")),
        number(result["prefill_tokens_per_sec"]),
        *(mebibytes(result.get(key)) for key in ("peak_bytes", "host_peak_bytes")),
    ]


def mebibytes(size: int | None) -> str:
    return UNKNOWN if size is None else number(size / MIB)


def probe_section(name: str, report: dict[str, Any]) -> str:
    """All-reduce times of every transport side by side, one row per message size."""
    timings = report["all_reduce"]
    columns = ["bytes"] + [f"{transport} {what}" for transport in timings for what in ("p50 us", "p99 us", "GB/s")]
    rows = []
    for same_size in zip(*timings.values(), strict=True):
        assert all(timing["exact"] for timing in same_size), f"{name} holds wrong sums"
        cells = [number(timing[key]) for timing in same_size for key in ("p50_us", "p99_us", "gb_per_sec")]
        rows.append([f"{same_size[0]['num_bytes']:,}", *cells])
    return f"## {name}\n\n{table(columns, rows)}"


def table(columns: list[str] | tuple[str, ...], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] + ["--:"] * (len(columns) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    main()
