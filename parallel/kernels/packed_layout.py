"""How a packed weight of w4a16 or w8a16 is read."""

from __future__ import annotations

from dataclasses import dataclass

# What copies to shared memory are made of.
COPIED_BYTES = 16


@dataclass(frozen=True)
class Layout:
    """What the kernels are told of a packed weight, and bytes of 128 inputs of 16 outputs.

    `scale_bytes`: of their scales, 0 where all inputs share one. `weights_side_by_side`: 2 for gates and ups.
    """

    options: tuple[str, ...]
    weight_bytes: int
    scale_bytes: int
    has_codebook: bool = False
    weights_side_by_side: int = 1

    @property
    def unit_bytes(self) -> int:
        """In shared memory."""
        return self.weight_bytes + copied_bytes(self.scale_bytes)


def copied_bytes(size: int) -> int:
    return -(-size // COPIED_BYTES) * COPIED_BYTES
