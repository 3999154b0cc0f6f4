"""Trees of drafts, against plain Python that walks them node by node."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from parallel.communicator import Communicator
from parallel.engine.noise import exponential_noise
from parallel.engine.rows import Rows
from parallel.engine.sampling import Sampler, SamplingParams, VocabularyShards
from parallel.engine.speculation.ngram import continuations
from parallel.engine.speculation.token_tree import NO_TOKEN, ROOT, Candidates, TokenTree, choose_nodes, follow
from parallel.engine.speculation.tree_ngram import merge
from parallel.engine.speculation.tree_plan import TreePlan
from parallel.engine.tree_rows import tree_rows
from parallel.transports.solo import Solo
from tests.parallel.ranks import CPU, run_on_ranks
from tests.parallel.trees import words_of

VOCABULARY = 100
# 11 tokens to two and three ranks.
SHARDS = {1: (11,), 2: (6, 5), 3: (7, 3, 1)}
DRAWS = [SamplingParams(), SamplingParams(0.7, seed=5), SamplingParams(1.3, top_k=3, seed=6)]


def random_candidates(draw: random.Random, rows: int, num: int, depth: int) -> Candidates:
    """Nodes that hang on any before them. Some scores are equal to the parent's, some nodes are none."""
    depths = sorted(draw.randint(1, depth) for _ in range(num))
    depths[0] = 1
    for i, (before, after) in enumerate(pairwise(depths), 1):
        depths[i] = min(after, before + 1, depths[i - 1] + 1)
    parents, scores = [], []
    for _ in range(rows):
        own_parents, own_scores = list[int](), list[float]()
        for depth_here in depths:
            above = [i for i in range(len(own_parents)) if depths[i] == depth_here - 1]
            parent = ROOT if depth_here == 1 else draw.choice(above)
            start = 0.0 if parent == ROOT else own_scores[parent]
            own_parents.append(parent)
            own_scores.append(draw.choice([start, start - draw.random(), start - draw.random(), -torch.inf]))
        parents.append(own_parents)
        scores.append(own_scores)
    tokens = torch.stack([torch.randperm(max(VOCABULARY, num))[:num] for _ in range(rows)])
    places = torch.randint(100, (rows, num))
    return Candidates(tokens, torch.tensor(parents), torch.tensor(depths), torch.tensor(scores), places)


def lineage(tree: TokenTree, row: int, node: int) -> list[int]:
    """A node and those above it, up to the newest token."""
    nodes = [node]
    while nodes[-1] != 0:
        nodes.append(int(tree.parents[row, nodes[-1]]))
    return nodes


