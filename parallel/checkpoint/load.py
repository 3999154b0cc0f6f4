"""Fills a sharded meta model from safetensors: each rank takes its own slices, file by file.

What every rank needs, each reads for itself: norms, and in GPTQ the input side's group indices (in act order all scales
of row-parallel linears too). For Llama-70B at two ranks that is 2.6 MB of 141 GB in bf16, 2.6 MB of 39.8 GB in AWQ, 16
MB in GPTQ and 488 MB in act order, 1.2 %. The second rank finds it in the page cache, at 10 GB/s and more: to broadcast
it would save 50 ms at best, and hold the ranks in step.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from parallel.checkpoint.headers import Checkpoint, TensorEntry
from parallel.checkpoint.match import Matches, match_tensors, parameter_owners
from parallel.checkpoint.quantize import cut_inputs, quantize_weight
from parallel.checkpoint.quantize_schemes import widen
from parallel.checkpoint.quantized import install, local_box, local_slices, place_linear
from parallel.checkpoint.read import TensorSlice, check_finite, is_finite
from parallel.checkpoint.read_ahead import LIMIT_BYTES, ReadAhead
from parallel.formats.scheme import Box, CheckpointError, Scheme
from parallel.layers.linear import ShardedLayer
from parallel.shard import ShardedModel

EMBEDDING_NAME = "model.embed_tokens.weight"

Stored = dict[str, Tensor]


@dataclass(frozen=True)
class LoadResult:
    """What one rank's load cost. Bytes are those of its slices, as stored.

    `disk_wait_sec`: of `sec`, waiting for bytes; `decode_sec`: checking, converting, decoding and packing them. The
    rest is copies to the device. `kernels`: how many quantised linears got which kernel, and why.
    """

    bytes_read: int
    sec: float
    disk_wait_sec: float
    decode_sec: float
    kernels: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """One parameter, or one quantised linear: what to read, and what to do with it.

    `place` gets what `reads` names, on the device; it returns the kernel of a quantised linear.
    """

    name: str
    reads: dict[str, TensorSlice]
    place: Callable[[Stored], str | None]

    @property
    def num_bytes(self) -> int:
        return sum(wanted.num_bytes for wanted in self.reads.values())

    @property
    def position(self) -> tuple[Path, int]:
        """Where it begins: its file, and the byte."""
        first = next(iter(self.reads.values())).entry
        return first.file, first.offset

    @property
    def layer(self) -> str:
        """model.layers.N, or the name of what is in none."""
        return ".".join(self.name.split(".")[:3])


def load_checkpoint(
    model: ShardedModel,
    checkpoint: Checkpoint,
    device: torch.device,
    *,
    quantize: Scheme | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    on_placed: Callable[[str], None] = lambda name: None,
    read_ahead_bytes: int = LIMIT_BYTES,
) -> LoadResult:
    """Reads this rank's slices to `device`, in the model's dtype, and puts them in place of the meta parameters.

    Quantised linears stay packed, in the layout of the kernel that multiplies by them.

    Args:
        quantize: how linears that are stored as numbers are rounded, tensor by tensor; None: they stay as they are.
        on_placed: called with the name of each parameter that is in place; a quantised weight is one.
        on_progress: called after each parameter with the bytes read so far and in all, both of this rank.
        read_ahead_bytes: of host memory for what is read ahead of its use.

    Raises:
        CheckpointError: a tensor is missing, has another shape, cannot be read, or holds a NaN or infinity; the message
            names it.
    """
    start = time.perf_counter()
    matches = match_tensors(model, checkpoint)
    check_zeros(matches.surplus_biases, read_ahead_bytes)
    steps = layer_by_layer([*plain_steps(model, matches, quantize), *quantized_steps(model, matches)])
    total = sum(step.num_bytes for step in steps)
    done, decode_sec, kernels = 0, 0.0, Counter[str]()
    with ReadAhead((wanted for step in steps for wanted in step.reads.values()), device, read_ahead_bytes) as reader:
        for step in steps:
            stored = {name: reader.take(wanted) for name, wanted in step.reads.items()}
            begin = time.perf_counter()
            kernel = place_step(step, stored)
            on_placed(step.name)
            decode_sec += time.perf_counter() - begin
            if kernel is not None:
                kernels[kernel] += 1
            done += step.num_bytes
            on_progress(done, total)
    move_buffers(model.module, device)
    return LoadResult(done, time.perf_counter() - start, reader.wait_sec, decode_sec, dict(kernels))


def layer_by_layer(steps: Sequence[Step]) -> list[Step]:
    """In the order of the files, but what a file has of a layer together, and the embedding before all.

    Files are sorted by dtype first: the norms without which no layer is whole, nor leaves the device, come after the
    packed weights of ten. And where the embedding goes on to host memory, all of the device is free for it. A layer
    that goes on in the next file is the last of its own, and the first there: no others are loaded beside its part.
    """
    starts: dict[tuple[Path, str], int] = {}
    files: dict[str, set[Path]] = {}
    for step in steps:
        file, offset = step.position
        starts[file, step.layer] = min(offset, starts.get((file, step.layer), offset))
        files.setdefault(step.layer, set()).add(file)

    def place(step: Step) -> tuple[bool, Path, int, int, int]:
        file, offset = step.position
        goes_on, has_begun = file < max(files[step.layer]), file > min(files[step.layer])
        return step.name != EMBEDDING_NAME, file, goes_on - has_begun, starts[file, step.layer], offset

    return sorted(steps, key=place)


def place_step(step: Step, stored: Stored) -> str | None:
    for name, wanted in step.reads.items():
        check_finite(stored[name], wanted.entry)
    return step.place(stored)


def plain_steps(model: ShardedModel, matches: Matches, quantize: Scheme | None) -> Iterator[Step]:
    owners = parameter_owners(model.module)
    for name, entry in matches.plain.items():
        module, attribute = owners[name][0]
        if quantize is not None and name in model.linears:
            assert isinstance(module, ShardedLayer)
            yield rounding_step(module, entry, quantize)
            continue
        slices = module.local_slices(attribute) if isinstance(module, ShardedLayer) else ()
        yield Step(name, {name: TensorSlice(entry, slices)}, partial(place_parameter, owners[name], name))


def rounding_step(layer: ShardedLayer, entry: TensorEntry, scheme: Scheme) -> Step:
    box = local_box(layer, entry.shape)
    wide = widen(box, scheme, entry.shape[1])
    read = TensorSlice(entry, (slice(*wide.outputs), slice(*wide.inputs)))
    return Step(entry.name, {entry.name: read}, partial(place_rounded, layer, entry.name, scheme, wide, box))


def place_rounded(layer: ShardedLayer, name: str, scheme: Scheme, wide: Box, box: Box, stored: Stored) -> str:
    """Rounds what was read, the inputs of `wide`, and packs those of `box`; returns the kernel's name and reason."""
    # Taken out, so that it is gone before the packing begins.
    return install(layer, cut_inputs(quantize_weight(stored.pop(name), scheme), wide, box))


