"""compressed-tensors: packed words of 4 or 8 bits, and weights of 8 bits as they are, scaled by channel or block.

Packed values and zeros are signed numbers plus half their range; weights are packed along the inputs, zeros along the
outputs (github.com/vllm-project/compressed-tensors, compressors/pack_quantized).
"""

from __future__ import annotations

import torch
from torch import Tensor

from parallel.formats.scheme import Box, Part, Scheme
from parallel.formats.unpack import cut_groups, stored_groups, trim, unpack
from parallel.quantized import QuantizedWeight

FLOATS = ("F16", "BF16", "F32")


def packed_parts(scheme: Scheme) -> tuple[Part, ...]:
    per_word = 32 // scheme.bits
    both = (
        Part("weight_packed", ("I32",), (("out", 1), ("in", per_word))),
        Part("weight_scale", FLOATS, (("out", 1), ("group", 1))),
        Part("weight_shape", ("I32", "I64"), (("two", 1),), required=False, used=False),
    )
    zeros = Part("weight_zero_point", ("I32",), (("out", per_word), ("group", 1)))
    groups = Part("weight_g_idx", ("I32", "I64"), (("in", 1),))
    return both + (zeros,) * scheme.has_zeros + (groups,) * scheme.act_order


def decode_packed(stored: dict[str, Tensor], scheme: Scheme, box: Box) -> QuantizedWeight:
    """Raises CheckpointError where group indices contradict the scales."""
    per_word = 32 // scheme.bits
    scales, zeros = stored["weight_scale"], None
    if scheme.has_zeros:
        zeros = trim(unpack(stored["weight_zero_point"].t(), scheme.bits), 1, box.outputs, per_word).t().contiguous()
    return QuantizedWeight(
        values=trim(unpack(stored["weight_packed"], scheme.bits), 1, box.inputs, per_word).contiguous(),
        bits=scheme.bits,
        scales=scales,
        zeros=zeros,
        group_size=scheme.group_size or max(box.shape[1], 1),
        group_of=stored_groups(stored["weight_g_idx"], scales.shape[1])
        if scheme.act_order
        else cut_groups(scheme, box, scales),
    )


def plain_parts(scheme: Scheme) -> tuple[Part, ...]:
    """Activations stay as they are here, so that their scale is not used."""
    scale = () if scheme.per_tensor else (("out", scheme.block_outputs), ("group", 1))
    return (
        Part("weight", ("F8_E4M3",) if scheme.is_float else ("I8",), (("out", 1), ("in", 1))),
        Part("weight_scale", FLOATS, scale),
        Part("weight_zero_point", ("I8", "F8_E4M3"), scale, required=scheme.has_zeros, used=scheme.has_zeros),
        Part("input_scale", FLOATS, (), required=False, used=False),
        Part("input_zero_point", ("I8", "F8_E4M3"), (), required=False, used=False),
    )


def decode_plain(stored: dict[str, Tensor], scheme: Scheme, box: Box) -> QuantizedWeight:
    num_out, num_in = box.shape

    def by_output(stored_scale: Tensor) -> Tensor:
        """A row for each output, of one number a group."""
        if scheme.per_tensor:
            return stored_scale.reshape(1, 1).repeat(num_out, 1)
        rows = stored_scale.repeat_interleave(scheme.block_outputs, dim=0)
        return trim(rows, 0, box.outputs, scheme.block_outputs).contiguous()

    zeros = by_output(unsigned(stored["weight_zero_point"])) if scheme.has_zeros else None
    return QuantizedWeight(
        values=stored["weight"] if scheme.is_float else unsigned(stored["weight"]),
        bits=scheme.bits,
        scales=by_output(stored["weight_scale"]),
        zeros=zeros,
        group_size=scheme.group_size or max(num_in, 1),
        group_of=cut_groups(scheme, box, stored["weight_scale"]),
    )


def unsigned(values: Tensor) -> Tensor:
    """int8 -> uint8, 128 more."""
    return values.view(torch.uint8) ^ 128
