"""What cannot run is refused with the value, the rule and the knob: one sentence, one line of JSON, exit code 1."""

from __future__ import annotations

import json
import re
import resource
import struct
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from parallel.checkpoint.headers import LENGTH_BYTES
from tests.launcher import cli
from tests.launcher.cli import SHORT, TORCHRUN, Result, torchrun
from tests.launcher.demo_model import WEIGHTS, change_weights, copy_demo
from tests.launcher.forked import ForkedProcess, run, started

GIB = 2**30

# Refused before a rank starts


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["gpsu=2", "topology=ring", "workload.batch_size=two"], ["gpsu", "topology/ring", "dual_pcie", "'two'"]),
        (["gpus=5", "sampling.top_p=2", "workload.output_tokens=0"], ["gpus=5", "top_p=2.0", "output_tokens=0"]),
        (["gpus=3", "topology=dual_pcie"], ["gpus=3", "topology=dual_pcie means 2", "Set gpus=2 or topology=triple"]),
        (["gpus=2", "topology=dual_nvlink"], ["dual_nvlink needs two cards with NVLink", "topology=dual_pcie"]),
        (["hardware=rtx4090"], ["hardware=NVIDIA GeForce RTX 4090 describes cards", "hardware=local", "task=plan"]),
        (["model=local"], ["model.path has no value", "model.path=VALUE"]),
        (["model.path=no-such-folder"], ["model.path=no-such-folder", "no such folder", "hub name"]),
        (["prompts_file=p.csv"], ["prompts_file=p.csv", ".txt or .jsonl"]),
        # Before a model is looked for: it may have to be downloaded.
        (["prompts_file=p.csv", "model.path=no-such-folder"], ["prompts_file=p.csv", ".txt or .jsonl"]),
        (["workload.batchsize=2"], ["workload.batchsize", "Keys there: prompt_tokens, output_tokens, batch_size,"]),
        (["engine.max_context=5000"], ["engine.max_context=5000", "limit of 1024 positions", "Lower it"]),
        (["workload.prompt_tokens=2000"], ["= 2008 exceeds", "1024 positions", "Lower workload.output_tokens"]),
        (["model.dtype=float16"], ["float16", "model.dtype=float32"]),
        (["hydra.run.dir=/dev/null/x"], ["/dev/null/x"]),
    ],
)
def test_setting_that_cannot_run_is_refused(tmp_path: Path, args: list[str], words: list[str]) -> None:
    error = run(*SHORT, *args, folder=tmp_path / "run").error
    assert [word for word in words if word not in error["message"]] == []
    assert not (tmp_path / "run" / "job.json").exists()


@pytest.mark.parametrize("override", ["prompt=def f(x):", "prompt=f(x)=3", "gpus=3x="])
def test_value_that_hydra_cannot_read_gets_a_hint(tmp_path: Path, override: str) -> None:
    assert "Quote a value with special characters" in run(override, folder=tmp_path / "run").error["hint"]


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("gpus=1,2", "Several values, one a run, need -m"),
        ("prompt=Hello, world", "quote a text with commas twice"),
        ("model=org/name", "Any other checkpoint: model=local model.path=FOLDER"),
    ],
)
def test_value_that_is_taken_for_something_else_gets_a_hint(tmp_path: Path, override: str, hint: str) -> None:
    assert hint in run(override, folder=tmp_path / "run").error["hint"]


def test_folder_that_cannot_be_written_gets_a_hint(tmp_path: Path) -> None:
    error = run(*SHORT, "hydra.run.dir=/dev/null/x", folder=tmp_path / "run").error
    assert (error["type"], error["hint"]) == (
        "NotADirectoryError",
        "Choose a folder that can be written: hydra.run.dir=FOLDER, of a sweep hydra.sweep.dir=FOLDER.",
    )


def test_cards_described_by_facts_do_not_run_but_plan(tmp_path: Path) -> None:
    result = run("task=plan", "hardware=rtx4090", "gpus=2", "model=llama3_3_70b_awq", folder=tmp_path / "run")
    assert result.returncode == 0
    assert result.report["predicted"]["cards"][0]["name"] == "NVIDIA GeForce RTX 4090"
    refused = run("task=plan", "hardware=rtx4090", "gpus=2", "model=llama3_3_70b", folder=tmp_path / "refused")
    assert "weights in bfloat16 do not fit" in refused.error["message"]


def test_hub_model_without_a_network_names_the_variable(tmp_path: Path) -> None:
    env = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    error = cli.run(*SHORT, "model=llama3_1_8b", folder=tmp_path / "run", env=env).error
    assert "HF_HUB_OFFLINE forbids a download" in error["message"]
    assert "model.path=FOLDER" in error["message"]


# Models


