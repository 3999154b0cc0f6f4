"""How a checkpoint of plain numbers is quantised while it loads; without torch, for plans."""

from __future__ import annotations

from parallel.formats.scheme import Box, Scheme

# Groups of one partition grain, so that a cut between ranks falls between groups and every rank count gives the same
# weights. Nats a token that rounding the demo model costs on 65,472 held-out tokens, in groups of 128: 4 bits symmetric
# 0.034, with the range searched 0.026; 4 bits with a zero 0.027, with the range searched 0.021.
QUANTIZE_SCHEMES = {
    "int4": Scheme("int4", "rounded", bits=4, group_size=128, has_zeros=True),
    "int8": Scheme("int8", "rounded", bits=8, group_size=128),
    "fp8": Scheme("fp8", "rounded", bits=8, group_size=128, is_float=True),
}
# Weights that plain torch rounds at a time: its passes over them stay in the cache of a card.
ROUNDED_AT_A_TIME = 4 * 1024**2
# Bytes a weight of those at most: as float32, filled up to whole groups, as levels, and errors while they are summed.
ROUNDING_BYTES = 4 + 4 + 4 + 4


def widen(box: Box, scheme: Scheme, num_in: int) -> Box:
    """The inputs of `box` and what their groups have besides: a group that ranks share is rounded as a whole."""
    if scheme.group_size is None:
        return box
    first, end = box.inputs
    if first == end:
        return box
    return Box(box.outputs, (first - first % scheme.group_size, min(end + -end % scheme.group_size, num_in)))
