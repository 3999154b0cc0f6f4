"""What task=calibrate times."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from launcher.timing.published import FORMATS


@dataclass
class CalibrateConfig:
    # Of weights: bf16, int4, int8, fp8. What was known of the others stays.
    formats: list[str] = field(default_factory=lambda: list(FORMATS))

    def problems(self) -> Iterator[str]:
        unknown = [name for name in self.formats if name not in FORMATS]
        if unknown or not self.formats:
            yield f"calibrate.formats={self.formats} must be some of {', '.join(FORMATS)}."
