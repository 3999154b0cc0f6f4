"""Speculation by trees inside captured graphs: the same answers as without, and what its parts cost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from parallel.engine.speculation.token_tree import Candidates, choose_nodes, follow
from parallel.engine.speculation.tree_ngram import merge
from parallel.engine.speculation.tree_plan import TreePlan
from parallel.kernels.limits import PAGE_SIZE
from parallel.kernels.pages import allocate_pages, as_bits, move_tokens
from tests.gpu.cards import needs_two_cards
from tests.gpu.test_speculation import FP32, SAMPLED, answers
from tests.launcher.cli import run
from tests.parallel.engine.speculation.draft_models import write_truncated
from tests.parallel.small_models import DEMO

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn]


def trees(folder: Path) -> dict[str, tuple[str, ...]]:
    draft = write_truncated(DEMO, folder / "draft", 3)
    drawn = ("speculation.kind=draft", f"speculation.draft_path={draft}")
    return {
        "ngram": ("speculation.kind=ngram", "speculation.tree_size=12"),
        "small": (*drawn, "speculation.tree_size=8", "speculation.tree_depth=3", "speculation.tree_top_k=2"),
        "large": (*drawn, "speculation.tree_size=64", "speculation.tree_depth=8", "speculation.tree_top_k=8"),
        "largest": (*drawn, "speculation.tree_size=256", "speculation.tree_depth=8", "speculation.tree_top_k=12"),
        "chosen": (*drawn, "speculation.tree_size=auto", "speculation.tree_max=64"),
        "chains": ("speculation.kind=ngram", "speculation.num_drafts=auto"),
    }


@pytest.mark.parametrize("gpus", [1, pytest.param(2, marks=needs_two_cards)])
@pytest.mark.parametrize("sampling", [(), SAMPLED], ids=["greedy", "sampled"])
def test_answers_are_those_without_drafts(gpus: int, sampling: tuple[str, ...], tmp_path: Path) -> None:
    """Token for token in float32, of sequences that join and leave, in graphs of one, two and three rows."""
    args = (f"gpus={gpus}", *FP32, *sampling)
    plain, _ = answers(tmp_path / "none", *args)
    for name, tree in trees(tmp_path / "models").items():
        tokens, report = answers(tmp_path / name, *args, *tree)
        found = report["speculation"]
        costs = f"{found['draft_ms']:.2f} ms to draft, {found['verify_ms']:.2f} to check"
        print(f"{name} on {gpus}: {found['tokens_per_pass']:.2f} tokens a pass, {costs}, {found['histogram']}")
        print(*(found["choices"] or []), sep="\n")
        assert tokens == plain, name
        # Where nothing pays, nothing is tried long.
        assert found["accepted"] > 0 or found["choices"]


def test_streamed_layers_beside_a_draft_model(tmp_path: Path) -> None:
    """The same answers, of trees of all sizes and of chosen ones; what they copied."""
    plain, _ = answers(tmp_path / "none", "gpus=1", *FP32)
    streamed = ("gpus=1", *FP32, "offload.enabled=on", "offload.resident_layers=2")
    for name, tree in trees(tmp_path / "models").items():
        tokens, report = answers(tmp_path / name, *streamed, *tree)
        assert tokens == plain, name
        found = report["speculation"]
        assert len(report["offload"]["streamed_layers"]) == 3
        assert found["copy_ms"] > 0
        print(f"{name}: {found['draft_ms']:.2f} + {found['verify_ms']:.2f} ms, {found['copy_ms']:.2f} to copy")


def test_kernels_in_bf16_agree_but_for_near_ties(tmp_path: Path) -> None:
    """With the tree's own attention kernel, which float32 does not take."""
    args = ("gpus=1", "model.dtype=bfloat16", "workload.output_tokens=40", "workload.batch_size=3")
    plain, _ = answers(tmp_path / "none", *args)
    for name, tree in trees(tmp_path / "models").items():
        tokens, report = answers(tmp_path / name, *args, *tree)
        equal = sum(mine == theirs for mine, theirs in zip(tokens, plain, strict=True))
        print(f"{name} in bf16: {equal} of {len(plain)} answers equal, {report['speculation']['histogram']}")
        assert [mine[0] for mine in tokens] == [theirs[0] for theirs in plain]
        assert equal >= len(plain) // 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tokens_are_moved_on_a_card_as_on_the_cpu(dtype: torch.dtype) -> None:
    there = allocate_pages(3, 9, 2, 64, dtype, "cuda")
    for layer in there:
        for tensor in (layer.keys, layer.values):
            tensor.copy_(torch.randn(tensor.shape))
    here = allocate_pages(3, 9, 2, 64, dtype, "cpu")
    for layer, other in zip(here, there, strict=True):
        as_bits(layer.keys).copy_(as_bits(other.keys).cpu())
        as_bits(layer.values).copy_(as_bits(other.values).cpu())
    sources, targets = torch.randperm(9 * PAGE_SIZE).split(100)[:2]
    targets[:30] = sources[30:60]
    move_tokens(here, sources, targets)
    move_tokens(there, sources.cuda(), targets.cuda())
    for layer, other in zip(here, there, strict=True):
        assert torch.equal(as_bits(layer.keys), as_bits(other.keys).cpu())
        assert torch.equal(as_bits(layer.values), as_bits(other.values).cpu())


