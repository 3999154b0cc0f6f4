"""What a safetensors checkpoint holds, from the headers of its files alone: no weight is read.

A file starts with 8 bytes, the little-endian length of a JSON header; the header maps each tensor to its dtype, shape
and byte range; the bytes follow (https://huggingface.co/docs/safetensors, section "Format").
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel.formats.scheme import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
LENGTH_BYTES = 8
# The limit that the safetensors library sets itself; a larger length means that the file is something else.
MAX_HEADER_BYTES = 100_000_000
LFS_POINTER = b"version https://git-lfs"
# Types missing here (sub-byte ones, and those to come) are accepted with the size that the header gives them.
BYTES_PER_ELEMENT = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip


@dataclass(frozen=True)
class TensorEntry:
    """One tensor: where it is and what it is. `dtype` in safetensors' spelling, such as BF16.

    Its bytes start at `offset` of the file.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class Checkpoint:
    folder: Path
    tensors: dict[str, TensorEntry]

    @property
    def total_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self.tensors.values())


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read and cross-check the headers of a checkpoint folder.

    Takes model.safetensors.index.json with its shards, else model.safetensors, else a single other *.safetensors file.

    Raises:
        CheckpointError: the folder or a file is missing, incomplete, corrupt or of another format, or the files and
            the index disagree.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder. Set model.path to a folder with config.json and *.safetensors.")
    weight_map = read_index(folder)
    if weight_map is None:
        return Checkpoint(folder, read_header(_only_file(folder)))
    found = _read_shards(folder, sorted(set(weight_map.values())))
    return Checkpoint(folder, {name: _find(found, name, folder / file) for name, file in weight_map.items()})


