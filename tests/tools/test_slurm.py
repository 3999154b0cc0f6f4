"""Scripts of tools.slurm: what bash makes of them, and command lines that are refused. tests/slurm submits some."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from tools.slurm import main

CPU = ("hardware=cpu", "workload.output_tokens=8")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("import os\n")
    return tmp_path


def written(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err


def arguments_of(script: str, folder: Path, **variables: str) -> list[str]:
    """What the script gives the launcher, by a bash that runs it with another program in Python's place."""
    record = folder / "python"
    program = "import json, sys; print(json.dumps(sys.argv[1:]))"
    record.write_text(f"#!/bin/bash\nshift 2\nexec {sys.executable} -c '{program}' \"$@\"\n")
    record.chmod(0o755)
    env = {"PATH": os.environ["PATH"], "SLURM_JOB_ID": "7", **variables}
    text = script.replace(f"\n{sys.executable} ", f"\n{record} ")
    done = subprocess.run(["bash", "-c", text], env=env, cwd=folder, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, ""), done
    found: list[str] = json.loads(done.stdout)
    return found


def test_arguments_reach_the_launcher_whole(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    prompt = "prompt='a  \"b\" $HOME `c` \\'d\\' #'"
    script = written(capsys, *CPU, "gpus=2", prompt)
    assert arguments_of(script, folder) == [*CPU, "gpus=2", prompt, "hydra.run.dir='slurm/launch70b-7'"]


def test_folder_reaches_hydra_whole(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    script = written(capsys, *CPU, "--folder=/Ann's runs/a,b=c {d}")
    argument = arguments_of(script, folder)[-1]
    (override,) = OverridesParser.create().parse_overrides([argument])
    assert (override.get_key_element(), override.value()) == ("hydra.run.dir", "/Ann's runs/a,b=c {d}/launch70b-7")


def test_tasks_of_an_array_have_a_value_each_and_folders_of_their_own(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    script = written(capsys, *CPU, "gpus=1,2", "workload.batch_size=1,3", "--parallel=2", "--name=a.b")
    assert "#SBATCH --array=0-3%2\n" in script
    found = [
        arguments_of(script, folder, SLURM_ARRAY_JOB_ID="9", SLURM_ARRAY_TASK_ID=str(task))[2:] for task in range(4)
    ]
    assert found == [
        [f"gpus={gpus}", f"workload.batch_size={batch}", f"hydra.run.dir='slurm/a.b-9/{task}'"]
        for task, (gpus, batch) in enumerate([(1, 1), (1, 3), (2, 1), (2, 3)])
    ]


def test_restart_resumes_the_answers_of_a_file_of_prompts(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    script = written(capsys, *CPU, "prompts_file=prompts.txt")
    output = "output_file=${hydra:runtime.output_dir}/outputs.jsonl"
    first = [*CPU, "prompts_file=prompts.txt", output, "hydra.run.dir='slurm/launch70b-7'"]
    assert arguments_of(script, folder) == first
    assert arguments_of(script, folder, SLURM_RESTART_COUNT="1") == [*first, "resume=true"]
    assert "scontrol requeue" in script


def test_run_with_nothing_to_resume_starts_again_and_requeues_itself_never(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    script = written(capsys, *CPU)
    assert arguments_of(script, folder, SLURM_RESTART_COUNT="1") == [*CPU, "hydra.run.dir='slurm/launch70b-7'"]
    assert "scontrol" not in script


def test_figures_say_where_they_come_from_and_options_replace_them(capsys: pytest.CaptureFixture[str]) -> None:
    model = ("model=llama3_1_8b", "model.weights=dummy", "task=bench")
    script = written(capsys, *model, "gpus=1,2", "--mem=9")
    assert "#SBATCH --gres=gpu:2\n" in script and "Tasks that use fewer hold them all the same." in script
    assert "# --mem=9G: --mem was set.\n#" in script and "#SBATCH --mem=9G\n" in script
    assert "published figures of NVIDIA GeForce RTX 4090" in script


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("modl=demo",), "Key 'modl' not in 'RunConfig'"),
        (("gpus=9",), "gpus=9 must be from 1 to 4"),
        (("gpus=1,9",), "gpus=9 must be from 1 to 4"),
        (("prompt=it's ;",), "Quote a value with special characters twice"),
        (("gpus=2", "model=llama3_3_70b"), "do not fit"),
        (("resume=true",), "resume=true is set by the script"),
        (("hydra.run.dir=here",), "--folder says where"),
        (("prompts_file=prompts.txt", "output_file=a.jsonl", "gpus=1,2"), "answers of 2 tasks"),
        (("--time=1", "--signal-sec=60"), "--signal-sec 60 must be less than the time limit of 1 min"),
        (("--name=a b",), "--name a b"),
    ],
)
def test_what_cannot_work_is_refused_and_nothing_is_written(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str
) -> None:
    assert words in refused(capsys, *arguments)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--time=soon", "--time: soon must be a whole number from 1 on"),
        ("--mem=0", "--mem: 0 must be a whole number from 1 on"),
        ("--restarts=-1", "--restarts: -1 must be a whole number from 0 on"),
        ("--sbatch=big", "--sbatch: big must be an option of sbatch, as in --sbatch=--partition=big"),
        ("-m", "-m is not needed here: values with commas make an array"),
    ],
)
def test_option_that_is_wrong_is_named_with_its_rule(
    capsys: pytest.CaptureFixture[str], option: str, words: str
) -> None:
    with pytest.raises(SystemExit):
        main(["gpus=1", option])
    out, err = capsys.readouterr()
    assert words in err and out == ""
