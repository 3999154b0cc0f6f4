"""The reader's benchmark: every method reads the file's bytes, and the table has every setting."""

from __future__ import annotations

import json
import mmap
import os
from pathlib import Path

import pytest

from tools.bench.read import METHODS, main

# Not every file system has O_DIRECT.
CACHED = [name for name in METHODS if name != "direct"]
MIB = 2**20


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "file").write_bytes(os.urandom(3 * MIB))
    return tmp_path / "file"


@pytest.mark.parametrize("method", CACHED)
def test_every_method_reads_the_bytes(file: Path, method: str) -> None:
    buffer = mmap.mmap(-1, MIB)
    METHODS[method](file, MIB, buffer)
    assert buffer[:] == file.read_bytes()[MIB : 2 * MIB]


def test_every_setting_has_its_rates(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(file), "--threads", "1", "2", "--chunk-mib", "1", "--methods", *CACHED])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(row["threads"], row["method"]) for row in result["reads"]] == [(n, m) for n in (1, 2) for m in CACHED]
    assert all(row["cold_gb_per_sec"] > 0 and row["warm_gb_per_sec"] > 0 for row in result["reads"])
