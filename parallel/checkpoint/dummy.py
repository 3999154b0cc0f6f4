"""Weights of the right layout that mean nothing, made on the device: for timing a model that is not on this machine.

Every row of a matrix is a window into one pool of random numbers, at a place that the parameter's name and the row
decide. So a rank makes its slice alone, at the speed of a copy, and any number of ranks makes the same model.
"""

from __future__ import annotations

import time
import zlib
from collections import Counter
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from parallel.checkpoint.load import LoadResult, move_buffers, place
from parallel.checkpoint.match import parameter_owners
from parallel.checkpoint.quantized import install, local_box
from parallel.formats.scheme import Box, Range, Scheme, group_range
from parallel.formats.unpack import cut_groups
from parallel.kernels.round_groups import FLOAT8_MAX
from parallel.layers.linear import ShardedLayer
from parallel.quantized import QuantizedWeight
from parallel.shard import ShardedModel

# The spread with which these families are initialised; activations stay finite in all dtypes at 80 layers.
STANDARD_DEVIATION = 0.02
# Spread of the values of an e4m3 weight, which end at 448.
FLOAT8_SPREAD = 64.0
# Beyond the longest row, the places at which a row may begin: rows look unrelated to any layer.
NUM_PLACES = 2**20 + 7


def fill_dummy(
    model: ShardedModel,
    scheme: Scheme | None,
    device: torch.device,
    *,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    on_placed: Callable[[str], None] = lambda name: None,
) -> LoadResult:
    """Puts random weights in place of the meta parameters: norms are 1, biases 0, all else of STANDARD_DEVIATION.

    Args:
        scheme: how linears are quantised, with values of random bits; None: they are plain.
        on_placed: called with the name of each parameter that is in place.
        on_progress: called after each parameter with how many are done, and of how many.
    """
    start = time.perf_counter()
    longest = max(shape[-1] for shape in model.full_shapes.values())
    pool, kernels = Pool(longest, device), Counter[str]()
    owners = parameter_owners(model.module)
    for done, (name, shape) in enumerate(model.full_shapes.items(), start=1):
        module, attribute = owners[name][0]
        if getattr(module, attribute).is_meta:
            if scheme is not None and name in model.linears:
                assert isinstance(module, ShardedLayer)
                # No name for the weight: it would hold its memory while the next one is made.
                kernel = install(module, quantized_values(pool, name, shape, local_box(module, shape), scheme))
                kernels[kernel] += 1
            else:
                place(owners[name], plain_values(pool, name, shape, module, attribute), name)
            on_placed(name)
        on_progress(done, len(model.full_shapes))
    move_buffers(model.module, device)
    sec = time.perf_counter() - start
    return LoadResult(bytes_read=0, sec=sec, disk_wait_sec=0.0, decode_sec=sec, kernels=dict(kernels))


class Pool:
    """Random numbers on a device, the same on every device; rows of up to `longest` elements are cut out of them."""

    def __init__(self, longest: int, device: torch.device) -> None:
        self.size = NUM_PLACES + longest
        self.device = device
        self.sources: dict[object, Tensor] = {}

    def source(self, key: object, draw: Callable[[torch.Generator], Tensor]) -> Tensor:
        """The numbers that `draw` makes, [size], once for each key."""
        if key not in self.sources:
            self.sources[key] = draw(torch.Generator().manual_seed(0)).to(self.device)
        return self.sources[key]

    def cut(self, source: Tensor, name: str, num_rows: int, rows: Range, columns: Range) -> Tensor:
        """Rows and columns of a matrix of `num_rows` rows that `name` decides."""
        starts = torch.randint(NUM_PLACES, (num_rows,), generator=seeded(name))[slice(*rows)]
        windows = source.unfold(0, columns[1] - columns[0], 1)
        return windows.index_select(0, (starts + columns[0]).to(self.device))


def seeded(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def plain_values(pool: Pool, name: str, shape: tuple[int, ...], module: nn.Module, attribute: str) -> Tensor:
    """What this rank holds of a parameter whose full shape is `shape`."""
    meta: Tensor = getattr(module, attribute)
    if len(shape) == 1:
        return torch.full(meta.shape, float(attribute != "bias"), dtype=meta.dtype, device=pool.device)
    noise = pool.source(
        meta.dtype, lambda generator: (STANDARD_DEVIATION * torch.randn(pool.size, generator=generator)).to(meta.dtype)
    )
    box = local_box(module, shape) if isinstance(module, ShardedLayer) else Box((0, shape[0]), (0, shape[1]))
    return pool.cut(noise, name, shape[0], box.outputs, box.inputs)


def quantized_values(pool: Pool, name: str, shape: tuple[int, ...], box: Box, scheme: Scheme) -> QuantizedWeight:
    """What this rank holds of a linear [out, in]; zeros are in the middle, so that values have no common bias."""
    num_out, num_in = shape
    levels = pool.source("values", partial(draw_values, pool.size, scheme))
    values = pool.cut(levels, name, num_out, box.outputs, box.inputs)
    steps = pool.source("scales", partial(draw_scales, pool.size, scheme))
    scales = pool.cut(steps, f"{name} scales", num_out, box.outputs, group_range(scheme, num_in, box))
    zeros = torch.full_like(scales, 2 ** (scheme.bits - 1), dtype=torch.uint8) if scheme.has_zeros else None
    return QuantizedWeight(
        values=values.view(torch.float8_e4m3fn) if scheme.is_float else values,
        bits=scheme.bits,
        scales=scales,
        zeros=zeros,
        group_size=scheme.group_size or max(box.shape[1], 1),
        group_of=groups_of(name, num_in, box, scheme, pool.device),
        codebook=codebook_of(scheme, pool.device),
    )


def codebook_of(scheme: Scheme, device: torch.device) -> Tensor | None:
    """The numbers that levels stand for without one, so that the spread is the same."""
    middle = 2 ** (scheme.bits - 1)
    return torch.arange(-middle, middle, dtype=torch.float32, device=device) if scheme.has_codebook else None


def groups_of(name: str, num_in: int, box: Box, scheme: Scheme, device: torch.device) -> Tensor | None:
    """The group of each input where they are not neighbours from a first one on."""
    if not scheme.act_order:
        return cut_groups(scheme, box, torch.empty(0, device=device))
    assert scheme.group_size is not None
    order = torch.randperm(num_in, generator=seeded(f"{name} order"))[slice(*box.inputs)]
    return (order // scheme.group_size).to(device)


def draw_values(size: int, scheme: Scheme, generator: torch.Generator) -> Tensor:
    """Bytes: levels from 1, as many below the middle as above it and equally likely; or e4m3 numbers."""
    if not scheme.is_float:
        return torch.randint(1, 2**scheme.bits, (size,), generator=generator, dtype=torch.uint8)
    numbers = FLOAT8_SPREAD * torch.randn(size, generator=generator)
    return numbers.clamp(-FLOAT8_MAX, FLOAT8_MAX).to(torch.float8_e4m3fn).view(torch.uint8)


def draw_scales(size: int, scheme: Scheme, generator: torch.Generator) -> Tensor:
    """What gives weights the spread of plain ones, a tenth more or less."""
    spread = FLOAT8_SPREAD if scheme.is_float else 2**scheme.bits / 12**0.5
    return (STANDARD_DEVIATION / spread * (0.9 + 0.2 * torch.rand(size, generator=generator))).bfloat16()
