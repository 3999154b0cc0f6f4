"""Two runs or two sweeps side by side: who is matched with whom, ratios, and what may be concluded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.launcher.sweep_jobs import bench_report, failed_report, write_job
from tools.compare import compare_values, differences, main, match_jobs, read_jobs


def compare(capsys: pytest.CaptureFixture[str], a: Path, b: Path) -> dict[str, Any]:
    assert main([str(a), str(b), "--json"]) == 0
    compared: dict[str, Any] = json.loads(capsys.readouterr().out)
    return compared


def test_two_runs_have_ratios_of_b_to_a(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write_job(tmp_path, 0, ["gpus=2"], bench_report())
    b = write_job(tmp_path, 1, ["gpus=4"], bench_report(tokens_per_sec=150.0, ttft_ms=60.0, tokens_per_joule=None))
    (job,) = compare(capsys, a, b / "report.json")["jobs"]
    assert job["overrides"] == {}
    assert {name: job["values"][name]["ratio"] for name in ("tokens_per_sec", "ttft_ms", "tpot_p99_ms")} == {
        "tokens_per_sec": 1.5, "ttft_ms": 0.5, "tpot_p99_ms": 1.0,
    }  # fmt: skip
    assert job["values"]["tokens_per_joule"] == {"a": 0.25, "b": None, "ratio": None, "verdict": None}


def test_jobs_of_sweeps_are_matched_by_what_varies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    for number, gpus in enumerate((1, 2, 4)):
        write_job(a, number, [f"gpus={gpus}", "engine.transport=nccl"], bench_report(tokens_per_sec=10.0 * gpus))
    for number, gpus in enumerate((4, 2, 3)):
        write_job(b, number, ["engine.transport=auto", f"gpus={gpus}"], bench_report(tokens_per_sec=20.0 * gpus))
    jobs = compare(capsys, a, b)["jobs"]
    assert [(job["overrides"], job["values"]["tokens_per_sec"]["ratio"]) for job in jobs] == [
        ({"gpus": "1"}, None),
        ({"gpus": "2"}, 2.0),
        ({"gpus": "4"}, 2.0),
        ({"gpus": "3"}, None),
    ]
    assert [(job["a"] is None, job["b"] is None) for job in jobs] == [
        (False, True), (False, False), (False, False), (True, False),
    ]  # fmt: skip


def test_setting_that_one_side_left_out_is_matched_with_what_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A sweep over groups alone beside one over batches, too; a group is no setting of a run, only its values are."""
    a, b = tmp_path / "a", tmp_path / "b"
    for number, model in enumerate(("small", "large")):
        for batch_size in (1, 8):
            config = {"model": {"path": model}, "workload": {"batch_size": batch_size}}
            report = bench_report(config=config, batch_size=batch_size)
            if batch_size == 1:
                write_job(a, number, [f"model={model}"], report)
            write_job(b, 2 * number + batch_size // 8, [f"model={model}", f"workload.batch_size={batch_size}"], report)
    jobs = compare(capsys, a, b)["jobs"]
    assert [(*job["overrides"].values(), job["a"] is not None) for job in jobs] == [
        ("small", "1", True), ("large", "1", True), ("small", "8", False), ("large", "8", False),
    ]  # fmt: skip
    assert all(job["b"] is not None for job in jobs)


def test_same_job_twice_is_matched_in_turn(tmp_path: Path) -> None:
    for name in ("a", "b"):
        for number in range(2):
            write_job(tmp_path / name, number, ["gpus=1"], bench_report())
    pairs = match_jobs(read_jobs(tmp_path / "a"), read_jobs(tmp_path / "b"))
    assert [(pair.a and pair.a.number, pair.b and pair.b.number) for pair in pairs] == [(0, 0), (1, 1)]


@pytest.mark.parametrize(
    ("b", "ttft", "tokens"),
    [
        ({"min": 90, "max": 99}, "better", "worse"),
        ({"min": 99, "max": 100}, "within the spread", "within the spread"),
        ({"min": 111, "max": 120}, "worse", "better"),
        ({"min": 111, "max": 111}, None, None),
        (None, None, None),
    ],
)
def test_verdict_needs_spreads_that_do_not_overlap(b: Any, ttft: str | None, tokens: str | None) -> None:
    def verdict(name: str) -> Any:
        rows = [{name: 105.0, "spread": {name: spread}} for spread in ({"min": 100, "max": 110}, b)]
        return compare_values(name, *rows)["verdict"]

    assert (verdict("ttft_ms"), verdict("tokens_per_sec")) == (ttft, tokens)


def test_settings_that_differ_in_every_pair_are_named(tmp_path: Path) -> None:
    for name, transport, torch in (("a", "nccl", "2.12.0"), ("b", "auto", "2.13.0")):
        for number, batch in enumerate((1, 8)):
            config = {"engine": {"transport": transport, "x": 1}, "workload": {"batch_size": batch}}
            report = bench_report(config=config, versions={"torch": torch, "hydra-core": "1.3.8"})
            write_job(tmp_path / name, number, [f"workload.batch_size={batch}"], report)
    pairs = match_jobs(read_jobs(tmp_path / "a"), read_jobs(tmp_path / "b"))
    assert differences(pairs) == {"engine.transport": ["nccl", "auto"], "versions.torch": ["2.12.0", "2.13.0"]}


def test_job_that_was_refused_hides_no_difference_of_others(tmp_path: Path) -> None:
    for name, transport in (("a", "nccl"), ("b", "auto")):
        report = bench_report(config={"engine": {"transport": transport}})
        write_job(tmp_path / name, 0, ["gpus=1"], failed_report() if name == "b" else report)
        write_job(tmp_path / name, 1, ["gpus=2"], report)
    pairs = match_jobs(read_jobs(tmp_path / "a"), read_jobs(tmp_path / "b"))
    assert differences(pairs) == {"engine.transport": ["nccl", "auto"]}


def test_each_difference_is_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = (
        write_job(tmp_path, number, [], bench_report(config={"prompt": prompt, "seed": number}))
        for number, prompt in enumerate(("one\ntwo\n", "three"))
    )
    assert main([str(a), str(b)]) == 0
    assert capsys.readouterr().out.splitlines()[2:4] == [
        'prompt: "one\\ntwo\\n" in A, three in B',
        "seed: 0 in A, 1 in B",
    ]


def test_table_shows_values_ratios_and_failures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, second in (("a", bench_report(4)), ("b", failed_report())):
        write_job(tmp_path / name, 0, ["gpus=2"], bench_report(spread={}))
        write_job(tmp_path / name, 1, ["gpus=4"], second)
    assert main([str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["2", "tokens/s", "100", "100", "1.000"] in lines
    assert ["4", "status", "ok", "failed"] in lines
    assert ["tokens/s", "100", "-", "-"] in lines


def test_folder_without_a_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([str(tmp_path), str(tmp_path)])
    assert caught.value.code == 2
    assert "holds neither a run (report.json) nor a sweep" in capsys.readouterr().err
