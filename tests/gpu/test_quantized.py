"""Quantised checkpoints on cards: torch's int4 operator against float64, and answers against the reference kernel's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from parallel.kernels import choice, tinygemm
from parallel.quantized import QuantizedWeight
from tests.gpu.cards import needs_two_cards
from tests.launcher.cli import run
from tests.launcher.demo_model import DEMO
from tools.checkpoint.quantization import WRITERS
from tools.quantize_checkpoint import main as quantize

pytestmark = pytest.mark.gpu

# [out, in] of a rank of Llama-70B at TP2: q, k and v; o; gate and up; down. And Qwen2.5-72B's smaller part of down.
SHAPES = [(4096, 8192), (512, 8192), (8192, 4096), (14336, 8192), (8192, 14336), (8192, 14720)]
# One of each kind of kernel and of scales; rounding to the others differs in what the files look like.
FORMATS = ("awq", "gptq_act_order", "w4a16", "w8a16", "fp8", "fp8_block", "nf4")


def fresh_weight(shape: tuple[int, int], group_size: int, *, has_zeros: bool) -> QuantizedWeight:
    """Unlike any other: seeded by the system."""
    num_groups = shape[1] // group_size
    zeros = torch.randint(16, (shape[0], num_groups), device="cuda").byte() if has_zeros else None
    values = torch.randint(16, shape, device="cuda").byte()
    scales = (0.002 + 0.002 * torch.rand(shape[0], num_groups, device="cuda")).half()
    return QuantizedWeight(values, 4, scales, zeros, group_size)


def poison_free_memory(num_bytes: int) -> None:
    """Freed memory full of NaN, which an operator that leaves an output unwritten would hand out."""
    torch.full((num_bytes // 2,), float("nan"), dtype=torch.bfloat16, device="cuda")


def worst_error(output: Tensor, rows: Tensor, weight: QuantizedWeight) -> float:
    """In units of the standard deviation of the exact product."""
    exact = rows.double() @ weight.dequantize(torch.float64).t()
    return float((output.double() - exact).abs().max() / exact.std())


@pytest.mark.parametrize("has_zeros", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_tinygemm_agrees_with_float64(shape: tuple[int, int], has_zeros: bool) -> None:
    weight = fresh_weight(shape, 128, has_zeros=has_zeros)
    assert tinygemm.refusal(weight, torch.bfloat16) is None
    layer = tinygemm.TinygemmLinear(weight)
    for num_rows in (1, 4, 16, 64):
        rows = torch.randn(num_rows, shape[1], device="cuda", dtype=torch.bfloat16)
        poison_free_memory(num_rows * shape[0] * 2)
        # Rounding of scales, shifts and sums to bf16: a hundredth or so; a wrong layout gives 4 and more.
        assert worst_error(layer(rows), rows, weight) < 0.1, num_rows


@pytest.mark.parametrize("group_size", tinygemm.GROUP_SIZES)
@pytest.mark.parametrize("num_in", [8192, 8192 + 64, 8192 + 32])
def test_every_packing_is_unpacked_as_it_was(group_size: int, num_in: int) -> None:
    """Few rows read the packed weight, many the unpacked one: they must be the same."""
    if num_in % group_size:
        pytest.skip("groups do not divide the inputs")
    weight = fresh_weight((256, num_in), group_size, has_zeros=True)
    layer = tinygemm.TinygemmLinear(weight)
    assert torch.equal(tinygemm.unpack_tiles(layer.packed), weight.values)
    rows = torch.randn(tinygemm.MAX_TINYGEMM_ROWS + 1, num_in, device="cuda", dtype=torch.bfloat16)
    few = torch.cat([layer(rows[:8]), layer(rows[8:])])
    assert float((few - layer(rows)).abs().max() / few.std()) < 0.05


def test_act_order_is_undone_by_ordering_the_inputs() -> None:
    weight = fresh_weight((512, 4096), 128, has_zeros=True)
    group_of = (torch.arange(4096, device="cuda") // 128)[torch.randperm(4096, device="cuda")]
    shuffled = QuantizedWeight(weight.values, 4, weight.scales, weight.zeros, 128, group_of)
    layer = tinygemm.TinygemmLinear(shuffled)
    for num_rows in (2, 40):
        rows = torch.randn(num_rows, 4096, device="cuda", dtype=torch.bfloat16)
        assert worst_error(layer(rows), rows, shuffled) < 0.1


@pytest.mark.parametrize("bits", [4, 8])
def test_reference_on_the_card_is_the_one_on_the_cpu(bits: int) -> None:
    values = torch.randint(2**bits, (384, 1024)).byte()
    weight = QuantizedWeight(values, bits, torch.rand(384, 8), torch.randint(2**bits, (384, 8)).byte(), 128)
    on_card = QuantizedWeight(values.cuda(), bits, weight.scales.cuda(), weight.zeros.cuda(), 128)  # type: ignore[union-attr]
    kernels = [choice.KERNELS["dequantize"].build(each) for each in (weight, on_card)]
    rows = torch.randn(5, 1024, dtype=torch.float64)
    torch.testing.assert_close(kernels[1](rows.cuda()).cpu(), kernels[0](rows), rtol=1e-12, atol=1e-9)


# The demo model through the command line


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("formats")
    for name in FORMATS:
        quantize([str(DEMO), str(root / name), "--format", name])
    return {name: root / name for name in FORMATS}


def answer(folder: Path, run_dir: Path, *overrides: str) -> dict[str, Any]:
    return run(*overrides, f"model.path={folder}", "workload.output_tokens=24", folder=run_dir).report


@pytest.mark.parametrize("gpus", [1, pytest.param(2, marks=needs_two_cards)])
@pytest.mark.parametrize("name", FORMATS)
def test_answers_begin_as_on_the_cpu_in_float32(folders: dict[str, Path], tmp_path: Path, name: str, gpus: int) -> None:
    """bf16 may tip a near-tie, and the texts part there; the first tokens of this prompt are none."""
    report = answer(folders[name], tmp_path / "card", f"gpus={gpus}")
    exact = answer(folders[name], tmp_path / "cpu", "gpus=1", "hardware=cpu", "model.dtype=float32")
    assert report["device"] == "cuda"
    assert report["outputs"][0]["token_ids"][:4] == exact["outputs"][0]["token_ids"][:4]
    kernel = next(iter(report["load"]["kernels"]))
    assert kernel.startswith(("w8a16", "dequantize") if WRITERS[name].scheme.bits == 8 else ("w4a16", "tinygemm"))
    predicted = report["predicted"]["cards"][0]["lines"]
    weights = sum(size for line, size in predicted.items() if line.startswith("weights."))
    assert report["cards"][0]["memory"]["weights_bytes"] == pytest.approx(weights, rel=0.01)


def logits_of(folder: Path, monkeypatch: pytest.MonkeyPatch, kernels: list[str]) -> Tensor:
    """[tokens, vocabulary] float32 of the demo model in bf16 on this card, with only these kernels to choose from."""
    from parallel.checkpoint.headers import read_checkpoint
    from parallel.checkpoint.load import load_checkpoint
    from tests.parallel.ranks import build, demo_tokenizer
    from tools.local_ranks import joined

    monkeypatch.setattr(choice, "KERNELS", {name: choice.KERNELS[name] for name in kernels})
    ids = demo_tokenizer().encode("def read_lines(path):\n    with open(path) as file:\n").ids
    with joined(0, 1, folder / f"store-{kernels[0]}", 60) as communicator, torch.inference_mode():
        model = build(communicator, folder, torch.bfloat16)
        load = load_checkpoint(model, read_checkpoint(folder), torch.device("cuda"))
        assert all(line.startswith(kernels[0]) for line in load.kernels), load.kernels
        # Few enough rows for the kernel itself, not for its way for many.
        return model.module(torch.tensor([ids[:12]], device="cuda")).logits[0].float()


def test_tinygemms_logits_are_those_of_the_reference(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        fast = logits_of(folders["awq"], patch, ["tinygemm", "dequantize"])
    with monkeypatch.context() as patch:
        reference = logits_of(folders["awq"], patch, ["dequantize"])
    best, second = reference.topk(2).values.unbind(-1)
    assert float((fast - reference).abs().max()) < 0.3
    clear = best - second > 0.6
    assert bool(clear.any())
    assert torch.equal(fast.argmax(-1)[clear], reference.argmax(-1)[clear])
