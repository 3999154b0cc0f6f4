"""From the folders of a sweep's jobs to rows, tables and what plots show."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from rich.console import Console

from launcher.sweeps.jobs import find_finished, find_jobs, number_jobs
from launcher.sweeps.rows import Row, sweep_rows, without_common_folders
from launcher.sweeps.series import (
    BATCH_KEYS,
    CARD_KEYS,
    Point,
    label_of,
    lines_over,
    memory_bars,
    pareto_front,
    read_power,
    thin,
    throughput_lines,
)
from launcher.sweeps.table import csv_text, markdown_text, reasons, terminal_table
from tests.launcher.sweep_jobs import bench_report, failed_report, write_job


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """gpus=1 fails, 2 and 4 go well, model b of 2 cards was cut short; an earlier sweep left job 5."""
    for number, (gpus, report) in enumerate([(1, failed_report()), (2, bench_report()), (4, bench_report(4))]):
        write_job(tmp_path, number, [f"gpus={gpus}", "model=a", "task=bench"], report)
    write_job(tmp_path, 3, ["gpus=2", "+model=b", "task=bench", "resume=true"], None)
    write_job(tmp_path, 5, ["gpus=3", "model=a", "task=bench"], bench_report(3))
    return tmp_path


EXPECTED = [
    *((f"gpus={gpus}", "model=a", "task=bench") for gpus in (1, 2, 4)),
    ("gpus=2", "+model=b", "task=bench"),
    ("gpus=4", "model=b", "task=bench"),
]


@pytest.fixture
def rows(sweep: Path) -> list[Row]:
    return sweep_rows(find_jobs(sweep, EXPECTED))


def test_every_job_has_its_row_with_how_it_ended(rows: list[Row]) -> None:
    # The last has the next number that is free.
    assert [row["job"] for row in rows] == [0, 1, 2, 3, 6]
    assert [row["status"] for row in rows] == ["failed", "ok", "ok", "not finished", "not run"]
    assert rows[0]["reason"] == "ConfigError: it needs 39.83 GiB | too much."
    assert [row["reason"] for row in rows[1:]] == [None] * 4


def test_reason_that_only_announces_has_the_next_line_too(tmp_path: Path) -> None:
    for number, message in enumerate(["it does not fit:\n  KV cache 3 GiB\nmore", ""]):
        report = failed_report() | {"error": {"type": "PlanError", "message": message}}
        write_job(tmp_path, number, [], report)
    assert [row["reason"] for row in sweep_rows(find_jobs(tmp_path))] == [
        "PlanError: it does not fit: KV cache 3 GiB",
        "PlanError: ",
    ]


def test_only_overrides_that_vary_are_columns(rows: list[Row]) -> None:
    assert [row["varies"] for row in rows] == [
        {"gpus": gpus, "model": model} for gpus, model in zip("12424", "aaabb", strict=True)
    ]
    assert rows[3]["overrides"] == {"gpus": "2", "model": "b", "task": "bench"}


@pytest.mark.parametrize(
    ("paths", "shown"),
    [
        (["/models/awq", "/models/awq-2/", None], ["awq", "awq-2/", None]),
        (["/models/awq/", "/models/awq/new"], ["awq/", "awq/new"]),
        (["org/name", "/models/name"], ["org/name", "/models/name"]),
    ],
)
def test_paths_are_shown_from_where_they_differ(paths: list[str | None], shown: list[str | None]) -> None:
    rows = [{"varies": {"gpus": "a/b", "model.path": path}} for path in paths]
    short = without_common_folders(rows)
    assert [row["varies"] for row in short] == [{"gpus": "a/b", "model.path": path} for path in shown]
    assert [row["varies"]["model.path"] for row in rows] == paths


def test_row_holds_what_the_report_says_and_the_fullest_card(rows: list[Row]) -> None:
    names = ("world_size", "tokens_per_sec", "ttft_ms", "tpot_p50_ms", "tpot_p99_ms", "tpot_floor_ms", "comm_share")
    assert [rows[2][name] for name in names] == [4, 100.0, 120.0, 8.0, 9.0, 5.0, 0.08]
    assert (rows[2]["peak_gib"], rows[2]["predicted_gib"], rows[2]["limit_gib"]) == (22.0, 22.5, 24.0)
    assert (rows[2]["batch_size"], rows[2]["tokens_per_joule"]) == (1, 0.25)
    names = ("tokens_per_sec", "ttft_ms", "tpot_ms", "comm_share")
    assert [rows[2][f"predicted_{name}"] for name in names] == [110.0, 115.0, 7.5, 0.06]


def test_a_report_of_before_has_the_step_alone(tmp_path: Path) -> None:
    report = bench_report()
    report["predicted"] = {name: value for name, value in report["predicted"].items() if name != "itl_ms"}
    write_job(tmp_path, 0, [], report)
    assert sweep_rows(find_jobs(tmp_path))[0]["predicted_tpot_ms"] == 7.0


def test_memory_of_a_card_that_was_not_measured_is_not_that_of_the_others(tmp_path: Path) -> None:
    report = bench_report()
    report["cards"][0]["peak_bytes"] = None
    write_job(tmp_path, 0, [], report)
    (row,) = sweep_rows(find_jobs(tmp_path))
    assert (row["peak_gib"], row["predicted_gib"]) == (None, 22.5)


def test_without_a_list_all_folders_are_jobs_by_number(tmp_path: Path) -> None:
    for number in (10, 9, 2):
        write_job(tmp_path, number, [f"x={number}"], None)
    assert [job.overrides for job in find_jobs(tmp_path)] == [("x=2",), ("x=9",), ("x=10",)]


def test_same_overrides_twice_are_two_jobs(tmp_path: Path) -> None:
    for number in (0, 1):
        write_job(tmp_path, number, ["gpus=1"], bench_report(ttft_ms=float(number)))
    jobs = find_jobs(tmp_path, [("gpus=1",), ("gpus=1",)])
    assert [row["ttft_ms"] for row in sweep_rows(jobs)] == [0.0, 1.0]


def test_job_that_others_have_overtaken_keeps_its_number(tmp_path: Path) -> None:
    """As one of a cluster that has not started yet. What an earlier sweep left in its place is none of its own."""
    write_job(tmp_path, 1, ["gpus=9"], bench_report())
    write_job(tmp_path, 2, ["gpus=4"], bench_report())
    jobs = find_jobs(tmp_path, [("gpus=1",), ("gpus=2",), ("gpus=4",)], [0, 1, 2])
    assert [(job.number, job.folder) for job in jobs] == [(0, None), (1, None), (2, tmp_path / "2")]


def test_report_that_was_cut_short_is_none(tmp_path: Path) -> None:
    (write_job(tmp_path, 0, [], None) / "report.json").write_text('{"task": "ben')
    assert sweep_rows(find_jobs(tmp_path))[0]["status"] == "not finished"


# Tables


def test_csv_has_every_value_unrounded_and_empty_cells_for_the_rest(rows: list[Row]) -> None:
    read = list(csv.DictReader(csv_text(rows).splitlines()))
    assert [line["status"] for line in read] == [row["status"] for row in rows]
    assert (read[1]["gpus"], read[1]["model"], read[1]["comm_share"], read[1]["peak_gib"]) == ("2", "a", "0.08", "22.0")
    assert (read[0]["ttft_ms"], read[0]["reason"]) == ("", "ConfigError: it needs 39.83 GiB | too much.")


def test_markdown_is_one_table_with_the_reasons(rows: list[Row]) -> None:
    lines = [line for line in markdown_text(rows, "x").splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(rows)
    # The bar in the reason is no border.
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1
    assert "| 1 | 2 | a | ok | 1 | 100 | 120 | 115 | 8 | 9 | 7.5 | 5 | 8.0 % | 22.00 | 22.50 | 0.25 | 0.3 |" in lines[3]
    assert "39.83 GiB \\| too much." in lines[2]


def test_value_with_a_line_end_stays_in_its_row(tmp_path: Path) -> None:
    for number, stop in enumerate(("\n", "###")):
        write_job(tmp_path, number, [f'sampling.stop=["{stop}"]'], bench_report())
    assert '| 0 | [" "] | ok |' in markdown_text(sweep_rows(find_jobs(tmp_path)), "x")


def test_terminal_gets_the_table_and_the_reasons_below(rows: list[Row]) -> None:
    console = Console(width=140)
    with console.capture() as capture:
        console.print(terminal_table(rows, "5 jobs"))
    assert "plan" in capture.get()
    assert "22.50" in capture.get()
    assert reasons(rows) == ["job 0 failed: ConfigError: it needs 39.83 GiB | too much."]


def test_sweep_of_plans_says_of_what_each_figure_is(tmp_path: Path) -> None:
    unmeasured = dict.fromkeys(("tokens_per_sec", "ttft_ms", "tpot_ms", "comm_share", "tokens_per_joule"))
    for number in range(2):
        write_job(tmp_path, number, [f"gpus={number + 1}"], bench_report(task="plan", cards=[], **unmeasured))
    header = next(
        line for line in markdown_text(sweep_rows(find_jobs(tmp_path, None)), "x").splitlines() if "|" in line
    )
    names = [name.strip() for name in header.split("|")]
    assert {"plan tokens/s", "plan TTFT ms", "plan TPOT ms", "plan comm.", "plan GiB", "plan tokens/J"} <= set(names)
    assert "plan" not in names


def test_columns_that_no_job_has_a_value_for_are_left_out(rows: list[Row]) -> None:
    assert "tokens/J" in markdown_text(rows, "x")
    without = {"tokens_per_joule": None, "predicted_tokens_per_joule": None}
    assert "tokens/J" not in markdown_text([row | without for row in rows], "x")


# Series


def row(gpus: int = 2, batch: int = 1, transport: str = "nccl", **values: object) -> Row:
    varies = {"gpus": str(gpus), "workload.batch_size": str(batch), "engine.transport": transport}
    measured = {"tokens_per_sec": 10.0, "tpot_p50_ms": 2.0, "ttft_ms": 5.0, "spread": {}}
    return {"job": 0, "varies": varies, "world_size": gpus, "batch_size": batch} | measured | values


def test_lines_over_cards_are_one_for_each_combination_of_the_rest() -> None:
    rows = [row(4, ttft_ms=1.0), row(1, ttft_ms=3.0), row(2, transport="auto"), row(4, transport="auto", ttft_ms=None)]
    lines = lines_over(rows, "world_size", "ttft_ms", CARD_KEYS)
    assert [line.label for line in lines] == ["batch_size=1, transport=nccl", "batch_size=1, transport=auto"]
    assert [[(point.x, point.y) for point in line.points] for line in lines] == [[(1, 3.0), (4, 1.0)], [(2, 5.0)]]


def test_topologies_of_as_many_cards_have_lines_of_their_own() -> None:
    names = {"single": 1, "dual_pcie": 2, "dual_nvlink": 2, "quad": 4}
    rows = [row(gpus, varies={"topology": name}, ttft_ms=float(len(name))) for name, gpus in names.items()]
    lines = lines_over(rows, "world_size", "ttft_ms", CARD_KEYS)
    assert {line.label: [(point.x, point.y) for point in line.points] for line in lines} == {
        "dual_pcie": [(1, 6.0), (2, 9.0), (4, 4.0)],
        "dual_nvlink": [(1, 6.0), (2, 11.0), (4, 4.0)],
    }
    assert [line.label for line in lines_over(rows[1:], "world_size", "ttft_ms", CARD_KEYS)] == [
        line.label for line in lines
    ]


def test_points_carry_the_spread_of_the_repeats() -> None:
    rows = [row(1, spread={"ttft_ms": {"min": 4.0, "max": 7.0}}), row(2)]
    (line,) = lines_over(rows, "world_size", "ttft_ms", CARD_KEYS)
    assert [(point.low, point.high) for point in line.points] == [(4.0, 7.0), (5.0, 5.0)]


def test_nothing_is_to_be_shown_over_one_number_of_cards_or_one_batch() -> None:
    assert lines_over([row(2), row(2, batch=8)], "world_size", "ttft_ms", CARD_KEYS) == []
    assert throughput_lines([row(2), row(4)]) == []


def test_throughput_lines_follow_the_batch() -> None:
    rows = [row(batch=8, tpot_p50_ms=3.0), row(batch=1), row(batch=1, transport="auto")]
    lines = throughput_lines(rows)
    assert [line.label for line in lines] == ["gpus=2, transport=nccl", "gpus=2, transport=auto"]
    assert [(point.x, point.label) for point in lines[0].points] == [(2.0, "1"), (3.0, "8")]
    assert label_of(rows[0], BATCH_KEYS) == lines[0].label


def test_pareto_front_is_what_nothing_beats_in_both() -> None:
    pairs = [(3, 30), (1, 10), (2, 25), (2, 9), (4, 30), (5, 31), (1, 8)]
    points = [Point(x, y, y, y) for x, y in pairs]
    beaten = {(a.x, a.y) for a in points for b in points if (b.x, -b.y) != (a.x, -a.y) and b.x <= a.x and b.y >= a.y}
    assert [(point.x, point.y) for point in pareto_front(points)] == sorted(set(pairs) - beaten)


def test_names_of_models_need_no_key() -> None:
    assert label_of({"varies": {"gpus": "2", "model": "a", "engine.x": None}}) == "gpus=2, a, engine.x as it is"


def test_memory_needs_both_sides(rows: list[Row]) -> None:
    bars = memory_bars(rows)
    assert [(bar.label, bar.predicted, bar.peak, bar.limit) for bar in bars] == [
        ("gpus=2, a", 22.5, 22.0, 24.0),
        ("gpus=4, a", 22.5, 22.0, 24.0),
    ]


def test_power_is_read_as_far_as_the_file_goes(tmp_path: Path) -> None:
    folder = write_job(tmp_path, 0, [], None, power="80.0 120.5 300.0")
    assert read_power(folder) == {0: [(0.0, 80.0), (1.0, 120.5), (2.0, 300.0)]}
    with (folder / "telemetry.csv").open("a") as file:
        file.write("3.0,0,12x")
    assert len(read_power(folder)[0]) == 3
    assert read_power(tmp_path / "nowhere") == {}


def test_telemetry_without_power_has_none(tmp_path: Path) -> None:
    folder = write_job(tmp_path, 0, [], None)
    (folder / "telemetry.csv").write_text("time_sec,index,power_w\n0.1,0,\n0.2,1,\n")
    assert read_power(folder) == {}


@pytest.mark.parametrize("length", [0, 1, 7, 400, 401, 1999])
def test_thinned_curves_keep_their_mean_and_stay_short(length: int) -> None:
    curve = [(float(n), float(n * n)) for n in range(length)]
    thinned = thin(curve, 400)
    assert len(thinned) <= 400
    assert thinned == curve if length <= 400 else len(thinned) > 200
    size = -(-length // 400) or 1
    full = length // size
    assert sum(y for _, y in thinned[:full]) * size == pytest.approx(sum(y for _, y in curve[: full * size]))


def test_finished_jobs_of_earlier_command_lines_have_numbers_of_their_own(tmp_path: Path) -> None:
    write_job(tmp_path, 0, ["gpus=1"], bench_report(1))
    write_job(tmp_path, 1, ["gpus=2"], failed_report())
    for name, gpus in (("a", "3"), ("b", "4")):
        write_job(tmp_path, 9, [f"gpus={gpus}"], bench_report()).rename(tmp_path / name)
    jobs = find_jobs(tmp_path, [("gpus=4",)])
    rest = find_finished(tmp_path, jobs)
    assert sorted(job.overrides for job in rest) == [("gpus=1",), ("gpus=3",)]
    assert len({job.number for job in (*jobs, *rest)}) == 3


def test_job_whose_overrides_were_cut_short_hides_no_other(tmp_path: Path) -> None:
    write_job(tmp_path, 0, ["gpus=1"], bench_report(1))
    cut = write_job(tmp_path, 1, ["gpus=2"], None) / ".hydra" / "overrides.yaml"
    cut.write_text("- gpus=2\n- 'prompt=")
    assert [job.overrides for job in find_jobs(tmp_path)] == [("gpus=1",), ()]
    assert number_jobs(tmp_path, [("gpus=1",), ("gpus=2",), ("gpus=4",)]) == (0, 2, 3)
