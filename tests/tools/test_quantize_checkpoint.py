"""Rounding a checkpoint to each format: what comes out is what went in, to half a step, and a plan can read it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer

from launcher.shape import shape_from_checkpoint
from parallel.checkpoint.headers import read_checkpoint
from tests.parallel.ranks import load
from tests.parallel.small_models import DEMO
from tools.local_ranks import run_on_ranks
from tools.quantization import WRITERS, is_linear, round_weight
from tools.quantize_checkpoint import main

FORMATS = tuple(WRITERS)
# Nats a token that rounding to the nearest may cost the demo model: twice what was measured.
MOST_LOST = {"awq": 0.10, "gptq": 0.08, "w4a16": 0.08, "w8a16": 0.001, "fp8": 0.008}
Result = tuple[dict[str, Tensor], float]
TEXT = Path(json.__file__).with_name("encoder.py").read_text()[:6000]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("rounded")
    for name in FORMATS:
        main([str(DEMO), str(root / name), "--format", name, "--shard-gib", "0.002"])
    return {name: root / name for name in FORMATS}


def dequantised(
    communicator: object, folders: list[Path], ids: list[list[int]]
) -> list[tuple[dict[str, Tensor], float]]:
    """The dequantised linears of the first layer, and the mean loss on `ids`, of each checkpoint."""
    results = []
    for folder in folders:
        module = load(communicator, folder)  # type: ignore[arg-type]
        layers = {name: layer for name, layer in module.named_modules() if name.startswith("model.layers.0.")}
        weights = {f"{name}.weight": layer.packed.dequantize(torch.float32)
                   for name, layer in layers.items() if getattr(layer, "packed", None) is not None}  # fmt: skip
        with torch.inference_mode():
            logits = module(torch.tensor(ids)).logits
        targets = torch.tensor(ids)[:, 1:]
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten())
        results.append((weights, float(loss)))
    return results


@pytest.fixture(scope="module")
def results(folders: dict[str, Path]) -> dict[str, Result]:
    ids = AutoTokenizer.from_pretrained(DEMO)(TEXT)["input_ids"]
    rows = [ids[start : start + 256] for start in range(0, len(ids) - 255, 256)]
    names = ["plain", *FORMATS]
    return dict(zip(names, run_on_ranks(dequantised, 1, [DEMO, *folders.values()], rows)[0], strict=True))


@pytest.mark.parametrize("name", FORMATS)
def test_weights_are_within_half_a_step(results: dict[str, Result], name: str) -> None:
    plain = load_file(DEMO / "model.safetensors")
    weights = results[name][0]
    assert len(weights) == 7
    for key, weight in weights.items():
        original = plain[key].float()
        group = 128 if WRITERS[name].scheme.group_size else original.shape[1]
        largest = original.unflatten(1, (-1, group)).abs().amax(dim=2).repeat_interleave(group, dim=1)
        # e4m3 keeps three bits after the first; a step of 4 bits is at most a seventh of the largest value; scales are
        # in bf16, and the largest values may be cut off by their rounding.
        bound = {"fp8": original.abs() / 16 + largest / 256, "w8a16": largest / 128}.get(name, largest / 7)
        assert bool(((weight - original).abs() <= bound + 1e-6).all()), key
        assert not torch.equal(weight, original)


@pytest.mark.parametrize("name", FORMATS)
def test_loss_is_near_that_of_the_plain_model(results: dict[str, Result], name: str) -> None:
    lost = results[name][1] - results["plain"][1]
    assert -0.001 < lost < MOST_LOST[name]


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


def test_folder_that_is_not_empty_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        main([str(DEMO), str(tmp_path), "--format", "awq"])
    assert "is not empty" in capsys.readouterr().err
