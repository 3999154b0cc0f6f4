"""What is done with the model, and the settings of single tasks; those of task=bench are in workload.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

# Formats of weights that rates are kept of: as linears are multiplied by, whatever the checkpoint's.
RATED_FORMATS = ("bf16", "int4", "int8", "fp8")


class TaskKind(str, Enum):
    generate = "generate"
    plan = "plan"
    probe = "probe"
    calibrate = "calibrate"
    bench = "bench"
    predictions = "predictions"


@dataclass
class TaskConfig:
    kind: TaskKind = TaskKind.generate


@dataclass
class ProbeConfig:
    """Sizes and repeats of task=probe; sizes grow by factors of four."""

    min_bytes: int = 1024
    max_bytes: int = 64 * 1024 * 1024
    repeats: int = 50

    def problems(self) -> Iterator[str]:
        if not 4 <= self.min_bytes <= self.max_bytes:
            yield f"probe.min_bytes={self.min_bytes} must be from 4 to probe.max_bytes={self.max_bytes}."
        if self.repeats < 1:
            yield f"probe.repeats={self.repeats} must be at least 1."


class Aim(str, Enum):
    latency = "latency"
    throughput = "throughput"
    context = "context"


@dataclass
class PlanConfig:
    # What topology=all ranks by: least time a token, most tokens a second of all copies, or most tokens of KV cache.
    aim: Aim = Aim.latency


@dataclass
class CalibrateConfig:
    # Of weights: bf16, int4, int8, fp8. What was known of the others stays.
    formats: list[str] = field(default_factory=lambda: list(RATED_FORMATS))

    def problems(self) -> Iterator[str]:
        unknown = [name for name in self.formats if name not in RATED_FORMATS]
        if unknown or not self.formats:
            yield f"calibrate.formats={self.formats} must be some of {', '.join(RATED_FORMATS)}."


@dataclass
class PredictionsConfig:
    """Every batch size with every length of prompt, where it fits."""

    batch_sizes: list[int] = field(default_factory=lambda: [1, 8, 32])
    prompt_tokens: list[int] = field(default_factory=lambda: [128, 512, 2048, 4096])

    def problems(self) -> Iterator[str]:
        for name in ("batch_sizes", "prompt_tokens"):
            values = getattr(self, name)
            if not values or min(values) < 1:
                yield f"predictions.{name}={values} must be a list of numbers of at least 1."
