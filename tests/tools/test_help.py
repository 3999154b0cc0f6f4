"""Every tool that is started by its name answers --help, in place of starting its work."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest

import tools

SOURCES = {path.stem: path.read_text(encoding="utf-8") for path in Path(tools.__path__[0]).glob("*.py")}
# Quick to import; of the others only that they read their arguments.
TORCH_FREE = ("claims", "compare", "health", "predictions", "queue", "results_table", "slurm")


def test_tools_that_are_started_read_their_arguments() -> None:
    started = [name for name, source in SOURCES.items() if '__name__ == "__main__"' in source]
    assert len(started) > 20
    assert [name for name in started if not re.search(r"\.parse_\w*args\(", SOURCES[name])] == []


@pytest.mark.parametrize("name", TORCH_FREE)
def test_tool_says_what_it_does(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"tools.{name}").main()
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: python -m tools.{name} ")
