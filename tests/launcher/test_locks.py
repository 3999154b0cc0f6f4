"""Two runs at a time in a folder, or with one file of answers: the second is refused, nothing of the first is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from launcher import cli
from launcher.config import ConfigError
from launcher.locks import InUse, held, held_output
from launcher.prompts import Prompt
from launcher.report.outcome import write_report
from launcher.run import held_answers
from launcher.tasks import generate
from launcher.whole_file import write_whole
from tests.launcher.cli import SHORT, started, wait_until
from tests.launcher.cli import run as run_as_user
from tests.launcher.forked import ForkedProcess, run
from tests.launcher.jobs import make_job, make_run

HOLD = """
import sys, time
from pathlib import Path
from launcher.locks import held
with held(Path(sys.argv[1]), "hydra.run.dir"):
    print("held", flush=True)
    time.sleep(600)
"""


def test_folder_is_free_again_when_its_run_has_ended_however_that_was(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        with pytest.raises(InUse, match=f"hydra.run.dir={tmp_path} is in use"), held(tmp_path, "hydra.run.dir"):
            pass
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    with held(tmp_path, "hydra.run.dir"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_file_without_an_answer_is_not_left_behind(tmp_path: Path) -> None:
    output = tmp_path / "answers.jsonl"
    with held_output(output):
        assert output.exists()
        with pytest.raises(InUse, match="output_file="), held_output(output):
            pass
    assert not output.exists()
    with held_output(output):
        output.write_text("{}\n")
    assert output.read_text() == "{}\n"
    assert output.stat().st_mode & 0o111 == 0
    with held_output(Path("/dev/null")), held_output(Path("/dev/null")):
        pass


def test_empty_file_and_link_that_were_there_stay(tmp_path: Path) -> None:
    """Such as /dev/stdout of a run whose output goes to a file, or what mktemp has made."""
    empty, link, dangling = (tmp_path / name for name in ("empty", "link", "dangling"))
    empty.touch()
    link.symlink_to(empty)
    dangling.symlink_to(tmp_path / "made")
    for output in (empty, link, dangling):
        with held_output(output):
            pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "empty", "link"]


def wait_for_leave() -> None:
    """Of the process of a run: rank 0 writes no answer before there is a file `leave` beside them."""
    append = generate.append_lines

    def append_later(path: Path, lines: Sequence[dict[str, Any]]) -> None:
        wait_until(path.with_name("leave").exists, "leave to go on")
        append(path, lines)

    generate.append_lines = append_later


WAITING = partial(ForkedProcess, before=wait_for_leave)


def test_second_run_in_a_folder_or_to_a_file_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("import os\n" * 8)
    output = tmp_path / "answers.jsonl"
    args = (*SHORT, f"prompts_file={tmp_path / 'p.txt'}", f"output_file={output}")
    with started(*args, folder=tmp_path / "first", launcher=WAITING) as first:
        first.wait_for("job.json")
        same_folder = run("task=plan", f"hydra.run.dir={tmp_path / 'first'}", folder=tmp_path / "second")
        same_file = run(*args, folder=tmp_path / "third")
        (tmp_path / "leave").touch()
        result = first.finish()
    assert f"hydra.run.dir={tmp_path / 'first'} is in use by another run" in same_folder.error["message"]
    assert f"output_file={output} is in use by another run" in same_file.error["message"]
    assert result.report["task"] == "generate" and len(result.report["outputs"]) == 8
    assert len(output.read_text().splitlines()) == 8


def test_report_of_a_run_that_lacks_its_file_of_answers_is_in_its_folder(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("import os\n")
    output = tmp_path / "answers.jsonl"
    with held_output(output):
        args = (*SHORT, f"prompts_file={tmp_path / 'p.txt'}", f"output_file={output}")
        error = run(*args, folder=tmp_path / "run").error
    assert error["message"].startswith(f"output_file={output} is in use")
    assert json.loads((tmp_path / "run" / "report.json").read_text())["error"] == error


def test_job_of_a_sweep_whose_folder_is_in_use_is_left_out_and_the_next_runs(tmp_path: Path) -> None:
    (tmp_path / "sweep" / "0").mkdir(parents=True)
    with held(tmp_path / "sweep" / "0", "hydra.sweep.dir"):
        result = run("-m", "task=plan", "workload.batch_size=1,2", folder=tmp_path / "sweep", sweep=True)
    first, second = result.reports
    assert first["error"]["message"].startswith(f"hydra.sweep.dir={tmp_path / 'sweep' / '0'} is in use")
    assert (result.returncode, second["task"]) == (1, "plan")
    assert not (tmp_path / "sweep" / "0" / "report.json").exists()


def test_folder_of_a_sweep_is_not_another_sweeps(tmp_path: Path) -> None:
    """Its command line, jobs and table stay as they are until it ends."""
    folder = tmp_path / "sweep"
    folder.mkdir()
    (folder / "multirun.yaml").write_text("of the first\n")
    with held(folder / "multirun.yaml", "hydra.sweep.dir"):
        result = run("-m", "task=plan", "gpus=1,2", folder=folder, sweep=True)
    assert result.returncode == 1
    assert result.error["message"].startswith(f"hydra.sweep.dir={folder} is in use by another run, which goes on")
    assert [path.name for path in folder.iterdir()] == ["multirun.yaml"]
    assert (folder / "multirun.yaml").read_text() == "of the first\n"
    assert run("-m", "task=plan", "gpus=1,2", folder=folder, sweep=True).returncode == 0


def check_held_at_write() -> None:
    """Of the process of a run: its folder is its own until its report is there."""

    def write(report: dict[str, Any], folder: Path) -> None:
        with pytest.raises(InUse), held(folder, "hydra.run.dir"):
            pass
        write_report(report, folder)

    pytest.MonkeyPatch().setattr(cli, "write_report", write)


def test_report_is_written_before_the_folder_is_free(tmp_path: Path) -> None:
    folder, launcher = tmp_path / "run", partial(ForkedProcess, before=check_held_at_write)
    assert run_as_user("task=plan", folder=folder, launcher=launcher).returncode == 0
    assert json.loads((folder / "report.json").read_text())["task"] == "plan"


def test_prompts_are_read_once_as_from_a_pipe(tmp_path: Path) -> None:
    job = make_job(tmp_path, run=make_run(prompts_file=str(tmp_path / "gone.txt")))
    prompts = (Prompt(0, text="a"), Prompt(1, text="b"))
    with held_answers(replace(job, prompts=prompts), prompts):
        assert job.output_path.exists()
    with (
        pytest.raises(ConfigError, match="another run wrote"),
        held_answers(replace(job, prompts=prompts[1:]), prompts),
    ):
        pass


def test_report_of_an_earlier_run_is_gone_once_the_next_has_begun(tmp_path: Path) -> None:
    assert run("task=plan", folder=tmp_path / "run").returncode == 0
    (tmp_path / "p.txt").write_text("import os\n")
    args = (*SHORT, f"prompts_file={tmp_path / 'p.txt'}")
    with started(*args, folder=tmp_path / "run", launcher=WAITING) as second:
        second.wait_for("ranks/0.pid")
        assert not (tmp_path / "run" / "report.json").exists()


def test_report_that_cannot_be_stored_is_on_stdout_before_the_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "report.json.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path / 'report.json'}'"):
        write_report({"task": "plan"}, tmp_path)
    assert capsys.readouterr().out == '{"task": "plan"}\n'
    assert list(tmp_path.iterdir()) == []


def test_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    write_whole(tmp_path / "report.json", "old")
    (tmp_path / "report.json.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "report.json", "new")
    assert (tmp_path / "report.json").read_text() == "old"
