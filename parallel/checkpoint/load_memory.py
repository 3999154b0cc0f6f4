"""What the load of a linear takes on its device beside what stays there; without torch, for plans.

Bytes are those of parallel/checkpoint/formats, quantize.py and kernels, counted in the code and measured with torch's
profiler on a CPU (tests/parallel/test_load_memory.py).
"""

from __future__ import annotations

from parallel.checkpoint.formats.scheme import Scheme
from parallel.checkpoint.quantize_schemes import ROUNDED_AT_A_TIME, ROUNDING_BYTES
from parallel.kernels.held import held_bits, predict_kernel, stored_bits

# A byte a weight is what decoding and rounding give. Of 4-bit values, halves of bytes are taken apart and put in order.
VALUE_BYTES = 1.0
UNPACK_BYTES = {4: 2.0, 8: 1.0}
# w4a16 spreads values as int32, permutes them, and joins eight to a word; w8a16 permutes bytes and deals the bits of
# e4m3 numbers anew; the others join two values of 4 bits to a byte.
PACK_BYTES = {"w4a16": 9.0, "w8a16": 2.0}
JOIN_BYTES = {4: 2.0, 8: 0.0}


def load_bytes(scheme: Scheme, device: str, dtype: str, stored_element_bytes: int, num_in: int, numel: int) -> int:
    """Bytes at the peak while a linear of `numel` weights, `num_in` inputs wide, becomes its packed self.

    Args:
        stored_element_bytes: of a weight in the file, where it is rounded here.
    """
    pack = VALUE_BYTES + PACK_BYTES.get(predict_kernel(scheme, device, dtype), JOIN_BYTES[scheme.bits])
    stays = held_bits(scheme, device, dtype, num_in) / 8
    if scheme.layout == "rounded":
        block = min(numel, ROUNDED_AT_A_TIME) * ROUNDING_BYTES
        return round(max(numel * (stored_element_bytes + VALUE_BYTES) + block, numel * pack) - numel * stays)
    stored = stored_bits(scheme, num_in) / 8
    # GPTQ's words are transposed first.
    decode = UNPACK_BYTES[scheme.bits] + (scheme.bits / 8 if scheme.layout == "gptq" else 0)
    return round(numel * (stored + max(decode, pack) - stays))
