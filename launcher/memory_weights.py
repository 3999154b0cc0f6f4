"""Bits that quantised weights take once they are on their device."""

from __future__ import annotations

from launcher.shape import DTYPE_BYTES, ModelShape
from parallel.kernels.held import held_bits, stored_bits

# Bits of the weights that a quantised checkpoint leaves as they are, and the share of them from which they count:
# smaller ones are group indices and symmetric zeros.
PLAIN_BITS = 16
LEAST_PLAIN = 0.01


def held_linear_bits(shape: ModelShape, device: str, dtype: str) -> float | None:
    """What a weight of a linear takes on average, packed for its kernel; None: as it is stored."""
    if shape.scheme is None:
        return None
    held = held_bits(shape.scheme, device, dtype, shape.hidden_size)
    stored = stored_bits(shape.scheme, shape.hidden_size)
    # What the checkpoint takes beyond its format is linears that it leaves as they are, in 16 bits.
    plain = max(0.0, (shape.linear_bits - stored) / (PLAIN_BITS - stored))
    return held + plain * (8 * DTYPE_BYTES[dtype] - held) if plain > LEAST_PLAIN else held
