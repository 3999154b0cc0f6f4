"""Whether runs can work in this container or on this host: python -m tools.health. Exit code 1 says they cannot.

The Dockerfile's health check. It starts no rank and imports no torch: task=probe and task=calibrate measure.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from launcher.config import HardwareConfig
from launcher.hardware.inventory import Inventory, read_inventory


def problems(inventory: Inventory, torch_cuda: str | None, folder: Path) -> Iterator[str]:
    """What is wrong, each with what to do about it.

    Args:
        torch_cuda: the version of CUDA that torch was built for; None: for CPUs.
        folder: where runs are written.
    """
    if not inventory.cards:
        yield "NVML shows no card. Does nvidia-smi work on the host? Containers need --gpus all."
    if torch_cuda is None:
        yield "torch is installed without CUDA. Install the wheel that pip chooses on its own."
    elif inventory.cuda is not None and major(inventory.cuda) < major(torch_cuda):
        yield (
            f"the driver ({inventory.driver}) knows CUDA up to {inventory.cuda}, but torch is built for {torch_cuda}. "
            "Update the driver of the host."
        )
    if not os.access(folder, os.W_OK):
        yield f"{folder} cannot be written. Start in a folder of yours, or set hydra.run.dir=FOLDER."


def major(version: str) -> int:
    return int(version.partition(".")[0])


def installed_torch_cuda() -> str | None:
    """By the file that torch has it from, for torch takes seconds to import."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    found = re.search(r"^cuda\b[^=]*= *'([^']+)'", text, re.MULTILINE)
    return found[1] if found else None


def main(argv: Sequence[str] | None = None) -> int:
    argparse.ArgumentParser(prog="python -m tools.health", description=__doc__).parse_args(argv)
    inventory = read_inventory(HardwareConfig(), 0)
    found = list(problems(inventory, installed_torch_cuda(), Path.cwd()))
    for problem in found:
        print(problem)
    if not found:
        names = ", ".join(card.name for card in inventory.cards)
        print(f"well: {names}; driver {inventory.driver}, CUDA {inventory.cuda}")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
