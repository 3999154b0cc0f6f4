"""Which layers of a model are streamed from host memory; without torch, for plans."""

from __future__ import annotations

# Layers that lie on the card at a time: one computes while the next is copied.
NUM_STAGED = 2


def spread_layers(num_layers: int, num_streamed: int) -> tuple[int, ...]:
    """Indices of the streamed layers, at distances that differ by at most one, also from the last to the first of the
    next pass.

    A copy may begin once the layer two places before it has computed, so it hides behind what computes from there to
    its own place. Equal distances make the least of these times as large as it can be.
    """
    return tuple((2 * place + 1) * num_layers // (2 * num_streamed) for place in range(num_streamed))