@pytest.mark.parametrize(
    ("num", "plan"),
    [(30, TreePlan(13, 5, 1)), (30, TreePlan(31, 6, 1)), (5, TreePlan(9, 3, 1)), (200, TreePlan(150, 9, 1))],
)
def test_the_best_candidates_become_a_tree(num: int, plan: TreePlan) -> None:
    found = random_candidates(random.Random(num), 40, num, plan.depth)
    newest = torch.randint(VOCABULARY, (40,))
    tree = choose_nodes(newest, found, plan)
    assert tree.tokens.shape == (40, plan.size)
    assert torch.equal(tree.tokens[:, 0], newest)
    for row in range(40):
        place_of = {int(token): i for i, token in enumerate(found.tokens[row])}
        nodes = [node for node in range(1, plan.size) if tree.tokens[row, node] != NO_TOKEN]
        chosen = [place_of[int(tree.tokens[row, node])] for node in nodes]
        best = sorted((score for score in found.scores[row].tolist() if score > -torch.inf), reverse=True)
        assert found.scores[row, chosen].tolist() == best[: plan.size - 1]
        for node, place in zip(nodes, chosen, strict=True):
            parent = int(tree.parents[row, node])
            assert parent < node
            assert tree.depths[row, node] == found.depths[place] == tree.depths[row, parent] + 1
            assert tree.places[row, node] == found.places[row, place]
            if found.parents[row, place] == ROOT:
                assert parent == 0
            else:
                assert tree.tokens[row, parent] == found.tokens[row, found.parents[row, place]]
            mask = sum(1 << each for each in lineage(tree, row, node))
            assert tree.masks[row, node].tolist() == words_of(mask, -(-plan.size // 64))


def walk(tree: TokenTree, drawn: Tensor, active: Tensor, row: int) -> list[int]:
    path = [0] if active[row, 0] else []
    while path:
        children = [n for n in range(1, drawn.shape[1]) if active[row, n] and tree.parents[row, n] == path[-1]]
        right = [n for n in children if tree.tokens[row, n] == drawn[row, path[-1]]]
        if not right:
            break
        path += right
    return path


@pytest.mark.parametrize("size", [2, 12, 64, 65, 256])
def test_the_branch_that_was_drawn_is_followed_to_its_end(size: int) -> None:
    plan = TreePlan(size, 6, 1)
    found = random_candidates(random.Random(size), 60, size + 10, plan.depth)
    tree = choose_nodes(torch.randint(VOCABULARY, (60,)), found, plan)
    drawn = torch.randint(VOCABULARY, (60, size))
    # Most parents draw one of their children; the last that is written wins.
    for row, node in torch.nonzero((torch.rand(60, size)[:, 1:] < 0.7) & (tree.tokens[:, 1:] >= 0)).tolist():
        drawn[row, tree.parents[row, node + 1]] = tree.tokens[row, node + 1]
    active = (tree.tokens >= 0).long() * (torch.rand(60, size) < 0.95)
    active[:, 0] = torch.arange(60) % 7 > 0
    path, counts = follow(tree, drawn, active, plan.depth)
    walked = [walk(tree, drawn, active, row) for row in range(60)]
    assert [nodes[:count] for nodes, count in zip(path.tolist(), counts.tolist(), strict=True)] == walked
    lengths = {len(each) for each in walked}
    assert {0, 2} <= lengths


def test_continuations_are_merged_where_they_begin_alike() -> None:
    draw = random.Random(1)
    found = torch.tensor([[[draw.randrange(3) for _ in range(4)] for _ in range(7)] for _ in range(50)])
    found[::5, 4:] = NO_TOKEN
    found[::9] = NO_TOKEN
    plan = TreePlan(12, 4, 1)
    tree = choose_nodes(torch.full((50,), 9), merge(found), plan)
    for row, ways in enumerate(found.tolist()):
        wanted: dict[tuple[int, ...], None] = {}
        for way in ways:
            if NO_TOKEN not in way:
                wanted |= dict.fromkeys(tuple(way[:length]) for length in range(1, 5))
        nodes = [node for node in range(1, plan.size) if tree.tokens[row, node] != NO_TOKEN]
        texts = [tuple(int(tree.tokens[row, n]) for n in reversed(lineage(tree, row, node)[:-1])) for node in nodes]
        assert texts == list(wanted)[: plan.size - 1]


def test_matches_come_longest_and_then_latest_first() -> None:
    draw = random.Random(3)
    texts = [[draw.randrange(3) for _ in range(draw.randint(4, 30))] for _ in range(200)]
    rows = torch.tensor([text + [0] * (31 - len(text)) for text in texts], dtype=torch.int32)
    found = continuations(rows, torch.tensor([len(text) - 1 for text in texts]), 3, 3, 1, 5)
    for ways, text in zip(found.tolist(), texts, strict=True):
        matches = []
        for end in range(len(text) - 1):
            length = max(n for n in range(4) if n <= end + 1 and text[end + 1 - n : end + 1] == text[len(text) - n :])
            if length:
                copy = list(text)
                for i in range(3):
                    copy.append(copy[end + 1 + i])
                matches.append((length, end, copy[len(text) :]))
        best = [following for _, _, following in sorted(matches, reverse=True)][:5]
        assert ways == best + [[NO_TOKEN] * 3] * (5 - len(best))


def guesses(communicator: Communicator, logits: Tensor, params: SamplingParams, num: int) -> tuple[Tensor, Tensor]:
    shards = VocabularyShards(SHARDS[communicator.world_size])
    start = shards.start(communicator.rank)
    local = logits[:, start : start + shards.sizes[communicator.rank]]
    rows = torch.arange(len(logits))
    return Sampler(params, shards, communicator).guesses(local, rows * 7, rows % 5, num)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_guesses_are_the_best_of_all_shards(world_size: int) -> None:
    logits = torch.randn(20, 11) * 2
    rows = torch.arange(20)
    for params in DRAWS:
        noise = exponential_noise(rows * 7, rows % 5, 11).double()
        scores = logits.double()
        if params.temperature:
            # In float32, where two that differ may become equal, and top_k keeps both.
            scores = (logits / params.temperature).double()
            if params.top_k:
                scores[scores < scores.topk(params.top_k).values[:, -1:]] = -torch.inf
            scores = params.temperature * (scores - noise.log())
        wanted = scores.log_softmax(-1).sort(descending=True)
        for tokens, chances in run_on_ranks(guesses, world_size, logits, params, 4):
            # Of two that are next to equal either may come first.
            assert all(len(set(row)) == 4 for row in tokens.tolist())
            found = scores.log_softmax(-1).gather(1, tokens)
            torch.testing.assert_close(found, wanted.values[:, :4], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(chances.double(), wanted.values[:, :4], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("params", DRAWS, ids=str)
def test_the_first_guess_is_what_would_be_drawn(params: SamplingParams) -> None:
    logits = torch.randn(500, 11)
    rows, sampler = torch.arange(500), Sampler(params, VocabularyShards((11,)), Solo(CPU))
    tokens, chances = sampler.guesses(logits, rows * 7, rows % 5, 20)
    drawn = sampler(logits, rows * 7, rows % 5)
    # The race has another formula: of two that are next to equal either may win.
    is_close = chances[:, 0] - chances[:, 1] < 1e-4
    second = torch.where(is_close & (params.temperature > 0), tokens[:, 1], tokens[:, 0])
    assert ((drawn == tokens[:, 0]) | (drawn == second)).all()
    # top_k keeps all that are equal at its edge, which hardly any row has.
    assert float(((chances > -torch.inf).sum(1) == (params.top_k or 11)).double().mean()) > 0.98
    assert (chances.diff(dim=1)[:, :2] <= 0).all()


def test_nodes_lie_behind_their_sequence_and_stand_at_their_depth() -> None:
    """Of three sequences, the second at its end and the third nobody."""
    rows = Rows.empty(3, 3, CPU)
    rows.positions.copy_(torch.tensor([62, 6, 0]))
    rows.active.copy_(torch.tensor([1, 1, 0]))
    rows.keys.copy_(torch.tensor([40, 41, 42]))
    rows.ends.copy_(torch.tensor([90, 8, 0]))
    rows.block_table.copy_(torch.tensor([[3, 4, 5], [6, 7, 8], [0, 0, 0]]))
    tokens = torch.tensor([[5, 6, 7, -1], [8, 9, 9, 9], [1, 2, 3, 4]])
    depths = torch.tensor([[0, 1, 1, 2]] * 3)
    masks = torch.tensor([[1, 3, 5, 9]] * 3).unsqueeze(2)
    nodes = tree_rows(rows, tokens, depths, masks, first=0, start=0)
    page = 64
    assert nodes.tokens.tolist() == [5, 6, 7, 0, 8, 9, 9, 9, 1, 2, 3, 4]
    assert nodes.positions.tolist() == [62, 63, 63, 64, 6, 7, 7, 7, 0, 0, 0, 0]
    assert nodes.active.tolist() == [1, 1, 1, 0, 1, 1, 1, 0, 0, 0, 0, 0]
    assert (
        nodes.slots.tolist()
        == [3 * page + 62, 3 * page + 63, 4 * page, 4 * page + 1] + [6 * page + at for at in (6, 7, 8, 9)] + [0] * 4
    )
    assert nodes.keys.tolist() == [40] * 4 + [41] * 4 + [42] * 4
    assert nodes.sequence_lengths().tolist() == [66, 10, 0]
    assert nodes.tree().starts.tolist()[:2] == [62, 6]
    assert nodes.tree().masks.flatten().tolist() == [1, 3, 5, 0, 1, 3, 5, 0, 0, 0, 0, 0]
    later = tree_rows(rows, tokens[:, :2], depths[:, 2:], masks[:, :2], first=3, start=1)
    assert later.slots.tolist() == [4 * page + 1, 4 * page + 2, 6 * page + 9, 6 * page + 10, 0, 0]
    assert later.sequence_lengths().tolist() == [67, 11, 0]
    assert later.tree().starts.tolist()[:2] == [63, 7]
