"""Speculation whose trees change from step to step: the same answers, and a draft model that misses nothing."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain, cycle, repeat
from pathlib import Path

import pytest
import torch

from parallel.communicator import Communicator
from parallel.engine.answer import StopRules
from parallel.engine.engine import Engine
from parallel.engine.generate import Result, generate
from parallel.engine.sampling import SamplingParams
from parallel.engine.sequence import TokenSequence
from parallel.engine.speculation.auto import AutoSpeculator
from parallel.engine.speculation.drafter import ModelDrafter
from parallel.engine.speculation.policy import Costs, Policy
from parallel.engine.speculation.speculator import Speculation
from parallel.engine.speculation.tree_plan import CHAINS, PLAIN, TreePlan
from parallel.engine.speculation.tune import tune
from parallel.kernels.limits import PAGE_SIZE
from tests.parallel.engine.speculation.draft_models import write_truncated
from tests.parallel.engine.speculation.test_speculation import SAMPLED
from tests.parallel.engine.speculation.test_tree_speculation import write_sure
from tests.parallel.paged import slots_of
from tests.parallel.ranks import demo_tokenizer, make_engine, numbered, prefill_whole, run_on_ranks
from tests.parallel.small_models import DEMO, prompts_of

PLANS = (TreePlan(4, 3, 2), TreePlan(20, 5, 4), TreePlan(70, 4, 8))
KINDS = {"draft": Speculation("draft", choices=PLANS), "ngram": Speculation("ngram", choices=PLANS)}


@dataclass
class Scripted:
    """Chooses what it was told to."""

    plans: Sequence[TreePlan]
    seen: list[tuple[TreePlan, tuple[int, ...]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.coming = cycle(self.plans)

    def choose(self, num_sequences: int) -> TreePlan:
        return next(self.coming)

    def learn(self, plan: TreePlan, nodes: list[int]) -> None:
        self.seen.append((plan, tuple(nodes)))


def script(engine: Engine, plans: Sequence[TreePlan]) -> Scripted:
    assert isinstance(engine.speculator, AutoSpeculator)
    engine.speculator.policy = Scripted(plans)  # type: ignore[assignment]
    return engine.speculator.policy  # type: ignore[return-value]


def answer(engine: Engine, num_tokens: int) -> Result:
    return generate(engine, numbered(prompts_of("llama")), demo_tokenizer(), StopRules(num_tokens))


def scripted_answers(
    communicator: Communicator, folder: Path, draft: Path, sampling: SamplingParams | None, streamed: Sequence[int]
) -> list[list[list[int]]]:
    """Without drafts, and of each kind by plans in a random order, among them runs of plain steps."""
    draw = random.Random(5)
    plans = [plan for _ in range(30) for plan in repeat(draw.choice((PLAIN, *PLANS)), draw.randint(1, 3))]
    settings = {"sampling": sampling, "batch_size": 2, "prefill_chunk": 16, "max_context": 96, "streamed": streamed}
    found = [answer(make_engine(communicator, folder, **settings), 40)]
    for kind, speculation in KINDS.items():
        model = draft if kind == "draft" else None
        engine = make_engine(communicator, folder, speculation=speculation, draft=model, **settings)
        policy = script(engine, plans)
        found.append(answer(engine, 40))
        assert {plan for plan, _ in policy.seen} == {PLAIN, *PLANS}
        assert all(len(nodes) <= plan.depth and max(nodes, default=0) < plan.size for plan, nodes in policy.seen)
    return [[each.token_ids for each in result.answers] for result in found]


# Any two of these with one another.
@pytest.mark.parametrize(
    ("streamed", "sampling", "world_size"),
    [((), None, 1), ((), SAMPLED, 2), ((0, 1), None, 2), ((0, 1), SAMPLED, 1)],
    ids=["resident-greedy-1", "resident-sampled-2", "streamed-greedy-2", "streamed-sampled-1"],
)
def test_answers_are_those_without_drafts(
    world_size: int, sampling: SamplingParams | None, streamed: Sequence[int], folders: dict[str, Path], tmp_path: Path
) -> None:
    draft = write_truncated(folders["llama"], tmp_path / "draft", 2)
    for plain, *guessed in run_on_ranks(scripted_answers, world_size, folders["llama"], draft, sampling, streamed):
        assert guessed == [plain] * len(KINDS)


def own_drafts(communicator: Communicator, folder: Path, num_plain: int) -> list[tuple[TreePlan, tuple[int, ...]]]:
    """What came true of a model's own trees, each after so many plain steps, of prompts that join and leave."""
    engine = make_engine(
        communicator, folder, max_context=256, batch_size=2, speculation=KINDS["draft"], draft=folder, prefill_chunk=16
    )
    plans = [each for plan in PLANS for each in (*repeat(PLAIN, num_plain), plan, plan)]
    policy = script(engine, plans)
    answer(engine, 2 * (2 * num_plain + 12))
    return policy.seen


