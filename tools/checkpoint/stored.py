"""Safetensors files written piece by piece: what is in them is known before the first byte of a weight."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from parallel.checkpoint.headers import BYTES_PER_ELEMENT


def folder_problem(folder: Path) -> str | None:
    """Why a checkpoint is not written there; None: it can be."""
    if not folder.exists():
        return None
    if not folder.is_dir():
        return f"{folder} is no folder"
    return f"{folder} is not empty; give another folder" if any(folder.iterdir()) else None


@dataclass(frozen=True)
class Linear:
    """A linear that is stored in several tensors; `shape` [out, in] is its weight's."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Tensor:
    """`dtype` in safetensors' spelling; `linear` is the one that a tensor is a part of, named LINEAR.PART."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    linear: Linear | None = None

    @property
    def part(self) -> str:
        assert self.linear is not None
        return self.name.removeprefix(f"{self.linear.name}.")

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * BYTES_PER_ELEMENT[self.dtype]


@dataclass(frozen=True)
class Shard:
    file: str
    tensors: tuple[Tensor, ...]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors)


def plan_shards(tensors: list[Tensor], max_bytes: int) -> list[Shard]:
    """Deal tensors in order over files of at most `max_bytes`; a larger tensor has a file to itself."""
    groups: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.num_bytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.num_bytes
    if len(groups) == 1:
        return [Shard("model.safetensors", tuple(tensors))]
    return [
        Shard(f"model-{i:05}-of-{len(groups):05}.safetensors", tuple(group)) for i, group in enumerate(groups, start=1)
    ]


def make_header(shard: Shard) -> bytes:
    """Length and JSON of a safetensors file, padded with spaces so that the data starts at a multiple of 8."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in shard.tensors:
        end = offset + tensor.num_bytes
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_index(shards: list[Shard], out: Path) -> None:
    """model.safetensors.index.json, where there are several files."""
    if len(shards) == 1:
        return
    weight_map = {tensor.name: shard.file for shard in shards for tensor in shard.tensors}
    index = {"metadata": {"total_size": sum(shard.num_bytes for shard in shards)}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
