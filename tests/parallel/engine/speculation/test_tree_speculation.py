"""Speculation by trees: answers stay what they are without, and what a draft model grows is its own likeliest tree."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from parallel.communicator import Communicator
from parallel.engine.answer import StopRules
from parallel.engine.generate import generate
from parallel.engine.rows import Rows
from parallel.engine.speculation.speculator import Speculation
from parallel.engine.speculation.token_tree import TokenTree
from parallel.engine.speculation.tree_plan import TreePlan
from parallel.engine.speculation.tree_speculator import TreeSpeculator
from tests.parallel.engine.speculation.draft_models import write_truncated
from tests.parallel.engine.speculation.test_speculation import (
    NUM_TOKENS,
    SAMPLED,
    Case,
    answer,
    check_ends,
    check_lookup,
    timed_steps,
)
from tests.parallel.ranks import demo_tokenizer, make_engine, numbered, run_on_ranks
from tests.parallel.small_models import DEMO, prompts_of

# Of the third, all candidates are in the tree; of the last, masks have several words, the draft model's too.
PLANS = {
    "narrow": TreePlan(7, 3, 2),
    "wide": TreePlan(20, 4, 5),
    "whole": TreePlan(64, 4, 4),
    "large": TreePlan(130, 8, 10),
}
NGRAM = Speculation("ngram", tree=TreePlan(10, 4, 1))


def grown(plan: str) -> Speculation:
    return Speculation("draft", tree=PLANS[plan])


@pytest.fixture(scope="module")
def drafts(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Target -> the folder of its draft model: for the one of random weights, one that is nearly it."""
    root = tmp_path_factory.mktemp("tree_drafts")
    return {
        "demo": write_truncated(DEMO, root / "demo", 3),
        "llama": write_truncated(folders["llama"], root / "llama", 2),
    }


@pytest.mark.parametrize("name", ("llama", "demo"))
def test_answers_are_those_without_drafts(name: str, folders: dict[str, Path], drafts: dict[str, Path]) -> None:
    """Greedy and sampled, token for token, of prompts that join and leave."""
    rules = StopRules(NUM_TOKENS[name])
    plain = [Case(name, rules), Case(name, rules, SAMPLED)]
    kinds = [(grown("narrow"), drafts[name]), (grown("wide"), drafts[name]), (NGRAM, None)]
    guessed = [replace(case, speculation=kind, draft=draft) for case in plain for kind, draft in kinds]
    (greedy, _), (sampled, _), *found = run_on_ranks(answer, 1, folders[name], [*plain, *guessed])[0]
    assert greedy != sampled
    assert [answers for answers, _ in found] == [greedy] * 3 + [sampled] * 3
    assert all(acceptance.drafted > 0 for _, acceptance in (found[0], found[1], found[3], found[4]))
    # Random weights say nothing twice.
    assert name == "llama" or all(0 < found.accepted < found.drafted for _, found in (found[2], found[5]))


def test_masks_of_several_words(folders: dict[str, Path], drafts: dict[str, Path]) -> None:
    plain = Case("llama", StopRules(12), SAMPLED)
    large = replace(plain, speculation=grown("large"), draft=drafts["llama"])
    (answers, _), (guessed, acceptance) = run_on_ranks(answer, 1, folders["llama"], [plain, large])[0]
    assert guessed == answers
    # Most of 129 nodes in a step, until an answer nears its end.
    assert acceptance.drafted > 40 * acceptance.lengths.total()


