"""Drafts that are recorded once and then replayed, beside layers that are streamed: what they are without."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from parallel.communicator import Communicator, ElidedAllReduce
from parallel.engine.answer import StopRules
from parallel.engine.engine import Engine
from parallel.engine.generate import Result, generate
from parallel.engine.speculation.draft_graphs import DraftGraphs
from parallel.engine.speculation.speculator import Speculation
from parallel.engine.speculation.tree_plan import TreePlan
from parallel.engine.step_timer import time_drafts, time_steps
from tests.parallel.engine.speculation.draft_models import write_truncated
from tests.parallel.engine.speculation.taped import taped
from tests.parallel.engine.speculation.test_auto_speculation import script
from tests.parallel.engine.speculation.test_speculation import SAMPLED
from tests.parallel.ranks import demo_tokenizer, make_engine, numbered, run_on_ranks
from tests.parallel.small_models import DEMO, prompts_of

PLANS = (TreePlan(4, 3, 2), TreePlan(20, 4, 5))
CHAIN = Speculation("draft", num_drafts=3)
TREE = Speculation("draft", tree=PLANS[1])
AUTO = Speculation("draft", choices=PLANS)
# Of six rows four prompts leave two empty; as answers end, three run the graph of four.
SETTINGS = {"batch_size": 6, "prefill_chunk": 7, "streamed": (1, 3)}


@dataclass
class Recorder:
    """Keeps for how many rows drafts were recorded, and whom layers talked through meanwhile."""

    engine: Engine
    communicators: list[Communicator] = field(default_factory=list)

    def __call__(self, draft: Callable[[], Any], pool: Any) -> tuple[Callable[[], object], Any]:
        self.communicators.append(self.engine.models[1].model.layers[0].self_attn.o_proj.communicator)
        return taped(draft, pool)


def put_graphs(engine: Engine) -> Recorder:
    recorder = Recorder(engine)
    for each in engine.drafting:
        each.graphs = DraftGraphs(each.draft, engine.rows, None, recorder)
        each.graphs.prepare()
    return recorder


def answer(engine: Engine) -> tuple[list[list[int]], Counter[int]]:
    if engine.plan is not None:
        script(engine, [*PLANS, TreePlan(1, 0, 0), *PLANS])
    result: Result = generate(engine, numbered(prompts_of("demo")), demo_tokenizer(), StopRules(12))
    return [each.token_ids for each in result.answers], result.acceptance.lengths


def both_answers(
    communicator: Communicator, draft: Path, speculation: Speculation
) -> list[tuple[list[list[int]], Counter[int]]]:
    """Greedy launched and replayed, then sampled."""
    found = []
    for sampling in (None, SAMPLED):
        settings = SETTINGS | {"speculation": speculation, "draft": draft, "sampling": sampling}
        plain, recorded = (make_engine(communicator, DEMO, **settings) for _ in range(2))
        recorder = put_graphs(recorded)
        found += [answer(plain), answer(recorded)]
        assert len(recorder.communicators) == 4 * len(recorded.drafting), "graphs of 1, 2, 4 and 6 rows"
    return found


@pytest.mark.parametrize("speculation", [CHAIN, TREE, AUTO], ids=["chain", "tree", "auto"])
def test_what_is_replayed_guesses_what_is_launched(speculation: Speculation, tmp_path: Path) -> None:
    """Drafts as right as they were: a wrong one would not show in answers."""
    draft = write_truncated(DEMO, tmp_path / "draft", 3)
    greedy, replayed, sampled, resampled = run_on_ranks(both_answers, 1, draft, speculation)[0]
    assert (replayed, resampled) == (greedy, sampled)
    assert greedy != sampled
    for _, lengths in (greedy, sampled):
        assert lengths.total() > lengths[0] > 0


def timed(communicator: Communicator, draft: Path) -> None:
    engine = make_engine(communicator, DEMO, speculation=TREE, draft=draft, **SETTINGS)
    recorder = put_graphs(engine)
    graphs, before = [each.graphs for each in engine.drafting], answer(engine)
    recorder.communicators.clear()
    time_steps(engine, [17, 5], 2, communicator)
    time_drafts(engine, [17, 5], 2, communicator)
    assert recorder.communicators == []
    other = ElidedAllReduce(communicator)
    time_steps(engine, [17, 5], 2, other)
    assert recorder.communicators == [other]
    assert [each.graphs for each in engine.drafting] == graphs
    assert answer(engine) == before


def test_timed_steps_talk_through_whom_they_are_timed_with(tmp_path: Path) -> None:
    run_on_ranks(timed, 1, write_truncated(DEMO, tmp_path / "draft", 3))
