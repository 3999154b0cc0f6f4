"""task=calibrate: times of small engines with layers of two sizes, from which any model's steps are predicted.

Steps and passes of prompts are timed whole, as they run, with their all-reduces and whatever overlaps. Two depths tell
a layer's time from the rest, two sizes a byte's from what every layer starts with. The deep engine runs the same few
layers again and again, so that it takes no more memory: together they are beyond any card's caches.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from launcher.memory.demand import Demand
from launcher.models.shape import ModelShape
from launcher.plan.prefill import hides_sums
from launcher.rank.context import RankContext
from launcher.tasks.fused_rows import fused_rows_of
from launcher.tasks.loads import Loads
from launcher.tasks.prompt_pass import prompt_pass
from launcher.tasks.weights import config_of_shape, give_back
from launcher.timing.fit import Calibration, ChunkTimes, Point, StepTimes
from launcher.timing.power_draw import Load
from launcher.timing.work import work_of
from parallel.checkpoint.dummy import fill_dummy
from parallel.checkpoint.quantize_schemes import QUANTIZE_SCHEMES
from parallel.communicator import ElidedAllReduce
from parallel.engine.chunk_timer import time_apart
from parallel.engine.engine import Engine
from parallel.engine.limits import EngineLimits
from parallel.engine.step_timer import time_steps
from parallel.footprint import held_bits
from parallel.layers.merged import LayerMerger
from parallel.partition import choose_grain
from parallel.product_trial import rows_limit
from parallel.shard import build_sharded_model

# Layers of Llama-70B and of half its width, which are those of Llama-8B.
WIDTHS = {"wide": 8192, "narrow": 4096}
NUM_LAYERS = 6
DEPTHS = (2, 18)
# Chunks of so many prompts or more are timed as such, too.
MIN_PARTS = 4
# Passes of a kind that are not timed: the first compiles kernels, the second may be captured.
NUM_WARM_UPS = 2


@dataclass(frozen=True)
class Settings:
    """What is timed; a test takes less of it."""

    widths: Mapping[str, int]
    formats: tuple[str, ...]
    rows: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    # Also between powers of two: kernels compute 256 tokens at a time, so that 384 take about as long as 512.
    chunks: tuple[int, ...] = (128, 256, 384, 512, 768, 1024, 2048)
    short_context: int = 512
    long_context: int = 4096
    part_tokens: int = 128
    vocab_size: int = 128256
    num_steps: int = 10
    num_chunks: int = 3


def run_calibrate(context: RankContext, settings: Settings | None = None) -> dict[str, Any]:
    """Results: {"calibration": ..., "loads": ...}, of rank 0's clock; every rank runs the same engines. What cards drew
    under the loads is for the parent to add."""
    settings = settings or Settings(WIDTHS, tuple(context.job.run.calibrate.formats))
    points, loads = list[Point](), list[Load]()
    cases = [(f, name) for f in settings.formats for name in settings.widths]
    for done, (format_name, size) in enumerate(cases, start=1):
        shape = calibration_shape(settings, size, format_name)
        model = build_model(context, shape)
        points += time_depths(context, settings, shape, size, model, loads)
        del model
        give_back(context.device)
        context.events.progress("calibrating", done, len(cases), "models")
    placement = context.job.placement
    calibration = Calibration(
        card=placement.names[0],
        world_size=placement.world_size,
        versions={"torch": torch.__version__},
        short_context=settings.short_context,
        long_context=settings.long_context,
        part_tokens=settings.part_tokens,
        points=tuple(points),
    )
    return {
        "transport": context.transport_summary(),
        "calibration": asdict(calibration),
        "loads": [asdict(load) for load in loads],
    }


def calibration_shape(settings: Settings, size: str, format_name: str) -> ModelShape:
    """A Llama of that width in the proportions of 70B, with heads of 128."""
    width, scheme = settings.widths[size], QUANTIZE_SCHEMES.get(format_name)
    return ModelShape(
        model_type="llama",
        hidden_size=width,
        intermediate_size=width * 7 // 2,
        num_layers=NUM_LAYERS,
        num_heads=width // 128,
        num_kv_heads=min(8, width // 128),
        head_dim=128,
        vocab_size=settings.vocab_size,
        max_positions=2 * settings.long_context,
        tied_embeddings=False,
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        qk_norm=False,
        sliding_window=None,
        dtype="bfloat16",
        quantization="none" if scheme is None else format_name,
        linear_bits=16.0 if scheme is None else held_bits(scheme, "cuda", "bfloat16", width),
        source="calibration",
        scheme=scheme,
    )


def build_model(context: RankContext, shape: ModelShape) -> PreTrainedModel:
    grain = choose_grain((shape.intermediate_size, shape.vocab_size), context.communicator.world_size)
    # As a run of such a model would choose.
    fused_rows = rows_limit(fused_rows_of(context, shape, grain, "bfloat16"))
    model = build_sharded_model(
        config_of_shape(shape), context.communicator, dtype=torch.bfloat16, grain=grain, fused_rows=fused_rows
    )
    fill_dummy(model, shape.scheme, context.device, on_placed=LayerMerger(model.module))
    return model.module


def time_depths(
    context: RankContext, settings: Settings, shape: ModelShape, size: str, model: PreTrainedModel, loads: list[Load]
) -> list[Point]:
    """A point of each depth; the largest of all widths and depths adds to `loads`."""
    own, points = list(model.model.layers), []
    for depth in DEPTHS:
        model.model.layers = nn.ModuleList(own[place % len(own)] for place in range(depth))
        engine = open_engine(context, settings, model)
        point = time_engine(context, settings, shape, size, engine)
        if (settings.widths[size], depth) == (max(settings.widths.values()), max(DEPTHS)):
            point, added = keep_busy(context, settings, engine, point)
            loads += added
        points.append(point)
        del engine
        give_back(context.device)
    return points


def open_engine(context: RankContext, settings: Settings, model: PreTrainedModel) -> Engine:
    # Each size, at the start of prompts and after it: a pass that is timed is captured before.
    captured = 2 * len(settings.chunks) if context.job.captured_passes else 0
    limits = EngineLimits(
        settings.long_context,
        max(settings.rows),
        max(settings.chunks),
        captured_passes=captured,
        hides_sums=hides_sums(context.job.run, over_nvlink=context.job.placement.over_nvlink),
    )
    return Engine(model, context.communicator, limits, prefix_cache=False)


def time_engine(context: RankContext, settings: Settings, shape: ModelShape, size: str, engine: Engine) -> Point:
    work = work_of(demand_of_calibration(context, settings, shape))
    large = [tokens for tokens in settings.chunks if tokens >= MIN_PARTS * settings.part_tokens]
    return Point(
        size=size,
        work=replace(work, num_layers=len(engine.caches)),
        steps={rows: time_rows(context, settings, engine, rows) for rows in settings.rows},
        chunks={tokens: time_chunk(context, settings, engine, [tokens]) for tokens in settings.chunks},
        past={tokens: time_chunk(context, settings, engine, [tokens], start=tokens) for tokens in large},
        parts={tokens: time_chunk(context, settings, engine, prompts_of(settings, tokens)) for tokens in large},
    )


def keep_busy(context: RankContext, settings: Settings, engine: Engine, point: Point) -> tuple[Point, list[Load]]:
    """`point` with what the longest passes take after many of them; and when the cards did what: steps of the fewest
    rows and of the most, such passes, nothing."""
    loads, tokens = Loads(context, engine, point.work.format), max(settings.chunks)
    for rows in sorted({min(settings.rows), max(settings.rows)}):
        loads.steps(rows, settings.short_context, point.steps[rows].short)
    sustained_ms = loads.passes(tokens, settings.vocab_size, point.chunks[tokens].card)
    loads.waiting()
    return replace(point, sustained_ms=sustained_ms), loads.done


def prompts_of(settings: Settings, tokens: int) -> list[int]:
    """Lengths of the prompts in a chunk of many."""
    return [settings.part_tokens] * (tokens // settings.part_tokens)


def demand_of_calibration(context: RankContext, settings: Settings, shape: ModelShape) -> Demand:
    world_size = context.communicator.world_size
    return Demand(
        shape=shape,
        world_size=world_size,
        grain=choose_grain((shape.intermediate_size, shape.vocab_size), world_size),
        dtype="bfloat16",
        kv_dtype="auto",
        device=context.device.type,
        transport="solo",
        batch_size=max(settings.rows),
        prefill_chunk=max(settings.chunks),
    )


def time_rows(context: RankContext, settings: Settings, engine: Engine, rows: int) -> StepTimes:
    def median(tokens: int, *, talking: bool) -> float:
        communicator = context.communicator if talking else ElidedAllReduce(context.communicator)
        context.communicator.barrier()
        return statistics.median(time_steps(engine, [tokens] * rows, settings.num_steps, communicator))

    short = median(settings.short_context, talking=True)
    elided = median(settings.short_context, talking=False) if context.communicator.world_size > 1 else short
    return StepTimes(short, median(settings.long_context, talking=True), elided)


def time_chunk(
    context: RankContext, settings: Settings, engine: Engine, lengths: list[int], start: int = 0
) -> ChunkTimes:
    """The median of each time of such a pass."""
    with prompt_pass(engine, settings.vocab_size, lengths, start) as run:
        num = NUM_WARM_UPS + settings.num_chunks
        times = [time_apart(run, context.communicator, context.device) for _ in range(num)][NUM_WARM_UPS:]
    return ChunkTimes(
        *(statistics.median(getattr(each, name) for each in times) for name in ("whole", "queued", "card"))
    )
