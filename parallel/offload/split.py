"""How many of the layers in host memory the host computes itself while the others are streamed; without torch."""

from __future__ import annotations

from dataclasses import dataclass

from parallel.offload.spread import spread_layers

# A smaller gain is within what rates change from one time to another.
LEAST_GAIN = 0.05


@dataclass(frozen=True)
class PassCosts:
    """Of decode steps. `num_layers`: all; `num_offloaded`: of them in host memory.

    Seconds of one layer: `host_sec` on the host while others are copied, `copy_sec` copied meanwhile, `copy_alone_sec`
    copied while the host does nothing, `card_sec` computed by the card.
    """

    num_layers: int
    num_offloaded: int
    host_sec: float
    copy_sec: float
    copy_alone_sec: float
    card_sec: float

    def pass_sec(self, num_on_host: int) -> float:
        """Copies go on beside all else; card and host wait for each other."""
        copy_sec = self.copy_sec if num_on_host else self.copy_alone_sec
        computing = num_on_host * self.host_sec + (self.num_layers - num_on_host) * self.card_sec
        return max((self.num_offloaded - num_on_host) * copy_sec, computing)


def choose_num_on_host(costs: PassCosts) -> int:
    """The number that makes a pass shortest; none where that gains less than LEAST_GAIN."""
    best = min(range(costs.num_offloaded + 1), key=costs.pass_sec)
    return best if costs.pass_sec(best) <= (1 - LEAST_GAIN) * costs.pass_sec(0) else 0


def spread_on_host(offloaded: tuple[int, ...], num_on_host: int) -> tuple[int, ...]:
    """Which of the layers `offloaded` the host computes: as evenly among the others as can be, so that copies wait for
    none of them long."""
    return tuple(offloaded[place] for place in spread_layers(len(offloaded), num_on_host)) if num_on_host else ()
