"""Fills a sharded meta model from safetensors: each rank reads its own slices, file by file, and nothing else."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from parallel.checkpoint.headers import Checkpoint, CheckpointError, TensorEntry
from parallel.linear import ShardedLayer
from parallel.shard import ShardedModel

# Checkpoints of older transformers carry these; models compute them.
COMPUTED = ("rotary_emb.inv_freq",)

Owners = dict[str, list[tuple[nn.Module, str]]]


@dataclass(frozen=True)
class LoadResult:
    """What one rank's load cost. Bytes are those of its slices, as stored."""

    bytes_read: int
    sec: float


def load_checkpoint(
    model: ShardedModel,
    checkpoint: Checkpoint,
    device: torch.device,
    *,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> LoadResult:
    """Reads this rank's slices to `device`, in the model's dtype, and puts them in place of the meta parameters.

    Args:
        on_progress: called after each tensor with the bytes read so far and in all, both of this rank.

    Raises:
        CheckpointError: a tensor is missing, has another shape, or holds a NaN or infinity; the message names it.
    """
    start = time.perf_counter()
    wanted = match_tensors(model, checkpoint)
    owners = parameter_owners(model.module)
    total = sum(local_bytes(owners[name][0], wanted[name]) for name in wanted)
    done = 0
    for file, names in group_by_file(wanted).items():
        for name in names:
            # A handle per tensor: closing it unmaps what was touched, which for a slice of columns is the whole tensor.
            with safe_open(file, framework="pt") as handle:
                stored = read_local(handle, name, *owners[name][0], device)
            done += stored.nbytes
            place(owners[name], stored, name, file)
            on_progress(done, total)
    move_buffers(model.module, device)
    return LoadResult(bytes_read=done, sec=time.perf_counter() - start)


def match_tensors(model: ShardedModel, checkpoint: Checkpoint) -> dict[str, TensorEntry]:
    """The checkpoint's entry for each distinct parameter, checked against the shape that the config promises."""
    tied = tied_names(model.module)
    wanted, problems = {}, []
    for name, shape in model.full_shapes.items():
        entry = checkpoint.tensors.get(name)
        if entry is None:
            if name not in tied or not any(twin in checkpoint.tensors for twin in tied[name]):
                problems.append(f"{name} is missing")
        elif entry.shape != shape:
            problems.append(f"{name} in {entry.file.name} is {list(entry.shape)}, config.json makes it {list(shape)}")
        elif not any(twin in wanted for twin in tied.get(name, ())):
            wanted[name] = entry
    unknown = [n for n in checkpoint.tensors if n not in model.full_shapes and not n.endswith(COMPUTED)]
    problems += [f"{name} in {checkpoint.tensors[name].file.name} is not part of the model" for name in unknown]
    if problems:
        shown = "; ".join(problems[:4]) + (f"; and {len(problems) - 4} more" if len(problems) > 4 else "")
        raise CheckpointError(f"{checkpoint.folder} does not match its config.json: {shown}.")
    return wanted


def parameter_owners(module: nn.Module) -> Owners:
    """Every place that holds each parameter, by each of its names: tied weights have several."""
    places: defaultdict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    names: list[tuple[str, int]] = []
    for prefix, owner in module.named_modules(remove_duplicate=False):
        for attribute, parameter in owner.named_parameters(recurse=False):
            if (owner, attribute) not in places[id(parameter)]:
                places[id(parameter)].append((owner, attribute))
            names.append((f"{prefix}.{attribute}" if prefix else attribute, id(parameter)))
    return {name: places[key] for name, key in names}


def tied_names(module: nn.Module) -> dict[str, set[str]]:
    """For each parameter that several names share, the other names."""
    by_id: defaultdict[int, set[str]] = defaultdict(set)
    for name, parameter in module.named_parameters(remove_duplicate=False):
        by_id[id(parameter)].add(name)
    return {name: group - {name} for group in by_id.values() if len(group) > 1 for name in group}


def group_by_file(entries: dict[str, TensorEntry]) -> dict[Path, list[str]]:
    files: defaultdict[Path, list[str]] = defaultdict(list)
    for name, entry in entries.items():
        files[entry.file].append(name)
    return dict(sorted(files.items()))


def local_bytes(owner: tuple[nn.Module, str], entry: TensorEntry) -> int:
    """Bytes of this rank's part, in the checkpoint's dtype."""
    module, attribute = owner
    full = 1
    for size in entry.shape:
        full *= size
    return entry.num_bytes * getattr(module, attribute).numel() // full


def read_local(handle: safe_open, name: str, module: nn.Module, attribute: str, device: torch.device) -> Tensor:
    """A copy on `device`: what safetensors gives on the CPU is a view of the mapped file."""
    stored = handle.get_slice(name)
    view = stored[module.local_slices(attribute)] if isinstance(module, ShardedLayer) else stored[:]
    return view.to(device, copy=True)


def place(owners: list[tuple[nn.Module, str]], stored: Tensor, name: str, file: Path) -> None:
    """Checks the values and sets the parameter everywhere it is held."""
    if not is_finite(stored):
        raise CheckpointError(f"{name} in {file} holds NaN or infinity. Download the file again.")
    meta = getattr(*owners[0])
    assert tuple(meta.shape) == tuple(stored.shape), f"{name}: {meta.shape=} {stored.shape=}"
    parameter = nn.Parameter(stored.to(meta.dtype).contiguous(), requires_grad=False)
    for module, attribute in owners:
        setattr(module, attribute, parameter)


def is_finite(tensor: Tensor) -> bool:
    """By the extremes, which a NaN takes over: 25 GB/s on one core and no memory; isfinite reads bf16 at 0.7 GB/s."""
    return tensor.numel() == 0 or all(bool(extreme.isfinite()) for extreme in tensor.aminmax())


def move_buffers(module: nn.Module, device: torch.device) -> None:
    for owner in module.modules():
        for name, buffer in owner.named_buffers(recurse=False):
            owner._buffers[name] = buffer.to(device)
