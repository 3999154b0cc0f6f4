"""A quantised linear from a checkpoint: this rank's slices of its tensors, decoded and packed for a kernel."""

from __future__ import annotations

from torch import Tensor

from parallel.checkpoint.headers import TensorEntry
from parallel.checkpoint.read import TensorSlice
from parallel.formats.registry import format_of
from parallel.formats.scheme import Box, CheckpointError, Scheme, part_slices
from parallel.kernels.choice import pack_linear
from parallel.layers.linear import ShardedLayer
from parallel.quantized import QuantizedWeight

Slices = dict[str, TensorSlice]


def local_box(layer: ShardedLayer, shape: tuple[int, ...]) -> Box:
    """What this rank holds of a linear whose full weight is `shape`, [out, in]."""
    cut = layer.local_slices("weight")
    slices = cut + (slice(None),) * (2 - len(cut))
    (first_out, end_out, _), (first_in, end_in, _) = (
        part.indices(size) for part, size in zip(slices, shape, strict=True)
    )
    return Box((first_out, end_out), (first_in, end_in))


def local_slices(entries: dict[str, TensorEntry], scheme: Scheme, num_in: int, box: Box) -> Slices:
    """What to read of each stored tensor for `box`, by part."""
    return {
        part.name: TensorSlice(entries[part.name], part_slices(part, scheme, num_in, box))
        for part in format_of(scheme).parts(scheme)
        if part.used and part.name in entries
    }


def place_linear(layer: ShardedLayer, reads: Slices, scheme: Scheme, box: Box, stored: dict[str, Tensor]) -> str:
    """Decodes and packs what was read; the layer then multiplies by it. Returns the kernel's name and reason.

    Raises:
        CheckpointError: the tensors contradict config.json.
    """
    weight = decode(reads, scheme, box, stored)
    assert weight.shape == box.shape, f"{layer.name}: {weight.shape=} {box.shape=}"
    return install(layer, weight)


def install(layer: ShardedLayer, weight: QuantizedWeight) -> str:
    """Makes the layer multiply by `weight`, packed. Returns the kernel's name and reason."""
    layer.packed, kernel = pack_linear(weight, layer.weight.dtype, on_host=layer.on_host, fused_rows=layer.fused_rows)
    layer.weight = None
    return kernel


def decode(reads: Slices, scheme: Scheme, box: Box, stored: dict[str, Tensor]) -> QuantizedWeight:
    try:
        return format_of(scheme).decode(stored, scheme, box)
    except CheckpointError as error:
        first = next(iter(reads.values())).entry
        raise CheckpointError(f"{first.name.rpartition('.')[0]} in {first.file}: {error}") from error
