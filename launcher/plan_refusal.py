"""What to say when a run does not fit: the sizes on every rank, and the nearest settings that would fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from launcher.config import MAX_CARDS, KVDType
from launcher.hardware import Inventory
from launcher.memory import Demand
from launcher.memory_fit import fits, group_lines, largest_context
from launcher.memory_kv import host_kv_bytes
from launcher.memory_streamed import ring_bytes
from launcher.shape import quantized_shape
from launcher.topology import PlanError
from launcher.units import GIB

# Kinds of model.quantize to advise, the nearest to the checkpoint first.
ADVISED_KINDS = ("int8", "int4")


def refuse_memory(
    demand: Demand, budgets: tuple[int, ...], inventory: Inventory, max_context: int, knobs: str
) -> PlanError:
    """The error for a run whose sequences of `max_context` tokens do not fit, or whose weights alone do not.

    Args:
        knobs: what decided on `max_context`: a key, or a sum of keys.
    """
    fixed = demand.fixed_lines()
    weights_fit = all(sum(lines.values()) <= budget for lines, budget in zip(fixed, budgets, strict=True))
    if weights_fit:
        what = f"{_sequences(demand, max_context)} do"
        remedies = [*_smaller_runs(demand, budgets, max_context, knobs)]
    else:
        what = f"the weights in {_format(demand)} do"
        remedies = []
    remedies += [*_other_runs(demand, budgets, inventory, max_context), *_streaming(demand, budgets, max_context)]
    remedies += _kv_on_host(demand, budgets, max_context)
    lines = demand.lines(max_context) if weights_fit else fixed
    sizes = [_rank_text(rank, lines[rank], budgets[rank], inventory) for rank in range(demand.world_size)]
    remedies = remedies or ["a smaller model, or more memory"]
    return PlanError("\n".join([f"{what} not fit (predicted):", *sizes, f"What would fit: {'; or '.join(remedies)}."]))


def refuse_host_memory(
    demand: Demand,
    budgets: tuple[int, ...],
    inventory: Inventory,
    max_context: int,
    needed_bytes: int,
    free_bytes: int,
    own_remedies: Sequence[str],
) -> PlanError:
    """The error for a run whose streamed layers do not fit into host memory.

    Args:
        needed_bytes: of host memory, for the layers and all else of the ranks.
        own_remedies: settings by which less lies there.
    """
    num_hosted, num_layers = demand.num_streamed - demand.num_disk, demand.shape.num_layers
    if num_hosted:
        what = f"{num_hosted} of {num_layers} layers in {_format(demand)} do not fit the cards and would be streamed " \
            "from host memory, which does not suffice"  # fmt: skip
        parts = f"{sum(demand.host_bytes()) / GIB:.2f} GiB for them and the embedding"
    else:
        what = "host memory does not suffice, with every layer that is not on a card on the disk (offload.disk)"
        parts = f"{sum(demand.host_bytes()) / GIB:.2f} GiB for the embedding"
    if demand.num_disk:
        parts += f" and {sum(ring_bytes(demand)) / GIB:.2f} to read others ahead"
    if demand.num_kv_hosted:
        kv_bytes = sum(host_kv_bytes(demand, max_context))
        parts += f", {kv_bytes / GIB:.2f} for keys and values of {_sequences(demand, max_context)}"
    remedies = [*_other_runs(demand, budgets, inventory, 1), *own_remedies, "more free host memory"]
    is_free = free_bytes in (inventory.host_memory_bytes, inventory.host_free_bytes)
    state = "are free" if is_free else "may be used (limits.host_memory_gib)"
    return PlanError(
        f"{what}: with {parts} the run needs {needed_bytes / GIB:.2f} (predicted), and {free_bytes / GIB:.2f} of "
        f"{inventory.host_memory_bytes / GIB:.2f} {state}.\nWhat would fit: {'; or '.join(remedies)}."
    )


def _other_runs(demand: Demand, budgets: tuple[int, ...], inventory: Inventory, max_context: int) -> list[str]:
    """More cards or fewer bits, nothing being streamed."""
    whole = replace(demand, num_streamed=0)
    return [*_more_cards(whole, budgets, inventory, max_context), *_fewer_bits(whole, budgets, max_context)]


def _streaming(demand: Demand, budgets: tuple[int, ...], max_context: int) -> Iterator[str]:
    """Layers in host memory, where none is there yet."""
    num_layers = demand.shape.num_layers
    if demand.num_streamed or demand.device == "cpu":
        return
    for kv_on_host in sorted({demand.kv_on_host, True}):
        for num in range(1, num_layers + 1):
            if fits(replace(demand, num_streamed=num, kv_on_host=kv_on_host), budgets, max_context):
                with_kv = " with offload.kv=host" if kv_on_host > demand.kv_on_host else ""
                what = f"streams {num} of {num_layers} layers from host memory in every pass"
                yield f"offload.enabled=on{with_kv}, which {what}"
                return


def _kv_on_host(demand: Demand, budgets: tuple[int, ...], max_context: int) -> Iterator[str]:
    """Keys and values beside their layers, where some of these are in host memory already."""
    hosted = replace(demand, kv_on_host=True)
    if demand.device == "cuda" and hosted.num_kv_hosted > demand.num_kv_hosted and fits(hosted, budgets, max_context):
        yield f"offload.kv=host, which keeps keys and values of {hosted.num_kv_hosted} layers in host memory"


def _sequences(demand: Demand, max_context: int) -> str:
    return f"sequences of {max_context} tokens with workload.batch_size={demand.batch_size}"


def _smaller_runs(demand: Demand, budgets: tuple[int, ...], max_context: int, knobs: str) -> Iterator[str]:
    """Settings that need no other hardware."""
    most = largest_context(demand, budgets, max_context)
    if most >= 2:
        yield f"sequences of up to {most} tokens ({knobs}={most})"
    if demand.kv_dtype != KVDType.fp8.value and fits(replace(demand, kv_dtype=KVDType.fp8.value), budgets, max_context):
        yield "engine.kv_dtype=fp8"
    for batch_size in range(demand.batch_size - 1, 0, -1):
        if fits(replace(demand, batch_size=batch_size), budgets, max_context):
            yield f"workload.batch_size={batch_size}"
            return


def _more_cards(demand: Demand, budgets: tuple[int, ...], inventory: Inventory, max_context: int) -> Iterator[str]:
    """The smallest larger number of cards like the smallest one here."""
    if demand.device == "cpu":
        return
    num_cards = _smallest_num_cards(demand, min(budgets), max_context, demand.world_size + 1)
    if num_cards is not None:
        more = "" if num_cards <= len(inventory.cards) else f" with {num_cards} such cards"
        yield f"gpus={num_cards}{more}"


def _fewer_bits(demand: Demand, budgets: tuple[int, ...], max_context: int) -> Iterator[str]:
    """The settings of model.quantize that fit here; where none does, the fewest cards that 4 bits need."""
    if demand.shape.quantization != "none":
        return
    smaller = {kind: replace(demand, shape=quantized_shape(demand.shape, kind)) for kind in ADVISED_KINDS}
    fitting = [f"model.quantize={kind}" for kind, each in smaller.items() if fits(each, budgets, max_context)]
    if not fitting and demand.device != "cpu":
        num_cards = _smallest_num_cards(smaller["int4"], min(budgets), max_context, 1)
        fitting = [f"model.quantize=int4 on gpus={num_cards}"] if num_cards is not None else []
    if fitting:
        yield " or ".join(fitting) + _none_as_it_is(demand, budgets, max_context)


def _none_as_it_is(demand: Demand, budgets: tuple[int, ...], max_context: int) -> str:
    """That more cards would not do; empty where they would, and on the CPU."""
    if demand.device == "cpu" or _smallest_num_cards(demand, min(budgets), max_context, 1) is not None:
        return ""
    return f" (in {_format(demand)} no number of such cards from 1 to {MAX_CARDS})"


def _smallest_num_cards(demand: Demand, budget: int, max_context: int, start: int) -> int | None:
    for num_cards in range(start, min(MAX_CARDS, demand.shape.num_kv_heads) + 1):
        transport = demand.transport if num_cards == 1 else "nccl"
        if fits(replace(demand, world_size=num_cards, transport=transport), (budget,) * num_cards, max_context):
            return num_cards
    return None


def _format(demand: Demand) -> str:
    return demand.dtype if demand.shape.quantization == "none" else demand.shape.quantization


def _rank_text(rank: int, lines: dict[str, int], budget: int, inventory: Inventory) -> str:
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in group_lines(lines).items() if size)
    where = f"rank {rank} on the CPU"
    free = ""
    if inventory.cards:
        card = inventory.cards[rank]
        where = f"rank {rank} on card {card.index} ({card.name})"
        free = " free" if card.free_bytes == budget else ""
    return f"  {where}: {sum(lines.values()) / GIB:.2f} GiB of {budget / GIB:.2f}{free}: {parts}"
