import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from parallel.checkpoint.headers import INDEX_NAME, read_checkpoint
from parallel.formats.scheme import CheckpointError

WEIGHTS = {
    "a": torch.ones(4, 8, dtype=torch.bfloat16),
    "b": torch.ones(3, dtype=torch.float32),
    "c": torch.ones(2, 2, 2, dtype=torch.float16),
}


def write_sharded(folder: Path, weights: dict[str, torch.Tensor] = WEIGHTS) -> Path:
    """One shard a tensor, and the index."""
    files = {name: f"model-{i + 1:05}-of-{len(weights):05}.safetensors" for i, name in enumerate(weights)}
    for name, file in files.items():
        save_file({name: weights[name]}, folder / file)
    write_index(folder, files)
    return folder


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_raw(folder: Path, header: object, data: bytes = b"") -> Path:
    text = json.dumps(header).encode()
    file = folder / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return file


def refused(folder: Path, *parts: str | Path) -> None:
    """The folder is refused with one message that has all `parts`."""
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(folder)
    assert all(str(part) in str(caught.value) for part in parts), caught.value


@pytest.mark.parametrize("name", ["model.safetensors", "weights.safetensors"])
def test_single_file_lists_its_tensors(tmp_path: Path, name: str) -> None:
    save_file(WEIGHTS, tmp_path / name, metadata={"format": "pt"})
    checkpoint = read_checkpoint(tmp_path)
    assert {key: entry.shape for key, entry in checkpoint.tensors.items()} == {"a": (4, 8), "b": (3,), "c": (2, 2, 2)}
    assert {key: entry.dtype for key, entry in checkpoint.tensors.items()} == {"a": "BF16", "b": "F32", "c": "F16"}
    assert checkpoint.tensors["a"].file == tmp_path / name
    assert checkpoint.total_bytes == sum(tensor.nbytes for tensor in WEIGHTS.values())


def test_shards_are_joined_through_the_index(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(write_sharded(tmp_path))
    assert [entry.file.name for entry in checkpoint.tensors.values()] == [
        f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)
    ]
    assert checkpoint.total_bytes == sum(tensor.nbytes for tensor in WEIGHTS.values())


