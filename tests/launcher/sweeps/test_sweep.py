"""A sweep from the command line to its table and plots, and again after it lost a job."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from launcher.config import ConfigError, SamplingConfig
from launcher.report.report import config_values
from launcher.sweeps.resume import finished_report, goes_on, quoted, resume_arguments
from launcher.sweeps.resume import resumed as resumed_folder
from tests.launcher.cli import SHORT, Result
from tests.launcher.forked import run
from tests.launcher.jobs import make_run

MARK = 12345.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sweep") / "jobs"


@pytest.fixture(scope="module")
def first(folder: Path) -> Result:
    return run("-m", "gpus=2,9,1", *SHORT, folder=folder, sweep=True)


@pytest.fixture(scope="module")
def rows(folder: Path, first: Result) -> list[dict[str, Any]]:
    """As the first sweep left them."""
    return read_rows(folder)


@pytest.fixture(scope="module")
def resumed(folder: Path, rows: list[dict[str, Any]]) -> Result:
    """After job 2 lost its report, and with a mark in the one of job 0."""
    (folder / "2" / "report.json").unlink()
    path = folder / "0" / "report.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"ttft_ms": MARK}))
    return run("-m", f"resume={folder}", folder=folder.parent / "unused", sweep=True)


def read_rows(folder: Path) -> list[dict[str, Any]]:
    return list(json.loads((folder / "sweep.json").read_text())["jobs"])


def test_table_has_a_row_for_every_job(folder: Path, first: Result, rows: list[dict[str, Any]]) -> None:
    assert first.returncode == 1
    assert [(row["job"], row["varies"], row["status"]) for row in rows] == [
        (0, {"gpus": "2"}, "ok"),
        (1, {"gpus": "9"}, "failed"),
        (2, {"gpus": "1"}, "ok"),
    ]
    assert rows[1]["reason"].startswith("ConfigError: gpus=9 must be from 1 to 4")
    for row, report in zip(rows, first.reports, strict=True):
        assert row["tokens_per_sec"] == report["tokens_per_sec"]
        assert row["folder"] == report["run_dir"]


def test_csv_and_markdown_say_the_same(folder: Path, rows: list[dict[str, Any]]) -> None:
    with (folder / "sweep.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["gpus"], line["status"]) for line in lines] == [("2", "ok"), ("9", "failed"), ("1", "ok")]
    assert float(lines[2]["ttft_ms"]) == rows[2]["ttft_ms"]
    assert "ConfigError: gpus=9 must be" in (folder / "sweep.md").read_text()


def test_people_see_the_table_and_how_to_go_on(folder: Path, first: Result) -> None:
    assert "job 1 failed: ConfigError: gpus=9 must be" in first.stderr
    assert f"1 of 3 jobs are left to do: -m resume={folder}" in first.stderr
    assert "Traceback" not in first.stderr
    assert "Error executing job" not in first.stderr


def test_plots_are_of_what_was_measured(folder: Path, first: Result) -> None:
    names = {path.name for path in (folder / "plots").iterdir()}
    over_cards = ("tokens_per_sec_over_cards", "ttft_over_cards", "comm_share_over_cards")
    # CPUs have no power to show, and there was one batch size.
    assert names == {f"{name}.{suffix}" for name in (*over_cards, "memory") for suffix in ("png", "svg")}
    assert "gpus=2" in (folder / "plots" / "memory.svg").read_text()


def test_resumed_sweep_keeps_what_is_done_and_does_the_rest(
    folder: Path, rows: list[dict[str, Any]], resumed: Result
) -> None:
    kept, failed, again = resumed.reports
    assert kept["ttft_ms"] == MARK
    assert failed["error"]["message"].startswith("gpus=9")
    assert again["world_size"] == 1
    assert again["tokens_per_sec"] != rows[2]["tokens_per_sec"]
    after = read_rows(folder)
    assert [row["status"] for row in after] == ["ok", "failed", "ok"]
    assert [row["varies"] for row in after] == [row["varies"] for row in rows]
    assert (after[0]["ttft_ms"], after[2]["ttft_ms"]) == (MARK, again["ttft_ms"])
    assert resumed.returncode == 1


def test_resumed_sweep_says_which_jobs_were_done_and_starts_no_other_folder(folder: Path, resumed: Result) -> None:
    assert f"done already: {folder / '0'}" in resumed.stderr
    assert resumed.stderr.count("done already") == 1
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["0", "1", "2", "plots"]


def test_job_whose_folder_cannot_be_written_keeps_its_number(tmp_path: Path) -> None:
    """As on a disk that is full: Hydra writes one of its files and ends at the next, and the sweep with it."""
    folder, arguments = tmp_path / "sweep", ("-m", "task=plan", "gpus=1,2,4")
    in_the_way = folder / "1" / ".hydra" / "hydra.yaml"
    in_the_way.mkdir(parents=True)
    result = run(*arguments, folder=folder, sweep=True)
    assert result.returncode == 1 and result.reports[-1]["error"]["type"] == "IsADirectoryError"
    assert (folder / "1" / ".hydra" / "config.yaml").is_file()
    rows = [(row["job"], row["varies"]["gpus"], row["status"]) for row in read_rows(folder)]
    assert rows == [(0, "1", "ok"), (1, "2", "not run"), (2, "4", "not run")]
    in_the_way.rmdir()
    assert run("-m", f"resume={folder}", folder=tmp_path / "unused", sweep=True).returncode == 0
    assert [(row["job"], Path(row["folder"]).name) for row in read_rows(folder)] == [(0, "0"), (1, "1"), (2, "2")]


# What is typed anew


@pytest.fixture
def plans(tmp_path: Path) -> Path:
    """A sweep of two jobs that are done, with a mark in their reports; each resolves a value of its own."""
    folder = tmp_path / "plans"
    result = run("-m", "task=plan", "gpus=1,2", "prompt='${gpus} cards'", folder=folder, sweep=True)
    assert [row["varies"] for row in read_rows(folder)] == [{"gpus": "1"}, {"gpus": "2"}], result.stderr
    for number in (0, 1):
        path = folder / str(number) / "report.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"ttft_ms": MARK + number}))
    return folder


def test_other_values_lose_no_result_and_find_theirs(plans: Path) -> None:
    before = [(plans / name / "report.json").read_text() for name in ("0", "1")]
    result = run("-m", f"resume={plans}", "gpus=2,4", folder=plans.parent / "unused", sweep=True)
    assert result.returncode == 0, result.stderr
    assert [report["ttft_ms"] for report in result.reports] == [MARK + 1, None]
    assert [json.loads((plans / name / "report.json").read_text()) for name in ("0", "1")] == [
        json.loads(text) for text in before
    ]
    rows = read_rows(plans)
    assert [(row["job"], row["varies"]["gpus"], row["status"]) for row in rows] == [
        (0, "1", "ok"), (1, "2", "ok"), (2, "4", "ok"),
    ]  # fmt: skip
    assert [Path(row["folder"]).name for row in rows] == ["0", "1", "2"]
    again = run("-m", f"resume={plans}", "gpus=4,2,1", folder=plans.parent / "unused", sweep=True)
    assert [again.stderr.count(f"done already: {plans / name}\n") for name in ("0", "1", "2")] == [1, 1, 1]


@pytest.mark.parametrize("word", ["resume=yes", "++resume=true"])
def test_however_going_on_is_said_no_result_is_lost(plans: Path, word: str) -> None:
    """Of the words that Hydra takes for a boolean."""
    arguments = ("task=plan", "gpus=2", "prompt='${gpus} cards'", word)
    result = run("-m", *arguments, folder=plans, sweep=True)
    assert result.returncode == 0, result.stderr
    assert [report["ttft_ms"] for report in result.reports] == [MARK + 1]
    reports = [json.loads((plans / name / "report.json").read_text()) for name in ("0", "1")]
    assert [report["ttft_ms"] for report in reports] == [MARK, MARK + 1]
    assert [row["varies"]["gpus"] for row in read_rows(plans)] == ["1", "2"]


def test_flag_of_a_sweep_may_stand_among_settings(tmp_path: Path) -> None:
    result = run("task=plan", "-m", "gpus=1,2", folder=tmp_path, sweep=True)
    assert result.returncode == 0, result.stderr
    assert [row["varies"] for row in read_rows(tmp_path)] == [{"gpus": "1"}, {"gpus": "2"}]


def test_values_that_cannot_be_composed_are_not_what_the_folder_goes_on_with(plans: Path) -> None:
    error = run("-m", f"resume={plans}", "gsup=2", folder=plans.parent / "unused", sweep=True).error
    assert "gsup" in error["message"]
    result = run("-m", f"resume={plans}", folder=plans.parent / "unused", sweep=True)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("done already") == 2


# Folders of one's own naming


def test_jobs_of_one_folder_are_refused_before_any_starts(tmp_path: Path) -> None:
    arguments = ("task=plan", "gpus=1,2", "workload.batch_size=1,3")
    error = run("-m", *arguments, "hydra.sweep.subdir='cards-${gpus}'", folder=tmp_path / "new", sweep=True).error
    for words in ("jobs 0 (task=plan gpus=1 workload.batch_size=1) and 1 (", "into one folder, cards-1."):
        assert words in error["message"]
    assert not (tmp_path / "new").exists()


def test_jobs_of_folders_of_their_own_run_under_any_names(tmp_path: Path) -> None:
    arguments = ("task=plan", "gpus=1,2", "hydra.sweep.subdir='${hydra:job.num}-${gpus}-cards'")
    result = run("-m", *arguments, folder=tmp_path / "new", sweep=True)
    assert result.returncode == 0, result.stderr
    assert [Path(row["folder"]).name for row in read_rows(tmp_path / "new")] == ["0-1-cards", "1-2-cards"]


# Which command line a sweep goes on with


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    text = """
hydra:
  overrides:
    hydra: [hydra.mode=MULTIRUN, hydra.sweep.dir=old, hydra/launcher=basic]
    task: ["gpus=1,2", "++model=demo", "resume=true"]
