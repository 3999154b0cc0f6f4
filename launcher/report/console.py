"""What a person sees: the plan, the report and failures, on stderr, so that stdout carries answers and JSON only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Console

from launcher.config import Aim, TaskKind
from launcher.failures import Failure
from launcher.models.shape import ModelShape
from launcher.plan.options import Option
from launcher.plan.plan import Plan
from launcher.report.accuracy_text import accuracy_page
from launcher.report.bench_text import bench_table, breakdown_tables
from launcher.report.cards_text import all_reduce_table, cards_table, inventory_table, links_table
from launcher.report.options_text import bases, options_table
from launcher.report.passes_text import passes_table
from launcher.report.plan_text import plan_tables
from launcher.report.speed_text import speed_table
from launcher.timing.predict import Times


def stderr_console() -> Console:
    """Without a terminal (a batch job's log) lines are as long as tables need, not 80 columns."""
    console = Console(stderr=True)
    return console if console.is_terminal else Console(stderr=True, width=140)


def print_plain(console: Console, text: str) -> None:
    """As it is: values may have brackets, and a terminal is to break no line that is to be copied."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def print_plan(plan: Plan, shape: ModelShape, times: Times | str) -> None:
    for table in plan_tables(plan, shape, times):
        stderr_console().print(table)


def print_options(options: list[Option], aim: Aim, batch_size: int) -> None:
    stderr_console().print(options_table(options, aim, batch_size))
    for line in bases(options):
        print_note(line)


def print_warning(message: str) -> None:
    console = stderr_console()
    console.print("[bold yellow]warning[/]", end=" ")
    print_plain(console, message)


def print_note(message: str) -> None:
    print_plain(stderr_console(), message)


def print_failure(failure: Failure) -> None:
    console = stderr_console()
    console.print(f"[bold red]{failure.type}[/]", end=" ")
    print_plain(console, failure.message)
    if failure.hint:
        print_plain(console, failure.hint)
    if failure.log and failure.log not in failure.message:
        print_plain(console, f"Log: {failure.log}")


def print_report(report: dict[str, Any]) -> None:
    console = stderr_console()
    PRINTERS[report["task"]](console, report)
    console.print(cards_table(report["cards"]))
    print_plain(console, f"report: {report['run_dir']}/report.json")


def print_speed(console: Console, report: dict[str, Any]) -> None:
    console.print(speed_table(report))


def print_probe(console: Console, report: dict[str, Any]) -> None:
    print_inventory(console, report["inventory"])
    for transport, timings in (report.get("all_reduce") or {}).items():
        console.print(all_reduce_table(transport, timings))


def print_calibration(console: Console, report: dict[str, Any]) -> None:
    print_plain(console, f"rates: {report['calibration_file']}")


def print_predictions(console: Console, report: dict[str, Any]) -> None:
    title = f"{report['model']}, {report['world_size']} x {report['device']}"
    print_plain(console, accuracy_page(title, report["predictions"]["points"]))


def print_bench(console: Console, report: dict[str, Any]) -> None:
    console.print(bench_table(report))
    for each in (*passes_table(report), *breakdown_tables(report)):
        if isinstance(each, str):
            print_plain(console, each)
        else:
            console.print(each)


def print_inventory(console: Console, inventory: dict[str, Any]) -> None:
    if not inventory["cards"]:
        console.print(f"no NVIDIA card found: ranks run on the CPU ({inventory['host_cores']} cores)")
        return
    console.print(inventory_table(inventory))
    console.print(links_table(inventory))


PRINTERS: dict[str, Callable[[Console, dict[str, Any]], None]] = {
    TaskKind.generate.value: print_speed,
    TaskKind.probe.value: print_probe,
    TaskKind.bench.value: print_bench,
    TaskKind.calibrate.value: print_calibration,
    TaskKind.predictions.value: print_predictions,
}
