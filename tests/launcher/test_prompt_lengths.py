"""How long prompts are, as plans of streamed runs want to know it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.config import EngineConfig, TaskConfig, TaskKind, WorkloadConfig
from launcher.hardware.inventory import read_inventory
from launcher.job import Job
from launcher.models.shape import shape_from_config
from launcher.plan.plan import plan_run
from launcher.plan.timed import plan_timed
from launcher.plan.topology import place_ranks
from launcher.prompt_lengths import answered_times, longest_prompt, wants_lengths
from launcher.prompts import Prompt
from launcher.timing.predict import Times
from tests.launcher.cli import SHORT
from tests.launcher.demo_model import DEMO
from tests.launcher.forked import run
from tests.launcher.jobs import make_job, make_run
from tests.launcher.plan.test_timed import FACTS
from tests.launcher.plans import LLAMA_8B, LLAMA_70B_AWQ, cards_of, plan, run_of

TEXTS = ("def main():", "x", "for each in range(10):\n    print(each)")

EXACT_AND_ROOMY = {"exact": (), "roomy": ("engine.max_context=500",)}


def demo_job(folder: Path, *texts: str, output_tokens: int = 8) -> Job:
    job = make_job(folder, run=make_run(workload=WorkloadConfig(output_tokens=output_tokens)))
    prompts = tuple(Prompt(index, text) for index, text in enumerate(texts))
    plan: Any = SimpleNamespace(max_context=1024)
    return replace(job, plan=plan, shape=shape_from_config(DEMO), model_folder=str(DEMO), prompts=prompts)


def test_longest_prompt_is_as_long_as_ranks_will_find_it(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokens = [len(ids) for ids in AutoTokenizer.from_pretrained(DEMO)(list(TEXTS))["input_ids"]]
    assert longest_prompt(demo_job(tmp_path, *TEXTS)) == max(tokens) > min(tokens)


def test_prompt_that_leaves_the_model_no_full_answer_gets_all_that_it_takes(tmp_path: Path) -> None:
    """The model has 1,024 positions: of a prompt of about 1,020 the answer ends early, of a longer one ranks tell."""
    assert longest_prompt(demo_job(tmp_path, "x " * 5000)) == 1024 - 8
    assert longest_prompt(demo_job(tmp_path, "x", output_tokens=2000)) == 1


@pytest.mark.parametrize(
    ("changes", "num_prompts", "expected"),
    [
        ({}, 1, True),
        ({}, 0, False),
        ({"engine": EngineConfig(max_context=600)}, 1, False),
        ({"task": TaskConfig(TaskKind.bench)}, 1, False),
    ],
    ids=["open", "all answered", "context set", "prompts of a known length"],
)
def test_lengths_matter_where_layers_make_room_for_them(
    tmp_path: Path, changes: dict[str, Any], num_prompts: int, expected: bool
) -> None:
    job = replace(make_job(tmp_path, run=replace(make_run(), **changes)), prompts=(Prompt(0, "x"),) * num_prompts)
    assert wants_lengths(job, plan(LLAMA_70B_AWQ, cards_of(1))) is expected
    assert not wants_lengths(job, plan(LLAMA_70B_AWQ, cards_of(2), 2))


def test_times_of_answers_are_of_prompts_and_answers_as_long_as_they_were(tmp_path: Path) -> None:
    """On average, and of no more rows than there were prompts."""
    inventory = read_inventory(FACTS, 2)
    run = run_of(hardware=FACTS, workload__batch_size=4, workload__prompt_tokens=512)
    placement = place_ranks(run, 2, inventory)
    job = replace(make_job(tmp_path), run=run, placement=placement, shape=LLAMA_8B)
    job = replace(job, plan=plan_run(run, placement, LLAMA_8B, inventory))
    uneven = [(100, 8), (300, 128)]
    for lengths, rows in ((uneven, 2), ([(200, 68)] * 4, 4), (uneven * 4, 4)):
        of_mean = run_of(hardware=FACTS, workload=WorkloadConfig(prompt_tokens=200, output_tokens=68, batch_size=rows))
        times = answered_times(job, inventory, lengths)
        assert isinstance(times, Times) and times == plan_timed(of_mean, placement, LLAMA_8B, inventory)[1]


def test_streamed_run_makes_room_for_its_prompts_alone(tmp_path: Path) -> None:
    """And answers as one with room for more; workload.prompt_tokens is what a plan counts with, not what is there."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "def main():"}\n{"prompt": "x = [1, 2, 3, 4, 5, 6, 7, 8]"}\n')
    args = ("hardware=cpu", *SHORT, f"prompts_file={prompts}", "offload.resident_layers=2", "workload.prompt_tokens=2")
    exact, roomy = (run(*args, *more, folder=tmp_path / name) for name, more in EXACT_AND_ROOMY.items())
    texts = [output["prompt"] for output in exact.report["outputs"]]
    longest = longest_prompt(demo_job(tmp_path, *texts))
    assert exact.report["max_context"] == longest + exact.report["config"]["workload"]["output_tokens"]
    assert longest > 2 == exact.report["config"]["workload"]["prompt_tokens"]
    assert roomy.report["max_context"] == 500
    assert exact.report["outputs"] == roomy.report["outputs"]


def test_prompts_that_cannot_be_used_are_refused_before_ranks_start(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"messages": [{"role": "user", "content": "x"}]}\n')
    refused = run("hardware=cpu", f"prompts_file={prompts}", "offload.resident_layers=2", folder=tmp_path)
    assert refused.returncode == 1 and "the model has no chat template" in refused.report["error"]["message"]
    assert not list(tmp_path.rglob("rank0.log"))
