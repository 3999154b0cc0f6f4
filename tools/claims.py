"""Published figures for RTX 4090s against what the hardware allows: `python -m tools.claims > docs/claims.md`.

The claims are docs/claims.json; each is one of three kinds, told by its keys: a speed (`tokens_per_sec`), a size (`gb`)
or a fact with its own reason. Of a speed's weights, `embedding_gb` are looked up and not read. The card is
conf/hardware/rtx4090.yaml.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from launcher.amounts import number
from launcher.plan.plan import DRIVER_RESERVED_BYTES
from parallel.units import GIB

ROOT = Path(__file__).parent.parent
GB = 1e9
# Two channels of DDR5-5600, as published: what a desktop's processor reads, for itself or for the cards.
HOST_GB_PER_SEC = 89.6
# A claimed size may be rounded or leave out the embedding.
SIZE_TOLERANCE = 0.05
INTRODUCTION = """# What is said about RTX 4090s, held against the hardware

Made by `python -m tools.claims` from docs/claims.json. One card: {memory:.1f} GB that a program can have,
{bandwidth:g} GB/s, PCIe {pcie}, no NVLink, no peer access.

A step at batch 1 reads every byte of the weights once, but for the embedding, of which it takes a row. On the cards
that takes bytes / (cards x {bandwidth:g} GB/s); what does not fit is read from the host's memory once a step, over the
link or by the processor, at {host:g} GB/s at best: a desktop's two channels of DDR5-5600. Both go on at once, and the
slower bounds tokens/s from above whatever the program. A batch shares a step, so that its ceiling is that of batch 1
times its size. Speculation shares one too and is another claim.

| claim | arithmetic | verdict |
|---|---|---|
"""


def main() -> None:
    argparse.ArgumentParser(prog="python -m tools.claims", description=__doc__).parse_args()
    print(render(json.loads((ROOT / "docs" / "claims.json").read_text(encoding="utf-8")), read_card()), end="")


def read_card() -> dict[str, Any]:
    card = OmegaConf.load(ROOT / "conf" / "hardware" / "rtx4090.yaml")
    assert isinstance(card, DictConfig)
    return dict(card)


def render(claims: list[dict[str, Any]], card: dict[str, Any]) -> str:
    head = INTRODUCTION.format(
        memory=usable_gb(card),
        bandwidth=card["memory_gb_per_sec"],
        pcie=f"{card['pcie_generation']}.0 x{card['pcie_lanes']}",
        host=HOST_GB_PER_SEC,
    )
    return head + "".join(f"| {claim['claim']} | {' | '.join(judge(claim, card))} |\n" for claim in claims)


def judge(claim: dict[str, Any], card: dict[str, Any]) -> tuple[str, str]:
    """Arithmetic and verdict."""
    return next(check for key, check in CHECKS.items() if key in claim)(claim, card)


def judge_fact(claim: dict[str, Any], card: dict[str, Any]) -> tuple[str, str]:
    return claim["fact"], "true" if claim["holds"] else "**false**"


def judge_size(claim: dict[str, Any], card: dict[str, Any]) -> tuple[str, str]:
    size, claimed = weights_gb(claim), claim["gb"]
    text = f"{claim['params_b']:g} B x {claim['bits']:g} bits = {size:.0f} GB"
    return text, "true" if abs(size - claimed) <= SIZE_TOLERANCE * size else f"**impossible**: {claimed:g} GB is not it"


def judge_speed(claim: dict[str, Any], card: dict[str, Any]) -> tuple[str, str]:
    batch, cards, read = claim.get("batch", 1), claim["cards"], weights_gb(claim) - claim["embedding_gb"]
    streamed = max(0.0, read - cards * usable_gb(card))
    cards_sec = (read - streamed) / (cards * card["memory_gb_per_sec"])
    ceiling = batch / max(cards_sec, streamed / HOST_GB_PER_SEC)
    return speed_text(claim, read, streamed, ceiling), speed_verdict(claim, streamed, ceiling)


def speed_text(claim: dict[str, Any], read: float, streamed: float, ceiling: float) -> str:
    size = f"{claim['params_b']:g} B x {claim['bits']:g} bits = {weights_gb(claim):.1f} GB"
    step = f"a step reads {read:.1f}" + (f", {streamed:.1f} of them in the host's memory" if streamed else "")
    of = f" from {claim['batch']} answers at a time" if "batch" in claim else ""
    return f"{size}; {step}: at most {number(ceiling)} tokens/s{of}"


def speed_verdict(claim: dict[str, Any], streamed: float, ceiling: float) -> str:
    fits = "" if not streamed else "does not fit; "
    share = claim["tokens_per_sec"] / ceiling
    if share <= 1:
        return f"{fits}possible, {share:.0%} of the ceiling"
    return f"{fits}**impossible** at batch {claim.get('batch', 1)}: {number(share)} times the ceiling"


CHECKS: dict[str, Callable[[dict[str, Any], dict[str, Any]], tuple[str, str]]] = {
    "fact": judge_fact,
    "gb": judge_size,
    "tokens_per_sec": judge_speed,
}


def weights_gb(claim: dict[str, Any]) -> float:
    return float(claim["params_b"] * claim["bits"] / 8)


def usable_gb(card: dict[str, Any]) -> float:
    return float((card["memory_gib"] * GIB - DRIVER_RESERVED_BYTES) / GB)


if __name__ == "__main__":
    main()
