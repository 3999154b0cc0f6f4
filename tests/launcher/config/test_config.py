"""What a user can set: every file under conf/, every rule, and errors that come all at once."""

from __future__ import annotations

from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import OmegaConf

import conf
from launcher.config import ConfigError, HardwareKind, ModelConfig, RunConfig, TaskKind, to_run_config
from launcher.override_errors import explain_composition

FOLDER = Path(conf.__file__).parent
FILES = sorted(path.relative_to(FOLDER) for path in FOLDER.glob("*/**/*.yaml") if path.parts[-3] != "hydra")
# Not a section of the config by itself: models take it as their shape.
PLACES = {"model_shape": "model.shape"}


def composed(*overrides: str) -> RunConfig:
    ConfigStore.instance().store(group="schema", name="run", node=RunConfig)
    with initialize_config_module("conf", version_base="1.3"):
        return to_run_config(compose("config", overrides=list(overrides)))


def refused(*overrides: str) -> str:
    """What a user reads who types these overrides, which Hydra cannot compose."""
    with pytest.raises(HydraException) as caught:
        composed(*overrides)
    return explain_composition(caught.value, overrides)


def plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value


# Files


@pytest.mark.parametrize("file", FILES, ids=str)
def test_every_option_composes_and_its_values_arrive(file: Path) -> None:
    group, option = str(file.parent), file.stem
    place = PLACES.get(group, group)
    choice = f"+{group}@{place}={option}" if group in PLACES else f"{group}={option}"
    values = OmegaConf.load(FOLDER / file)
    path = ["model.path=org/name"] if OmegaConf.is_missing(values, "path") else []
    section = composed("task=plan", choice, *path)
    for name in place.split("."):
        section = getattr(section, name)
    scalars = {name: value for name, value in values.items_ex(resolve=False) if not OmegaConf.is_config(value)}
    expected = {name: value for name, value in scalars.items() if value != "???"}
    assert {name: plain(getattr(section, name)) for name in expected} == expected


def test_there_are_files_to_compose() -> None:
    assert len(FILES) > 30


def test_defaults_are_the_demo_model_on_this_machine() -> None:
    run = composed()
    assert (run.gpus, run.task.kind, run.hardware.kind) == (None, TaskKind.generate, HardwareKind.local)
    assert run.model == ModelConfig(path="pkg://launcher/models/demo")
    assert run.model.name == "demo"


# Rules


@pytest.mark.parametrize("task", ["bench", "probe"])
def test_key_of_another_task_gets_no_advice_that_would_be_refused(task: str) -> None:
    with pytest.raises(ConfigError) as caught:
        composed(f"task={task}", "resume=true")
    assert "needs" not in str(caught.value)


