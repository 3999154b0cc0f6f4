"""A file of prompts to a file of answers: order, interruption, sampling, stop strings, chat templates."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from launcher.tasks import generate
from parallel.engine import generate as engine
from parallel.engine.sampling import NO_NUMBER
from parallel.engine.sequence import TokenSequence
from parallel.engine.speculation.given import Given
from tests.launcher import cli
from tests.launcher.cli import LIMIT_SEC, SHORT, Result, texts
from tests.launcher.demo_model import DEMO, TEMPLATE, change_json, copy_demo
from tests.launcher.forked import ForkedProcess, run, run_together, started

PROMPTS = ["def mean(values):\n", "import os\u2028", "class A:\n    def __init__(self", "é", "x = [", "for i in range("]
# Float32, so that what else is in a batch leaves no trace in an answer.
ARGS = (*SHORT, "model.dtype=float32", "engine.comm_share_steps=0")
SAMPLED = (*ARGS, "gpus=2", "sampling.temperature=0.8", "sampling.seed=7", "workload.output_tokens=40")


def write_prompts(path: Path, *lines: Any) -> Path:
    """A JSONL file; a text stands for a prompt."""
    values = [{"prompt": line} if isinstance(line, str) else line for line in lines]
    path.write_text("".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values), encoding="utf-8")
    return path


# Interruption


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("many")


@pytest.fixture(scope="module")
def prompts(folder: Path) -> str:
    return f"prompts_file={write_prompts(folder / 'prompts.jsonl', *PROMPTS)}"


def stand_still_after_two() -> None:
    """Rank 0 goes no further than to its second answer, however long it takes to kill it there."""
    append, written = generate.append_lines, list[Path]()

    def append_two(path: Path, lines: Sequence[dict[str, Any]]) -> None:
        append(path, lines)
        written.append(path)
        if len(written) == 2:
            time.sleep(600)

    generate.append_lines = append_two


@pytest.fixture(scope="module")
def whole(folder: Path, prompts: str) -> Result:
    """A run that nobody interrupted, two prompts at a time. Beside it another one, by the same seed, is killed."""
    stopping, answers = partial(ForkedProcess, before=stand_still_after_two), f"output_file={folder / 'answers.jsonl'}"
    with (
        started(*SAMPLED, prompts, "workload.batch_size=2", folder=folder / "whole") as whole,
        cli.started(*SAMPLED, prompts, answers, folder=folder / "killed", launcher=stopping) as killed,
    ):
        killed.wait_for("../answers.jsonl", '"index": 1,')
        killed.process.kill()
        killed.process.wait(LIMIT_SEC)
        return whole.finish()


@pytest.fixture(scope="module")
def expected(whole: Result) -> list[dict[str, Any]]:
    """The answers of the run that nobody interrupted."""
    assert whole.returncode == 0, whole.stderr
    return texts(Path(whole.report["run_dir"]) / "outputs.jsonl")


def test_answers_are_in_the_order_of_the_prompts(expected: list[dict[str, Any]]) -> None:
    assert [(answer["index"], answer["prompt"]) for answer in expected] == list(enumerate(PROMPTS))
    assert all(len(answer["token_ids"]) == 40 or answer["finish_reason"] == "eos" for answer in expected)


def test_report_holds_the_same_answers_and_stdout_nothing_but_the_report(
    whole: Result, expected: list[dict[str, Any]]
) -> None:
    assert whole.report["outputs"] == expected
    assert len(whole.stdout.splitlines()) == 1
    assert whole.report["batch_size"] == 2


@pytest.fixture(scope="module")
def left_over(folder: Path, whole: Result) -> list[dict[str, Any]]:
    """What the killed run had answered; half a line is added, as if it had died while it wrote."""
    path = folder / "answers.jsonl"
    answers = texts(path)
    with path.open("ab") as file:
        file.write('{"index": 5, "prompt": "for é'.encode()[:-1])
    return answers


def test_killed_run_keeps_the_answers_that_were_done(
    left_over: list[dict[str, Any]], expected: list[dict[str, Any]]
) -> None:
    """One prompt at a time gives the same answers as two: a batch's company does not change an answer."""
    assert left_over == expected[:2]