def test_trees_are_chosen_and_followed_on_a_card_as_on_the_cpu() -> None:
    plan = TreePlan(40, 5, 1)
    found = merge(torch.randint(4, (16, 16, 5)))
    drawn, newest, active = torch.randint(4, (16, 40)), torch.randint(4, (16,)), torch.ones(16, 40, dtype=torch.int64)
    here = choose_nodes(newest, found, plan)
    there = choose_nodes(newest.cuda(), Candidates(*(each.cuda() for each in vars(found).values())), plan)
    for ours, theirs in zip(vars(here).values(), vars(there).values(), strict=True):
        assert torch.equal(ours, theirs.cpu())
    path, counts = follow(here, drawn, active, plan.depth)
    card_path, card_counts = follow(there, drawn.cuda(), active.cuda(), plan.depth)
    assert torch.equal(path, card_path.cpu())
    assert torch.equal(counts, card_counts.cpu())
    assert counts.max() > 1


def write_draft_config(folder: Path) -> Path:
    """Of the size of Llama 3.2 1B, for weights that are made up."""
    LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131072,
        tie_word_embeddings=True,
    ).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("batch_size", [1, 4])
def test_what_a_step_costs(batch_size: int, tmp_path: Path) -> None:
    """Four layers of a 70B in int4, looked-up trees and those of a 1B; memory against the plan."""
    args = (
        *("task=bench", "gpus=1", "model=llama3_3_70b", "model.path=nobody/has-this", "model.shape.num_layers=4"),
        *("model.weights=dummy", "model.quantize=int4", f"workload.batch_size={batch_size}", "workload.repeats=1"),
        *("workload.output_tokens=32", "engine.max_context=2048"),
    )
    tree, drawn = "speculation.tree_size=", ("speculation.kind=draft", f"speculation.draft_path={tmp_path / 'draft'}")
    write_draft_config(tmp_path / "draft")
    cases = {
        "none": (),
        "16 looked up": ("speculation.kind=ngram", f"{tree}16"),
        "64 looked up": ("speculation.kind=ngram", f"{tree}64"),
        "64 looked up, sampled": ("speculation.kind=ngram", f"{tree}64", "sampling.temperature=0.8"),
        "chain of 4 by a 1B": drawn,
        "64 by a 1B": (*drawn, f"{tree}64"),
        "256 by a 1B": (*drawn, f"{tree}256", "speculation.tree_top_k=8"),
        "chosen, by a 1B": (*drawn, f"{tree}auto"),
    }
    for name, extra in cases.items():
        report = run(*args, *extra, folder=tmp_path / name, env={"HF_HUB_OFFLINE": "1"}).report
        assert report.get("error") is None, report["error"]
        (card,) = report["cards"]
        off = card["peak_bytes"] / card["predicted_bytes"] - 1
        found, step_ms = report["speculation"] or {}, report["decode_step_ms"]["measured"]
        parts = f"draft {found.get('draft_ms')}, verify {found.get('verify_ms')}"
        print(f"batch {batch_size}, {name}: {step_ms:.3f} ms, {parts}, memory {off:+.1%} of the plan")
        assert step_ms > 0
