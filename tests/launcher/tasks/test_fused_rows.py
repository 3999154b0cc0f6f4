"""Who asks for a trial of products, of which weight, and what becomes of the answer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from launcher.config import EngineConfig, WeightsKind
from launcher.config.model import ModelFacts
from launcher.job import Job
from launcher.models.draft import Draft
from launcher.models.shape import ModelShape, quantized_shape, shape_from_facts
from launcher.rank.context import RankContext
from launcher.tasks import calibrate, fused_rows, weights
from launcher.tasks.fused_rows import choose_fused_rows
from parallel.communicator import Communicator
from parallel.product_trial import FusedRows
from tests.launcher.jobs import make_job, make_run

PLAIN = shape_from_facts(
    ModelFacts(
        hidden_size=256, intermediate_size=1152, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=64,
        vocab_size=512, max_positions=512,
    )
)  # fmt: skip
INT4, FP8 = (quantized_shape(PLAIN, kind) for kind in ("int4", "fp8"))
CHOSEN = FusedRows(1024, "a test", {256: 1.0}, {256: 2.0})
CPU, CARD = torch.device("cpu"), torch.device("cuda", 0)


class Stop(Exception):
    """Whatever comes after is not of this test."""


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What trials were of: bits, outputs, inputs and device."""
    seen = []

    def measure(scheme: Any, num_out: int, num_in: int, communicator: Any, device: torch.device) -> FusedRows:
        seen.append((scheme.bits, scheme.is_float, num_out, num_in, device))
        return CHOSEN

    monkeypatch.setattr(fused_rows, "measure_fused_rows", measure)
    return seen


def context_of(
    shape: ModelShape,
    *,
    device: torch.device = CARD,
    draft: ModelShape | None = None,
    dtype: str = "bfloat16",
    asked: int | None = None,
    planned: int = 256,
) -> RankContext:
    """On the second of three ranks."""
    job: Job = make_job(Path(), world_size=3, run=make_run(engine=EngineConfig(fused_prefill_rows=asked)))
    job.run.model.weights = WeightsKind.dummy
    plan = SimpleNamespace(grain=128, draft_grain=64, dtype=dtype, fused_rows=planned)
    job = replace(job, plan=cast(Any, plan), shape=shape, draft=None if draft is None else Draft(draft, "folder"))
    communicator = cast(Communicator, SimpleNamespace(world_size=3, rank=1))
    return RankContext(job, 1, device, communicator, (), cast(Any, None))


def test_a_trial_is_of_gate_and_up_of_the_rank_that_has_most(trials: list[tuple[Any, ...]]) -> None:
    # Nine grains of 128 over three ranks.
    assert choose_fused_rows(context_of(INT4)) is CHOSEN
    assert choose_fused_rows(context_of(replace(FP8, intermediate_size=1280))) is CHOSEN
    assert trials == [(4, False, 2 * 384, 256, CARD), (8, True, 2 * 512, 256, CARD)]


def test_without_a_choice_nothing_is_tried(trials: list[tuple[Any, ...]]) -> None:
    without = [
        context_of(PLAIN),
        context_of(INT4, device=CPU),
        context_of(INT4, device=CPU, asked=512),
        context_of(INT4, dtype="float16"),
    ]
    assert [choose_fused_rows(context) for context in without] == [None] * 4
    assert trials == []


def test_a_draft_model_decides_where_only_its_weights_are_packed(trials: list[tuple[Any, ...]]) -> None:
    draft = replace(INT4, intermediate_size=576, hidden_size=128)
    assert choose_fused_rows(context_of(PLAIN, draft=draft)) is CHOSEN
    assert choose_fused_rows(context_of(FP8, draft=draft)) is CHOSEN
    # Nine grains of 64.
    assert trials == [(4, False, 2 * 192, 128, CARD), (8, True, 2 * 384, 256, CARD)]


def test_what_was_asked_for_is_not_tried(trials: list[tuple[Any, ...]]) -> None:
    found = choose_fused_rows(context_of(INT4, asked=700))
    assert found is not None and trials == []
    assert (found.limit, found.packed_ms) == (700, {}) and "engine.fused_prefill_rows=700" in found.reason


def test_a_trial_does_not_go_below_what_the_plan_counts_on(trials: list[tuple[Any, ...]]) -> None:
    """There is no memory for dequantised weights."""
    found = choose_fused_rows(context_of(INT4, planned=2048))
    assert found == replace(CHOSEN, limit=2048, reason="2048 rows, as planned for such cards; a test")
    assert choose_fused_rows(context_of(INT4, planned=1024)) is CHOSEN


def test_too_few_rows_are_refused() -> None:
    (problem,) = EngineConfig(fused_prefill_rows=255).problems()
    assert "engine.fused_prefill_rows=255" in problem and "256" in problem
    assert list(EngineConfig(fused_prefill_rows=256).problems()) == []


@pytest.mark.parametrize(("chosen", "limit"), [(CHOSEN, 1024), (None, 256)])
def test_linears_of_a_run_get_what_was_chosen(
    monkeypatch: pytest.MonkeyPatch, chosen: FusedRows | None, limit: int
) -> None:
    given = catch_models(monkeypatch, weights)
    with pytest.raises(Stop):
        weights.load_sharded_model(context_of(INT4), chosen)
    assert given == [limit]


def test_what_is_calibrated_multiplies_as_a_run_would(
    monkeypatch: pytest.MonkeyPatch, trials: list[tuple[Any, ...]]
) -> None:
    given = catch_models(monkeypatch, calibrate)
    settings = calibrate.Settings({"wide": 512}, ("int4", "bf16"), vocab_size=512)
    for name in settings.formats:
        with pytest.raises(Stop):
            calibrate.build_model(context_of(PLAIN), calibrate.calibration_shape(settings, "wide", name))
    assert given == [1024, 256]
    # 1792 in grains of 128, of which the first two of three ranks have five.
    assert trials == [(4, False, 2 * 5 * 128, 512, CARD)]


def catch_models(monkeypatch: pytest.MonkeyPatch, module: Any) -> list[int]:
    """The limit of each model that `module` builds, none of which it gets."""
    given = []

    def build(*args: Any, fused_rows: int, **options: Any) -> None:
        given.append(fused_rows)
        raise Stop

    monkeypatch.setattr(module, "build_sharded_model", build)
    return given