@pytest.fixture(scope="module")
def resumed(
    folder: Path, prompts: str, left_over: list[dict[str, Any]], expected: list[dict[str, Any]]
) -> list[Result]:
    """The killed run taken up again, in its own folder, and beside it a run that was complete already."""
    complete = f"output_file={folder / 'whole' / 'outputs.jsonl'}"
    options = (prompts, "resume=true", "workload.batch_size=3")
    with (
        started(*SAMPLED, *options, f"output_file={folder / 'answers.jsonl'}", folder=folder / "killed") as first,
        started(*ARGS, *options, complete, "gpus=1", folder=folder / "nothing") as second,
    ):
        return [first.finish(), second.finish()]


def test_resumed_run_answers_the_rest_once_and_as_an_uninterrupted_run_would(
    folder: Path, resumed: list[Result], left_over: list[dict[str, Any]], expected: list[dict[str, Any]]
) -> None:
    assert resumed[0].returncode == 0, resumed[0].stderr
    assert texts(folder / "answers.jsonl") == expected
    assert resumed[0].report["outputs"] == expected[len(left_over) :]


def test_resuming_a_complete_file_succeeds_and_changes_nothing(
    folder: Path, resumed: list[Result], expected: list[dict[str, Any]]
) -> None:
    assert resumed[1].returncode == 0, resumed[1].stderr
    assert texts(folder / "whole" / "outputs.jsonl") == expected
    report = resumed[1].report
    assert report["outputs"] == []
    assert [report[name] for name in ("load", "ttft_ms", "tpot_ms", "tokens_per_sec")] == [None] * 4


def test_without_resume_answers_are_not_overwritten(
    folder: Path, prompts: str, resumed: list[Result], expected: list[dict[str, Any]]
) -> None:
    error = run(*ARGS, prompts, f"output_file={folder / 'answers.jsonl'}", folder=folder / "refused").error
    assert "answers.jsonl exists. Add resume=true" in error["message"]
    assert texts(folder / "answers.jsonl") == expected


# Seeds of prompts


def lose_numbers_of_the_second() -> None:
    """Its logits are as of a model that overflows."""
    check = engine.check_number

    def check_second(sequence: TokenSequence, given: Given) -> None:
        check(sequence, Given([NO_NUMBER]) if sequence.index == 1 else given)

    engine.check_number = check_second


