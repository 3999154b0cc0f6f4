"""model.weights=dummy and model.quantize through the command line: without weights, without a folder, and refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.launcher import cli
from tests.launcher.cli import SHORT
from tests.launcher.demo_model import DEMO, WEIGHTS, copy_demo
from tests.launcher.forked import run, run_together
from tools.checkpoint.quantization import AWQ

# A model of a shape that no folder has; the hub is never asked.
FACTS = (
    "model.path=nobody/has-this",
    *(f"model.shape.{name}={value}" for name, value in {
        "hidden_size": 256, "intermediate_size": 512, "num_layers": 3, "num_heads": 8, "num_kv_heads": 4,
        "head_dim": 32, "vocab_size": 1024, "max_positions": 2048,
    }.items()),
)  # fmt: skip
PLAIN, QUANTIZED = "model=llama3_1_8b", "model=qwen2_5_72b_awq"
DUMMY = "model.weights=dummy"
OFFLINE = {"HF_HUB_OFFLINE": "1"}


def weights_bytes(report: dict[str, Any]) -> list[tuple[int, int]]:
    """Measured and predicted, of each rank."""
    lines = [card["lines"] for card in report["predicted"]["cards"]]
    predicted = [sum(size for name, size in each.items() if name.startswith("weights.")) for each in lines]
    return list(zip([card["memory"]["weights_bytes"] for card in report["cards"]], predicted, strict=True))


@pytest.fixture(scope="module")
def config_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantised model of which there is config.json alone."""
    folder = tmp_path_factory.mktemp("config") / "model"
    folder.mkdir()
    config = json.loads((DEMO / "config.json").read_text()) | {"quantization_config": AWQ}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def without_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model with its tokenizer and no weights."""
    folder = tmp_path_factory.mktemp("no_weights") / "demo"
    shutil.copytree(DEMO, folder, ignore=shutil.ignore_patterns(WEIGHTS))
    return folder


def test_dummy_weights_of_a_folder_run_on_two_ranks(without_weights: Path, tmp_path: Path) -> None:
    result = run("gpus=2", *SHORT, DUMMY, f"model.path={without_weights}", folder=tmp_path / "run")
    report = result.report
    assert result.returncode == 0, result.stderr
    assert (report["weights"], report["quantize"], report["world_size"]) == ("dummy", "none", 2)
    assert "answers are noise" in result.stderr
    assert (report["load"]["bytes_read"], report["load"]["gb_per_sec"]) == (0, None)
    (output,) = report["outputs"]
    # An end of text comes at random, and ends nothing.
    assert (len(output["token_ids"]), output["finish_reason"]) == (8, "length")
    assert report["ttft_ms"] > 0
    assert all(measured == predicted for measured, predicted in weights_bytes(report))


def test_config_alone_is_enough_and_prompts_are_random_tokens(config_only: Path, tmp_path: Path) -> None:
    result = run(*SHORT, DUMMY, f"model.path={config_only}", "gpus=2", folder=tmp_path / "run")
    assert result.returncode == 0, result.stderr
    report = result.report
    assert (report["outputs"][0]["text"], len(report["outputs"][0]["token_ids"])) == ("", 8)
    assert '"stage": "prefill", "done": 512, "total": 512' in (tmp_path / "run" / "events.jsonl").read_text()
    assert sum(report["load"]["kernels"].values()) == 35
    assert all(measured == predicted for measured, predicted in weights_bytes(report))


def test_facts_run_without_a_folder(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a\nb\n")
    sizes = (f"prompts_file={prompts}", "workload.batch_size=2", "workload.prompt_tokens=9")
    args = (*SHORT, PLAIN, *FACTS, DUMMY, "model.quantize=int4", *sizes)
    result = run("gpus=2", *args, folder=tmp_path / "run", env=OFFLINE)
    report = result.report
    assert result.returncode == 0, result.stderr
    assert (report["model"], report["weights"], report["quantize"]) == ("has-this", "dummy", "int4")
    assert [output["text"] for output in report["outputs"]] == ["", ""]
    assert report["outputs"][0]["token_ids"] != report["outputs"][1]["token_ids"]
    assert sum(report["load"]["kernels"].values()) == 7 * 3
    assert all(measured == predicted for measured, predicted in weights_bytes(report))


def test_facts_without_dummy_weights_are_looked_for_on_the_hub(tmp_path: Path) -> None:
    error = cli.run(*SHORT, PLAIN, *FACTS, folder=tmp_path / "run", env=OFFLINE).error
    assert "nobody/has-this is not on this machine" in error["message"]


def test_hub_name_without_facts_needs_its_config(tmp_path: Path) -> None:
    args = (*SHORT, DUMMY, "model=local", "model.path=nobody/has-this")
    assert (
        "nobody/has-this is not on this machine"
        in cli.run(*args, folder=tmp_path / "run", env=OFFLINE).error["message"]
    )


def test_checkpoint_is_rounded_on_two_ranks(tmp_path: Path) -> None:
    args = ("gpus=2", *SHORT, "model.dtype=float32")
    plain, rounded = run_together(tmp_path, args, [*args, "model.quantize=int8"])
    report = rounded.report
    assert (report["weights"], report["quantize"]) == ("checkpoint", "int8")
    assert report["outputs"][0]["token_ids"] == plain.report["outputs"][0]["token_ids"]
    assert report["load"]["bytes_read"] == plain.report["load"]["bytes_read"]
    assert "weights in int8, rounded while they load" in rounded.stderr
    assert all(measured == predicted for measured, predicted in weights_bytes(report))
    assert weights_bytes(report)[0][0] < 0.7 * weights_bytes(plain.report)[0][0]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["model.quantize=int3"], ["model.quantize", "int3", "none, int4, int8, fp8"]),
        (["model.weights=random"], ["model.weights", "random", "checkpoint, dummy"]),
        (
            [QUANTIZED, *FACTS, DUMMY, "model.quantize=int4"],
            ["model.quantize=int4", "quantised as awq already"],
        ),
        ([DUMMY, "model.path=no-such-folder"], ["model.path=no-such-folder", "no such folder"]),
    ],
)
def test_values_that_cannot_run_are_refused(tmp_path: Path, args: list[str], words: list[str]) -> None:
    message = run(*SHORT, *args, folder=tmp_path / "run").error["message"]
    assert [word for word in words if word not in message] == []
    assert not (tmp_path / "run" / "job.json").exists()


def test_quantised_checkpoint_is_not_rounded_again(tmp_path: Path) -> None:
    folder = copy_demo(tmp_path / "model", quantization_config=AWQ)
    message = run(*SHORT, f"model.path={folder}", "model.quantize=fp8", folder=tmp_path / "run").error["message"]
    assert message == (
        "model.quantize=fp8 rounds bf16, fp16 and fp32 checkpoints, and this one is quantised as awq already. "
        "Set model.quantize=none."
    )


def test_dummy_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    error = run(*SHORT, DUMMY, f"model.path={tmp_path / 'empty'}", folder=tmp_path / "run").error
    assert "config.json is missing" in error["message"]
