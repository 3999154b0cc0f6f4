"""What task=predictions measures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field


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