def test_prompt_after_which_there_are_no_numbers_is_named_by_its_line(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("import os\n\nimport sys\n")
    failing = partial(ForkedProcess, before=lose_numbers_of_the_second)
    result = run(*ARGS, "gpus=1", f"prompts_file={file}", folder=tmp_path / "run", launcher=failing)
    assert result.error["type"] == "ModelError"
    assert result.error["message"].startswith(f"after prompts_file={file}, line 3 the model gives no numbers (NaN, ")
    assert [line["index"] for line in texts(tmp_path / "run" / "outputs.jsonl")] == [0]


def test_prompt_with_a_seed_has_the_same_answer_anywhere_in_a_file_and_alone(tmp_path: Path) -> None:
    seeded = {"prompt": PROMPTS[1], "seed": 11}
    first = write_prompts(tmp_path / "first.jsonl", seeded, PROMPTS[0])
    last = write_prompts(tmp_path / "last.jsonl", *PROMPTS[2:5], seeded)
    results = run_together(
        tmp_path,
        (*SAMPLED, f"prompts_file={first}"),
        (*SAMPLED, f"prompts_file={last}", "workload.batch_size=3"),
        (*ARGS, *SAMPLED[-3:], "gpus=1", "sampling.seed=11", f"prompt='{PROMPTS[1]}'"),
    )
    (one, plain), (*_, other), (alone,) = (result.report["outputs"] for result in results)
    assert one["token_ids"] == other["token_ids"] == alone["token_ids"]
    assert [(line["seed"], line["index"]) for line in (one, plain, other)] == [(11, 0), (None, 1), (11, 3)]
    assert texts(Path(results[1].report["run_dir"]) / "outputs.jsonl")[3] == other


# Prompts with a head in common


def test_head_that_prompts_share_is_read_once_and_the_report_says_so(tmp_path: Path) -> None:
    head = "".join(f"LIMIT_{n} = {n * n}\n" for n in range(40))
    asked = [head + tail for tail in ("def a(", "class C", "import os")]
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    ids = [tokenizer.encode(text).ids for text in asked]
    num_common = next(at for at, tokens in enumerate(zip(*ids, strict=False)) if len(set(tokens)) > 1)
    file = write_prompts(tmp_path / "shared.jsonl", *asked)
    common = (*ARGS, "gpus=1", "workload.batch_size=2", f"prompts_file={file}")
    on, off = (result.report for result in run_together(tmp_path, common, (*common, "engine.prefix_cache=false")))
    reused = 2 * (num_common // 64 * 64)
    assert on["prefix_cache"] == {"prompt_tokens": sum(map(len, ids)), "reused_tokens": reused}
    assert reused > 300
    assert off["prefix_cache"] is None
    assert on["outputs"] == off["outputs"]


# Chat templates and stop strings

QUESTION = "def mean(values):\n"
RENDERED = f"user: {QUESTION}\nassistant:"


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Answers of the demo model with a chat template: through it, past it, and past it with stop strings."""
    folder = tmp_path_factory.mktemp("chat")
    model = copy_demo(folder / "model")
    change_json(model / "tokenizer_config.json", chat_template=TEMPLATE)
    messages = {"messages": [{"role": "user", "content": QUESTION}]}
    asked = write_prompts(folder / "asked.jsonl", QUESTION, messages)
    plain = write_prompts(folder / "plain.jsonl", RENDERED, QUESTION)
    common = (*ARGS, "gpus=1", "workload.output_tokens=32", f"model.path={model}")
    results = run_together(
        folder,
        (*common, f"prompts_file={asked}"),
        (*common, f"prompts_file={plain}", "chat=false"),
        (*common, f"prompts_file={plain}", "chat=false", "sampling.stop=[def,import,self]", "workload.batch_size=2"),
    )
    assert [result.returncode for result in results] == [0, 0, 0], results[0].stderr
    return dict(zip(("chat", "plain", "stopped"), (result.report["outputs"] for result in results), strict=True))


def test_template_wraps_prompts_and_messages_alike(chats: dict[str, list[dict[str, Any]]]) -> None:
    prompt, messages = chats["chat"]
    rendered, bare = chats["plain"]
    assert prompt["token_ids"] == messages["token_ids"] == rendered["token_ids"]
    assert bare["token_ids"] != rendered["token_ids"]


def test_answer_is_labelled_with_the_prompt_as_it_was_given(chats: dict[str, list[dict[str, Any]]]) -> None:
    prompt, messages = chats["chat"]
    assert prompt["prompt"] == QUESTION
    assert json.loads(messages["prompt"]) == [{"role": "user", "content": QUESTION}]


def test_stop_string_ends_an_answer_and_is_cut_off(chats: dict[str, list[dict[str, Any]]]) -> None:
    stops = ("def", "import", "self")
    pairs = list(zip(chats["stopped"], chats["plain"], strict=True))
    assert any(stopped["finish_reason"] == "stop" for stopped, _ in pairs)
    for stopped, plain in pairs:
        ends = [plain["text"].index(stop) for stop in stops if stop in plain["text"]]
        assert stopped["text"] == plain["text"][: min(ends, default=None)]
        assert stopped["finish_reason"] == ("stop" if ends else plain["finish_reason"])
