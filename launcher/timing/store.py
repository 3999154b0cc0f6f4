"""Where calibrations are kept: one file for each machine-like thing that rates depend on."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from launcher.timing.fit import Calibration
from launcher.whole_file import write_whole


def calibration_path(card: str, world_size: int, *, peer_access: bool, sums: Sequence[str] = ()) -> Path:
    """$XDG_CACHE_HOME/launch70b/rates, in ~/.cache where it is not set.

    Args:
        sums: how ranks add up, where not as they do by default.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    words = [re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-"), f"x{world_size}"]
    if world_size > 1 and not peer_access:
        words.append("no-peer-access")
    words += sums if world_size > 1 else ()
    return root / "launch70b" / "rates" / f"{'-'.join(words)}.json"


def save_calibration(path: Path, calibration: Calibration) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, TypeAdapter(Calibration).dump_json(calibration, indent=1).decode())


def load_calibration(path: Path) -> Calibration | None:
    """None where there is none, or one of another version of this program."""
    try:
        return TypeAdapter(Calibration).validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None