def test_plan_may_be_of_a_run_with_files_or_of_a_bench() -> None:
    composed("task=plan", "prompts_file=a.txt", "output_file=b", "resume=true", "workload.repeats=5")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["gpus=0"], "gpus=0 must be from 1 to 4"),
        (["gpus=5"], "gpus=5 must be from 1 to 4"),
        (["model.path=' '"], "model.path is empty"),
        (["workload.output_tokens=0"], "workload.output_tokens=0 must be at least 1"),
        (["workload.prompt_tokens=0"], "workload.prompt_tokens=0 must be at least 1"),
        (["workload.batch_size=-1"], "workload.batch_size=-1 must be at least 1"),
        (["task=bench", "workload.num_requests=0"], "workload.num_requests=0 must be at least 1"),
        (["task=bench", "workload.repeats=0"], "workload.repeats=0 must be at least 1"),
        (["task=bench", "workload.warm_up=-1"], "workload.warm_up=-1 must be 0 (none) or above"),
        (["task=bench", "workload.arrival_rate=0"], "workload.arrival_rate=0.0 must be above 0 requests a second"),
        (["task=bench", "workload.arrival_rate=inf"], "workload.arrival_rate=inf must be above 0"),
        (["task=bench", "prompts_file=a.txt"], "prompts_file is read by task=generate only, not by task=bench"),
        (["task=bench", "output_file=a"], "output_file is read by task=generate only, not by task=bench"),
        (["task=probe", "resume=true"], "resume is read by task=generate only, not by task=probe"),
        (["task=bench", "engine.max_context=639"], "= 640 exceeds engine.max_context=639"),
        (["workload.repeats=2"], "workload.repeats is read by task=bench only, not by task=generate"),
        (["task=probe", "workload.arrival_rate=2"], "workload.arrival_rate is read by task=bench only"),
        (["task=plan", "bench.baselines=[vllm]"], "bench.baselines is read by task=bench only, not by task=plan"),
        (["limits.card_memory_gib=0"], "limits.card_memory_gib=0.0 must be above 0"),
        (["limits.card_memory_gib=nan"], "limits.card_memory_gib=nan must be above 0"),
        (["limits.card_memory_gib=inf"], "limits.card_memory_gib=inf must be above 0 and at most 1,048,576"),
        (["limits.host_memory_gib=1e300"], "limits.host_memory_gib=1e+300 must be above 0 and at most 1,048,576"),
        (["task=plan", "hardware.memory_gib=nan"], "hardware.memory_gib=nan must be from 0.001 to 1,000,000,000, or 0"),
        (["task=plan", "hardware.bf16_tflops=-1"], "hardware.bf16_tflops=-1.0 must be from 0.001"),
        (["task=plan", "hardware.bf16_tflops=1e-300"], "hardware.bf16_tflops=1e-300 must be from 0.001"),
        (["task=plan", "hardware.memory_gib=inf"], "hardware.memory_gib=inf must be from 0.001 to 1,000,000,000, or 0"),
        (["task=plan", "hardware.pcie_lanes=-1"], "hardware.pcie_lanes=-1 must be from 0.001"),
        (["task=plan", "hardware.pcie_generation=9"], "hardware.pcie_generation=9 must be one of 3, 4, 5, or 0"),
        (["sampling.temperature=-0.5"], "sampling.temperature=-0.5 must be 0 (greedy) or above"),
        (["sampling.temperature=nan"], "sampling.temperature=nan must be"),
        (["sampling.temperature=inf"], "sampling.temperature=inf must be"),
        (["sampling.top_p=0"], "sampling.top_p=0.0 must be above 0 and at most 1"),
        (["sampling.top_p=1.5"], "sampling.top_p=1.5 must be above 0 and at most 1"),
        (["sampling.top_k=-1"], "sampling.top_k=-1 must be 0 (all tokens) or above"),
        (["sampling.seed=-1"], "sampling.seed=-1 must be from 0 to 4294967295"),
        (["sampling.seed=4294967296"], "sampling.seed=4294967296 must be from 0 to 4294967295"),
        (["sampling.stop=['']"], "sampling.stop holds an empty text"),
        (["engine.max_context=1"], "engine.max_context=1 must be at least 2"),
        (["engine.prefill_chunk=0"], "engine.prefill_chunk=0 must be at least 1"),
        (["engine.prefill_chunk_while_decoding=0"], "engine.prefill_chunk_while_decoding=0 must be at least 1"),
        (["engine.prefill_chunk_while_decoding=few"], "while_decoding=few must be at least 1, or auto"),
        (["task=bench", "workload.max_ttft_ms=0"], "workload.max_ttft_ms=0.0 must be above 0 milliseconds"),
        (["task=bench", "workload.max_tpot_ms=inf"], "workload.max_tpot_ms=inf must be above 0 milliseconds"),
        (["workload.max_tpot_ms=9"], "workload.max_tpot_ms is read by task=bench only"),
        (["engine.comm_share_steps=-1"], "engine.comm_share_steps=-1 must be 0 (do not measure) or above"),
        (["engine.all_reduce_bits=4"], "engine.all_reduce_bits=4 must be 16 (exact) or 8"),
        (["engine.all_reduce_bits=8", "engine.transport=nccl"], "engine.all_reduce_bits=8 goes through host memory"),
        (["engine.all_reduce_bits=8", "task=probe"], "engine.all_reduce_bits=8 is not for task=probe"),
        (["engine.fused_prefill_rows=512", "task=calibrate"], "engine.fused_prefill_rows is not for task=calibrate"),
        (["speculation.kind=ngram", "task=predictions"], "speculation.kind=ngram is not for task=predictions"),
        (["engine.fused_prefill_rows=100"], "engine.fused_prefill_rows=100 must be at least 256"),
        (["probe.min_bytes=3"], "probe.min_bytes=3 must be from 4 to probe.max_bytes"),
        (["probe.min_bytes=8", "probe.max_bytes=4"], "probe.min_bytes=8 must be from 4 to probe.max_bytes=4"),
        (["probe.repeats=0"], "probe.repeats=0 must be at least 1"),
        (["timeouts.selftest_sec=0"], "timeouts.selftest_sec=0.0 must be above 0"),
        (["timeouts.collective_sec=-1"], "timeouts.collective_sec=-1.0 must be above 0"),
        (["timeouts.collective_sec=inf"], "timeouts.collective_sec=inf must be above 0 and at most 31,536,000"),
        (["timeouts.selftest_sec=nan"], "timeouts.selftest_sec=nan must be above 0"),
        (["resume=true", "output_file=a"], "resume=true needs prompts_file"),
        (["resume=true", "prompts_file=a"], "resume=true needs output_file"),
        (["output_file=a"], "output_file=a is for the answers to prompts_file"),
        (
            ["hardware=rtx4090"],
            "describes cards for planning, but task=generate runs. Use hardware=local, or task=plan",
        ),
        (["engine.max_context=100"], "= 129 exceeds engine.max_context=100"),
        (["model=local"], "model.path has no value"),
        (["+gpsu=2"], "gpsu is unknown"),
        (["++workload.batchsize=2"], "workload.batchsize is unknown"),
    ],
)
def test_broken_rule_names_value_and_knob(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        composed(*overrides)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "override",
    [
        "gpus=4",
        "workload.output_tokens=1",
        "limits.card_memory_gib=0.5",
        "sampling.temperature=0",
        "sampling.top_p=1",
        "sampling.seed=4294967295",
        "sampling.stop=[a,b]",
        "engine.max_context=129",
        "engine.comm_share_steps=0",
        "task=bench workload.warm_up=0 workload.repeats=1 workload.num_requests=1 workload.arrival_rate=0.01",
        "task=bench engine.max_context=640",
        "task=plan workload=serving",
        "engine.prefill_chunk_while_decoding=auto",
        "task=bench engine.prefill_chunk_while_decoding=64 workload.max_ttft_ms=500",
    ],
)
def test_value_on_the_edge_of_a_rule_is_accepted(override: str) -> None:
    composed(*override.split())


