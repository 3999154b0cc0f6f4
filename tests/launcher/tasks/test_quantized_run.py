"""Quantised checkpoints through the command line: one runs on two ranks, one that cannot be loaded starts none."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.models.config_json import read_model_config
from launcher.models.shape import TYPICAL_SCHEMES, shape_from_checkpoint
from parallel.checkpoint.headers import read_checkpoint
from parallel.formats.config import READERS
from tests.launcher.demo_model import DEMO, change_json, copy_demo
from tests.launcher.forked import run
from tools.quantize_checkpoint import main as quantize

SHORT = ("hardware=cpu", "workload.output_tokens=12", "engine.comm_share_steps=0")


@pytest.fixture(scope="module")
def awq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("awq") / "demo-awq"
    quantize([str(DEMO), str(folder), "--format", "awq"])
    # As AutoAWQ's files say, whatever the model was trained in.
    change_json(folder / "config.json", dtype="float16")
    return folder


def test_awq_checkpoint_answers_on_two_ranks_from_packed_weights(awq: Path, tmp_path: Path) -> None:
    report = run(*SHORT, "gpus=2", f"model.path={awq}", folder=tmp_path / "run").report
    assert report["dtype"] == "bfloat16"
    assert len(report["outputs"][0]["token_ids"]) == 12
    assert report["load"]["kernels"] == {next(iter(report["load"]["kernels"])): 35}
    assert next(iter(report["load"]["kernels"])).startswith("dequantize (not ")
    plain_bytes = read_checkpoint(DEMO).total_bytes
    for card, predicted in zip(report["cards"], report["predicted"]["cards"], strict=True):
        held = card["memory"]["weights_bytes"]
        assert held == sum(size for name, size in predicted["lines"].items() if name.startswith("weights."))
        # Embedding and head, two thirds of what is left, stay in bf16.
        assert held < 0.5 * plain_bytes / 2


def test_variant_that_cannot_be_loaded_is_refused_before_ranks_start(awq: Path, tmp_path: Path) -> None:
    folder = tmp_path / "gemv"
    folder.mkdir()
    for file in awq.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    section = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemv", "zero_point": True}
    change_json(folder / "config.json", quantization_config=section)
    error = run(*SHORT, "gpus=2", f"model.path={folder}", folder=tmp_path / "run").error
    for word in ("quantised as awq", "version='gemv'", "only gemm", "GPTQ (4 or 8 bits", "model.path", "task=plan"):
        assert word in error["message"]
    assert not (tmp_path / "run" / "job.json").exists()
    plan = run("task=plan", "gpus=2", "hardware=rtx4090", f"model.path={folder}", folder=tmp_path / "plan").report
    assert plan["predicted"]["cards"]


def test_quantised_head_is_not_loadable(tmp_path: Path) -> None:
    folder = copy_demo(tmp_path / "model", quantization_config={"quant_method": "fp8"})
    header = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    # A name of the same length keeps the header as long as it was.
    (folder / "model.safetensors").write_bytes(header.replace(b'"lm_head.weight"', b'"lm_head.scales"', 1))
    assert "quantised lm_head" in shape_from_checkpoint(folder).not_loadable


def test_config_that_promises_what_the_weights_are_not_is_not_loadable(tmp_path: Path) -> None:
    section = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    shape = shape_from_checkpoint(copy_demo(tmp_path / "model", quantization_config=section))
    assert "has no quantised tensor" in shape.not_loadable


def test_every_format_that_facts_can_name_can_be_loaded() -> None:
    assert set(TYPICAL_SCHEMES) == set(READERS)


@pytest.mark.parametrize("section", ["awq", [1], {"quant_method": "quanto"}])
def test_other_sections_can_be_planned_and_say_why_they_cannot_run(tmp_path: Path, section: object) -> None:
    folder = copy_demo(tmp_path / "model", quantization_config=section)
    fields = read_model_config(folder / "config.json")
    assert fields["scheme"] is None
    assert "quantization_config" in fields["not_loadable"]
