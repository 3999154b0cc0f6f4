"""Rounding a checkpoint to each format: what comes out is what went in, to half a step, and a plan can read it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from launcher.models.shape import shape_from_checkpoint
from parallel.checkpoint.headers import read_checkpoint
from parallel.communicator import Communicator
from parallel.formats.registry import format_of
from parallel.formats.scheme import Box
from tests.parallel.ranks import load
from tests.parallel.small_models import DEMO
from tools import make_checkpoint
from tools.checkpoint.quantization import WRITERS, is_linear, round_weight
from tools.demo.perplexity import INT8_SUMS, KV_FP8, PLAIN, held_out_tokens, measure
from tools.local_ranks import run_on_ranks
from tools.quantize_checkpoint import main

FORMATS = tuple(WRITERS)
# What rounding to the nearest costs the demo model on 65,536 tokens. The test takes the first of them.
TABLE = Path(__file__).parents[2] / "results" / "perplexity_demo_202611.json"
NUM_TOKENS = 2 + 2 * 1024
# Share by which perplexity may rise: a tenth or more above the larger of the table and the first tokens alone.
MOST = {
    "awq": 0.038, "gptq": 0.051, "gptq_act_order": 0.051,
    "w4a16": 0.051, "w4a16_zeros": 0.038, "w4a16_act_order": 0.051,
    "w8a16": 0.0003, "fp8": 0.0025, "fp8_tensor": 0.002, "fp8_block": 0.0033, "nf4": 0.027,
    KV_FP8: 0.009,
    **dict.fromkeys(INT8_SUMS.values(), 0.001),
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("rounded")
    for name in FORMATS:
        main([str(DEMO), str(root / name), "--format", name, "--shard-gib", "0.002"])
    return {name: root / name for name in FORMATS}


def dequantised(communicator: Communicator, folders: list[Path]) -> list[dict[str, Tensor]]:
    """The dequantised linears of the first layer of each checkpoint."""
    return [first_layer(load(communicator, folder)) for folder in folders]


def first_layer(module: nn.Module) -> dict[str, Tensor]:
    layers = {name: layer for name, layer in module.named_modules() if name.startswith("model.layers.0.")}
    return {f"{name}.weight": layer.packed.dequantize(torch.float32)
            for name, layer in layers.items() if getattr(layer, "packed", None) is not None}  # fmt: skip


@pytest.fixture(scope="module")
def weights(folders: dict[str, Path]) -> dict[str, dict[str, Tensor]]:
    return dict(zip(FORMATS, run_on_ranks(dequantised, 1, list(folders.values()))[0], strict=True))


def bound(name: str, original: Tensor) -> Tensor:
    """How far a weight may be from the one that was rounded to `name`.

    e4m3 keeps three bits after the first; a step of 4 bits is at most a seventh of the largest value; NF4's widest is
    between -1 and -0.696; scales are in bf16, and the largest values may be cut off by their rounding.
    """
    scheme = WRITERS[name].scheme
    # In act order any input may be in the group.
    group = original.shape[1] if scheme.act_order or not scheme.group_size else scheme.group_size
    largest = original.unflatten(1, (-1, group)).abs().amax(dim=2).repeat_interleave(group, dim=1)
    if scheme.is_float:
        return original.abs() / 16 + largest / 256
    return largest * (0.16 if scheme.has_codebook else 1 / 7 if scheme.bits == 4 else 1 / 128)


@pytest.mark.parametrize("name", FORMATS)
def test_weights_are_within_half_a_step(weights: dict[str, dict[str, Tensor]], name: str) -> None:
    plain = load_file(DEMO / "model.safetensors")
    assert len(weights[name]) == 7
    for key, weight in weights[name].items():
        original = plain[key].float()
        assert bool(((weight - original).abs() <= bound(name, original) + 1e-6).all()), key
        assert not torch.equal(weight, original)


@pytest.fixture(scope="module")
def increases(folders: dict[str, Path]) -> dict[str, float]:
    rows = measure({PLAIN: DEMO} | folders, held_out_tokens(DEMO, NUM_TOKENS))
    return {row["format"]: row["increase"] for row in rows}


@pytest.mark.parametrize("name", MOST)
def test_perplexity_rises_no_more_than_was_measured(increases: dict[str, float], name: str) -> None:
    assert abs(increases[name]) < MOST[name]


def test_perplexities_in_the_table_are_within_the_same_bounds() -> None:
    rows = {row["format"]: row for row in json.loads(TABLE.read_text())["perplexity"]}
    assert set(rows) == {PLAIN, *MOST} == {PLAIN, *FORMATS, KV_FP8, *INT8_SUMS.values()}
    assert all(abs(rows[name]["increase"]) < most for name, most in MOST.items())


@pytest.mark.parametrize("name", FORMATS)
def test_plan_can_read_it(folders: dict[str, Path], name: str) -> None:
    shape = shape_from_checkpoint(folders[name])
    assert (shape.scheme, shape.not_loadable) == (WRITERS[name].scheme, "")
    assert WRITERS[name].scheme.bits < shape.linear_bits < WRITERS[name].scheme.bits + 0.5
    assert len(list(folders[name].glob("*.safetensors"))) > 1
    assert (folders[name] / "tokenizer.json").is_file()


@pytest.mark.parametrize("name", FORMATS)
def test_all_but_the_linears_stays_as_it_is(folders: dict[str, Path], name: str) -> None:
    plain = load_file(DEMO / "model.safetensors")
    stored = {key: value for file in folders[name].glob("*.safetensors") for key, value in load_file(file).items()}
    kept = {key for key in plain if not is_linear(key)}
    assert len(kept) == 2 * 5 + 3
    assert all(torch.equal(stored[key], plain[key]) for key in kept)
    assert set(stored) == set(read_checkpoint(folders[name]).tensors)


def extremes() -> Iterator[tuple[str, Tensor]]:
    yield "constant", torch.full((4, 32), 0.25)
    yield "zero", torch.zeros(4, 32)
    yield "all below zero", -torch.rand(4, 32, generator=torch.Generator().manual_seed(1)) - 0.5


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("name", "weight"), list(extremes()))
def test_extreme_groups_are_rounded_well(name: str, weight: Tensor, symmetric: bool) -> None:
    rounded = round_weight(weight, 4, 16, symmetric=symmetric)
    scales, zeros = (t.float().repeat_interleave(16, dim=1) for t in (rounded.scales, rounded.zeros))
    back = (rounded.values.float() - zeros) * scales
    assert bool(((back - weight).abs() <= scales * 0.6 + 1e-6).all())


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "nf4"])
def test_linear_whose_sizes_fill_no_word_and_no_group_is_read_as_it_was(name: str) -> None:
    weight, writer = torch.randn(13, 203, generator=torch.Generator().manual_seed(0)), WRITERS[name]
    stored = writer.stored(weight)
    assert {part: tuple(each.shape) for part, each in stored.items()} == {
        part: shape for part, (_, shape) in writer.tensors(13, 203).items()
    }
    read = format_of(writer.scheme).decode(stored, writer.scheme, Box((0, 13), (0, 203))).dequantize(torch.float32)
    # Half a step, of 15 between the largest and the smallest.
    assert (read - weight).abs().max() < 0.04 * (weight.max() - weight.min())


def test_folder_that_is_not_empty_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        main([str(DEMO), str(tmp_path), "--format", "awq"])
    assert "is not empty" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(DEMO), str(tmp_path / "file"), "--format", "awq"])
    assert "file is no folder" in capsys.readouterr().err


def test_quantised_weights_are_not_copied_under_another_name(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([str(folders["awq"]), str(tmp_path / "out"), "--format", "gptq"])
    assert "is quantised already (awq)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("words", "told"), [(["/nowhere"], "/nowhere"), ([str(DEMO), "--shard-gib=0"], "--shard-gib")])
def test_what_cannot_be_quantised_is_said_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    with pytest.raises(SystemExit):
        main([*words, str(tmp_path / "out"), "--format", "awq"])
    assert told in capsys.readouterr().err.splitlines()[-1]


def test_linears_that_a_format_cannot_store_are_refused_before_writing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    make_checkpoint.main(["--out", str(source), "--intermediate-size", "200"])
    with pytest.raises(SystemExit):
        main([str(source), str(tmp_path / "out"), "--format", "nf4"])
    assert "mlp.down_proj: blocks of 64 weights run on" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()
