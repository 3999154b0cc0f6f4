"""bitsandbytes' NF4, as transformers saves it: weight = codebook[value] * absmax of its block of 64 inputs.

Values are two to a byte, the first in the high half, in one line over all rows. With double quantisation a block's
absmax is nested_quant_map[absmax] * nested_absmax + nested_offset, where 256 blocks, again in one line, share a
nested_absmax.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from parallel.formats.scheme import NESTED_GROUP, TEXT, Box, CheckpointError, Part, Scheme, group_range
from parallel.formats.unpack import cut_groups, split_bytes, trim
from parallel.quantized import QuantizedWeight

PER_BYTE = 2
STATE = "weight.quant_state.bitsandbytes__nf4"
# Where NF4's outermost quantiles are: the mean of 1 - 1/32 and 1 - 1/30, the outer halves of 16 and of 15 parts.
OUTERMOST = (2 - 1 / 32 - 1 / 30) / 2


def parts(scheme: Scheme) -> tuple[Part, ...]:
    both = (
        Part("weight", ("U8",), (("out", 1), ("in", PER_BYTE)), flat_dims=2),
        Part("weight.absmax", ("U8",) if scheme.nested_scales else ("F32",), (("out", 1), ("group", 1)), flat_dims=1),
        Part("weight.quant_map", ("F32",), (("4 bits", 1),)),
        Part(STATE, ("U8",), ((TEXT, 1),)),
    )
    nested = (
        Part("weight.nested_absmax", ("F32",), (("nested", 1),)),
        Part("weight.nested_quant_map", ("F32",), (("8 bits", 1),)),
    )
    return both + nested * scheme.nested_scales


def decode(stored: dict[str, Tensor], scheme: Scheme, box: Box) -> QuantizedWeight:
    """Raises CheckpointError where the state that is stored with a weight contradicts config.json."""
    assert scheme.group_size is not None
    state = read_state(stored[STATE], scheme)
    scales = stored["weight.absmax"]
    if scheme.nested_scales:
        scales = nested_scales(stored, state, scheme, box)
    return QuantizedWeight(
        values=trim(split_bytes(stored["weight"], first=1), 1, box.inputs, PER_BYTE).contiguous(),
        bits=scheme.bits,
        scales=scales,
        zeros=None,
        group_size=scheme.group_size,
        group_of=cut_groups(scheme, box, scales),
        codebook=stored["weight.quant_map"],
    )


def read_state(text: Tensor, scheme: Scheme) -> dict[str, Any]:
    """The JSON in the bytes of `text`."""
    try:
        state = json.loads(bytes(text.tolist()))
    except ValueError as error:
        raise CheckpointError(f"{STATE} holds no valid JSON ({error}). Download the file again.") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{STATE} holds no JSON object. Download the file again.")
    wanted: dict[str, Any] = {"quant_type": "nf4", "blocksize": scheme.group_size}
    if scheme.nested_scales:
        wanted["nested_blocksize"] = NESTED_GROUP
    for name, value in wanted.items():
        if state.get(name) != value:
            raise CheckpointError(f"{STATE} has {name}={state.get(name)!r}, and only {value!r} can be loaded.")
    return state


def nested_scales(stored: dict[str, Tensor], state: dict[str, Any], scheme: Scheme, box: Box) -> Tensor:
    """[outputs, groups] float32 out of bytes; which of the 256 blocks an absmax is in depends on the whole linear."""
    try:
        num_in, offset = int(state["shape"][1]), float(state["nested_offset"])
    except (LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"{STATE} lacks a shape or a nested_offset. Download the file again.") from error
    absmax = stored["weight.absmax"]
    outputs = torch.arange(*box.outputs, device=absmax.device).unsqueeze(1)
    groups = torch.arange(*group_range(scheme, num_in, box), device=absmax.device)
    blocks = (outputs * scheme.num_groups(num_in) + groups) // NESTED_GROUP
    by_block = stored["weight.nested_quant_map"][absmax.int()] * stored["weight.nested_absmax"][blocks]
    return by_block + offset


def nf4_codebook() -> Tensor:
    """[16] float32, ascending from -1 to 1: quantiles of the normal distribution, seven below zero, zero, eight above.

    For weights that come from no file. Dettmers et al., QLoRA, 2023 (arXiv:2305.14314), section 3 and appendix E.
    """
    below = torch.special.ndtri(torch.linspace(OUTERMOST, 0.5, 8, dtype=torch.float64)[:-1])
    above = torch.special.ndtri(torch.linspace(OUTERMOST, 0.5, 9, dtype=torch.float64)[:-1])
    numbers = torch.cat([-below, torch.zeros(1, dtype=torch.float64), above.flip(0)])
    return (numbers / numbers.max()).float()