def test_index_of_files_that_one_file_took_the_place_of_does_not_count(tmp_path: Path) -> None:
    """Who makes one file of a model's weights copies its other *.json files."""
    save_file(WEIGHTS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    write_index(tmp_path, {name: f"model-0000{place}-of-00002.safetensors" for place, name in enumerate(WEIGHTS)})
    assert set(read_checkpoint(tmp_path).tensors) == set(WEIGHTS)
    # With one of its files it may be of a download that was broken off.
    save_file(WEIGHTS, tmp_path / "model-00001-of-00002.safetensors", metadata={"format": "pt"})
    refused(tmp_path, "files that are missing", "model-00002-of-00002.safetensors")


def test_empty_tensors_and_types_yet_unknown_are_accepted(tmp_path: Path) -> None:
    fields = {"dtype": "F4_NEW", "shape": [8], "data_offsets": [0, 4]}
    write_raw(tmp_path, {"x": fields, "none": {"dtype": "F32", "shape": [0, 3], "data_offsets": [4, 4]}}, bytes(4))
    tensors = read_checkpoint(tmp_path).tensors
    assert (tensors["x"].num_bytes, tensors["none"].num_bytes) == (4, 0)


def test_missing_folder_names_model_path(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", tmp_path / "nowhere", "model.path")


def test_empty_folder_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, tmp_path, "no *.safetensors")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "model.pth"])
def test_pickled_weights_are_refused_with_the_conversion(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    refused(tmp_path, name, "can run code", "save_pretrained", "python -c")


def test_the_conversion_that_is_advised_works(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    source = tmp_path / "source"
    config = LlamaConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=16, dtype="bfloat16"
    )
    model = LlamaForCausalLM(config).bfloat16()
    config.save_pretrained(source)
    torch.save(model.state_dict(), source / "pytorch_model.bin")
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(source)
    code = str(caught.value).split('python -c "')[1].split('"')[0]
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    converted = read_checkpoint(tmp_path / "source-safetensors")
    assert set(converted.tensors) == set(model.state_dict())


def test_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    refused(tmp_path, "model-Q4_K_M.gguf", "GGUF", "safetensors version")


def test_all_missing_shards_are_listed(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    gone = ["model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"]
    for name in gone:
        (tmp_path / name).unlink()
    refused(tmp_path, "2 of 3 files", *gone, INDEX_NAME)


def test_shards_without_their_index_are_refused(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    (tmp_path / INDEX_NAME).unlink()
    refused(tmp_path, "3 safetensors files", INDEX_NAME)


def test_link_to_nothing_and_folder_are_no_weights(tmp_path: Path) -> None:
    """Such as a hub's cache has whose blobs were removed."""
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "gone")
    refused(tmp_path, tmp_path / "model.safetensors", "link to one that is missing", "Download it again")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").mkdir()
    refused(tmp_path, tmp_path / "model.safetensors", "is no file")


@pytest.mark.parametrize("kept_bytes", [0, 5, 50, -1])
def test_truncated_file_is_refused_at_any_length(tmp_path: Path, kept_bytes: int) -> None:
    file = tmp_path / "model.safetensors"
    save_file(WEIGHTS, file)
    whole = file.read_bytes()
    file.write_bytes(whole[:kept_bytes])
    refused(tmp_path, file, "truncated", "Download it again")


def test_truncated_file_names_both_sizes(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file(WEIGHTS, file)
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-10])
    refused(tmp_path, f"its header says {size} bytes, the file has {size - 10}")


def test_file_longer_than_its_header_says_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file(WEIGHTS, file)
    file.write_bytes(file.read_bytes() + b"x")
    refused(tmp_path, file, "corrupt")


def test_something_else_named_safetensors_is_corrupt(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"<!DOCTYPE html><html>Not Found</html>")
    refused(tmp_path, "model.safetensors", "corrupt")


@pytest.mark.parametrize("header", [b"{not json", b"[1, 2]", b"\xff\xfe"])
def test_header_that_is_no_json_object_is_corrupt(tmp_path: Path, header: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    refused(tmp_path, "model.safetensors", "corrupt")


@pytest.mark.parametrize(
    "fields",
    [
        {"shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]},
        {"dtype": "F32", "shape": [1], "data_offsets": ["0", "4"]},
        {"dtype": 3, "shape": [1], "data_offsets": [0, 4]},
        ["F32"],
    ],
)
def test_invalid_entry_names_its_tensor(tmp_path: Path, fields: object) -> None:
    write_raw(tmp_path, {"layer.weight": fields}, bytes(4))
    refused(tmp_path, "model.safetensors", "layer.weight", "corrupt")


def test_holes_between_tensors_are_corrupt(tmp_path: Path) -> None:
    first = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}
    second = {"dtype": "U8", "shape": [1], "data_offsets": [2, 3]}
    write_raw(tmp_path, {"first": first, "second": second}, bytes(3))
    refused(tmp_path, "corrupt", "byte 2 of the data where 1 is due")


def test_git_lfs_pointer_is_recognised(tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4976698672\n"
    (tmp_path / "model.safetensors").write_text(pointer)
    refused(tmp_path, "model.safetensors", "git-lfs pointer", "git lfs pull")


def test_tensor_that_its_file_lacks_is_named(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    first = "model-00001-of-00003.safetensors"
    index = json.loads((tmp_path / INDEX_NAME).read_text())["weight_map"]
    write_index(tmp_path, {**index, "ghost": first})
    refused(tmp_path, "tensor ghost", first, INDEX_NAME)


def test_tensor_in_another_file_than_the_index_says_is_named(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    index = json.loads((tmp_path / INDEX_NAME).read_text())["weight_map"]
    write_index(tmp_path, {**index, "a": index["b"]})
    refused(tmp_path, "tensor a", index["b"])


def test_tensor_in_two_files_names_both(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    save_file({"b": WEIGHTS["b"], "a": WEIGHTS["a"]}, tmp_path / "model-00002-of-00003.safetensors")
    refused(tmp_path, "tensor a", "two files", "model-00001-of-00003", "model-00002-of-00003")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_invalid_index_is_corrupt(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX_NAME).write_text(text)
    refused(tmp_path, INDEX_NAME, "corrupt")


def test_headers_are_read_without_torch() -> None:
    source = Path(read_checkpoint.__code__.co_filename).read_text()
    assert not re.search(r"^\s*(import|from) (torch|transformers|safetensors)", source, re.MULTILINE)