def quantized_steps(model: ShardedModel, matches: Matches) -> Iterator[Step]:
    for name, entries in matches.quantized.items():
        assert model.scheme is not None
        layer = model.module.get_submodule(name)
        shape = model.full_shapes[f"{name}.weight"]
        box = local_box(layer, shape)
        reads = local_slices(entries, model.scheme, shape[1], box)
        yield Step(f"{name}.weight", reads, partial(place_linear, layer, reads, model.scheme, box))


def place_parameter(owners: list[tuple[nn.Module, str]], name: str, stored: Stored) -> None:
    place(owners, stored[name], name)


def place(owners: list[tuple[nn.Module, str]], stored: Tensor, name: str) -> None:
    """Sets the parameter everywhere it is held.

    Raises:
        CheckpointError: a value is too large for the model's dtype.
    """
    meta = getattr(*owners[0])
    assert tuple(meta.shape) == tuple(stored.shape), f"{name}: {meta.shape=} {stored.shape=}"
    values = stored.to(meta.dtype).contiguous()
    if meta.dtype == torch.float16 and stored.dtype != torch.float16 and not is_finite(values):
        raise CheckpointError(f"{name} holds values beyond float16's 65504. Set model.dtype=bfloat16.")
    parameter = nn.Parameter(values, requires_grad=False)
    for module, attribute in owners:
        setattr(module, attribute, parameter)


def check_zeros(entries: Iterable[TensorEntry], read_ahead_bytes: int) -> None:
    """Raises CheckpointError: a bias that the model has no place for is more than zeros."""
    biases = [TensorSlice(entry) for entry in entries]
    with ReadAhead(biases, torch.device("cpu"), read_ahead_bytes) as reader:
        for bias in biases:
            if reader.take(bias).any():
                raise CheckpointError(
                    f"{bias.entry.name} in {bias.entry.file} is not zero, and the model has no such bias. "
                    "Take the config.json that belongs to the weights."
                )


def move_buffers(module: nn.Module, device: torch.device) -> None:
    for owner in module.modules():
        for name, buffer in owner.named_buffers(recurse=False):
            # Those of streamed layers have left the device again.
            if not buffer.is_meta:
                owner._buffers[name] = buffer.to(device)