"""
    (tmp_path / "multirun.yaml").write_text(text)
    return tmp_path


def test_folder_stands_for_the_command_line_of_its_sweep(stored: Path) -> None:
    assert resume_arguments(["-m", f"resume={stored}"]) == [
        "-m", "hydra/launcher=basic", "gpus=1,2", "++model=demo", f"hydra.sweep.dir='{stored}'", "resume=true",
    ]  # fmt: skip


def test_what_is_typed_now_takes_its_place(stored: Path) -> None:
    arguments = resume_arguments(["--multirun", "gpus=1,2,4", f"resume={stored}", "prompt=x"])
    assert arguments[2:] == ["gpus=1,2,4", "++model=demo", "prompt=x", f"hydra.sweep.dir='{stored}'", "resume=true"]


def test_what_belongs_to_a_flag_stays_beside_it(stored: Path) -> None:
    arguments = resume_arguments(["-m", f"resume={stored}", "~prompt", "--config-dir", "some/folder"])
    assert arguments[:4] == ["-m", "--config-dir", "some/folder", "hydra/launcher=basic"] and "~prompt" in arguments


@pytest.mark.parametrize("typed", ["{}", "'{}'", '"{}"'])
def test_folder_of_any_name_is_quoted_for_hydra(stored: Path, typed: str) -> None:
    """As it is typed in the shell's quotes alone, or in Hydra's within them."""
    folder = stored.rename(stored / ".." / f"Läufe von {stored.name} = 2, (neu)")
    arguments = resume_arguments(["-m", f"resume={typed.format(folder)}"])
    parsed = OverridesParser.create().parse_override(arguments[-2])
    assert (parsed.key_or_group, parsed.value()) == ("hydra.sweep.dir", str(folder))


@pytest.mark.parametrize("name", ["it's", "back\\slash"])
def test_quotes_stay_in_names(name: str) -> None:
    parsed = OverridesParser.create().parse_override(f"resume={quoted(name)}")
    assert parsed.value() == name == resumed_folder(f"resume={quoted(name)}")


@pytest.mark.parametrize("arguments", [["-m", "resume=true", "gpus=1"], ["resume=True"], ["gpus=2"], ["resume=false"]])
def test_other_command_lines_stay_as_they_are(arguments: list[str]) -> None:
    assert resume_arguments(arguments) == arguments


def test_folder_needs_a_sweep(stored: Path) -> None:
    with pytest.raises(ConfigError, match="add -m"):
        resume_arguments([f"resume={stored}"])
    with pytest.raises(ConfigError, match=r"must be the folder of a sweep, which has a multirun\.yaml"):
        resume_arguments(["-m", f"resume={stored / 'elsewhere'}"])


# Which jobs are done


def test_job_is_done_once_its_report_is_complete_and_of_this_config(tmp_path: Path) -> None:
    run = make_run()
    assert finished_report(run, tmp_path) is None
    report = {"task": "bench", "config": config_values(run)}
    for text, done in [
        (json.dumps(report), True),
        (json.dumps(report)[:-5], False),
        (json.dumps(report | {"error": {"type": "X", "message": "x"}}), False),
        ('{"task": "bench"}', False),
    ]:
        (tmp_path / "report.json").write_text(text)
        assert (finished_report(run, tmp_path) is not None) == done
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert finished_report(replace(run, resume=True), tmp_path) == report
    assert finished_report(replace(run, sampling=SamplingConfig(seed=7)), tmp_path) is None


def test_answers_of_a_job_that_was_cut_short_are_gone_on_with(tmp_path: Path) -> None:
    run = make_run(prompts_file="a.txt")
    assert not goes_on(run, tmp_path).resume
    (tmp_path / "job.json").write_text(json.dumps({"run": config_values(run)}))
    assert goes_on(run, tmp_path).resume
    assert not goes_on(replace(run, prompt="other"), tmp_path).resume
    assert not goes_on(make_run(), tmp_path).resume
    assert goes_on(replace(run, output_file="answers.jsonl"), tmp_path / "none").resume
