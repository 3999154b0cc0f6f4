"""The formats whose weights can be read, by layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from parallel.formats import awq, compressed_tensors, fp8_block, gptq, nf4
from parallel.formats.scheme import Box, Part, Scheme
from parallel.quantized import QuantizedWeight


@dataclass(frozen=True)
class Format:
    """`parts` lists the stored tensors of a linear, `decode` makes one weight of a rank's slices of them."""

    parts: Callable[[Scheme], tuple[Part, ...]]
    decode: Callable[[dict[str, Tensor], Scheme, Box], QuantizedWeight]


FORMATS = {
    "awq": Format(awq.parts, awq.decode),
    "gptq": Format(gptq.parts, gptq.decode),
    "pack-quantized": Format(compressed_tensors.packed_parts, compressed_tensors.decode_packed),
    "int-quantized": Format(compressed_tensors.plain_parts, compressed_tensors.decode_plain),
    "float-quantized": Format(compressed_tensors.plain_parts, compressed_tensors.decode_plain),
    "fp8-block": Format(fp8_block.parts, fp8_block.decode),
    "nf4": Format(nf4.parts, nf4.decode),
}


def format_of(scheme: Scheme) -> Format:
    assert scheme.layout in FORMATS, f"{scheme.layout=}; known: {', '.join(FORMATS)}"
    return FORMATS[scheme.layout]
