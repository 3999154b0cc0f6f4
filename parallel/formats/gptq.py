"""GPTQ, as AutoGPTQ and GPTQModel write it: weight = (q - zero) * scale.

Weights are packed along the inputs, zeros along the outputs. The first version of the format ("gptq") stores each zero
less one, in the same number of bits, so that 0 is stored as the largest value.
"""

from __future__ import annotations

import torch
from torch import Tensor

from parallel.formats.scheme import Box, CheckpointError, Part, Scheme
from parallel.formats.unpack import cut_groups, stored_groups, trim, unpack
from parallel.quantized import QuantizedWeight


def parts(scheme: Scheme) -> tuple[Part, ...]:
    per_word = 32 // scheme.bits
    return (
        Part("qweight", ("I32",), (("in", per_word), ("out", 1))),
        Part("qzeros", ("I32",), (("group", 1), ("out", per_word))),
        Part("scales", ("F16", "BF16", "F32"), (("group", 1), ("out", 1))),
        Part("g_idx", ("I32", "I64"), (("in", 1),), required=scheme.act_order),
    )


def decode(stored: dict[str, Tensor], scheme: Scheme, box: Box) -> QuantizedWeight:
    """Raises CheckpointError where zeros or group indices contradict config.json."""
    per_word = 32 // scheme.bits
    zeros = trim(unpack(stored["qzeros"], scheme.bits), 1, box.outputs, per_word).t().contiguous()
    if scheme.zeros_less_one:
        zeros = (zeros + 1) & (2**scheme.bits - 1)
    if not scheme.has_zeros:
        check_middle(zeros, scheme)
    return QuantizedWeight(
        values=trim(unpack(stored["qweight"].t(), scheme.bits), 1, box.inputs, per_word).contiguous(),
        bits=scheme.bits,
        scales=stored["scales"].t().contiguous(),
        zeros=zeros if scheme.has_zeros else None,
        group_size=scheme.group_size or max(box.shape[1], 1),
        group_of=local_groups(stored, scheme, box),
    )


def check_middle(zeros: Tensor, scheme: Scheme) -> None:
    """Symmetric weights have their zero in the middle; another one means that the format is misnamed."""
    wrong = zeros[zeros != 2 ** (scheme.bits - 1)]
    if wrong.numel():
        raise CheckpointError(
            f"zeros are {int(wrong[0])} where sym=true in quantization_config makes them {2 ** (scheme.bits - 1)}: "
            "checkpoint_format or sym is wrong. Correct config.json."
        )


def local_groups(stored: dict[str, Tensor], scheme: Scheme, box: Box) -> Tensor | None:
    """Each input's group in act order; otherwise those of neighbours, once it is sure that they are."""
    if scheme.act_order:
        return stored_groups(stored["g_idx"], len(stored["scales"]))
    if "g_idx" in stored and scheme.group_size is not None:
        inputs = torch.arange(*box.inputs, device=stored["g_idx"].device)
        if not torch.equal(stored["g_idx"].long(), inputs // scheme.group_size):
            raise CheckpointError("g_idx is in act order, where quantization_config has desc_act=false. Correct it.")
    return cut_groups(scheme, box, stored["scales"])