def read_header(file: Path) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file, by name.

    Raises:
        CheckpointError: the file is truncated, corrupt, or a git-lfs pointer.
    """
    header, data_start = _load_header(file)
    header.pop("__metadata__", None)
    ranges = {name: _byte_range(file, name, fields) for name, fields in header.items()}
    _check_tiling(file, ranges.values(), data_start)
    sizes = {name: (fields["dtype"], tuple(fields["shape"])) for name, fields in header.items()}
    return {
        name: TensorEntry(name, file, *sizes[name], data_start + begin, end - begin)
        for name, (begin, end) in ranges.items()
    }


def _load_header(file: Path) -> tuple[dict[str, Any], int]:
    """The header of `file` and the offset of its first weight."""
    if not file.is_file():
        raise CheckpointError(f"{file} is no file, or a link to one that is missing. Download it again.")
    file_bytes = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(len(LFS_POINTER))
        if start == LFS_POINTER:
            raise CheckpointError(f"{file} is a git-lfs pointer, not the weights. Run `git lfs pull` in its folder.")
        if len(start) < LENGTH_BYTES:
            raise CheckpointError(f"{file} is truncated: it has {file_bytes} bytes. Download it again.")
        header_bytes = int.from_bytes(start[:LENGTH_BYTES], "little")
        if header_bytes > MAX_HEADER_BYTES:
            raise _corrupt(file, f"its header would take {header_bytes} bytes")
        if LENGTH_BYTES + header_bytes > file_bytes:
            raise CheckpointError(
                f"{file} is truncated: its header alone takes {header_bytes} bytes, the file has "
                f"{file_bytes}. Download it again."
            )
        stream.seek(LENGTH_BYTES)
        text = stream.read(header_bytes)
    return _parse_object(file, text), LENGTH_BYTES + header_bytes


def _byte_range(file: Path, name: str, fields: Any) -> tuple[int, int]:
    """First and last-plus-one byte of a tensor, counted from the end of the header."""
    try:
        begin, end = fields["data_offsets"]
        dtype, shape = fields["dtype"], fields["shape"]
        sizes = (begin, end - begin, *shape)
        valid = isinstance(dtype, str) and all(isinstance(size, int) and size >= 0 for size in sizes)
    except (KeyError, TypeError, ValueError):
        valid = False
    if not valid:
        raise _corrupt(file, f"tensor {name} has no valid dtype, shape and data_offsets")
    element_bytes = BYTES_PER_ELEMENT.get(dtype)
    if element_bytes is not None and math.prod(shape) * element_bytes != end - begin:
        raise _corrupt(file, f"tensor {name} of {dtype} {shape} cannot take {end - begin} bytes")
    return begin, end


def _check_tiling(file: Path, ranges: Iterable[tuple[int, int]], data_start: int) -> None:
    """Tensors must follow one another without hole or overlap up to the end of the file."""
    expected = 0
    for begin, end in sorted(ranges):
        if begin != expected:
            raise _corrupt(file, f"a tensor starts at byte {begin} of the data where {expected} is due")
        expected = end
    expected += data_start
    file_bytes = file.stat().st_size
    if file_bytes < expected:
        raise CheckpointError(
            f"{file} is truncated: its header says {expected} bytes, the file has {file_bytes}. Download it again."
        )
    if file_bytes > expected:
        raise _corrupt(file, f"its header says {expected} bytes, the file has {file_bytes}")


def read_index(folder: Path) -> dict[str, str] | None:
    """Tensor name -> file name; None where there is no index, or one that came along with other JSON files: none of the
    files it names is there, and model.safetensors is.

    Raises:
        CheckpointError: it is corrupt.
    """
    index = folder / INDEX_NAME
    if not index.is_file():
        return None
    weight_map = _parse_object(index, index.read_bytes()).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise _corrupt(index, "it has no weight_map from tensor to file")
    is_left = not any((folder / file).is_file() for file in set(weight_map.values()))
    return None if is_left and (folder / SINGLE_NAME).is_file() else weight_map


def _read_shards(folder: Path, names: list[str]) -> dict[str, TensorEntry]:
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder / INDEX_NAME} names {len(missing)} of {len(names)} files that are missing: "
            f"{', '.join(missing)}. Download them again."
        )
    found: dict[str, TensorEntry] = {}
    for name in names:
        for entry in read_header(folder / name).values():
            if entry.name in found:
                raise CheckpointError(
                    f"tensor {entry.name} is in two files, {found[entry.name].file} and "
                    f"{entry.file}. Remove the one that does not belong, or download the checkpoint again."
                )
            found[entry.name] = entry
    return found


def _find(found: dict[str, TensorEntry], name: str, file: Path) -> TensorEntry:
    entry = found.get(name)
    if entry is None or entry.file != file:
        raise CheckpointError(
            f"tensor {name} is not in {file}, where {INDEX_NAME} places it. Index and file come from "
            "different versions: download the checkpoint again."
        )
    return entry


def _only_file(folder: Path) -> Path:
    """The file of an unsharded checkpoint."""
    if (folder / SINGLE_NAME).is_file():
        return folder / SINGLE_NAME
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    if files:
        raise CheckpointError(
            f"{folder} has {len(files)} safetensors files and no {INDEX_NAME} to say what is in "
            "them. Download that file too."
        )
    raise _no_safetensors(folder)


def _no_safetensors(folder: Path) -> CheckpointError:
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
    if pickles:
        return CheckpointError(
            f"{folder} has only pickled weights ({pickles[0]}), and reading a pickle can run code hidden in it. "
            "Take the safetensors version of the model; or, if you trust where it comes from, convert it: "
            'python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{folder}', dtype='auto').save_pretrained('{folder}-safetensors')\" "
            "and copy the tokenizer files."
        )
    ggufs = sorted(file.name for file in folder.glob("*.gguf"))
    if ggufs:
        return CheckpointError(
            f"{folder} has only GGUF weights ({ggufs[0]}), which cannot be loaded. "
            "Take the safetensors version of the model."
        )
    return CheckpointError(
        f"{folder} has no *.safetensors file. Set model.path to the folder that has, or download the checkpoint again."
    )


def _parse_object(file: Path, text: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _corrupt(file, f"no valid JSON ({error})") from error
    if not isinstance(parsed, dict):
        raise _corrupt(file, "its JSON is no object")
    return parsed


def _corrupt(file: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{file} is corrupt: {reason}. Download it again.")