def only_pickles(folder: Path) -> None:
    copy_demo(folder)
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def truncated(folder: Path) -> None:
    change_weights(copy_demo(folder), lambda weights: weights.__delitem__(slice(-1000, None)))


def without_a_shard(folder: Path) -> None:
    copy_demo(folder)
    (folder / WEIGHTS).rename(folder / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


def changed(**config: Any) -> Callable[[Path], object]:
    return lambda folder: copy_demo(folder, **config)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (only_pickles, ["pickled weights (pytorch_model.bin)", "run code", "save_pretrained"]),
        (truncated, [WEIGHTS, "is truncated", "Download it again"]),
        (without_a_shard, ["model-00002-of-00002.safetensors", "missing", "Download them again"]),
        (changed(model_type="gpt2"), ["config.json: model_type='gpt2'", "supported: llama, mistral, qwen2, qwen3"]),
        (changed(num_key_value_heads=2), ["the model has 2 KV heads", "over 4 ranks", "gpus=2"]),
        (
            changed(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
            ["quantised as bitsandbytes", "supported: ", "model.path", "task=plan"],
        ),
        (Path.mkdir, ["no *.safetensors file", "Set model.path"]),
    ],
    ids=["pickles", "truncated", "missing shard", "architecture", "heads", "quantised", "empty"],
)
def test_model_that_cannot_run_is_refused(tmp_path: Path, make: Callable[[Path], object], words: list[str]) -> None:
    make(tmp_path / "model")
    error = run(*SHORT, "gpus=4", f"model.path={tmp_path / 'model'}", folder=tmp_path / "run").error
    assert [word for word in words if word not in error["message"]] == []
    assert str(tmp_path / "model") in error["message"] or "gpus=2" in words or "task=plan" in words
    assert not (tmp_path / "run" / "job.json").exists()


# Refused by a rank


def element_offset(weights: bytes | bytearray, name: str, row: int) -> int:
    """Where in a safetensors file of bf16 the first value of a tensor's row is."""
    (header_bytes,) = struct.unpack("<Q", weights[:LENGTH_BYTES])
    entry = json.loads(weights[LENGTH_BYTES : LENGTH_BYTES + header_bytes])[name]
    return int(LENGTH_BYTES + header_bytes + entry["data_offsets"][0] + row * entry["shape"][1] * 2)


def put_nan(weights: bytearray) -> None:
    """Into the last row of the head, which rank 1 of two holds."""
    start = element_offset(weights, "lm_head.weight", 4095)
    weights[start : start + 2] = b"\xc0\x7f"


def make_huge(folder: Path) -> Path:
    """4 GiB of zeros in one tensor that take no space on the disk; tied, so that it is the only large one."""
    copy_demo(folder, vocab_size=8 * 2**20, tie_word_embeddings=True)
    weights = (folder / WEIGHTS).read_bytes()
    (header_bytes,) = struct.unpack("<Q", weights[:LENGTH_BYTES])
    header = json.loads(weights[LENGTH_BYTES : LENGTH_BYTES + header_bytes])
    del header["lm_head.weight"]
    header["model.embed_tokens.weight"]["shape"][0] = 8 * 2**20
    end = 0
    for name, entry in header.items():
        if name != "__metadata__":
            rows, columns = (*entry["shape"], 1)[:2]
            entry["data_offsets"] = [end, end := end + rows * columns * 2]
    text = json.dumps(header).encode()
    (folder / WEIGHTS).unlink()
    with (folder / WEIGHTS).open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(LENGTH_BYTES + len(text) + end)
    return folder


def limit_memory() -> None:
    """Less than the huge tensor, enough for everything else. Counts what a process may write, not what it maps."""
    resource.setrlimit(resource.RLIMIT_DATA, (3 * GIB, 3 * GIB))


