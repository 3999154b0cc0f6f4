"""Which trees are chosen: of chances that are known here, and not to the policy."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import pytest

from parallel.engine.speculation.policy import HALF_LIFE, Costs, Policy
from parallel.engine.speculation.tree_plan import CHAINS, PLAIN, TREES, TreePlan

STREAMED = {plan: Costs(((1, 320.0 + 3 * plan.depth),)) for plan in (PLAIN, *TREES)}
RESIDENT = {plan: Costs(((1, 8 + 0.1 * plan.size + 1.5 * plan.depth),)) for plan in (PLAIN, *TREES)}


def draw_nodes(draw: random.Random, plan: TreePlan, chance: Callable[[int], float]) -> list[int]:
    """At each depth a node of ranks up to n comes true with chance(n), and one of higher ranks than that above."""
    nodes: list[int] = []
    for _ in range(plan.depth):
        luck, rank = draw.random(), nodes[-1] + 1 if nodes else 1
        while rank < plan.size and luck >= chance(rank):
            rank += 1
        if rank >= plan.size:
            break
        nodes.append(rank)
    return nodes


def run(policy: Policy, chance: Callable[[int], float], num_steps: int, seed: int = 0) -> Counter[TreePlan]:
    draw, chosen = random.Random(seed), Counter[TreePlan]()
    for _ in range(num_steps):
        plan = policy.choose(1)
        chosen[plan] += 1
        policy.learn(plan, draw_nodes(draw, plan, chance))
    return chosen


def true_rate(plan: TreePlan, costs: dict[TreePlan, Costs], chance: Callable[[int], float]) -> float:
    """Tokens a millisecond, by drawing."""
    draw = random.Random(99)
    tokens = sum(1 + len(draw_nodes(draw, plan, chance)) for _ in range(3000))
    return tokens / 3000 / costs[plan].of(1)


def unlikely(rank: int) -> float:
    return 0.002


def likely(rank: int) -> float:
    return 0.75 + 0.2 * rank / 256


def broad(rank: int) -> float:
    return min(0.9, 0.1 + 0.2 * rank**0.3)


@pytest.mark.parametrize("chance", [likely, broad, unlikely])
@pytest.mark.parametrize("costs", [STREAMED, RESIDENT], ids=["streamed", "resident"])
def test_what_is_chosen_is_nearly_the_best(costs: dict[TreePlan, Costs], chance: Callable[[int], float]) -> None:
    policy = Policy(TREES, costs)
    chosen = run(policy, chance, 1500)
    rates = {plan: true_rate(plan, costs, chance) for plan in (PLAIN, *TREES)}
    total_ms = sum(num * costs[plan].of(1) for plan, num in chosen.items())
    found = sum(num * rates[plan] * costs[plan].of(1) for plan, num in chosen.items()) / total_ms
    assert found > 0.9 * max(rates.values()), (chosen, rates)


def test_plain_steps_where_nothing_comes_true_and_trees_again_when_that_changes() -> None:
    policy = Policy(TREES, RESIDENT)
    chosen = run(policy, unlikely, 2000)
    assert chosen[PLAIN] > 0.9 * 2000
    # Now and then it looks.
    assert chosen[PLAIN] < 2000
    later = run(policy, likely, 4 * HALF_LIFE)
    assert later[PLAIN] < 0.5 * 4 * HALF_LIFE
    assert run(policy, likely, 500)[PLAIN] < 25


def test_without_times_steps_are_plain() -> None:
    assert run(Policy(TREES), likely, 5) == {PLAIN: 5}


def test_small_and_shallow_trees_are_known_by_large_ones() -> None:
    """Trees of 64 alone are seen; of theirs the fourth comes true at the first depth, half the times the 20th below."""
    policy = Policy(TREES, STREAMED)
    large = TreePlan(64, 10, 8)
    for step in range(3000):
        policy.learn(large, [4, 20] if step % 2 else [4])
    small, medium = TreePlan(4, 3, 2), TreePlan(16, 4, 4)
    assert policy.expected(small) == pytest.approx(1, abs=0.01)
    assert policy.expected(medium) == pytest.approx(2, abs=0.01)
    assert policy.expected(large) == pytest.approx(2.5, abs=0.02)


def test_all_that_was_not_seen_is_hoped_for_once() -> None:
    policy = Policy(CHAINS)
    assert [policy.expected(plan) for plan in CHAINS] == [1 + plan.depth for plan in CHAINS]
    policy.learn(CHAINS[-1], [])
    assert all(1 < policy.expected(plan) < 1 + plan.depth for plan in CHAINS)


def test_times_between_those_measured_lie_on_a_line() -> None:
    costs = Costs(((1, 10.0), (5, 30.0)))
    assert [costs.of(num) for num in (1, 2, 5, 9)] == [10, 15, 30, 30]
    assert Costs(((4, 7.0),)).of(1) == 7


def test_policies_that_see_the_same_choose_the_same() -> None:
    first, second = (Policy(TREES, RESIDENT) for _ in range(2))
    assert [run(first, broad, 200), run(first, likely, 50)] == [run(second, broad, 200), run(second, likely, 50)]
    assert first.seen == second.seen


@pytest.mark.parametrize("plans", [TREES, CHAINS], ids=["trees", "chains"])
def test_plans_have_as_many_nodes_as_they_say(plans: tuple[TreePlan, ...]) -> None:
    for plan in plans:
        assert plan.num_candidates >= plan.size - 1 >= plan.depth
        assert plan.num_grown <= 256
