"""A sharded model with quantised linears says what the whole one with the dequantised weights says, in float32."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.parallel.packers import FLOAT8_CASES
from tests.parallel.quantized_models import (
    LEAVING,
    LEFT_ALONE,
    MODEL_CASES,
    QuantizedRun,
    expected_logits,
    refusals,
    run_quantized,
    write_pair,
)
from tests.parallel.ranks import run_on_ranks

WORLD_SIZES = (1, 2, 3, 4)
TOLERANCE = 1e-4
NAMES = list(MODEL_CASES)
Q_PROJ, DOWN_PROJ = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
Stored = dict[str, Tensor]
Runs = Callable[[int], dict[str, list[QuantizedRun]]]

each_format = pytest.mark.parametrize("name", NAMES)
each_world_size = pytest.mark.parametrize("world_size", WORLD_SIZES)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("quantized")
    return {name: write_pair(name, root / name.replace(" ", "_")) for name in NAMES}


@pytest.fixture(scope="module")
def runs(pairs: dict[str, Path]) -> Runs:
    """World size -> format -> what each rank saw; one start of the ranks for all formats."""
    done: dict[int, dict[str, list[QuantizedRun]]] = {}

    def run(world_size: int) -> dict[str, list[QuantizedRun]]:
        if world_size not in done:
            ranks = run_on_ranks(run_quantized, world_size, [pairs[name] / "quantized" for name in NAMES])
            done[world_size] = dict(zip(NAMES, zip(*ranks, strict=True), strict=True))
        return done[world_size]

    return run


@pytest.fixture(scope="module")
def references(pairs: dict[str, Path]) -> dict[str, Tensor]:
    return {name: expected_logits(pairs[name]) for name in NAMES}


@each_format
@each_world_size
def test_logits_are_those_of_the_dequantised_model(
    runs: Runs, references: dict[str, Tensor], name: str, world_size: int
) -> None:
    assert references[name].std() > 0.5
    for run in runs(world_size)[name]:
        torch.testing.assert_close(run.logits, references[name], rtol=0, atol=TOLERANCE)


@each_format
@each_world_size
def test_nothing_is_left_on_meta(runs: Runs, name: str, world_size: int) -> None:
    assert [run.on_meta for run in runs(world_size)[name]] == [[]] * world_size


@each_format
def test_one_rank_reads_every_tensor_that_matters_once(runs: Runs, pairs: dict[str, Path], name: str) -> None:
    tensors = load_file(pairs[name] / "quantized" / "model.safetensors")
    unused = (".weight_shape", ".input_scale", ".activation_scale")
    assert runs(1)[name][0].load.bytes_read == sum(t.nbytes for key, t in tensors.items() if not key.endswith(unused))


@each_format
def test_two_ranks_read_little_twice(runs: Runs, name: str) -> None:
    """Norms, row-parallel scales of a channel and, in act order, of all groups; words and groups that are cut."""
    once = runs(1)[name][0].load.bytes_read
    assert once < sum(run.load.bytes_read for run in runs(2)[name]) < 1.1 * once


@each_format
@each_world_size
def test_weights_stay_packed_in_memory(runs: Runs, pairs: dict[str, Path], name: str, world_size: int) -> None:
    bits = MODEL_CASES[name].bits if name not in FLOAT8_CASES else 8
    held = sum(run.held_bytes[Q_PROJ] for run in runs(world_size)[name])
    num_weights = load_file(pairs[name] / "plain" / "model.safetensors")[f"{Q_PROJ}.weight"].numel()
    # At most 32 bits for a group of 32 inputs, or for a channel of 96.
    assert num_weights * bits / 8 < held <= num_weights * (bits + 32 / 32) / 8


@pytest.mark.parametrize("name", LEAVING)
def test_linear_that_the_checkpoint_leaves_alone_stays_plain(runs: Runs, pairs: dict[str, Path], name: str) -> None:
    whole = load_file(pairs[name] / "plain" / "model.safetensors")[f"{LEFT_ALONE}.weight"]
    assert runs(1)[name][0].held_bytes[LEFT_ALONE] == whole.nbytes
    assert sum(runs(1)[name][0].load.kernels.values()) == 13
    assert sum(runs(1)["gptq v1"][0].load.kernels.values()) == 14


# What a checkpoint may have wrong


def drop(key: str, stored: Stored) -> None:
    del stored[key]


def shorten(key: str, stored: Stored) -> None:
    stored[key] = stored[key][:-1].contiguous()


def poison(key: str, stored: Stored) -> None:
    stored[key].view(-1)[3:4].fill_(math.nan)


def retype(key: str, stored: Stored) -> None:
    stored[key] = stored[key].to(torch.int16)


def restate(old: str, new: str, stored: Stored) -> None:
    key = f"{Q_PROJ}.weight.quant_state.bitsandbytes__nf4"
    text = bytes(stored[key].tolist()).decode()
    assert old in text
    stored[key] = torch.tensor(list(text.replace(old, new).encode()), dtype=torch.uint8)


def add_bias(value: float, stored: Stored) -> None:
    stored["model.layers.0.mlp.gate_proj.bias"] = torch.full((224,), value, dtype=torch.float16)


def add(key: str, stored: Stored) -> None:
    stored[key] = torch.ones(1)


BROKEN: dict[str, tuple[str, Callable[[Stored], None], list[str]]] = {
    "missing scales": ("awq", partial(drop, f"{Q_PROJ}.scales"), [f"{Q_PROJ}.scales is missing"]),
    "missing zeros": ("gptq v1", partial(drop, f"{DOWN_PROJ}.qzeros"), [f"{DOWN_PROJ}.qzeros is missing"]),
    "missing g_idx": ("gptq act order", partial(drop, f"{DOWN_PROJ}.g_idx"), [f"{DOWN_PROJ}.g_idx is missing"]),
    "short weight": ("awq", partial(shorten, f"{Q_PROJ}.qweight"), [f"{Q_PROJ}.qweight", "[95, 12]", "[96, 12]"]),
    "short scale": ("w4a16", partial(shorten, f"{Q_PROJ}.weight_scale"), ["[95, 3]", "[96, 3]"]),
    "no number": ("gptq v1", partial(poison, f"{Q_PROJ}.scales"), [f"{Q_PROJ}.scales", "NaN or infinity"]),
    "no number in fp8": ("fp8 by channel", partial(poison, f"{Q_PROJ}.weight"), [f"{Q_PROJ}.weight", "NaN"]),
    "short blocks": ("nf4", partial(shorten, f"{Q_PROJ}.weight"), [f"{Q_PROJ}.weight", "[12287, 1]", "[12288, 1]"]),
    "not nested": ("nf4 nested", partial(drop, f"{Q_PROJ}.weight.nested_absmax"), ["weight.nested_absmax is missing"]),
    "another type": ("nf4 nested", partial(restate, "nf4", "fp4"), [f"{Q_PROJ}", "quant_type='fp4'", "'nf4'"]),
    "another block": ("nf4", partial(restate, '"blocksize": 64', '"blocksize": 32'), ["blocksize=32", "only 64"]),
    "no state": ("nf4", partial(restate, "{", ""), [f"{Q_PROJ}", "no valid JSON"]),
    "short block scales": ("fp8 by block", partial(shorten, f"{DOWN_PROJ}.weight_scale_inv"), ["[2, 7]", "[3, 7]"]),
    "wrong dtype": ("awq", partial(retype, f"{Q_PROJ}.qweight"), [f"{Q_PROJ}.qweight", "is I16", "must be I32"]),
    "fp8 without scale": ("fp8 by channel", partial(drop, f"{Q_PROJ}.weight_scale"), [f"{Q_PROJ}.weight", "F8_E4M3"]),
    "bias without a place": ("gptq v1", partial(add_bias, 0.5), ["gate_proj.bias", "is not zero"]),
    "extra": ("awq", partial(add, f"{Q_PROJ}.k_scale"), [f"{Q_PROJ}.k_scale", "is not part of the model"]),
}


@pytest.fixture(scope="module")
def reasons(pairs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("broken")
    folders = []
    for name, (case, change, _) in BROKEN.items():
        folders.append(root / name.replace(" ", "_"))
        shutil.copytree(pairs[case] / "quantized", folders[-1])
        stored = load_file(folders[-1] / "model.safetensors")
        change(stored)
        save_file(stored, folders[-1] / "model.safetensors")
    # What AutoGPTQ writes for linears without a bias.
    folders.append(root / "zero bias")
    shutil.copytree(pairs["gptq v1"] / "quantized", folders[-1])
    stored = load_file(folders[-1] / "model.safetensors")
    add_bias(0.0, stored)
    save_file(stored, folders[-1] / "model.safetensors")
    # Quantised weights, and a config that does not say so.
    folders.append(root / "silent")
    shutil.copytree(pairs["fp8 by channel"] / "quantized", folders[-1])
    config = json.loads((folders[-1] / "config.json").read_text())
    del config["quantization_config"]
    (folders[-1] / "config.json").write_text(json.dumps(config))
    return dict(zip([*BROKEN, "zero bias", "silent"], run_on_ranks(refusals, 1, folders)[0], strict=True))


@pytest.mark.parametrize("name", BROKEN)
def test_broken_tensor_is_named(reasons: dict[str, str], name: str) -> None:
    words = BROKEN[name][2]
    assert reasons[name], "it was loaded"
    assert [word for word in words if word not in reasons[name]] == []


def test_zero_bias_that_the_model_has_no_place_for_is_ignored(reasons: dict[str, str]) -> None:
    assert reasons["zero bias"] == ""


def test_quantised_weights_without_a_quantization_config_are_refused(reasons: dict[str, str]) -> None:
    assert "is F8_E4M3, and nothing says how to read that" in reasons["silent"]
