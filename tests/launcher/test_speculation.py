"""Speculative decoding through the command line: the same answers, the report, what the plan counts, and refusals."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.config import ConfigError, QuantizeKind, RunConfig, SpeculationConfig, SpeculationKind
from launcher.memory.activations import NUM_GAPS, SAMPLING_BYTES_PER_LOGIT
from launcher.memory.demand import TOKEN_BYTES
from launcher.models.draft import read_vocabulary
from launcher.models.shape import DTYPE_BYTES
from launcher.plan.plan import Plan, plan_run
from launcher.plan.topology import place_ranks
from parallel.kernels.limits import PAGE_SIZE
from tests.launcher.demo_model import change_json, copy_demo
from tests.launcher.forked import run, run_together
from tests.launcher.plans import LLAMA_8B, LLAMA_70B, cards_of, run_of
from tests.parallel.engine.speculation.draft_models import write_truncated
from tests.parallel.small_models import DEMO

SHORT = ("hardware=cpu", "workload.output_tokens=12", "engine.comm_share_steps=1")
NGRAM = SpeculationConfig(SpeculationKind.ngram, num_drafts=7)
DRAFT = SpeculationConfig(SpeculationKind.draft, draft_path="org/small")


def tree_of(size: int, depth: int, top_k: int) -> SpeculationConfig:
    return SpeculationConfig(
        SpeculationKind.draft, draft_path="org/small", tree_size=size, tree_depth=depth, tree_top_k=top_k
    )


def test_answers_stay_and_the_report_counts_drafts(tmp_path: Path) -> None:
    draft = write_truncated(DEMO, tmp_path / "draft", 2)
    plain, looked_up, drawn, tree, auto = run_together(
        tmp_path,
        ("gpus=2", *SHORT),
        ("gpus=2", *SHORT, "speculation.kind=ngram", "speculation.num_drafts=2"),
        ("gpus=2", *SHORT, "speculation.kind=draft", f"speculation.draft_path={draft}"),
        (
            *(
                "gpus=2",
                *SHORT,
                "speculation.kind=draft",
                f"speculation.draft_path={draft}",
                "speculation.tree_size=12",
            ),
            "speculation.draft_quantize=int8",
        ),
        (
            *("gpus=2", *SHORT, "speculation.kind=draft", f"speculation.draft_path={draft}"),
            *("speculation.tree_size=auto", "speculation.tree_max=16"),
        ),
    )
    assert plain.report["speculation"] is None
    for result, kind, num_drafts, most in (
        (looked_up, "ngram", 2, 2),
        (drawn, "draft", 4, 4),
        (tree, "draft", 6, 11),
        (auto, "draft", 8, 15),
    ):
        report = result.report
        assert report["outputs"] == plain.report["outputs"]
        assert 0 < report["tpot_ms"]["p50"] <= report["tpot_ms"]["p99"]
        found = report["speculation"]
        assert (found["kind"], found["num_drafts"], len(found["histogram"])) == (kind, num_drafts, num_drafts + 1)
        steps = sum(found["histogram"])
        assert found["accepted"] == sum(i * count for i, count in enumerate(found["histogram"])) == 11 - steps
        assert found["accepted"] <= found["drafted"] <= steps * most
        assert found["tokens_per_pass"] == found["accepted_per_step"] + 1
        assert found["passes_per_sec"] > 0 <= found["verify_ms"]
        # Where no tree pays, none is grown.
        assert found["draft_ms"] > 0 or result is auto
        assert found["copy_ms"] is None
        assert "ms to check" in result.stderr
        assert found["accepted_per_step"] == pytest.approx(found["accepted"] / steps)
        assert "drafts accepted a step" in result.stderr
    assert looked_up.report["speculation"]["load"] is None
    assert drawn.report["speculation"]["tree"] is None
    assert tree.report["speculation"]["tree"] == {"size": 12, "depth": 6, "top_k": 6}
    assert [each.report["speculation"]["choices"] for each in (looked_up, drawn, tree)] == [None] * 3
    choices = auto.report["speculation"]["choices"]
    assert [(each["size"], each["depth"]) for each in choices] == [(1, 0), (4, 3), (16, 4), (16, 8)]
    assert sum(each["steps"] for each in choices) >= 11 - auto.report["speculation"]["accepted"]
    for each in choices:
        assert set(each["costs"]) == {"1"}
        assert each["costs"]["1"]["step_ms"] > 0
        assert (each["costs"]["1"]["draft_ms"] > 0) == (each["size"] > 1)
    assert "steps by tree" in auto.stderr
    names = {
        "draft_weights_bytes": "draft.weights",
        "draft_kv_cache_bytes": "draft.kv_cache",
        "kv_cache_bytes": "kv_cache",
    }
    for report in (drawn.report, tree.report):
        for card, planned in zip(report["cards"], report["predicted"]["cards"], strict=True):
            assert card["memory"]["draft_weights_bytes"] > 0
            for ours, theirs in names.items():
                assert card["memory"][ours] == planned["lines"][theirs]


def test_draft_model_that_is_quantised_already_is_not_quantised_again(tmp_path: Path) -> None:
    draft = write_truncated(DEMO, tmp_path / "draft", 1)
    change_json(draft / "config.json", quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 128})
    args = ("task=plan", "hardware=rtx4090", "speculation.kind=draft", f"speculation.draft_path={draft}")
    message = run(*args, "speculation.draft_quantize=int4", folder=tmp_path / "run").error["message"]
    assert f"speculation.draft_path={draft}: speculation.draft_quantize=int4 rounds" in message
    assert "Set speculation.draft_quantize=none." in message


def test_other_tokenizer_is_refused(tmp_path: Path) -> None:
    draft = copy_demo(tmp_path / "draft")
    vocabulary = {f"token{i}": i for i in range(1024)}
    change_json(draft / "tokenizer.json", model={"type": "BPE", "vocab": vocabulary, "merges": []})
    args = (*SHORT, "speculation.kind=draft", f"speculation.draft_path={draft}")
    message = run(*args, folder=tmp_path / "run").error["message"]
    assert f"speculation.draft_path={draft}" in message
    assert "same tokenizer" in message


@pytest.mark.parametrize("text", ["{", "{}", "[]"])
def test_tokenizer_without_a_vocabulary_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ConfigError, match=r"tokenizer.json holds no vocabulary .*Download it again"):
        read_vocabulary(tmp_path)


def test_plain_jobs_of_a_sweep_leave_guesses_unread_and_say_so(tmp_path: Path) -> None:
    args = ("task=plan", "hardware=rtx4090", "model=llama3_1_8b", "speculation.draft_path=none/here")
    result = run(*args, "speculation.tree_size=16", folder=tmp_path / "run")
    assert result.report["speculation"] is None
    assert "speculation.kind=none reads nothing of speculation: draft_path, tree_size. Set" in result.stderr
    assert not list(SpeculationConfig().notes())
    assert not list(SpeculationConfig(SpeculationKind.ngram, tree_size=16).notes())


def test_missing_draft_is_told_by_its_own_knob(tmp_path: Path) -> None:
    args = (*SHORT, "speculation.kind=draft", "speculation.draft_path=no-such-folder")
    message = run(*args, folder=tmp_path / "run").error["message"]
    assert message == "speculation.draft_path=no-such-folder: no such folder, and not a hub name such as org/name."


@pytest.mark.parametrize(
    ("section", "words"),
    [
        (SpeculationConfig(SpeculationKind.ngram, num_drafts=0), "speculation.num_drafts=0 must be from 1 to 16"),
        (SpeculationConfig(SpeculationKind.ngram, num_drafts=17), "speculation.num_drafts=17"),
        (SpeculationConfig(ngram_min=0), "speculation.ngram_min=0"),
        (SpeculationConfig(ngram_min=4), "at most speculation.ngram_max=3"),
        (SpeculationConfig(SpeculationKind.draft), "needs speculation.draft_path"),
        (SpeculationConfig(SpeculationKind.draft, draft_path=" "), "needs speculation.draft_path"),
        (SpeculationConfig(SpeculationKind.ngram, draft_path="org/small"), "not by kind=ngram"),
        (
            SpeculationConfig(SpeculationKind.ngram, draft_quantize=QuantizeKind.int4),
            "draft_quantize is read by",
        ),
        (SpeculationConfig(SpeculationKind.ngram, tree_size=1), "speculation.tree_size=1 must be from 2 to 256"),
        (SpeculationConfig(SpeculationKind.ngram, tree_size=257), "speculation.tree_size=257 must be"),
        (
            SpeculationConfig(SpeculationKind.ngram, tree_size=8, tree_depth=0),
            "speculation.tree_depth=0 must be from 1",
        ),
        (SpeculationConfig(SpeculationKind.ngram, tree_size=8, tree_depth=17), "speculation.tree_depth=17"),
        (
            SpeculationConfig(SpeculationKind.ngram, tree_size="many"),
            "must be from 2 to 256, auto, or null",
        ),
        (
            SpeculationConfig(SpeculationKind.ngram, num_drafts="many"),
            "speculation.num_drafts=many must be from 1 to 16, or auto",
        ),
        (SpeculationConfig(SpeculationKind.ngram, tree_size="auto", tree_max=3), "tree_max=3 must be from 4 to 256"),
        (tree_of(8, 4, 0), "speculation.tree_top_k=0 must be at least 1"),
        (tree_of(8, 4, 86), "(tree_depth - 1) * tree_top_k = 258 nodes"),
        (tree_of(16, 2, 3), "speculation.tree_size=16: with speculation.tree_depth=2 and"),
    ],
)
def test_values_that_cannot_run_are_refused(section: SpeculationConfig, words: str) -> None:
    run = run_of(speculation=section)
    assert [words in problem for problem in run.problems()] == [True]


@pytest.mark.parametrize("size", [2, 16, 64])
def test_trees_of_all_sizes_run_with_the_other_settings_as_they_are(size: int) -> None:
    section = SpeculationConfig(SpeculationKind.draft, draft_path="org/small", tree_size=size)
    assert list(section.problems()) == []
    assert section.tree is not None
    assert (section.rows_per_sequence, section.longest) == (size, section.tree.depth)


def test_what_is_chosen_from_has_room() -> None:
    """As much as the largest takes; of chains the longest."""
    section = SpeculationConfig(SpeculationKind.draft, draft_path="org/small", tree_size="auto", tree_max=256)
    assert list(section.problems()) == []
    assert (section.tree, section.rows_per_sequence, section.longest, section.num_ahead) == (None, 256, 12, 255)
    assert {tree.size for tree in section.choices} == {4, 16, 64, 256}
    chains = SpeculationConfig(SpeculationKind.ngram, num_drafts="auto")
    assert list(chains.problems()) == []
    assert (chains.rows_per_sequence, chains.longest, {tree.top_k for tree in chains.choices}) == (17, 16, {1})
    assert SpeculationConfig(num_drafts="auto").rows_per_sequence == 1


def test_settings_of_trees_are_not_read_without_one() -> None:
    section = SpeculationConfig(SpeculationKind.ngram, tree_depth=99, tree_top_k=99)
    assert list(section.problems()) == []
    assert (section.tree, section.rows_per_sequence, section.num_ahead) == (None, 5, 0)


def test_off_by_default() -> None:
    assert RunConfig().speculation == SpeculationConfig()
    assert SpeculationConfig().rows_per_sequence == 1
    assert list(SpeculationConfig().problems()) == []


def plan(speculation: SpeculationConfig, world_size: int = 2, **changes: object) -> Plan:
    run = run_of(speculation=speculation, model__quantize="none", **changes)
    draft = LLAMA_8B if speculation.kind == SpeculationKind.draft else None
    inventory = cards_of(world_size, memory_bytes=200 * 2**30)
    return plan_run(run, place_ranks(run, world_size, inventory), LLAMA_70B, inventory, draft=draft)


# Of each token of a whole pass: the residual stream, its update and their norm, and what lies free between them.
STREAMED_ROWS = 3 + NUM_GAPS


def test_plan_counts_the_table_of_tokens_and_the_logits_of_all_drafts() -> None:
    changes = {"workload__batch_size": 16, "engine__max_context": 1000, "engine__prefill_chunk": 1}
    changes["sampling__temperature"] = 1.0
    plain, looked_up = plan(SpeculationConfig(), **changes), plan(NGRAM, **changes)
    for before, after in zip(plain.cards, looked_up.cards, strict=True):
        assert after.lines["draft.tokens"] == 16 * 1001 * TOKEN_BYTES
        assert not {"draft.weights", "draft.kv_cache"} & set(after.lines)
        # One token of prompt a pass: logits are the largest step of both. Of 64 rows at a time they are drawn from.
        drawn = LLAMA_70B.vocab_size * (2 * 2 + SAMPLING_BYTES_PER_LOGIT)
        local = LLAMA_70B.vocab_size // 2 * 2
        stream = STREAMED_ROWS * LLAMA_70B.hidden_size * 2
        more = 7 * 16 * (local + stream) + (64 - 16) * drawn
        assert after.lines["activations"] - before.lines["activations"] == more
        assert "draft.tokens" not in before.lines


def test_plan_counts_a_draft_model_shard_by_shard() -> None:
    plain, drawn = (plan(section, workload__batch_size=2) for section in (SpeculationConfig(), DRAFT))
    alone = plan_run(run := run_of(), place_ranks(run, 2, cards_of(2)), LLAMA_8B, cards_of(2))
    for before, after, draft in zip(plain.cards, drawn.cards, alone.cards, strict=True):
        weights = sum(size for name, size in draft.lines.items() if name.startswith("weights."))
        assert after.lines["draft.weights"] == weights
        per_token = LLAMA_8B.num_layers * 2 * 4 * LLAMA_8B.head_dim * DTYPE_BYTES["bfloat16"]
        pages = 1 + 2 * -(-drawn.max_context // PAGE_SIZE)
        assert after.lines["draft.kv_cache"] == pages * PAGE_SIZE * per_token
        assert {name: after.lines[name] for name in before.lines if name.startswith("weights.")} == {
            name: size for name, size in before.lines.items() if name.startswith("weights.")
        }
    assert plain.draft_grain is None
    assert drawn.draft_grain == alone.grain
    assert drawn.kv_tokens_that_fit < plain.kv_tokens_that_fit


def test_plan_counts_the_rows_and_the_slots_of_trees() -> None:
    """Of a draft model as many rows as it goes on from; of both caches a page more, where the tree needs it."""
    tree = tree_of(64, 8, 8)
    changes = {"workload__batch_size": 4, "engine__max_context": 256, "engine__prefill_chunk": 1}
    changes["workload__output_tokens"] = 64
    chain, grown = plan(DRAFT, **changes), plan(tree, **changes)
    for before, after in zip(chain.cards, grown.cards, strict=True):
        for name in ("kv_cache", "draft.kv_cache"):
            assert after.lines[name] * (1 + 4 * 4) == before.lines[name] * (1 + 4 * 5)
        # Greedy: this rank's logits, and they in float32.
        rows = 4 * (64 - 5)
        per_row = LLAMA_70B.vocab_size // 2 * (2 + 4) + STREAMED_ROWS * LLAMA_70B.hidden_size * 2
        assert after.lines["activations"] - before.lines["activations"] == rows * per_row
