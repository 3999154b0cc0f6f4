"""Every tool that is started by its name answers --help, in place of starting its work."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest

import tools

ROOT = Path(tools.__path__[0]).parent
SOURCES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path.read_text(encoding="utf-8")
    for path in Path(tools.__path__[0]).rglob("*.py")
}
STARTED = [name for name, source in SOURCES.items() if '__name__ == "__main__"' in source]
# Quick to import; of the others only that they read their arguments.
TORCH_FREE = ("claims", "compare", "health", "predictions", "queue", "results_table", "slurm")


def test_tools_that_are_started_read_their_arguments_and_say_their_names() -> None:
    assert len(STARTED) > 20
    assert [name for name in STARTED if not re.search(r"\.parse_\w*args\(", SOURCES[name])] == []
    assert [name for name in STARTED if f'prog="python -m {name}"' not in SOURCES[name]] == []


def test_tools_name_others_that_exist() -> None:
    for name, source in SOURCES.items():
        unknown = {each for each in re.findall(r"python -m (tools[\w.]*\w)", source) if each not in STARTED}
        assert unknown == set(), name


@pytest.mark.parametrize("name", TORCH_FREE)
def test_tool_says_what_it_does(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"tools.{name}").main()
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: python -m tools.{name} ")
