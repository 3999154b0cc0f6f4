"""task=calibrate on small engines of a CPU, and the file by which later plans are predicted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from pydantic import TypeAdapter

from launcher.config.tasks import RATED_FORMATS
from launcher.rank.context import RankContext
from launcher.tasks import calibrate, loads
from launcher.tasks.calibrate import DEPTHS, Settings, run_calibrate
from launcher.timing.fit import Calibration, fit_rates, with_older
from launcher.timing.load import Workload
from launcher.timing.power_draw import Load
from launcher.timing.predict import predict_times
from launcher.timing.rates import PowerDraw
from launcher.timing.store import calibration_path, load_calibration, save_calibration
from parallel.engine.engine import Engine
from parallel.engine.prefill.recorded import Places, Recorded
from parallel.transports.solo import Solo
from parallel.units import GIB
from tests.launcher.jobs import make_job

SETTINGS = Settings(
    widths={"wide": 256, "narrow": 128},
    formats=("bf16", "int4"),
    rows=(1, 2),
    chunks=(16, 32),
    short_context=64,
    long_context=128,
    part_tokens=8,
    vocab_size=512,
    num_steps=2,
    num_chunks=1,
)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    cpu = torch.device("cpu")
    events = cast(Any, SimpleNamespace(progress=lambda *args: None))
    job = make_job(tmp_path_factory.mktemp("calibrate"), world_size=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loads, "SUSTAINED_MS", 1.0)
        found = run_calibrate(RankContext(job, 0, cpu, Solo(cpu), (), events), SETTINGS)
    return found | {"calibration": TypeAdapter(Calibration).validate_python(found["calibration"])}


@pytest.fixture(scope="module")
def calibration(results: dict[str, Any]) -> Calibration:
    return cast(Calibration, results["calibration"])


def test_every_format_size_and_depth_was_timed(calibration: Calibration) -> None:
    found = {(point.work.format, point.size, point.work.num_layers) for point in calibration.points}
    assert found == {(f, size, depth) for f in ("bf16", "int4") for size in ("wide", "narrow") for depth in DEPTHS}
    for point in calibration.points:
        assert set(point.steps) == {1, 2} and set(point.chunks) == {16, 32}
        assert set(point.past) == set(point.parts) == {32}
        chunks = (*point.chunks.values(), *point.past.values(), *point.parts.values())
        assert min(*(chunk.whole for chunk in chunks), *(step.short for step in point.steps.values())) > 0
        is_largest = (point.size, point.work.num_layers) == ("wide", max(DEPTHS))
        assert point.sustained_ms == (point.chunks[32].card if is_largest else None)


def test_cards_are_kept_at_steps_passes_and_nothing_of_every_format(results: dict[str, Any]) -> None:
    done = TypeAdapter(list[Load]).validate_python(results["loads"])
    kinds = [("steps", 1), ("steps", 2), ("passes", 0), ("waiting", 0)]
    assert [(load.format, load.kind, load.rows) for load in done] == [
        (f, *kind) for f in ("bf16", "int4") for kind in kinds
    ]
    times = [moment for load in done for moment in (load.start, load.end)]
    assert times == sorted(times)


def test_no_pass_that_is_timed_is_captured_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    records: list[int] = []
    recorded = Recorded([lambda: None], None, lambda calls, pool: records.append(1) or list(calls), Places(1))

    def prefill(parts: object) -> None:
        with recorded.use() as (run,):
            run()

    def timed(run: Callable[[], object], *rest: object) -> SimpleNamespace:
        before = len(records)
        run()
        return SimpleNamespace(whole=len(records) - before, queued=0, card=0)

    monkeypatch.setattr(calibrate, "time_apart", timed)
    pages = SimpleNamespace(allocate=lambda num: [], release=lambda pages: None)
    engine: Any = SimpleNamespace(pages=pages, prefill=prefill, start_answers=lambda sequences, logits: logits)
    context: Any = SimpleNamespace(communicator=None, device=None)
    assert calibrate.time_chunk(context, SETTINGS, engine, [16]).whole == 0
    assert records == [1]


def test_engines_that_are_timed_have_the_layers_that_their_points_say(monkeypatch: pytest.MonkeyPatch) -> None:
    depths = []

    def open_engine(*args: Any, **options: Any) -> Engine:
        engine = Engine(*args, **options)
        depths.append(len(engine.caches))
        return engine

    monkeypatch.setattr(calibrate, "Engine", open_engine)
    cpu = torch.device("cpu")
    context = RankContext(make_job(Path(), world_size=1), 0, cpu, Solo(cpu), (), cast(Any, None))
    shape = calibrate.calibration_shape(SETTINGS, "narrow", "bf16")
    points = calibrate.time_depths(context, SETTINGS, shape, "narrow", calibrate.build_model(context, shape), [])
    assert depths == [point.work.num_layers for point in points] == list(DEPTHS)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("format_name", RATED_FORMATS)
def test_the_largest_engine_fits_a_card_of_24_gb(format_name: str, world_size: int) -> None:
    """Beside what a desktop has there: layers that stand in it more than once have their weights and pages once, not
    their part of graphs."""
    settings = Settings(calibrate.WIDTHS, RATED_FORMATS)
    context: Any = SimpleNamespace(device=torch.device("cuda"), communicator=SimpleNamespace(world_size=world_size))
    shape = calibrate.calibration_shape(settings, "wide", format_name)
    demand = replace(
        calibrate.demand_of_calibration(context, settings, shape), captured_passes=2 * len(settings.chunks)
    )
    deep = replace(demand, shape=replace(shape, num_layers=max(DEPTHS)))
    for once, often in zip(demand.lines(settings.long_context), deep.lines(settings.long_context), strict=True):
        lines = once | {"graphs": often["graphs"]}
        assert 3 * GIB < sum(lines.values()) < 22 * GIB


def test_bytes_are_those_of_the_shape(calibration: Calibration) -> None:
    deep = next(point for point in calibration.points if (point.size, point.work.format) == ("wide", "bf16"))
    # q and o, k and v of two heads of 128, and three projections of 896; two bytes each.
    assert deep.work.layer_plain_bytes == 2 * 256 * (2 * 256 + 2 * 256 + 3 * 896)


def test_the_file_gives_the_rates_back(calibration: Calibration, tmp_path: Path) -> None:
    path = tmp_path / "rates" / "a.json"
    save_calibration(path, calibration)
    assert load_calibration(path) == calibration
    work, load = calibration.points[0].work, Workload(2, 40, 8, 32, 32)
    assert predict_times(work, load, fit_rates(calibration)).tpot_ms > 0


def test_a_file_that_has_more_is_read(calibration: Calibration, tmp_path: Path) -> None:
    """As those of before, which had the speed of a copy."""
    path = tmp_path / "a.json"
    save_calibration(path, calibration)
    path.write_text(path.read_text().replace("{", '{"copy_gb_per_sec": 4220.0,', 1))
    assert load_calibration(path) == calibration


def test_a_file_of_another_kind_counts_as_none(tmp_path: Path) -> None:
    assert load_calibration(tmp_path / "missing.json") is None
    (tmp_path / "other.json").write_text('{"card": "x"}')
    assert load_calibration(tmp_path / "other.json") is None


def test_the_file_is_named_for_what_rates_depend_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    two = calibration_path("NVIDIA GeForce RTX 4090", 2, peer_access=False)
    assert two == tmp_path / "launch70b" / "rates" / "nvidia-geforce-rtx-4090-x2-no-peer-access.json"
    rounded = calibration_path("NVIDIA L40S", 2, peer_access=True, sums=["8-bit-sums"])
    assert rounded.name == "nvidia-l40s-x2-8-bit-sums.json"
    assert calibration_path("NVIDIA L40S", 1, peer_access=False).name == "nvidia-l40s-x1.json"


def test_formats_that_were_not_timed_again_stay(calibration: Calibration) -> None:
    def of(name: str) -> Calibration:
        points = tuple(point for point in calibration.points if point.work.format == name)
        return replace(calibration, points=points, power_draws={name: PowerDraw({1: 1.0}, 2.0, 0.5)})

    joined = with_older(of("int4"), of("bf16"))
    assert {point.work.format for point in joined.points} == set(joined.power_draws) == {"int4", "bf16"}
    newer = replace(of("int4"), power_draws={})
    assert with_older(newer, of("int4")) == newer
    assert with_older(of("int4"), replace(of("int4"), points=())) == of("int4")
    # Of other prompts, or another torch, rates do not mix.
    assert with_older(of("int4"), replace(of("bf16"), short_context=1)) == of("int4")
    assert with_older(of("int4"), replace(of("bf16"), versions={"torch": "0"})) == of("int4")
    assert with_older(of("int4"), None) == of("int4")
