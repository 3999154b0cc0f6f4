"""Prompts from files, and which of them a file of answers still lacks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.config import ConfigError, ModelConfig, RunConfig
from launcher.config.engine import MAX_SEED, SamplingConfig
from launcher.prompts import Prompt, cut_last_line, prompts_to_do, read_prompts

PROMPTS = (
    Prompt(0, text="a"),
    Prompt(1, text="b\u2028é"),
    Prompt(2, messages=({"role": "user", "content": "c"},)),
)


def read(path: Path, text: str, temperature: float = 0.0) -> tuple[Prompt, ...]:
    path.write_text(text, encoding="utf-8")
    run = RunConfig(model=ModelConfig("m"), prompt="unused", prompts_file=str(path))
    return read_prompts(replace(run, sampling=SamplingConfig(temperature)))


def refused(path: Path, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read(path, text)
    return str(caught.value)


def answer(prompt: Prompt, /, text: str = "x", **changes: Any) -> str:
    """A line of answers as a rank writes it."""
    key = prompt.text if prompt.text is not None else json.dumps(list(prompt.messages or ()), ensure_ascii=False)
    line = {"index": prompt.index, "prompt": key, "seed": prompt.seed, "text": text}
    return json.dumps(line | changes, ensure_ascii=False) + "\n"


# Reading


def test_prompt_of_the_command_line_is_the_only_one() -> None:
    assert read_prompts(RunConfig(model=ModelConfig("m"), prompt="hello")) == (Prompt(0, text="hello"),)


def test_text_file_has_a_prompt_on_every_line_that_is_not_blank(tmp_path: Path) -> None:
    prompts = read(tmp_path / "p.txt", "one\n\n  two  \n \nthree")
    assert prompts == (Prompt(0, text="one"), Prompt(1, text="  two  "), Prompt(2, text="three"))
    assert [prompt.name for prompt in prompts] == ["line 1", "line 3", "line 5"]


def test_only_newlines_end_a_prompt(tmp_path: Path) -> None:
    """U+2028, form feed and the like are line ends to Python's splitlines, and plain text to a model."""
    text = "one\u2028still one\x0cand\x85more"
    assert read(tmp_path / "p.txt", text + "\r\ntwo") == (Prompt(0, text=text), Prompt(1, text="two"))
    line = json.dumps({"prompt": text}, ensure_ascii=False)
    assert read(tmp_path / "p.jsonl", line) == (Prompt(0, text=text),)


def test_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    assert read(tmp_path / "p.txt", "\ufeffone") == (Prompt(0, text="one"),)


def test_json_lines_hold_prompts_or_messages(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u", "name": "dropped"}]
    lines = [json.dumps(value) for value in ({"prompt": "é\n", "id": 7}, {"messages": messages})]
    prompts = read(tmp_path / "p.jsonl", "\n\n".join(lines))
    assert [prompt.name for prompt in prompts] == ["line 1", "line 3"]
    assert prompts == (
        Prompt(0, text="é\n"),
        Prompt(1, messages=({"role": "system", "content": "s"}, {"role": "user", "content": "u"})),
    )


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        "[1]",
        "3",
        "{}",
        '{"prompt": 3}',
        '{"prompt": null}',
        '{"messages": []}',
        '{"messages": "hello"}',
        '{"messages": [{"role": "user"}]}',
        '{"messages": ["hello"]}',
        '{"messages": [{"role": "user", "content": null}]}',
        '{"messages": [{"role": "user", "content": [{"type": "text", "text": "parts"}]}]}',
        '{"prompt": "\\ud800"}',
        pytest.param("[" * 100_000, id="deep"),
    ],
)
def test_bad_line_is_named(tmp_path: Path, line: str) -> None:
    message = refused(tmp_path / "p.jsonl", '{"prompt": "fine"}\n\n' + line + "\n")
    assert f"prompts_file={tmp_path / 'p.jsonl'}, line 3" in message
    assert '{"prompt": TEXT}' in message and '{"messages": [...]}' in message


def test_a_line_may_have_a_seed_which_counts_where_tokens_are_drawn(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "u"}]
    values = [{"prompt": "a", "seed": 0}, {"messages": messages, "seed": MAX_SEED}, {"prompt": "b", "seed": None}]
    text = "\n".join(map(json.dumps, values))
    assert [prompt.seed for prompt in read(tmp_path / "p.jsonl", text, temperature=1.0)] == [0, MAX_SEED, None]
    assert [prompt.seed for prompt in read(tmp_path / "p.jsonl", text)] == [None] * 3


@pytest.mark.parametrize("seed", ["-1", str(MAX_SEED + 1), "1.0", "true", '"7"', "[7]"])
def test_other_seeds_are_refused_with_line_value_and_rule(tmp_path: Path, seed: str) -> None:
    message = refused(tmp_path / "p.jsonl", '{"prompt": "fine"}\n\n{"prompt": "a", "seed": ' + seed + "}\n")
    assert f"prompts_file={tmp_path / 'p.jsonl'}, line 3: seed={seed} must be" in message
    assert message.endswith(f"a whole number from 0 to {MAX_SEED}.")


@pytest.mark.parametrize("text", ["", "\n \n"])
@pytest.mark.parametrize("name", ["p.txt", "p.jsonl"])
def test_file_without_prompts_is_refused(tmp_path: Path, name: str, text: str) -> None:
    assert "holds no prompt" in refused(tmp_path / name, text)


def test_other_kind_of_file_is_refused_with_the_known_kinds(tmp_path: Path) -> None:
    message = refused(tmp_path / "p.csv", "a")
    assert f"prompts_file={tmp_path / 'p.csv'} must end in .txt or .jsonl" in message


