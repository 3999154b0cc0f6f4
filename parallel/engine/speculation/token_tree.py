"""Trees of drafts, one for each row, of static shapes; and what of them came true."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.engine.speculation.tree_plan import TreePlan
from parallel.kernels.node_bits import bits_of, num_words, pack_bits

NO_TOKEN = -1
ROOT = -1


@dataclass(frozen=True)
class Candidates:
    """What may be nodes of a tree, parents before their children: [rows, n] each, and `depths` [n].

    `parents`: places among the candidates, ROOT for the newest token. `scores`: the best are taken; a child's is never
    above its parent's, -inf is no node. `places`: in the draft model's cache, in slots after the newest token's; 0 for
    what it does not have. No two children of a node have the same token.
    """

    tokens: Tensor
    parents: Tensor
    depths: Tensor
    scores: Tensor
    places: Tensor


@dataclass(frozen=True)
class TokenTree:
    """Nodes [rows, size] int64, the first of them the newest token, parents before their children.

    `tokens` are NO_TOKEN where there is no node; `parents` are places in the tree, `masks` [rows, size, words] the bits
    of a node and its ancestors, `places` as Candidates'.
    """

    tokens: Tensor
    parents: Tensor
    depths: Tensor
    masks: Tensor
    places: Tensor

    def __getitem__(self, rows: slice) -> TokenTree:
        columns = (self.tokens, self.parents, self.depths, self.masks, self.places)
        return TokenTree(*(column[rows] for column in columns))


def choose_nodes(newest: Tensor, found: Candidates, plan: TreePlan) -> TokenTree:
    """The tree of the `newest` tokens [rows] and the best candidates: the best tree, as scores only fall.

    The same on every rank that has the same candidates: of equal ones the first is taken.
    """
    found = fill_up(found, plan.size - 1)
    order = found.scores.sort(dim=1, descending=True, stable=True).indices
    ranks = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    # Places in the tree come after the newest token's.
    parents = torch.where(found.parents == ROOT, 0, ranks.gather(1, found.parents.clamp(min=0)) + 1)
    tokens = torch.where(found.scores > -torch.inf, found.tokens, NO_TOKEN)
    depths = found.depths.expand_as(order)

    def chosen(values: Tensor) -> Tensor:
        """Of the newest token, for which it is 0, and of those taken."""
        return torch.nn.functional.pad(values.gather(1, order[:, : plan.size - 1]), (1, 0))

    parents = chosen(parents).clamp(max=plan.size - 1)
    tokens = torch.cat([newest.unsqueeze(1), chosen(tokens)[:, 1:]], dim=1)
    return TokenTree(tokens, parents, chosen(depths), lineages(parents, plan.depth), chosen(found.places))


def lineages(parents: Tensor, depth: int) -> Tensor:
    """[rows, size, words] int64: the bits of each node and of its ancestors, in trees of at most so many levels below
    the first."""
    size = parents.shape[1]
    own = bits_of(torch.arange(size, device=parents.device), num_words(size)).expand(*parents.shape, -1)
    masks, above = own, parents.unsqueeze(2).expand_as(own)
    for _ in range(depth):
        masks = own | masks.gather(1, above)
    return masks


def follow(tree: TokenTree, drawn: Tensor, active: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    """How far what the model has `drawn` [rows, size] after each node goes along the tree.

    A node came true where it is what was drawn after its parent, and its parent came true. Returns the nodes [rows,
    1 + depth] that did, from the newest token on, and how many [rows]; 0 where that is not `active` [rows, size].
    """
    nodes = torch.arange(drawn.shape[1], device=drawn.device)
    right = (tree.tokens == drawn.gather(1, tree.parents)) | (nodes == 0)
    true_bits = pack_bits(right * active).unsqueeze(1)
    kept = ((tree.masks & ~true_bits) == 0).all(2)
    # Of those at one depth at most one is kept; the others go to a column of their own.
    path = nodes.new_zeros(len(drawn), depth + 2)
    path.scatter_(1, torch.where(kept, tree.depths, depth + 1), nodes.expand_as(drawn))
    return path[:, : depth + 1], kept.sum(1)


def fill_up(found: Candidates, num: int) -> Candidates:
    """At least `num` candidates."""
    missing = max(0, num - found.tokens.shape[1])
    if missing == 0:
        return found
    pad = torch.nn.functional.pad
    return Candidates(
        pad(found.tokens, (0, missing), value=NO_TOKEN),
        pad(found.parents, (0, missing), value=ROOT),
        pad(found.depths, (0, missing), value=1),
        pad(found.scores, (0, missing), value=-torch.inf),
        pad(found.places, (0, missing)),
    )
