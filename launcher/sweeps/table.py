"""One table over all jobs of a sweep: as CSV and Markdown text, and for a terminal."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from launcher.amounts import number, percent
from launcher.sweeps.rows import OK, Row


def gib(value: float | None) -> str:
    return number(None) if value is None else f"{value:.2f}"


def plain(value: object) -> str:
    return "" if value is None else str(value)


# Column of CSV -> heading for people and how they see a value.
VALUES: dict[str, tuple[str, Callable[[Any], str]]] = {
    "world_size": ("cards", plain),
    "batch_size": ("batch", plain),
    "tokens_per_sec": ("tokens/s", number),
    "predicted_tokens_per_sec": ("plan tokens/s", number),
    "ttft_ms": ("TTFT ms", number),
    "predicted_ttft_ms": ("plan", number),
    "tpot_p50_ms": ("TPOT ms", number),
    "tpot_p99_ms": ("p99", number),
    "predicted_tpot_ms": ("plan", number),
    "tpot_floor_ms": ("floor", number),
    "comm_share": ("comm.", percent),
    "predicted_comm_share": ("plan comm.", percent),
    "peak_gib": ("GiB", gib),
    "predicted_gib": ("plan", gib),
    "tokens_per_joule": ("tokens/J", number),
    "predicted_tokens_per_joule": ("plan", number),
}
# Of what a column that only says `plan` is the prediction.
PREDICTS = {
    "predicted_ttft_ms": "ttft_ms",
    "predicted_tpot_ms": "tpot_p50_ms",
    "predicted_gib": "peak_gib",
    "predicted_tokens_per_joule": "tokens_per_joule",
}
# What a terminal has no room for beside what was measured.
ONLY_IN_CSV = {"predicted_tokens_per_sec": "tokens_per_sec", "predicted_comm_share": "comm_share"}
NOTE = (
    "tokens/s with prefill; TTFT and TPOT are medians; plan: predicted, of what stands before it; floor: the least "
    "TPOT by bytes and bandwidth; comm.: share of a decode step; GiB of the fullest card; -: not measured"
)


def csv_text(rows: Sequence[Row]) -> str:
    """Every column, also where no job has a value for it; empty cells were not measured."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    keys = list(rows[0]["varies"])
    writer.writerow(["job", *keys, "status", *VALUES, "reason", "folder"])
    for row in rows:
        values = [row["job"], *row["varies"].values(), row["status"], *(row[name] for name in VALUES)]
        writer.writerow(["" if value is None else value for value in (*values, row["reason"], row["folder"])])
    return file.getvalue()


def markdown_text(rows: Sequence[Row], title: str) -> str:
    """A table for people: only columns that say something, rounded."""
    has_reason = any(row["reason"] for row in rows)
    names = shown(rows)
    words = ["job", *rows[0]["varies"], "status"]
    headings = [*words, *(heading(name, names) for name in names), *(["reason"] if has_reason else [])]
    rules = [*["---"] * len(words), *["--:"] * len(names), *(["---"] if has_reason else [])]
    cells = [[*table_cells(row, names), *([plain(row["reason"])] if has_reason else [])] for row in rows]
    escaped = ([cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in (headings, rules, *cells))
    lines = [f"| {' | '.join(line)} |" for line in escaped]
    return "\n".join([f"# {title}", "", *lines, "", f"{NOTE}.", ""])


def terminal_table(rows: Sequence[Row], title: str) -> Table:
    """The same for a terminal, where reasons are lines of their own: see `reasons`."""
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for words in ("job", *(key.rpartition(".")[2] for key in rows[0]["varies"]), "status"):
        table.add_column(words, overflow="fold")
    names = shown(rows)
    for name in names:
        table.add_column(heading(name, names), justify="right", no_wrap=True)
    for row in rows:
        cells = (Text(cell) for cell in table_cells(row, shown(rows)))
        table.add_row(*cells, style=None if row["status"] == OK else "red")
    return table


def heading(name: str, names: Sequence[str]) -> str:
    """Of a column among `names`; one that the plan filled says of what, where that does not stand before it."""
    own, measured = VALUES[name][0], PREDICTS.get(name)
    return own if measured is None or measured in names else f"plan {VALUES[measured][0]}"


def reasons(rows: Sequence[Row]) -> list[str]:
    return [f"job {row['job']} {row['status']}: {row['reason']}" for row in rows if row["reason"]]


def table_cells(row: Row, names: Sequence[str]) -> list[str]:
    words = [str(row["job"]), *(plain(value) for value in row["varies"].values()), row["status"]]
    return [*words, *(VALUES[name][1](row[name]) for name in names)]


def shown(rows: Sequence[Row]) -> list[str]:
    """Columns that say something: a value of one job at least, and nothing that an override says already."""
    said = {"world_size": "gpus", "batch_size": "workload.batch_size"}
    names = [name for name in VALUES if said.get(name) not in rows[0]["varies"]]
    told = [name for name in names if any(row[name] is not None for row in rows)]
    return [name for name in told if ONLY_IN_CSV.get(name) not in told]


def num_left(rows: Sequence[Row]) -> int:
    """Jobs that are still to be done: failed, cut short or never started."""
    return sum(row["status"] != OK for row in rows)