def test_missing_file_and_other_encodings_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    run = RunConfig(model=ModelConfig("m"), prompt="", prompts_file=str(path))
    with pytest.raises(ConfigError, match=r"cannot be read: .*No such file"):
        read_prompts(run)
    path.write_bytes("é".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"cannot be read: .*utf-8"):
        read_prompts(run)


# What is left to do


@pytest.mark.parametrize("resume", [False, True])
def test_all_is_to_do_where_there_is_no_file(tmp_path: Path, resume: bool) -> None:
    assert prompts_to_do(PROMPTS, tmp_path / "out.jsonl", resume=resume) == PROMPTS


def test_empty_file_holds_nothing_to_lose(tmp_path: Path) -> None:
    (tmp_path / "out.jsonl").touch()
    assert prompts_to_do(PROMPTS, tmp_path / "out.jsonl", resume=False) == PROMPTS


def test_existing_file_is_refused_and_kept_without_resume(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text("whatever")
    with pytest.raises(ConfigError, match=f"output_file={output} exists. Add resume=true output_file={output} to"):
        prompts_to_do(PROMPTS, output, resume=False)
    assert output.read_text() == "whatever"


def test_resume_leaves_out_what_is_answered_and_keeps_the_file(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    text = answer(PROMPTS[2]) + answer(PROMPTS[1], text="line\u2028end")
    output.write_text(text, encoding="utf-8")
    assert prompts_to_do(PROMPTS, output, resume=True) == (PROMPTS[0],)
    assert output.read_text(encoding="utf-8") == text


def test_resume_of_a_complete_file_has_nothing_to_do(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text("".join(answer(prompt) for prompt in PROMPTS), encoding="utf-8")
    assert prompts_to_do(PROMPTS, output, resume=True) == ()


def test_half_written_last_line_is_cut_off_wherever_it_ends_but_not_by_who_only_looks(tmp_path: Path) -> None:
    """Also in the middle of a character, and where only the newline is missing: another run may be writing it."""
    output = tmp_path / "out.jsonl"
    first, second = (answer(prompt).encode() for prompt in PROMPTS[:2])
    for size in range(1, len(second)):
        output.write_bytes(first + second[:size])
        assert prompts_to_do(PROMPTS, output, resume=True) == PROMPTS[1:]
        assert output.read_bytes() == first + second[:size]
        cut_last_line(output)
        assert output.read_bytes() == first
    cut_last_line(output)
    assert output.read_bytes() == first


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (answer(PROMPTS[0], prompt="other"), "line 2 answers another prompt"),
        (answer(PROMPTS[0], index=3), "line 2 answers another prompt"),
        (answer(PROMPTS[2], index=-1), "line 2 answers another prompt"),
        (answer(PROMPTS[0], index=None), "line 2 is not an answer"),
        ("{}\n", "line 2 is not an answer"),
        ("[]\n", "line 2 is not an answer"),
        ("\n", "line 2 is not an answer"),
        ("what is no answer and has no end", "line 2 is not an answer, nor the beginning of one. Remove it"),
    ],
)
def test_answers_of_other_prompts_are_refused_and_kept(tmp_path: Path, line: str, words: str) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text(answer(PROMPTS[1]) + line, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        prompts_to_do(PROMPTS, output, resume=True)
    assert f"output_file={output}, {words}" in str(caught.value) and "or name another" in str(caught.value)
    assert output.read_text(encoding="utf-8").endswith(line)


def test_answers_by_another_seed_are_refused_and_those_of_before_seeds_are_kept(tmp_path: Path) -> None:
    output, seeded = tmp_path / "out.jsonl", (replace(PROMPTS[0], seed=7), *PROMPTS[1:])
    output.write_text(answer(seeded[0]), encoding="utf-8")
    assert prompts_to_do(seeded, output, resume=True) == PROMPTS[1:]
    for prompts, now in ((PROMPTS, "null"), ((replace(PROMPTS[0], seed=8), *PROMPTS[1:]), "8")):
        with pytest.raises(ConfigError, match=f"line 1 has seed=7, and this run draws that answer with seed={now},"):
            prompts_to_do(prompts, output, resume=True)
    line = json.loads(answer(PROMPTS[0]))
    del line["seed"]
    output.write_text(json.dumps(line) + "\n", encoding="utf-8")
    assert prompts_to_do(PROMPTS, output, resume=True) == PROMPTS[1:]
    with pytest.raises(ConfigError, match=r"line 1 has seed=null, and .* with seed=7,"):
        prompts_to_do(seeded, output, resume=True)


@pytest.mark.parametrize("device", ["/dev/null", "/dev/full"])
def test_device_is_never_in_the_way(device: str) -> None:
    assert prompts_to_do(PROMPTS, Path(device), resume=False) == PROMPTS


def test_folder_that_is_missing_is_refused_before_the_run(tmp_path: Path) -> None:
    output = tmp_path / "missing" / "out.jsonl"
    with pytest.raises(ConfigError, match=f"output_file={output} cannot be written"):
        prompts_to_do(PROMPTS, output, resume=False)


@pytest.mark.parametrize("resume", [False, True])
def test_folder_is_no_file_of_answers(tmp_path: Path, resume: bool) -> None:
    with pytest.raises(ConfigError, match=rf"output_file={tmp_path} is a folder. Name a file in it"):
        prompts_to_do(PROMPTS, tmp_path, resume=resume)


@pytest.mark.parametrize("message", ['"hello"', '{"role": "user"}', '{"content": "hello"}', "3"])
def test_message_without_its_parts_is_told_in_words(tmp_path: Path, message: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'{{"messages": [{message}]}}\n')
    with pytest.raises(ConfigError, match=r"line 1 is not .*: each of messages must have role and content\.$"):
        read_prompts(RunConfig(model=ModelConfig("m"), prompt="x", prompts_file=str(file)))
