"""Fills a sharded meta model from safetensors: each rank reads its own slices, file by file, and nothing else."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from parallel.checkpoint.formats.scheme import Scheme, Slices
from parallel.checkpoint.headers import Checkpoint, CheckpointError, TensorEntry
from parallel.checkpoint.match import Matches, match_tensors, parameter_owners
from parallel.checkpoint.quantize import cut_inputs, quantize_weight
from parallel.checkpoint.quantize_schemes import widen
from parallel.checkpoint.quantized import install, local_box, local_tensors, read_linear
from parallel.checkpoint.read import is_finite, read_slices, sliced_bytes
from parallel.linear import ShardedLayer
from parallel.shard import ShardedModel


@dataclass(frozen=True)
class LoadResult:
    """What one rank's load cost. Bytes are those of its slices, as stored.

    `kernels`: how many quantised linears got which kernel, and why.
    """

    bytes_read: int
    sec: float
    kernels: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """One parameter, or one quantised linear: the file that it begins in, its bytes, and what reads it.

    `run` returns the kernel of a quantised linear.
    """

    file: Path
    num_bytes: int
    run: Callable[[], str | None]


def load_checkpoint(
    model: ShardedModel,
    checkpoint: Checkpoint,
    device: torch.device,
    *,
    quantize: Scheme | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> LoadResult:
    """Reads this rank's slices to `device`, in the model's dtype, and puts them in place of the meta parameters.

    Quantised linears stay packed, in the layout of the kernel that multiplies by them.

    Args:
        quantize: how linears that are stored as numbers are rounded, tensor by tensor; None: they stay as they are.
        on_progress: called after each parameter with the bytes read so far and in all, both of this rank.

    Raises:
        CheckpointError: a tensor is missing, has another shape, or holds a NaN or infinity; the message names it.
    """
    start = time.perf_counter()
    matches = match_tensors(model, checkpoint)
    for entry in matches.surplus_biases:
        check_zero(entry)
    steps = [*plain_steps(model, matches, device, quantize), *quantized_steps(model, matches, device)]
    steps.sort(key=by_file)
    total = sum(step.num_bytes for step in steps)
    done, kernels = 0, Counter[str]()
    for step in steps:
        kernel = step.run()
        if kernel is not None:
            kernels[kernel] += 1
        done += step.num_bytes
        on_progress(done, total)
    move_buffers(model.module, device)
    return LoadResult(bytes_read=done, sec=time.perf_counter() - start, kernels=dict(kernels))


def by_file(step: Step) -> Path:
    return step.file


def plain_steps(model: ShardedModel, matches: Matches, device: torch.device, quantize: Scheme | None) -> Iterator[Step]:
    owners = parameter_owners(model.module)
    for name, entry in matches.plain.items():
        module, attribute = owners[name][0]
        if quantize is not None and name in model.linears:
            assert isinstance(module, ShardedLayer)
            yield rounding_step(module, entry, quantize, device)
            continue
        slices = module.local_slices(attribute) if isinstance(module, ShardedLayer) else ()
        yield Step(
            entry.file, sliced_bytes(entry, slices), partial(read_parameter, owners[name], entry, slices, device)
        )


def rounding_step(layer: ShardedLayer, entry: TensorEntry, scheme: Scheme, device: torch.device) -> Step:
    box = local_box(layer, entry.shape)
    wide = widen(box, scheme, entry.shape[1])
    slices = (slice(*wide.outputs), slice(*wide.inputs))
    return Step(
        entry.file,
        sliced_bytes(entry, slices),
        lambda: install(layer, cut_inputs(quantize_weight(read_slices(entry, slices, device), scheme), wide, box)),
    )


def quantized_steps(model: ShardedModel, matches: Matches, device: torch.device) -> Iterator[Step]:
    for name, entries in matches.quantized.items():
        assert model.scheme is not None
        layer = model.module.get_submodule(name)
        shape = model.full_shapes[f"{name}.weight"]
        box = local_box(layer, shape)
        tensors = local_tensors(entries, model.scheme, shape[1], box)
        first = next(iter(tensors.values()))[0]
        num_bytes = sum(sliced_bytes(entry, slices) for entry, slices in tensors.values())
        yield Step(first.file, num_bytes, partial(read_linear, layer, tensors, model.scheme, box, device))


def read_parameter(
    owners: list[tuple[nn.Module, str]], entry: TensorEntry, slices: Slices, device: torch.device
) -> None:
    place(owners, read_slices(entry, slices, device), entry.name)


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


def check_zero(entry: TensorEntry) -> None:
    """Raises CheckpointError: a bias that the model has no place for is more than zeros."""
    if read_slices(entry, (), torch.device("cpu")).any():
        raise CheckpointError(
            f"{entry.name} in {entry.file} is not zero, and the model has no such bias. "
            "Take the config.json that belongs to the weights."
        )


def move_buffers(module: nn.Module, device: torch.device) -> None:
    for owner in module.modules():
        for name, buffer in owner.named_buffers(recurse=False):
            owner._buffers[name] = buffer.to(device)
