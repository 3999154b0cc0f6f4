"""The settings nearest to a run that does not fit with which it would, each tried as the plan would try it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from launcher.config import MAX_CARDS, KVDType, KVPlace, OffloadKind, RunConfig, WeightsKind
from launcher.hardware.inventory import Inventory
from launcher.memory.demand import Demand
from launcher.memory.fit import fits, largest
from launcher.models.shape import quantized_shape
from launcher.plan.offload_choice import refused_by_host, stream_layers
from launcher.plan.offload_disk import has_host_room, place_layers
from launcher.plan.prefill import hides_sums
from launcher.plan.topology import cards_knob, communicator_key, goes_over_nvlink

# Kinds of model.quantize to advise, the nearest to the checkpoint first.
ADVISED_KINDS = ("int8", "int4")


@dataclass(frozen=True)
class Refused:
    """A run that does not fit with sequences of `max_context` tokens."""

    run: RunConfig
    demand: Demand
    budgets: tuple[int, ...]
    inventory: Inventory
    max_context: int

    def would_fit(self, demand: Demand, max_context: int | None = None) -> bool:
        """On the cards, and in host memory where layers are streamed."""
        tokens = self.max_context if max_context is None else max_context
        on_cards = fits(demand, self.budgets, tokens)
        return on_cards and has_host_room(self.run, demand, self.inventory, tokens)

    @property
    def format(self) -> str:
        return self.demand.dtype if self.demand.shape.quantization == "none" else self.demand.shape.quantization


def other_runs(refused: Refused) -> list[str]:
    """More cards or fewer bits, nothing being streamed; neither where the cards hold it all."""
    whole = replace(refused, demand=replace(refused.demand, num_streamed=0))
    without = "" if refused.run.offload.resident_layers is None else " without offload.resident_layers"
    if without and whole.would_fit(whole.demand):
        return [f"the run{without}"]
    return [f"{remedy}{without}" for remedy in _more_cards(whole)] + [*_fewer_bits(whole, without)]


def smaller_runs(refused: Refused) -> Iterator[str]:
    """Settings that need no other hardware."""
    demand = refused.demand
    most = largest(lambda tokens: refused.would_fit(demand, tokens), refused.max_context)
    if most >= 2:
        yield shorter_sequences(refused.run, most)
    in_fp8 = replace(demand, kv_dtype=KVDType.fp8.value)
    if demand.kv_dtype != in_fp8.kv_dtype and refused.would_fit(in_fp8):
        yield "engine.kv_dtype=fp8"
    fewer = largest(lambda size: refused.would_fit(replace(demand, batch_size=size)), demand.batch_size - 1)
    if fewer:
        yield f"workload.batch_size={fewer}"
    if demand.captured_passes and refused.would_fit(replace(demand, captured_passes=0)):
        yield "engine.prefill_graphs=auto"


def shorter_sequences(run: RunConfig, most: int) -> str:
    """The keys that allow for sequences of `most` tokens: none may exceed engine.max_context."""
    knobs = [] if most >= run.needed_tokens else [f"workload.prompt_tokens + workload.output_tokens={most}"]
    if run.engine.max_context is not None or not knobs:
        knobs.append(f"engine.max_context={most}")
    return f"sequences of up to {most} tokens ({' and '.join(knobs)})"


def streaming(refused: Refused) -> Iterator[str]:
    """Layers in host memory, where none is there yet; more of them where offload.resident_layers says how many."""
    run, demand = refused.run, refused.demand
    if demand.device != "cpu" and run.offload.resident_layers is not None:
        yield from _fewer_resident(refused, run.offload.resident_layers)
        return
    if demand.num_streamed or demand.device == "cpu":
        return
    for kv in dict.fromkeys((run.offload.kv, *([] if run.offload.disk else [KVPlace.host]))):
        placed = _followed(refused, enabled=OffloadKind.on, kv=kv)
        is_made_up = placed.num_disk > 0 and run.model.weights == WeightsKind.dummy
        if placed.num_streamed and refused.would_fit(placed) and not is_made_up:
            with_kv = "" if kv == run.offload.kv else f" with offload.kv={kv.value}"
            where = "host memory and the disk" if placed.num_disk else "host memory"
            what = f"streams {placed.num_streamed} of {demand.shape.num_layers} layers from {where} in every pass"
            yield f"offload.enabled=on{with_kv}{_without_host_layers(refused)}, which {what}"
            return


def _followed(refused: Refused, **changes: Any) -> Demand:
    """As a run with such changes of its `offload` would be planned."""
    run = replace(refused.run, offload=replace(refused.run.offload, **changes))
    on_cards = replace(refused.demand, num_streamed=0, num_on_disk=0)
    return stream_layers(run, on_cards, refused.budgets, refused.inventory)


def _fewer_resident(refused: Refused, resident: int) -> Iterator[str]:
    """The most layers that may stay on the card, of fewer than were to."""
    run, demand, inventory = refused.run, refused.demand, refused.inventory
    for num in range(resident - 1, -1, -1):
        if refused.would_fit(place_layers(run, demand, inventory, demand.shape.num_layers - num)):
            yield f"offload.resident_layers={num}{_without_host_layers(refused)}"
            return


def _without_host_layers(refused: Refused) -> str:
    """Which are read only where layers are streamed, and may be such that the host cannot compute them."""
    return "" if refused_by_host(refused.run, refused.demand) is None else " without offload.host_layers"


def kv_on_host(refused: Refused) -> Iterator[str]:
    """Keys and values beside their layers, where some of these are in host memory already; offload.disk is for hosts
    that have no room for them."""
    if refused.demand.device == "cpu" or refused.run.offload.disk is not None:
        return
    hosted = _followed(refused, kv=KVPlace.host)
    if hosted.num_kv_hosted > refused.demand.num_kv_hosted and refused.would_fit(hosted):
        yield f"offload.kv=host, which keeps keys and values of {hosted.num_kv_hosted} layers in host memory"


def _more_cards(refused: Refused) -> Iterator[str]:
    """The smallest larger number of cards like the smallest one here."""
    if refused.demand.device == "cpu":
        return
    num_cards = _smallest_num_cards(refused, refused.demand, refused.demand.world_size + 1)
    if num_cards is not None:
        more = "" if num_cards <= len(refused.inventory.cards) else f" with {num_cards} such cards"
        yield f"{cards_knob(refused.run, num_cards)}{more}"


def _fewer_bits(refused: Refused, without: str) -> Iterator[str]:
    """The settings of model.quantize that fit here, each with what has to go; where none does, the fewest cards that 4
    bits need."""
    demand = refused.demand
    if demand.shape.quantization != "none":
        return
    smaller = {kind: replace(demand, shape=quantized_shape(demand.shape, kind)) for kind in ADVISED_KINDS}
    fitting = [f"model.quantize={kind}" for kind, each in smaller.items() if refused.would_fit(each)]
    if not fitting and demand.device != "cpu":
        num_cards = _smallest_num_cards(refused, smaller["int4"], 1)
        fitting = [f"model.quantize=int4 on {cards_knob(refused.run, num_cards)}"] if num_cards is not None else []
    if fitting:
        yield " or ".join(f"{each}{without}" for each in fitting) + _none_as_it_is(refused)


def _none_as_it_is(refused: Refused) -> str:
    """That more cards would not do; empty where they would, and on the CPU."""
    if refused.demand.device == "cpu" or _smallest_num_cards(refused, refused.demand, 1) is not None:
        return ""
    return f" (in {refused.format} no number of such cards from 1 to {MAX_CARDS})"


def _smallest_num_cards(refused: Refused, demand: Demand, start: int) -> int | None:
    budget = min(refused.budgets)
    for num_cards in range(start, min(MAX_CARDS, demand.shape.num_kv_heads) + 1):
        if fits(_spread(refused, demand, num_cards), (budget,) * num_cards, refused.max_context):
            return num_cards
    return None


def _spread(refused: Refused, demand: Demand, num_cards: int) -> Demand:
    """`demand` on so many cards."""
    run, over_nvlink = refused.run, goes_over_nvlink(refused.run, refused.inventory, num_cards)
    transport = "solo" if num_cards == 1 else communicator_key("nccl", over_nvlink=over_nvlink)
    hides = hides_sums(run, over_nvlink=over_nvlink)
    return replace(demand, world_size=num_cards, transport=transport, hides_sums=hides)