ROOMY = pytest.mark.skipif(psutil.virtual_memory().total < 8 * GIB, reason="the plan itself would refuse the model")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bad")


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Result]:
    """Runs that a rank refuses, all at the same time."""
    broken = change_weights(copy_demo(folder / "broken"), put_nan)
    (folder / "p.txt").write_text("import os\n")
    (folder / "chat.jsonl").write_text('{"prompt": "a"}\n\n{"messages": [{"role": "user", "content": "hi"}]}\n')
    (folder / "long.jsonl").write_text("\n".join(json.dumps({"prompt": "x " * n}) + "\n" for n in (1, 500, 2, 600)))
    (folder / "longest.jsonl").write_text(json.dumps({"prompt": "x " * 3000}))
    options: dict[str, dict[str, Any]] = {
        "long": {"args": [f"prompts_file={folder / 'long.jsonl'}", "engine.max_context=64"]},
        "longest": {"args": [f"prompts_file={folder / 'longest.jsonl'}"]},
        "chat": {"args": [f"prompts_file={folder / 'chat.jsonl'}"]},
        "disk": {"args": [f"prompts_file={folder / 'p.txt'}", "output_file=/dev/full"]},
        "nan": {"args": [f"model.path={broken}", "gpus=2"]},
        "nan-torchrun-of-two": {"args": [f"model.path={broken}", "gpus=2"], "launcher": torchrun(2)},
        "world size": {"args": ["gpus=3"], "launcher": torchrun(2)},
        "sweep": {"args": ["-m", "gpus=1,2"], "launcher": torchrun(2), "sweep": True},
    }
    if not ROOMY.args[0]:
        huge = make_huge(folder / "huge")
        options["memory"] = {"args": [f"model.path={huge}"], "launcher": partial(ForkedProcess, before=limit_memory)}
    with ExitStack() as stack:
        running = {}
        for name, option in options.items():
            args = option.pop("args")
            running[name] = stack.enter_context(started(*args, *SHORT, folder=folder / name, **option))
        return {name: each.finish() for name, each in running.items()}


def test_all_prompts_longer_than_the_cache_are_named_before_the_model_is_loaded(
    results: dict[str, Result], folder: Path
) -> None:
    message = results["long"].error["message"]
    where = re.escape(f"prompts_file={folder / 'long.jsonl'}, ")
    assert re.match(rf"{where}line 3 has \d{{3,4}} tokens, line 7 has \d{{3,4}} tokens; ", message)
    assert "engine.max_context=64. Raise engine.max_context or shorten the prompts." in message
    assert "loading weights" not in (folder / "long" / "events.jsonl").read_text()
    assert not (folder / "long" / "outputs.jsonl").exists()


def test_prompt_beyond_the_model_is_not_told_to_raise_the_context(results: dict[str, Result]) -> None:
    message = results["longest"].error["message"]
    assert message.endswith("must fit the model's limit of 1024 positions. Shorten the prompts.")


def test_messages_for_a_model_without_a_template_are_refused(results: dict[str, Result]) -> None:
    assert "chat.jsonl, line 3 is chat messages, but the model has no chat" in results["chat"].error["message"]


def test_full_disk_is_named_with_what_to_do(results: dict[str, Result]) -> None:
    error = results["disk"].error
    assert "No space left on device: '/dev/full'" in error["message"]
    assert "output_file=FILE" in error["hint"] and error["hint"] in results["disk"].stderr


@pytest.mark.parametrize("way", ["nan", "nan-torchrun-of-two"])
def test_nan_is_named_with_tensor_file_and_the_rank_that_read_it(
    results: dict[str, Result], folder: Path, way: str
) -> None:
    error = results[way].error
    assert f"lm_head.weight in {folder / 'broken' / WEIGHTS} holds NaN or infinity" in error["message"]
    assert (error["type"], error["rank"]) == ("CheckpointError", 1)
    assert error["log"] == str(folder / way / "logs" / "rank1.log")
    assert "lm_head.weight" in Path(error["log"]).read_text()


@ROOMY
def test_no_memory_at_load_says_what_takes_less(results: dict[str, Result]) -> None:
    error = results["memory"].error
    assert "allocate memory" in error["message"]
    assert "gpus" in error["hint"] and "workload.batch_size" in error["hint"]


def test_world_size_that_contradicts_gpus_names_both_and_both_ways_to_start(results: dict[str, Result]) -> None:
    message = results["world size"].error["message"]
    assert "WORLD_SIZE=2 ranks were started, but 3 are asked for" in message
    assert "`torchrun -m launcher gpus=3`" in message
    assert "`torchrun --nproc-per-node 3 -m launcher gpus=3`" in message
    assert len(results["world size"].reports) == 1


def test_sweep_in_several_processes_is_refused_for_each_job(results: dict[str, Result]) -> None:
    errors = [report["error"]["message"] for report in results["sweep"].reports]
    assert len(errors) == 2
    assert all("use `torchrun -m launcher -m ...`, one process" in message for message in errors)


@pytest.mark.parametrize("launcher", [TORCHRUN, None], ids=["torchrun", "python"])
def test_world_size_without_torchrun_is_refused(tmp_path: Path, launcher: tuple[str, ...] | None) -> None:
    """Torchrun sets its own, so that a leftover in the environment does no harm there."""
    env = {"WORLD_SIZE": "2", "RANK": "1"}
    if launcher is None:
        error = cli.run(*SHORT, "gpus=2", folder=tmp_path / "run", env=env).error
        assert "WORLD_SIZE=2 is set, but torchrun did not start this process" in error["message"]
    else:
        result = cli.run(*SHORT, "task=plan", "gpus=2", folder=tmp_path / "run", env=env, launcher=launcher)
        assert result.returncode == 0
