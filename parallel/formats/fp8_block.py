"""FP8 with a scale a block, as DeepSeek's and Qwen's FP8 checkpoints have it: weight = value * weight_scale_inv.

Whatever its name says, weight_scale_inv is what a value is multiplied by.
"""

from __future__ import annotations

from torch import Tensor

from parallel.formats import compressed_tensors
from parallel.formats.scheme import Box, Part, Scheme
from parallel.quantized import QuantizedWeight

FLOATS = ("F32", "BF16", "F16")


def parts(scheme: Scheme) -> tuple[Part, ...]:
    return (
        Part("weight", ("F8_E4M3",), (("out", 1), ("in", 1))),
        Part("weight_scale_inv", FLOATS, (("out", scheme.block_outputs), ("group", 1))),
        # Activations stay as they are here.
        Part("activation_scale", FLOATS, (), required=False, used=False),
    )


def decode(stored: dict[str, Tensor], scheme: Scheme, box: Box) -> QuantizedWeight:
    renamed = {"weight": stored["weight"], "weight_scale": stored["weight_scale_inv"]}
    return compressed_tensors.decode_plain(renamed, scheme, box)
