import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from launcher.models.config_json import SUPPORTED
from launcher.models.shape import TABLES, part_bytes, shape_from_checkpoint
from parallel.checkpoint.headers import read_checkpoint
from parallel.communicator import Communicator
from tests.parallel.ranks import load, run_on_ranks
from tools.checkpoint.fills import BLOCK_ELEMENTS
from tools.checkpoint.quantization import WRITERS
from tools.make_checkpoint import FULL_ATTENTION, TOKENIZER, main


def logits_of(folder: Path) -> torch.Tensor:
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    with torch.inference_mode():
        return model(torch.arange(24).view(2, 12)).logits


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def test_every_supported_family_can_be_made() -> None:
    assert set(FULL_ATTENTION) == set(SUPPORTED)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", SUPPORTED)
def test_transformers_loads_it_and_its_logits_are_finite(tmp_path: Path, model_type: str, tied: bool) -> None:
    main(["--out", str(tmp_path), "--model-type", model_type, *(["--tied"] if tied else [])])
    logits = logits_of(tmp_path)
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()
    assert logits.float().std() > 0.01


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_its_size_is_the_planned_one(tmp_path: Path, model_type: str) -> None:
    main(["--out", str(tmp_path), "--model-type", model_type])
    shape = shape_from_checkpoint(tmp_path)
    (parts,) = part_bytes(shape, 1, 128, shape.dtype)
    assert read_checkpoint(tmp_path).total_bytes == sum(parts.values())
    assert shape.sliding_window is None


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_other_dtypes_are_stored_and_load(tmp_path: Path, dtype: str) -> None:
    main(["--out", str(tmp_path), "--dtype", dtype])
    assert shape_from_checkpoint(tmp_path).dtype == dtype
    assert {str(tensor.dtype) for tensor in weights_of(tmp_path).values()} == {f"torch.{dtype}"}


def test_small_shards_make_several_files_with_an_index(tmp_path: Path) -> None:
    main(["--out", str(tmp_path), "--shard-gib", "0.0001"])
    checkpoint = read_checkpoint(tmp_path)
    files = {entry.file for entry in checkpoint.tensors.values()}
    assert len(files) > 3
    alone = [file for file in files if sum(entry.file == file for entry in checkpoint.tensors.values()) == 1]
    assert all(file in alone or file.stat().st_size < 0.0001 * 2**30 + 4096 for file in files)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == checkpoint.total_bytes
    assert logits_of(tmp_path).isfinite().all()


def test_weights_look_random_and_norms_are_one(tmp_path: Path) -> None:
    main(["--out", str(tmp_path), "--dtype", "float32", "--vocab-size", "70000"])
    weights = weights_of(tmp_path)
    embedding = weights["model.embed_tokens.weight"]
    assert embedding.numel() > BLOCK_ELEMENTS, "several pieces of the block"
    assert embedding.mean().abs() < 1e-3
    assert embedding.std() == pytest.approx(0.02, rel=0.01)
    assert (weights["model.norm.weight"] == 1).all()


def test_seed_decides_the_bytes_and_the_number_of_workers_does_not(tmp_path: Path) -> None:
    for name, options in {"one": ["--workers", "1"], "two": ["--workers", "2"], "other": ["--seed", "1"]}.items():
        main(["--out", str(tmp_path / name), "--shard-gib", "0.0001", *options])
    one, two, other = (weights_of(tmp_path / name) for name in ("one", "two", "other"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])


def test_sizes_replace_those_of_the_preset(tmp_path: Path) -> None:
    main(["--out", str(tmp_path), "--num-layers", "3", "--num-heads", "6", "--hidden-size", "96"])
    shape = shape_from_checkpoint(tmp_path)
    assert (shape.num_layers, shape.num_heads, shape.num_kv_heads, shape.hidden_size) == (3, 6, 2, 96)


@pytest.mark.skipif(not (TOKENIZER / "tokenizer.json").is_file(), reason="the demo model is not here")
def test_demo_tokenizer_comes_with_it(tmp_path: Path) -> None:
    main(["--out", str(tmp_path)])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.decode(tokenizer("def mean(values):", add_special_tokens=False).input_ids) == "def mean(values):"
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == tokenizer.eos_token_id


def test_without_a_tokenizer_that_fits_there_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--out", str(tmp_path), "--vocab-size", "300"])
    assert not (tmp_path / "tokenizer.json").exists()
    assert "no tokenizer" in capsys.readouterr().out
    assert logits_of(tmp_path).isfinite().all()


def test_folder_that_is_not_empty_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path)])
    assert "is not empty" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path / "model.safetensors")])
    assert "model.safetensors is no folder" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["--num-layers=0", "--hidden-size=-64", "--tokenizer=/nowhere"])
def test_sizes_that_make_no_model_are_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], word: str
) -> None:
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path / "out"), word])
    assert word.partition("=")[0] in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_linears_that_a_format_cannot_store_are_refused_before_writing(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="down_proj: blocks of 64 weights run on from one row of 200 inputs"):
        main(["--out", str(tmp_path / "new"), "--quantization", "nf4", "--intermediate-size", "200"])
    assert not (tmp_path / "new").exists()


def test_more_than_the_disk_holds_is_refused_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(SystemExit, match="GiB free, the checkpoint takes"):
        main(["--out", str(tmp_path / "new")])
    assert not list((tmp_path / "new").iterdir())


def logits_on_two_ranks(communicator: Communicator, folders: list[Path]) -> list[torch.Tensor]:
    """Of this rank's part of the vocabulary, in bf16."""
    with torch.inference_mode():
        return [load(communicator, folder, torch.bfloat16)(torch.arange(24).view(2, 12)).logits for folder in folders]


def test_quantised_ones_load_on_two_ranks_and_are_as_large_as_planned(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in WRITERS]
    for name, folder in zip(WRITERS, folders, strict=True):
        main(["--out", str(folder), "--quantization", name, "--hidden-size", "128", "--intermediate-size", "384"])
        shape = shape_from_checkpoint(folder)
        assert shape.scheme == WRITERS[name].scheme
        (parts,) = part_bytes(shape, 1, 128, shape.dtype)
        # What the plan rounds up: a byte for the attention and for the MLP; tables of a fixed size it leaves out.
        checkpoint = read_checkpoint(folder)
        tables = sum(entry.num_bytes for key, entry in checkpoint.tensors.items() if key.endswith(TABLES))
        assert checkpoint.total_bytes - tables == pytest.approx(sum(parts.values()), abs=2)
        assert tables == (14 * (16 * 4 + 256 * 4 + 256) if name == "nf4" else 0)
    for logits in (logits for rank in run_on_ranks(logits_on_two_ranks, 2, folders) for logits in rank):
        assert logits.isfinite().all()
        assert 0.01 < logits.float().std() < 10


def test_quantised_weights_spread_like_plain_ones(tmp_path: Path) -> None:
    for name in WRITERS:
        main(["--out", str(tmp_path / name), "--quantization", name, "--hidden-size", "128", "--num-layers", "1"])
    for weight in run_on_ranks(first_weights, 1, [tmp_path / name for name in WRITERS])[0]:
        assert weight.std() == pytest.approx(0.02, rel=0.1)
        # Values from 0 to 15 about a zero of 8 are half a step low; NF4's numbers have a mean of their own.
        assert weight.mean().abs() < 0.003


def first_weights(communicator: Communicator, folders: list[Path]) -> list[torch.Tensor]:
    modules = [load(communicator, folder) for folder in folders]
    return [module.get_submodule("model.layers.0.mlp.gate_proj").packed.dequantize(torch.float32) for module in modules]