@pytest.mark.parametrize("num_plain", [1, 3, 70])
def test_a_draft_model_takes_in_what_it_has_missed(num_plain: int, folders: dict[str, Path], tmp_path: Path) -> None:
    """It keeps the whole of its own branch, as without plain steps; 70 tokens are more than a pass takes in."""
    folder = write_sure(folders["llama"], tmp_path / "sure")
    seen = run_on_ranks(own_drafts, 1, folder, num_plain)[0]
    trees = [(plan, len(nodes)) for plan, nodes in seen if plan != PLAIN]
    assert len(trees) > 8
    # Where an answer ends, fewer can come true: once for each of four prompts.
    assert sum(num < plan.depth for plan, num in trees) <= 4


CHOICES = (TreePlan(4, 3, 2), TreePlan(8, 3, 4), TreePlan(32, 4, 6))


def tuned(communicator: Communicator, draft: Path, streamed: Sequence[int]) -> tuple[object, ...]:
    """Costs, and choices by them; and choices by costs that are given, which change from step to step."""
    settings = {"max_context": 128, "batch_size": 3, "streamed": streamed}
    plain = generate(make_engine(communicator, DEMO, **settings), numbered(prompts_of("demo")), demo_tokenizer(), RULES)
    engine = make_engine(communicator, DEMO, speculation=Speculation("draft", choices=CHOICES), draft=draft, **settings)
    speculator = engine.speculator
    assert isinstance(speculator, AutoSpeculator)
    costs = tune(engine)
    assert costs is not None
    assert all(cost.step_ms > 0 for by_num in costs.values() for cost in by_num.values())
    assert [cost.draft_ms > 0 for cost in costs[CHOICES[0]].values()] == [True, True]
    measured = speculator.policy
    assert measured.costs == {
        plan: Costs(tuple((num, cost.step_ms) for num, cost in by_num.items())) for plan, by_num in costs.items()
    }
    # What was measured may say that no tree ever pays; where all cost about the same, the largest is tried first.
    given = Policy(CHOICES, {plan: Costs(((1, 50.0 + plan.size),)) for plan in costs})
    chosen = []
    for speculator.policy in (measured, given):
        found = generate(engine, numbered(prompts_of("demo")), demo_tokenizer(), RULES)
        assert found.answers == plain.answers
        assert sum(found.plans.values()) == len(found.step_ms)
        chosen.append(dict(found.plans))
    return costs, chosen, measured.seen


RULES = StopRules(18)


@pytest.mark.parametrize("streamed", [(), (1, 3)], ids=["resident", "streamed"])
def test_ranks_measure_for_themselves_and_choose_alike(streamed: Sequence[int], tmp_path: Path) -> None:
    draft = write_truncated(DEMO, tmp_path / "draft", 2)
    first, second = run_on_ranks(tuned, 2, draft, streamed)
    assert first == second
    costs, (_, chosen), _ = first
    assert set(costs) == {PLAIN, *CHOICES}
    assert len(chosen) > 1, chosen


LARGE, SMALLER = TreePlan(16, 5, 4), (TreePlan(4, 3, 4), TreePlan(8, 3, 4))


