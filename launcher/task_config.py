"""What is done with the model, and what task=probe measures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum


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
