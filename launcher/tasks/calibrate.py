"""task=calibrate: times of small engines with layers of two sizes, from which any model's steps are predicted.

Steps are timed whole, as they run: captured, with their all-reduces and whatever overlaps. Two depths tell a layer's
time from the rest, two sizes a byte's from what every layer starts with.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from launcher.memory import Demand
from launcher.rank import RankContext
from launcher.shape import ModelShape
from launcher.tasks.bandwidth import copy_bandwidth
from launcher.tasks.weights import config_of_shape
from launcher.timing.fit import Calibration, Point, StepTimes
from launcher.timing.work import work_of
from parallel.checkpoint.dummy import fill_dummy
from parallel.checkpoint.quantize_schemes import QUANTIZE_SCHEMES
from parallel.communicator import ElidedAllReduce
from parallel.engine.engine import Engine, Part
from parallel.engine.limits import EngineLimits
from parallel.engine.merged import LayerMerger
from parallel.engine.pages import pages_for
from parallel.engine.sequence import Sequence
from parallel.engine.step_timer import time_steps
from parallel.kernels.held import held_bits
from parallel.partition import choose_grain
from parallel.shard import build_sharded_model

FORMATS = ("bf16", *QUANTIZE_SCHEMES)
# Layers of Llama-70B and of half its width.
WIDTHS = {"wide": 8192, "narrow": 4096}
DEPTHS = (2, 6)


@dataclass(frozen=True)
class Settings:
    """What is timed; a test takes less of it."""

    widths: Mapping[str, int]
    formats: tuple[str, ...] = FORMATS
    rows: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    chunks: tuple[int, ...] = (128, 256, 512, 1024, 2048)
    short_context: int = 512
    long_context: int = 4096
    vocab_size: int = 128256
    num_steps: int = 10
    num_chunks: int = 3


def run_calibrate(context: RankContext, settings: Settings | None = None) -> dict[str, Any]:
    """Results: {"calibration": ...}, of rank 0's clock; every rank runs the same engines."""
    settings, points = settings or Settings(WIDTHS), []
    cases = [(f, name, depth) for f in settings.formats for name in settings.widths for depth in DEPTHS]
    copy_bytes_per_sec = copy_bandwidth(context.device)
    for done, (format_name, size, depth) in enumerate(cases, start=1):
        points.append(time_engine(context, settings, calibration_shape(settings, size, depth, format_name), size))
        context.events.progress("calibrating", done, len(cases), "engines")
    placement = context.job.placement
    calibration = Calibration(
        card=placement.names[0],
        world_size=placement.world_size,
        versions={"torch": torch.__version__},
        short_context=settings.short_context,
        long_context=settings.long_context,
        copy_gb_per_sec=(copy_bytes_per_sec or 0.0) / 1e9,
        points=tuple(points),
    )
    return {"transport": context.transport_summary(), "calibration": asdict(calibration)}


def calibration_shape(settings: Settings, size: str, depth: int, format_name: str) -> ModelShape:
    """A Llama of that width in the proportions of 70B, with heads of 128."""
    width, scheme = settings.widths[size], QUANTIZE_SCHEMES.get(format_name)
    return ModelShape(
        model_type="llama",
        hidden_size=width,
        intermediate_size=width * 7 // 2,
        num_layers=depth,
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


def time_engine(context: RankContext, settings: Settings, shape: ModelShape, size: str) -> Point:
    engine = open_engine(context, settings, shape)
    point = Point(
        size=size,
        work=replace(work_of(demand_of_calibration(context, settings, shape)), num_layers=shape.num_layers),
        steps={rows: time_rows(context, settings, engine, rows) for rows in settings.rows},
        chunks_ms={tokens: time_chunk(context, settings, engine, tokens, 0) for tokens in settings.chunks},
        past_ms=time_chunk(context, settings, engine, max(settings.chunks), max(settings.chunks)),
    )
    # Before the next one is built; what refers to itself goes with the collector only.
    del engine
    gc.collect()
    if context.device.type == "cuda":
        torch.cuda.empty_cache()
    return point


def open_engine(context: RankContext, settings: Settings, shape: ModelShape) -> Engine:
    grain = choose_grain((shape.intermediate_size, shape.vocab_size), context.communicator.world_size)
    model = build_sharded_model(config_of_shape(shape), context.communicator, dtype=torch.bfloat16, grain=grain)
    fill_dummy(model, shape.scheme, context.device, on_placed=LayerMerger(model.module))
    limits = EngineLimits(settings.long_context, max(settings.rows), max(settings.chunks))
    return Engine(model.module, context.communicator, context.device, limits, prefix_cache=False)


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


def time_chunk(context: RankContext, settings: Settings, engine: Engine, tokens: int, start: int) -> float:
    """Milliseconds of a pass over `tokens` tokens of one prompt, those before `start` being in the cache."""
    sequence = Sequence(0, [0] * (start + tokens), max_tokens=1)
    sequence.pages = engine.pages.allocate(pages_for(sequence.num_tokens))
    part = Part(sequence, start, start + tokens)
    try:
        times = [one_pass(context, engine, part) for _ in range(1 + settings.num_chunks)]
    finally:
        engine.pages.release(sequence.pages)
    return statistics.median(times[1:])


def one_pass(context: RankContext, engine: Engine, part: Part) -> float:
    context.communicator.barrier()
    begin = time.perf_counter()
    engine.prefill([part])
    if context.device.type == "cuda":
        torch.cuda.synchronize(context.device)
    return (time.perf_counter() - begin) * 1e3
