"""Every mistake on a command line at once: Hydra stops at the first, so each override is also tried by itself."""

from __future__ import annotations

from collections.abc import Sequence

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

# What Hydra says -> how to write it in its place.
HINTS = {
    (
        "mismatched input", "extraneous input", "no viable alternative", "token recognition error",
        "LexerNoViableAlt", "Error parsing override",
    ): "Quote a value with special characters twice, \"prompt='f(x) = ...'\", or use prompts_file=FILE.",
    (
        "Ambiguous value",
    ): "Several values, one a run, need -m; quote a text with commas twice, \"prompt='a, b'\"; a list is KEY=[a,b].",
    ("Could not find 'model/",): "Any other checkpoint: model=local model.path=FOLDER, or its name on the hub.",
}  # fmt: skip


def explain_composition(error: Exception, arguments: Sequence[str]) -> str:
    """One message with what Hydra said and what it would have said of the other overrides."""
    overrides = [argument for argument in arguments if is_plain_override(argument)]
    sound = [override for override in overrides if try_overrides([override]) is None]
    # Some make sense only beside others: model.shape.num_layers needs a model that has a shape.
    others = (try_overrides([*sound, override]) for override in overrides if override not in sound)
    return "\n".join(dict.fromkeys([first_line(error), *(message for message in others if message)]))


def composition_hint(message: str) -> str:
    """How to write what Hydra could not read, or took for something else; empty where that is not the trouble."""
    return " ".join(hint for texts, hint in HINTS.items() if any(text in message for text in texts))


def is_plain_override(argument: str) -> bool:
    """Whether an argument sets one value of this project's config: no flag, no sweep, no setting of Hydra's own."""
    if argument.startswith("-") or "=" not in argument:
        return False
    try:
        parsed = OverridesParser.create().parse_override(argument)
    except HydraException:
        return True
    return not parsed.is_sweep_override() and not (parsed.key_or_group or "").startswith("hydra")


def try_overrides(overrides: Sequence[str]) -> str | None:
    """What Hydra says of these overrides; None if it composes them."""
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module("conf", version_base="1.3"):
            compose("config", overrides=list(overrides))
    except (HydraException, OmegaConfBaseException, AssertionError) as error:
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
        text += f" ({str(error.__cause__).splitlines()[0]})" + known_keys(error.__cause__)
    return text


def known_keys(error: OmegaConfBaseException) -> str:
    """The keys beside one that there is not; empty where that is not the trouble."""
    section = error.parent_node
    if not isinstance(error, ConfigKeyError | ConfigAttributeError) or not isinstance(section, DictConfig):
        return ""
    return f" Keys there: {', '.join(str(key) for key in section if key != 'hydra')}."
