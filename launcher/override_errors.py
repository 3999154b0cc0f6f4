"""Every mistake on a command line at once: Hydra stops at the first, so each override is also tried alone."""

from __future__ import annotations

from collections.abc import Sequence

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException


def explain_composition(error: Exception, arguments: Sequence[str]) -> str:
    """One message with what Hydra said and what it would have said of the other overrides."""
    messages = [first_line(error)]
    for override in arguments:
        message = try_override(override)
        if message is not None and message not in messages:
            messages.append(message)
    return "\n".join(messages)


def try_override(override: str) -> str | None:
    """What is wrong with one override by itself; None if nothing is, or if it is no plain override."""
    try:
        parsed = OverridesParser.create().parse_override(override)
        if parsed.is_sweep_override() or (parsed.key_or_group or "").startswith("hydra"):
            return None
        GlobalHydra.instance().clear()
        with initialize_config_module("conf", version_base="1.3"):
            compose("config", overrides=[override])
    except (HydraException, OmegaConfBaseException) as error:
        return first_line(error)
    return None


def first_line(error: BaseException) -> str:
    """Hydra's message and the cause it wraps, without the hints for programmers below them."""
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else type(error).__name__
    if "Available options" in str(error):
        options, _, _ = str(error).partition("Config search path")
        text = " ".join(options.split())
    if isinstance(error.__cause__, OmegaConfBaseException):
        text += f" ({str(error.__cause__).splitlines()[0]})"
    return text
