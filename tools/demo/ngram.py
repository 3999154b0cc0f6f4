"""The baseline the demo model has to beat: a token trigram model with interpolated modified Kneser-Ney smoothing.

S. F. Chen, J. Goodman, "An Empirical Study of Smoothing Techniques for Language Modeling" (1998), the best of the
smoothings compared there. It has no free parameters: the discounts follow from the training counts, so nothing is
tuned on the held-out text.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

# For counts too small for the closed-form discounts (a unigram level, a test's toy corpus). Any value in [0, 1] gives a
# proper distribution; 0.75 is Church and Gale's (1991) average.
FALLBACK_DISCOUNT = 0.75


@dataclass(frozen=True)
class Level:
    """Discounted counts of one order. Keys are `context * vocab_size + token`, sorted; contexts likewise."""

    keys: Ints
    discounted: Floats
    contexts: Ints
    totals: Floats
    backoff: Floats


@dataclass(frozen=True)
class Trigram:
    """Levels from the highest order (context of two tokens) to the lowest (empty context, key 0)."""

    vocab_size: int
    levels: tuple[Level, ...]

    def probability(self, before_last: Ints, last: Ints, token: Ints) -> Floats:
        """P(token | before_last, last), elementwise over three arrays of one shape; never zero."""
        result = np.full(token.shape, 1.0 / self.vocab_size)
        contexts = (before_last * self.vocab_size + last, last, np.zeros_like(last))
        for level, context in zip(reversed(self.levels), reversed(contexts), strict=True):
            result = _interpolate(level, context, context * self.vocab_size + token, result)
        return result

    def loss(self, stream: Ints) -> float:
        """Mean negative log-likelihood in nats of `stream[2:]`, each token given the two before it."""
        return float(-np.log(self.probability(stream[:-2], stream[1:-1], stream[2:])).mean())


def fit_trigram(stream: Ints, vocab_size: int) -> Trigram:
    """Count `stream` (1-D token ids below `vocab_size`, up to 2**20) and smooth.

    Lower orders count in how many different contexts a token occurs, not how often (Kneser-Ney's continuation counts):
    distinct trigrams for the bigram level, distinct bigrams for the unigram level.
    """
    size = vocab_size
    trigrams, counts = np.unique((stream[:-2] * size + stream[1:-1]) * size + stream[2:], return_counts=True)
    bigrams, continuations = np.unique(trigrams % (size * size), return_counts=True)
    unigrams, spread = np.unique(bigrams % size, return_counts=True)
    pairs = ((trigrams, counts), (bigrams, continuations), (unigrams, spread))
    return Trigram(size, tuple(_fit_level(keys, counted, size) for keys, counted in pairs))


def discounts(counts: Ints) -> Floats:
    """What is taken off a count of 0, 1, 2 and 3 or more (Chen and Goodman, equation 26)."""
    ones, twos, threes, fours = (float((counts == n).sum()) for n in (1, 2, 3, 4))
    if min(ones, twos, threes, fours) == 0:
        return np.array([0.0] + [FALLBACK_DISCOUNT] * 3)
    ratio = ones / (ones + 2 * twos)
    raw = [0.0, 1 - 2 * ratio * twos / ones, 2 - 3 * ratio * threes / twos, 3 - 4 * ratio * fours / threes]
    return np.clip(raw, 0.0, [0.0, 1.0, 2.0, 3.0])


def _fit_level(keys: Ints, counts: Ints, vocab_size: int) -> Level:
    taken = discounts(counts)[np.minimum(counts, 3)]
    contexts, start = np.unique(keys // vocab_size, return_index=True)
    totals = np.add.reduceat(counts.astype(np.float64), start)
    return Level(keys, counts - taken, contexts, totals, np.add.reduceat(taken, start) / totals)


def _interpolate(level: Level, context: Ints, key: Ints, lower: Floats) -> Floats:
    """The level's own share plus the discounted mass spread as `lower`; an unseen context leaves `lower` as it is."""
    at, seen = _find(level.contexts, context)
    place, counted = _find(level.keys, key)
    own = np.where(counted, level.discounted[place], 0.0) / level.totals[at]
    return np.where(seen, own + level.backoff[at] * lower, lower)


def _find(table: Ints, wanted: Ints) -> tuple[Ints, NDArray[np.bool_]]:
    place = np.minimum(np.searchsorted(table, wanted), len(table) - 1)
    return place, table[place] == wanted
