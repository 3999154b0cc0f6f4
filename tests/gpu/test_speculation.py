"""Speculative decoding inside captured graphs: the same answers as without, and what a step costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.engine.speculation.ngram import look_up
from tests.gpu.cards import needs_two_cards
from tests.launcher.cli import run, texts
from tests.parallel.engine.speculation.draft_models import write_truncated
from tests.parallel.small_models import DEMO, DEMO_TEXTS

pytestmark = pytest.mark.gpu

# Where logits do not depend on the number of rows so much that a token changes.
FP32 = ("model.dtype=float32", "workload.output_tokens=40", "workload.batch_size=3")
SAMPLED = ("sampling.temperature=0.8", "sampling.top_p=0.95", "sampling.seed=3")


def speculations(folder: Path) -> dict[str, tuple[str, ...]]:
    draft = write_truncated(DEMO, folder / "draft", 2)
    return {
        "none": (),
        "ngram": ("speculation.kind=ngram", "speculation.num_drafts=6"),
        "draft": ("speculation.kind=draft", f"speculation.draft_path={draft}"),
        "same": ("speculation.kind=draft", f"speculation.draft_path={DEMO}", "speculation.num_drafts=3"),
    }


def answers(folder: Path, *args: str) -> tuple[list[list[int]], dict[str, Any]]:
    """Of seven prompts in three rows: sequences join and leave. One of them repeats itself."""
    folder.mkdir(parents=True)
    prompts = folder / "prompts.jsonl"
    lines = [*DEMO_TEXTS, DEMO_TEXTS[3] * 4, "import", DEMO_TEXTS[1]]
    prompts.write_text("\n".join(json.dumps({"prompt": text}) for text in lines))
    report = run(*args, f"prompts_file={prompts}", folder=folder / "run").report
    assert report.get("error") is None, report["error"]
    assert report["device"] == "cuda"
    found = sorted(texts(folder / "run" / "outputs.jsonl"), key=lambda line: int(line["index"]))
    return [line["token_ids"] for line in found], report


@pytest.mark.parametrize("gpus", [1, pytest.param(2, marks=needs_two_cards)])
@pytest.mark.parametrize("sampling", [(), SAMPLED], ids=["greedy", "sampled"])
def test_answers_are_those_without_drafts(gpus: int, sampling: tuple[str, ...], tmp_path: Path) -> None:
    found = {
        name: answers(tmp_path / name, f"gpus={gpus}", *FP32, *sampling, *args)
        for name, args in speculations(tmp_path / "models").items()
    }
    plain, _ = found.pop("none")
    for name, (tokens, report) in found.items():
        speculation = report["speculation"]
        print(f"{name} on {gpus}: {speculation['accepted_per_step']:.2f} a step, {speculation['histogram']}")
        assert tokens == plain, name
    same = found["same"][1]["speculation"]
    assert same["accepted"] == same["drafted"] > 0
    assert found["ngram"][1]["speculation"]["accepted"] > 0


def test_kernels_in_bf16_agree_but_for_near_ties(tmp_path: Path) -> None:
    """Kernels of other numbers of rows round otherwise, so that answers may part; most tokens are the same."""
    args = ("gpus=1", "model.dtype=bfloat16", "workload.output_tokens=40", "workload.batch_size=3")
    kinds = speculations(tmp_path / "models")
    plain, _ = answers(tmp_path / "none", *args)
    for name in ("ngram", "same"):
        tokens, report = answers(tmp_path / name, *args, *kinds[name])
        equal = sum(mine == theirs for mine, theirs in zip(tokens, plain, strict=True))
        print(f"{name} in bf16: {equal} of {len(plain)} answers equal, {report['speculation']['histogram']}")
        assert [mine[0] for mine in tokens] == [theirs[0] for theirs in plain]
        assert equal >= len(plain) // 2
    assert report["speculation"]["accepted"] > 0.9 * report["speculation"]["drafted"]


def test_look_up_on_a_card_is_that_of_the_cpu() -> None:
    history = torch.randint(5, (16, 4097), dtype=torch.int32)
    newest = torch.randint(4096, (16,))
    newest[0] = 0
    found = look_up(history.cuda(), newest.cuda(), 6, 3, 2)
    assert torch.equal(found.cpu(), look_up(history, newest, 6, 3, 2))


@pytest.mark.parametrize("batch_size", [1, 4])
def test_what_a_step_costs(batch_size: int, tmp_path: Path) -> None:
    """Four layers of a 70B, int4, of random weights: the step by itself, without drafts and with them."""
    args = (
        *("task=bench", "gpus=1", "model=llama3_3_70b", "model.path=nobody/has-this", "model.shape.num_layers=4"),
        *("model.weights=dummy", "model.quantize=int4", f"workload.batch_size={batch_size}", "workload.repeats=1"),
        *("workload.output_tokens=32", "engine.max_context=2048"),
    )
    steps = {}
    for num_drafts in (0, 4, 7):
        extra = ("speculation.kind=ngram", f"speculation.num_drafts={num_drafts}") if num_drafts else ()
        report = run(*args, *extra, folder=tmp_path / str(num_drafts), env={"HF_HUB_OFFLINE": "1"}).report
        assert report.get("error") is None, report["error"]
        steps[num_drafts] = report["decode_step_ms"]["measured"]
        parts = report["breakdown"]["parts"]
        print(f"batch {batch_size}, {num_drafts} drafts: {steps[num_drafts]:.3f} ms,", parts and {
            name: round(part["us"]) for name, part in parts.items()
        })  # fmt: skip
    assert min(steps.values()) > 0
