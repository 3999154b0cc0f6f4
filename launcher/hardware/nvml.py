"""NVML without surprises: a session that may be absent, questions that may go unanswered, and which cards CUDA sees."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

_LOG = logging.getLogger(__name__)

# Constants of nvml.h, so that pynvml is imported only where it is asked. Its own NVML_P2P_CAPS_INDEX_READ could not be
# used anyway: nvidia-ml-py 13.615 ends that line with a comma, which makes a tuple that ctypes refuses.
CLOCK_SM = 1
CLOCK_MEMORY = 2
TEMPERATURE_GPU = 0
PCIE_TX = 0
PCIE_RX = 1
MAX_NVLINKS = 36
P2P_READ = 0
P2P_NVLINK = 2
P2P_STATUS_OK = 0


def ask(name: str, *args: Any) -> Any:
    """The answer of pynvml's function `name`; None where card, driver or pynvml does not support the question."""
    try:
        import pynvml
    except ImportError:
        return None
    function = getattr(pynvml, name, None)
    try:
        return None if function is None else function(*args)
    except pynvml.NVMLError:
        return None


def ask_first(names: Sequence[str], *args: Any) -> Any:
    """The first answer among functions that ask the same under old and new names; None where none answers."""
    return next((answer for name in names if (answer := ask(name, *args)) is not None), None)


@contextmanager
def session() -> Iterator[bool]:
    """NVML, started and shut down again. Gives False where there is no NVML or it does not answer; raises nothing."""
    started = _start()
    try:
        yield started
    finally:
        if started:
            ask("nvmlShutdown")


def _start() -> bool:
    try:
        import pynvml
    except ImportError:
        return False
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError_LibraryNotFound:
        return False
    except pynvml.NVMLError as error:
        # A driver is there but broken (often updated without a restart): worth a word, unlike a machine without cards.
        _LOG.warning("NVML is installed but does not answer (%s): no card is counted. Does nvidia-smi work?", error)
        return False
    return True


def visible_positions(visible: str | None, uuids: Sequence[str]) -> list[int]:
    """Which cards CUDA shows, in CUDA's order, as positions in `uuids` (all cards, in order of PCI bus).

    CUDA's rules for `visible` (the value of CUDA_VISIBLE_DEVICES): unset shows all; entries are indices or UUIDs, which
    may be shortened while they stay unique; the first invalid entry ends the list; a card named twice leaves none.
    The first entry decides whether all are indices or UUIDs, as in torch.cuda.
    """
    if visible is None:
        return list(range(len(uuids)))
    position = _position_of_uuid if visible.startswith("GPU-") else _position_of_index
    positions: list[int] = []
    for entry in visible.split(","):
        found = position(entry, uuids)
        if found is None:
            break
        if found in positions:
            return []
        positions.append(found)
    return positions


def _position_of_index(entry: str, uuids: Sequence[str]) -> int | None:
    # The driver reads the digits that an entry starts with (strtoul) and passes over the rest.
    digits = re.match(r"\s*\+?(\d+)", entry)
    return int(digits[1]) if digits and int(digits[1]) < len(uuids) else None


def _position_of_uuid(entry: str, uuids: Sequence[str]) -> int | None:
    matches = [place for place, uuid in enumerate(uuids) if entry.startswith("GPU-") and uuid.startswith(entry)]
    return matches[0] if len(matches) == 1 else None
