"""The packed weights of w4a16 and w8a16 in bf16 (dequantize_packed.cu), for products of more rows than they take."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from torch import Tensor

from parallel.kernels.launch import Kernel, load_kernel
from parallel.kernels.tiles import FOLDER, WARP, empty_weight
from parallel.kernels.wide import Layout, describe_card

# Of a block, as in the source.
WARPS = 8
# The weight, its scales, the result; row tiles, units; then perhaps a codebook.
PARAMETERS = "PPPii"


@dataclass(frozen=True)
class Variant:
    """Bytes of a row that a store covers, units a warp has at a time, and what caches do not keep (see the source).

    `blocks`: so many on a multiprocessor, which take units until there are none; 0: as many as there is work for.
    """

    run: int
    units: int
    stream: int = 0
    blocks: int = 0

    def options(self) -> tuple[str, ...]:
        return (f"-DRUN={self.run}", f"-DUNITS={self.units}", f"-DSTREAM={self.stream}")


# The plainest. Which is the fastest on a card, tools/bench_dequantize.py measures.
CHOSEN = Variant(run=64, units=1)


def run(packed: Tensor, scales: Tensor, codebook: Tensor | None, layout: Layout) -> Tensor:
    """[out, in] bf16, columns as they are packed."""
    tiles, units = packed.shape[:2]
    weight = empty_weight(packed)
    blocks = -(-tiles * units // (WARPS * CHOSEN.units))
    if CHOSEN.blocks:
        blocks = min(blocks, CHOSEN.blocks * describe_card(packed.device.index).multiprocessors)
    kernel = compile_kernel(CHOSEN, layout, packed.device.index)
    entries = [] if codebook is None else [codebook]
    kernel((blocks, 1, 1), WARPS * WARP, packed, scales, weight, tiles, units, *entries)
    return weight


@cache
def compile_kernel(variant: Variant, layout: Layout, device_index: int) -> Kernel:
    options = (*variant.options(), *layout.options)
    parameters = PARAMETERS + "P" * layout.has_codebook
    return load_kernel(FOLDER / "dequantize_packed.cu", "dequantize_weight", options, parameters, device_index)