def foretold(communicator: Communicator, draft: Path) -> list[tuple[float, float]]:
    """Tokens of a pass with each plan as they were, and as trees of the largest foretold them."""
    policy, found = Policy((*SMALLER, LARGE)), []
    for plan in (LARGE, *SMALLER):
        speculation = Speculation("draft", choices=(plan,))
        engine = make_engine(
            communicator, DEMO, max_context=128, speculation=speculation, draft=draft, sampling=SAMPLED
        )
        scripted = script(engine, [plan])
        result = generate(engine, numbered(prompts_of("demo")), demo_tokenizer(), StopRules(60))
        for seen, nodes in scripted.seen if plan == LARGE else ():
            policy.learn(seen, nodes)
        lengths = result.acceptance.lengths
        found.append((1 + result.acceptance.accepted / lengths.total(), policy.expected(plan)))
    return found


def test_a_large_tree_foretells_what_smaller_ones_give(tmp_path: Path) -> None:
    """Of the demo model and its first four layers, which guess well; of 240 tokens, so within a sixth."""
    draft = write_truncated(DEMO, tmp_path / "draft", 4)
    (large, own), *smaller = run_on_ranks(foretold, 1, draft)[0]
    assert own == pytest.approx(large, rel=0.1)
    for measured, expected in smaller:
        assert 1.2 < measured < large
        assert expected == pytest.approx(measured, rel=1 / 6)


def lengths_by_chains(communicator: Communicator, folder: Path) -> list[int]:
    """Of a model that drafts for itself, whose passes cost the same for all chains."""
    engine = make_engine(
        communicator, folder, max_context=256, speculation=Speculation("draft", choices=CHAINS), draft=folder
    )
    assert isinstance(engine.speculator, AutoSpeculator)
    engine.speculator.policy.costs = {plan: Costs(((1, 1.0),)) for plan in (PLAIN, *CHAINS)}
    return list(chain.from_iterable(repeat(*each) for each in answer(engine, 90).acceptance.lengths.items()))


def test_chains_are_trees_too(folders: dict[str, Path], tmp_path: Path) -> None:
    """Of drafts that all come true the longest is chosen at once, and kept."""
    lengths = run_on_ranks(lengths_by_chains, 1, write_sure(folders["llama"], tmp_path / "sure"))[0]
    assert lengths.count(16) >= 0.8 * len(lengths)


def taken_in(communicator: Communicator, folder: Path, num: int) -> None:
    """Keys and values of two prompts, made anew from their tokens, those before their newest two."""
    engine = make_engine(communicator, folder, speculation=KINDS["draft"], draft=folder)
    assert isinstance(engine.speculator, AutoSpeculator)
    drafter = engine.speculator.drafter
    assert isinstance(drafter, ModelDrafter)
    sequences = [TokenSequence(index, prompt, max_tokens=9) for index, prompt in enumerate(prompts_of("llama")[:2])]
    for sequence in sequences:
        sequence.pages = engine.pages.allocate(engine.limits.pages_of(sequence.num_tokens))
        engine.start_answers([sequence], prefill_whole(engine, sequence))
    engine.arrange(sequences)
    places = [slots_of(each.pages, 0, len(each.prompt) - 1) for each in sequences]
    slots = torch.cat([place[-num:] for place in places])
    caches = [tensor.transpose(1, 2).flatten(0, 1) for kv in drafter.caches for tensor in (kv.keys, kv.values)]
    before = [cache[slots].clone() for cache in caches]
    for kv in drafter.caches:
        for tensor in (kv.keys, kv.values):
            tensor.transpose(1, 2)[slots // PAGE_SIZE, slots % PAGE_SIZE] = 7.0
    drafter.take_in(engine.rows.first(2), engine.speculator.history.tokens[:2], num)
    after = [tensor.transpose(1, 2).flatten(0, 1)[slots] for kv in drafter.caches for tensor in (kv.keys, kv.values)]
    for mine, theirs in zip(after, before, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num", [1, 2, 9, 40, 150])
def test_what_is_taken_in_is_what_a_prompt_leaves(num: int, folders: dict[str, Path]) -> None:
    """Of prompts of 3 and 17 tokens: of some that many, of others all there are."""
    run_on_ranks(taken_in, 1, folders["llama"], num)
