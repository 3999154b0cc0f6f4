"""Plots as files: what is on them, and that nothing is drawn of nothing."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import matplotlib.image
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from launcher.sweeps.finish import draw_plots
from launcher.sweeps.jobs import SweepJob, find_jobs
from launcher.sweeps.plots import FRONT, draw_memory, draw_throughput, write_plots
from launcher.sweeps.rows import Row, sweep_rows
from tests.launcher.sweep_jobs import bench_report, failed_report, write_job

NAMES = {
    "tokens_per_sec_over_cards",
    "ttft_over_cards",
    "comm_share_over_cards",
    "memory",
    "throughput_against_latency",
    "power_over_time",
}


def draw(sweep: Path) -> dict[str, Path]:
    jobs = find_jobs(sweep)
    return {path.name: path for path in write_plots(jobs, sweep_rows(jobs), sweep / "plots")}


@pytest.fixture(scope="module")
def plots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two batch sizes on one, two and four cards; one job failed."""
    sweep = tmp_path_factory.mktemp("sweep")
    number = 0
    for gpus in (1, 2, 4):
        for batch in (1, 8):
            fields = {"batch_size": batch, "tokens_per_sec": 50.0 * gpus * batch, "comm_share": 0.1 * gpus}
            report = failed_report() if (gpus, batch) == (1, 8) else bench_report(gpus, **fields)
            overrides = [f"gpus={gpus}", f"workload.batch_size={batch}"]
            write_job(sweep, number, overrides, report, power="80 250 300")
            number += 1
    return draw(sweep)


def texts(path: Path) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text(encoding="utf-8"))


def test_every_plot_is_there_as_png_and_svg(plots: dict[str, Path]) -> None:
    assert set(plots) == {f"{name}.{suffix}" for name in NAMES for suffix in ("png", "svg")}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "tokens_per_sec_over_cards",
            ["cards", "tokens/s, prefill included", "batch_size=8", "predicted"],
        ),
        ("ttft_over_cards", ["cards", "TTFT (ms)", "batch_size=1"]),
        ("comm_share_over_cards", ["share of the step (%)", "batch_size=8", "40"]),
        ("memory", ["GiB", "predicted", "measured peak", "limit of a card", "-2.2 %", "gpus=2, batch_size=8"]),
        ("throughput_against_latency", ["time per output token, p50 (ms)", "Pareto front", "gpus=4", "8"]),
        ("power_over_time", ["power (W)", "seconds since the start of the job", "card 0", "gpus=4, batch_size=1"]),
    ],
)
def test_axes_have_units_and_series_their_names(plots: dict[str, Path], name: str, words: list[str]) -> None:
    found = texts(plots[f"{name}.svg"])
    assert [word for word in words if word not in found] == []


def test_failed_job_is_on_no_plot(plots: dict[str, Path]) -> None:
    for name in ("memory", "power_over_time"):
        assert "gpus=1, batch_size=8" not in texts(plots[f"{name}.svg"])
        assert "gpus=1, batch_size=1" in texts(plots[f"{name}.svg"])


@pytest.mark.parametrize("name", sorted(NAMES))
def test_image_is_large_enough_and_not_blank(plots: dict[str, Path], name: str) -> None:
    image = matplotlib.image.imread(plots[f"{name}.png"])
    assert min(image.shape[:2]) > 400
    assert 0.005 < (image[..., :3].min(axis=2) < 0.7).mean() < 0.5


def is_framed(path: Path) -> bool:
    """Whether nothing is drawn over an edge."""
    image = matplotlib.image.imread(path)[..., :3]
    return all((edge > 0.99).all() for edge in (image[0], image[-1], image[:, 0], image[:, -1]))


@pytest.mark.parametrize("name", sorted(NAMES))
def test_nothing_is_drawn_over_the_edge(plots: dict[str, Path], name: str) -> None:
    assert is_framed(plots[f"{name}.png"])


def test_long_names_of_lines_have_room_below_the_plot(tmp_path: Path) -> None:
    for number, (end, gpus) in enumerate((end, gpus) for end in ("old", "new") for gpus in (1, 2)):
        overrides = [f"model.path=/models/{end}-{'name-' * 30}{end}", f"gpus={gpus}"]
        write_job(tmp_path, number, overrides, bench_report(gpus, batch_size=gpus))
    files = draw(tmp_path)
    for name in ("ttft_over_cards", "throughput_against_latency"):
        assert is_framed(files[f"{name}.png"])
        found = " ".join(texts(files[f"{name}.svg"]))
        assert "old" in found and "new" in found


def test_lines_of_checkpoints_in_one_folder_have_their_names_alone(tmp_path: Path) -> None:
    for number, (name, gpus) in enumerate((name, gpus) for name in ("awq", "fp8") for gpus in (1, 2)):
        write_job(tmp_path, number, [f"model.path=/mnt/models/{name}", f"gpus={gpus}"], bench_report(gpus))
    found = texts(draw(tmp_path)["ttft_over_cards.svg"])
    assert "path=awq" in found and "path=fp8" in found


