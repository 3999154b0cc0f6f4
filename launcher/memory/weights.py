"""Bits that weights take in the checkpoint, and quantised ones once they are on their device."""

from __future__ import annotations

from launcher.models.shape import DTYPE_BYTES, ModelShape, part_bytes
from parallel.footprint import held_bits, stored_bits

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


def stored_linear_bits(shape: ModelShape) -> float:
    """What a weight of a linear takes in the checkpoint on average; those that are rounded at load are plain there."""
    is_plain = shape.quantization == "none" or (shape.scheme is not None and shape.scheme.layout == "rounded")
    return 8.0 * DTYPE_BYTES[shape.dtype] if is_plain else shape.linear_bits


def stored_bytes(shape: ModelShape) -> int:
    """Weights of the whole model in the checkpoint."""
    (parts,) = part_bytes(shape, 1, 1, shape.dtype, linear_bits=stored_linear_bits(shape))
    return sum(parts.values())
