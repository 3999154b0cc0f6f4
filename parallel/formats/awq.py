"""AWQ, version gemm, as AutoAWQ writes it: weight = (q - zero) * scale.

Words run over the outputs, and value i of a word is output 8 * word + ORDER[i]; inputs are rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from parallel.formats.scheme import Box, Part, Scheme
from parallel.formats.unpack import cut_groups, trim, unpack
from parallel.quantized import QuantizedWeight, by_blocks

PER_WORD = 8
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
# Where output i of a word's eight is.
POSITIONS = [ORDER.index(output) for output in range(PER_WORD)]


def parts(scheme: Scheme) -> tuple[Part, ...]:
    return (
        Part("qweight", ("I32",), (("in", 1), ("out", PER_WORD))),
        Part("qzeros", ("I32",), (("group", 1), ("out", PER_WORD))),
        Part("scales", ("F16", "BF16", "F32"), (("group", 1), ("out", 1))),
    )


def decode(stored: dict[str, Tensor], scheme: Scheme, box: Box) -> QuantizedWeight:
    def by_output(words: Tensor) -> Tensor:
        """[rows, words] -> [outputs, rows], a block of outputs at a time."""

        def unpack_outputs(outputs: slice) -> Tensor:
            some = words[:, outputs.start // PER_WORD : outputs.stop // PER_WORD]
            return unpack(some, scheme.bits).unflatten(-1, (-1, PER_WORD))[..., POSITIONS].flatten(-2).t()

        shape = (words.shape[1] * PER_WORD, len(words))
        return trim(by_blocks(shape, torch.uint8, words.device, unpack_outputs, PER_WORD), 0, box.outputs, PER_WORD)

    return QuantizedWeight(
        values=by_output(stored["qweight"]),
        bits=scheme.bits,
        scales=stored["scales"].t().contiguous(),
        zeros=by_output(stored["qzeros"]),
        group_size=scheme.group_size or max(box.shape[1], 1),
        group_of=cut_groups(scheme, box, stored["scales"]),
    )
