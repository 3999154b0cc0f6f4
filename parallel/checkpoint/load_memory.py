"""What the load of a linear takes on its device beside what stays there; without torch, for plans.

Bytes are those of parallel/formats, quantize.py and kernels, counted in the code and measured with torch's
profiler on a CPU (tests/parallel/checkpoint/test_load_memory.py).
"""

from __future__ import annotations

from parallel.checkpoint.quantize_schemes import ROUNDED_AT_A_TIME, ROUNDING_BYTES
from parallel.footprint import BLOCK_ELEMENTS, held_bits, predict_kernel, stored_bits
from parallel.formats.scheme import Scheme

# A byte a weight is what decoding and rounding give.
VALUE_BYTES = 1.0
# For each weight of a block of BLOCK_ELEMENTS: AWQ's values are put in order twice.
DECODE_BLOCK_BYTES = {"awq": 2.0}
# Likewise. w4a16 spreads values as int32, permutes them, and joins eight to a word; w8a16 permutes bytes, and deals the
# bits of e4m3 numbers anew. Both take inputs in act order from a copy.
PACK_BLOCK_BYTES = {"w4a16": 9.0, "w8a16": 1.0}
FLOAT_BYTES = 1.0
ACT_ORDER_BYTES = 1.0
# The other kernels join two values of 4 bits to a byte, all of them at once.
JOIN_BYTES = {4: 2.0, 8: 0.0}


def load_bytes(scheme: Scheme, device: str, dtype: str, stored_element_bytes: int, num_in: int, numel: int) -> int:
    """Bytes at the peak while a linear of `numel` weights, `num_in` inputs wide, becomes its packed self.

    Args:
        stored_element_bytes: of a weight in the file, where it is rounded here.
    """
    stays = numel * held_bits(scheme, device, dtype, num_in) / 8
    pack = pack_bytes(scheme, predict_kernel(scheme, device, dtype), stays, numel)
    if scheme.layout == "rounded":
        # On a card, one kernel rounds all of it and takes nothing beside.
        block = 0 if device == "cuda" else min(numel, ROUNDED_AT_A_TIME)
        rounding = numel * (stored_element_bytes + VALUE_BYTES) + block * ROUNDING_BYTES
        return round(max(rounding, pack) - stays)
    stored = numel * stored_bits(scheme, num_in) / 8
    return round(stored + max(decode_bytes(scheme, numel), pack) - stays)


def decode_bytes(scheme: Scheme, numel: int) -> float:
    """What decoding takes beside what is stored, its result included."""
    # GPTQ's words are transposed first.
    transposed = scheme.bits / 8 if scheme.layout == "gptq" else 0
    return numel * (VALUE_BYTES + transposed) + in_block(numel) * DECODE_BLOCK_BYTES.get(scheme.layout, 0)


def pack_bytes(scheme: Scheme, kernel: str, stays: float, numel: int) -> float:
    """What packing takes, the values and its result included."""
    if kernel not in PACK_BLOCK_BYTES:
        return numel * (VALUE_BYTES + JOIN_BYTES[scheme.bits])
    block_bytes = PACK_BLOCK_BYTES[kernel] + FLOAT_BYTES * scheme.is_float + ACT_ORDER_BYTES * scheme.act_order
    return numel * VALUE_BYTES + stays + in_block(numel) * block_bytes


def in_block(numel: int) -> int:
    return min(numel, BLOCK_ELEMENTS)