def write_sure(folder: Path, target: Path) -> Path:
    """The model in `folder`, whose likeliest token is all but certain."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    tensors["lm_head.weight"] *= 30
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def test_a_model_keeps_the_whole_of_its_own_branch(folders: dict[str, Path], tmp_path: Path) -> None:
    """So what was moved in both caches is right, over and over."""
    folder = write_sure(folders["llama"], tmp_path / "sure")
    plain = Case("llama", StopRules(42))
    same = replace(plain, speculation=grown("wide"), draft=folder)
    (answers, _), (guessed, acceptance) = run_on_ranks(answer, 1, folder, [plain, same])[0]
    assert guessed == answers
    # 41 tokens after the first: eight steps of 1 + 4, and one where the answer ends.
    assert acceptance.lengths == {4: 8 * 4, 0: 4}


@pytest.mark.parametrize("kind", ("narrow", "whole", "ngram"))
def test_answers_end_at_any_place_of_a_step(kind: str, folders: dict[str, Path], drafts: dict[str, Path]) -> None:
    """At max_tokens and where the context is full, of prompts of 3, 17, 9 and 30 tokens."""
    # The last fills its pages to the end: trees need another.
    plain = [
        *(Case("llama", StopRules(num)) for num in (1, 2, 3, 6)),
        Case("llama", StopRules(99), max_context=45),
        Case("llama", StopRules(99), max_context=64),
    ]
    speculation, draft = (NGRAM, None) if kind == "ngram" else (grown(kind), folders["llama"])
    guessed = [replace(case, speculation=speculation, draft=draft) for case in plain]
    found = [answers for answers, _ in run_on_ranks(answer, 1, folders["llama"], [*plain, *guessed])[0]]
    assert found[:6] == found[6:]
    assert [len(each.token_ids) for each in found[-1]] == [61, 47, 55, 34]
    assert {each.finish_reason for each in (*found[-1], *found[-2])} == {"context"}


@pytest.mark.parametrize(("name", "world_size"), [("demo", 2), ("llama", 3)])
def test_ranks_answer_as_one(name: str, world_size: int, folders: dict[str, Path], drafts: dict[str, Path]) -> None:
    plain = [Case(name, StopRules(8)), Case(name, StopRules(8), SAMPLED)]
    trees = [replace(case, speculation=grown("wide"), draft=drafts[name]) for case in plain]
    (greedy, one), (sampled, other) = run_on_ranks(answer, 1, folders[name], trees)[0]
    assert [greedy, sampled] == [answers for answers, _ in run_on_ranks(answer, 1, folders[name], plain)[0]]
    assert min(one.accepted, other.accepted) > 0
    for found in run_on_ranks(answer, world_size, folders[name], trees):
        assert found == [(greedy, one), (sampled, other)]


def test_repeated_text_is_looked_up() -> None:
    check_lookup(NGRAM, longest=4)


def test_nothing_follows_an_end_of_sequence() -> None:
    check_ends(grown("whole"), DEMO)


@pytest.mark.parametrize("speculation", [NGRAM, grown("wide")], ids=str)
def test_timed_steps_leave_the_engine_as_it_was(speculation: Speculation, folders: dict[str, Path]) -> None:
    times = run_on_ranks(timed_steps, 1, folders["llama"], speculation)[0]
    assert all(len(each) == 2 and min(each) > 0 for each in times)


def watched_trees(
    communicator: Communicator, folder: Path, prompt: list[int], plan: TreePlan
) -> tuple[list[int], list[tuple[int, TokenTree]]]:
    """An answer, and of every step the newest token's position and the tree that the model proposed to itself."""
    engine = make_engine(communicator, folder, speculation=Speculation("draft", tree=plan), draft=folder)
    found: list[tuple[int, TokenTree]] = []
    speculator = engine.speculator
    assert isinstance(speculator, TreeSpeculator)
    propose = speculator.propose

    def watch(rows: Rows) -> TokenTree:
        position, tree = int(rows.positions[0]), propose(rows)
        found.append((position, tree))
        return tree

    speculator.propose = watch  # type: ignore[method-assign]
    (answered,) = generate(engine, numbered([prompt]), demo_tokenizer(), StopRules(20)).answers
    return answered.token_ids, found


def grow(model: PreTrainedModel, text: list[int], plan: TreePlan) -> set[tuple[int, ...]]:
    """The best ways to go on, from logits of whole texts: at each depth from the best that were found there."""
    found: dict[tuple[int, ...], float] = {}
    level = {(): 0.0}
    for _ in range(plan.depth):
        children = {}
        for way, score in level.items():
            chances = model(torch.tensor([[*text, *way]])).logits[0, -1].double().log_softmax(-1)
            best = chances.topk(plan.top_k)
            children |= {(*way, int(token)): score + float(chances[token]) for token in best.indices}
        found |= children
        level = dict(sorted(children.items(), key=lambda each: -each[1])[: plan.top_k])
    return set(sorted(found, key=lambda way: -found[way])[: plan.size - 1])


def ways_of(tree: TokenTree) -> set[tuple[int, ...]]:
    ways: list[tuple[int, ...]] = [()]
    for token, parent in zip(tree.tokens[0, 1:].tolist(), tree.parents[0, 1:].tolist(), strict=True):
        ways.append((*ways[parent], token))
    return set(ways[1:])


@torch.inference_mode()
def test_a_draft_model_grows_its_likeliest_tree(folders: dict[str, Path]) -> None:
    """Step after step, over what came true before, against whole forward passes of transformers."""
    plan, prompt = TreePlan(12, 4, 3), prompts_of("llama")[1]
    tokens, trees = run_on_ranks(watched_trees, 1, folders["llama"], prompt, plan)[0]
    model = AutoModelForCausalLM.from_pretrained(folders["llama"], dtype=torch.float32)
    # Nodes behind the end of the answer are never checked, and stand anywhere.
    inside = [(position, tree) for position, tree in trees if position + plan.depth < len(prompt) + len(tokens)]
    assert len(inside) > 3
    for position, tree in inside:
        text = [*prompt, *tokens][: position + 1]
        assert tree.tokens[0, 0] == text[-1]
        assert ways_of(tree) == grow(model, text, plan)
