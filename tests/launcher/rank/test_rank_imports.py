"""What is done before and beside a rank's imports."""

from __future__ import annotations

import ctypes
import gc
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.rank.imports import UNUSED, begin_context, lean_imports


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """What these tests leave in the process is taken away."""
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    monkeypatch.setenv("CUDA_MODULE_LOADING", "EAGER")


@pytest.mark.parametrize("error", [None, KeyError])
def test_garbage_is_collected_again_but_not_in_what_was_imported(error: type[Exception] | None) -> None:
    before, kept = gc.get_freeze_count(), []
    try:
        with lean_imports():
            assert not gc.isenabled()
            kept += [[] for _ in range(1000)]
            if error is not None:
                raise error
    except KeyError:
        pass
    try:
        assert gc.isenabled() and gc.get_freeze_count() >= before + 1000
    finally:
        gc.unfreeze()
    assert len(kept) == 1000


@pytest.mark.parametrize("name", UNUSED)
def test_what_no_rank_needs_counts_as_not_installed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / f"{name}.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, name, raising=False)
    assert importlib.util.find_spec(name) is not None
    with lean_imports():
        assert importlib.util.find_spec(name) is None
        with pytest.raises(ImportError):
            importlib.import_module(name)
    gc.unfreeze()


def test_what_was_imported_before_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", gc)
    with lean_imports():
        assert importlib.import_module("scipy") is gc
    gc.unfreeze()


class Driver:
    """CUDA's, of a machine with two cards."""

    def __init__(self, name: str, result: int = 0) -> None:
        self.name, self.result, self.calls = name, result, list[tuple[Any, ...]]()

    def cuInit(self, flags: int) -> int:
        self.calls.append(("init", flags, os.environ["CUDA_MODULE_LOADING"]))
        return self.result

    def cuDeviceGet(self, device: Any, number: int) -> int:
        device._obj.value = 70 + number
        return 0

    def cuDevicePrimaryCtxRetain(self, context: Any, device: ctypes.c_int) -> int:
        self.calls.append(("retain", device.value))
        return 0


def opened(monkeypatch: pytest.MonkeyPatch, open_driver: Callable[[str], Driver]) -> list[Driver]:
    drivers = []

    def load(name: str) -> Driver:
        drivers.append(open_driver(name))
        return drivers[-1]

    monkeypatch.setattr(ctypes, "CDLL", load)
    begin_context(1).join(60)
    return drivers


def test_the_context_of_the_card_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_MODULE_LOADING")
    (driver,) = opened(monkeypatch, Driver)
    assert driver.name == "libcuda.so.1"
    assert driver.calls == [("init", 0, "LAZY"), ("retain", 71)]


def test_a_driver_that_fails_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    (driver,) = opened(monkeypatch, lambda name: Driver(name, result=100))
    assert driver.calls == [("init", 0, "EAGER")]


def test_a_machine_without_a_driver_is_left_to_torch(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    def missing(name: str) -> Driver:
        raise OSError(name)

    assert opened(monkeypatch, missing) == [] and not list(recwarn)