def test_all_broken_rules_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        composed("gpus=9", "workload.batch_size=0", "sampling.top_p=2", "timeouts.selftest_sec=-1", "resume=true")
    lines = str(caught.value).splitlines()
    knobs = ("gpus=9", "workload.batch_size=0", "sampling.top_p=2.0", "timeouts.selftest_sec=-1.0")
    assert all(any(line.startswith(knob) for line in lines) for knob in knobs)
    assert len(lines) == 6


def test_config_without_schema_is_refused() -> None:
    with pytest.raises(ConfigError, match="no schema"):
        to_run_config(OmegaConf.create({"gpus": 2}))


# What Hydra cannot compose


def test_all_override_errors_are_told_at_once() -> None:
    lines = refused("gpsu=2", "model=nope", "workload.batch_size=abc", "topology=star", "gpus=1").splitlines()
    assert len(lines) == 4
    found = {
        word: next(line for line in lines if word in line)
        for word in ("gpsu", "model/nope", "workload.batch_size=abc", "topology/star")
    }
    assert "not in 'RunConfig'" in found["gpsu"]
    assert "'abc' of type 'str' could not be converted to Integer" in found["workload.batch_size=abc"]
    assert all(option in found["model/nope"] for option in ("demo", "llama3_3_70b_awq", "local"))
    assert all(option in found["topology/star"] for option in ("auto", "single", "dual_nvlink", "triple"))


@pytest.mark.parametrize(
    "override", ["gpsu=2", "workload.batchsize=2", "model.shape.num_layer=2", "hardware.kind=tpu", "gpus=two"]
)
def test_misspelt_key_or_value_is_refused_and_named(override: str) -> None:
    message = refused("model=llama3_1_8b", override)
    name = override.partition("=")[0]
    assert name.split(".")[-1] in message
    assert len(message.splitlines()) == 1


def test_override_that_needs_another_one_is_not_accused() -> None:
    """model.shape is there only with a model that has one, so the override fails when it is tried alone."""
    message = refused("model=llama3_3_70b", "model.shape.num_layers=2", "gpsu=2")
    assert "gpsu" in message
    assert "num_layers" not in message


def test_flags_and_sweeps_are_not_taken_for_bad_overrides() -> None:
    with pytest.raises(HydraException) as caught:
        composed("gpsu=2")
    explained = explain_composition(caught.value, ["-m", "--multirun", "gpsu=2", "gpus=1,2", "hydra.run.dir=x"])
    keys = ", ".join(field.name for field in fields(RunConfig))
    assert explained == f"Could not override 'gpsu'. (Key 'gpsu' not in 'RunConfig') Keys there: {keys}."