def test_dollar_signs_of_a_prompt_are_no_formula(tmp_path: Path) -> None:
    """Which would be drawn as one, or end the drawing where it is none."""
    prompts = ["is $5_{ more than $6", "what is $x$"]
    for number, (prompt, gpus) in enumerate((prompt, gpus) for prompt in prompts for gpus in (1, 2)):
        write_job(tmp_path, number, [f"prompt={prompt}", f"gpus={gpus}"], bench_report(gpus))
    found = texts(draw(tmp_path)["ttft_over_cards.svg"])
    assert all(f"prompt={prompt}" in found for prompt in prompts)


def test_signs_that_the_font_has_not_are_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, prompt in enumerate(["天空", "蓝色"]):
        write_job(tmp_path, number, [f"prompt={prompt}"], bench_report())
    jobs = find_jobs(tmp_path)
    assert {path.name for path in draw_plots(jobs, sweep_rows(jobs), tmp_path)} == {"memory.png", "memory.svg"}
    assert capsys.readouterr().err.count("missing from font") == 1


def test_memory_that_differs_by_little_does_not_fill_the_axis() -> None:
    figure = draw_memory(many_jobs(1))
    assert figure is not None
    low, high = figure.axes[0].get_xlim()
    assert high - low > 5 and low < 22 < 24 < high


def test_plans_alone_are_drawn_over_cards_as_predictions(tmp_path: Path) -> None:
    for number, gpus in enumerate((2, 4)):
        report = bench_report(gpus, tokens_per_sec=None, ttft_ms=None, tpot_ms=None, comm_share=None)
        report["cards"] = []
        write_job(tmp_path, number, [f"gpus={gpus}"], report)
    files = draw(tmp_path)
    assert {name.partition(".")[0] for name in files} == {name for name in NAMES if "over_cards" in name}
    assert "predicted" in texts(files["ttft_over_cards.svg"])
    assert "measured" not in texts(files["ttft_over_cards.svg"])


def test_one_job_on_a_cpu_has_only_its_memory_to_show(tmp_path: Path) -> None:
    write_job(tmp_path, 0, ["gpus=2"], bench_report())
    assert set(draw(tmp_path)) == {"memory.png", "memory.svg"}


def test_same_numbers_give_the_same_file(tmp_path: Path) -> None:
    write_job(tmp_path, 0, ["gpus=2"], bench_report())
    assert draw(tmp_path)["memory.svg"].read_bytes() == draw(tmp_path)["memory.svg"].read_bytes()


def test_front_of_a_single_job_is_seen(tmp_path: Path) -> None:
    """The larger batch is better in both."""
    for number, (batch, tpot_ms) in enumerate([(1, 9.0), (8, 8.0)]):
        report = bench_report(1, batch_size=batch, tokens_per_sec=50.0 * batch, tpot_ms={"p50": tpot_ms, "p99": 9.0})
        write_job(tmp_path, number, ["gpus=1", f"workload.batch_size={batch}"], report)
    text = draw(tmp_path)["throughput_against_latency.svg"].read_text()
    marks = re.findall(rf'<use [^>]*style="fill: {FRONT}', text)
    assert len(marks) == 1


def many_jobs(num_models: int) -> list[Row]:
    """Of long names, at two batch sizes each."""
    jobs = [
        SweepJob(0, (f"model=a_model_of_a_long_name_{model}", f"engine.prefill_chunk_while_decoding={model}",
                     f"workload.batch_size={batch}", f"gpus={gpus}"),
                 Path(), bench_report(gpus, batch_size=batch, tokens_per_sec=100.0 * batch + model + gpus))
        for model in range(num_models) for batch in (1, 8) for gpus in (1, 2)
    ]  # fmt: skip
    return sweep_rows(jobs)


def test_long_labels_of_memory_stand_apart() -> None:
    figure = draw_memory(many_jobs(3))
    assert figure is not None
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    boxes = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
    assert max(label.get_text().count("\n") for label in figure.axes[0].get_yticklabels()) >= 2
    assert not any(above.overlaps(below) for above, below in pairwise(boxes))


@pytest.mark.parametrize(("num_models", "num_numbers"), [(2, 8), (5, 2)])
def test_of_many_lines_only_the_front_has_numbers(num_models: int, num_numbers: int) -> None:
    rows = many_jobs(num_models)
    for row in rows:
        row["tpot_p50_ms"] = 1000.0 * row["batch_size"] - row["tokens_per_sec"]
    figure = draw_throughput(rows)
    assert figure is not None
    assert len(figure.axes[0].texts) == num_numbers
