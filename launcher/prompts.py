"""Prompts from the command line or a file, and the file their answers go to."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from launcher.config import ConfigError, RunConfig
from launcher.config.engine import MAX_SEED

# With which every answer's line begins (launcher/tasks/generate.py).
ANSWER_START = b'{"index": '


@dataclass(frozen=True)
class Prompt:
    """One thing to answer: plain `text`, or chat `messages` (role and content), one of the two.

    `seed`: its own, of its draws; None where sampling.seed and its index decide, and where nothing is drawn.
    `line`: where prompts_file has it, from 1; None for the prompt of the command line.
    """

    index: int
    text: str | None = None
    messages: tuple[dict[str, str], ...] | None = None
    seed: int | None = None
    line: int | None = field(default=None, compare=False)

    @property
    def name(self) -> str:
        """What people find it by, with `where_from` before it; answers and reports have its index, from 0."""
        return "the prompt" if self.line is None else f"line {self.line}"


def where_from(run: RunConfig) -> str:
    """What comes before the names of a run's prompts."""
    return "" if run.prompts_file is None else f"prompts_file={run.prompts_file}, "


def read_prompts(run: RunConfig) -> tuple[Prompt, ...]:
    """The prompts of a run, in order.

    Raises:
        ConfigError: the file is missing, empty or has a line that is no prompt; the message names the line.
    """
    if run.prompts_file is None:
        return (Prompt(0, text=run.prompt),)
    path = Path(run.prompts_file)
    readers = {".txt": read_text_lines, ".jsonl": read_json_lines}
    if path.suffix not in readers:
        raise ConfigError(f"prompts_file={path} must end in {' or '.join(readers)}.")
    try:
        # Not splitlines(): JSON strings and prompts may hold other line ends, such as U+2028.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"prompts_file={path} cannot be read: {error}") from error
    prompts = tuple(readers[path.suffix](path, lines))
    if not prompts:
        raise ConfigError(f"prompts_file={path} holds no prompt.")
    is_greedy = run.sampling.temperature == 0
    return tuple(replace(prompt, seed=None) for prompt in prompts) if is_greedy else prompts


def read_text_lines(path: Path, lines: list[str]) -> Iterator[Prompt]:
    """One prompt a line; blank lines are no prompts."""
    return (Prompt(index, text=text, line=number) for index, (number, text) in enumerate(numbered(lines)))


def read_json_lines(path: Path, lines: list[str]) -> Iterator[Prompt]:
    """One object a line: {"prompt": TEXT} or {"messages": [{"role": ..., "content": ...}, ...]}, and maybe "seed"."""
    for index, (number, line) in enumerate(numbered(lines)):
        try:
            value = json.loads(line)
            prompt = _parse_json_prompt(index, value)
        except (ValueError, TypeError, RecursionError) as error:
            raise ConfigError(
                f'prompts_file={path}, line {number} is not {{"prompt": TEXT}} or {{"messages": [...]}}: {error}.'
            ) from error
        seed = value.get("seed")
        # JSON's true is an int, too.
        if seed is not None and not (type(seed) is int and 0 <= seed <= MAX_SEED):
            rule = f"must be a whole number from 0 to {MAX_SEED}"
            raise ConfigError(f"prompts_file={path}, line {number}: seed={json.dumps(seed)} {rule}.")
        yield replace(prompt, seed=seed, line=number)


def numbered(lines: list[str]) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, each with its number, from 1."""
    return ((number, line) for number, line in enumerate(lines, start=1) if line.strip())


def _parse_json_prompt(index: int, value: object) -> Prompt:
    if not isinstance(value, dict):
        raise TypeError("not an object")
    if isinstance(value.get("prompt"), str):
        return Prompt(index, text=text_of(value["prompt"], "prompt"))
    if "messages" not in value:
        raise ValueError('no "prompt" with text, and no "messages"')
    messages = value["messages"]
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages must be a list of one or more")
    if not all(isinstance(message, dict) and {"role", "content"} <= message.keys() for message in messages):
        raise ValueError("each of messages must have role and content")
    return Prompt(
        index, messages=tuple({name: text_of(m[name], name) for name in ("role", "content")} for m in messages)
    )


def text_of(value: object, name: str) -> str:
    """A value that is text.

    Raises:
        TypeError: it is something else, such as the parts that a message of another program has.
        ValueError: half of a surrogate pair, which no file can hold.
    """
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a text")
    value.encode()
    return value


def prompt_key(prompt: Prompt) -> str:
    """What an answer's line says about its prompt, so that a resumed run can tell that nothing moved."""
    return prompt.text if prompt.text is not None else json.dumps(list(prompt.messages or ()), ensure_ascii=False)


def prompts_to_do(prompts: tuple[Prompt, ...], output: Path, *, resume: bool) -> tuple[Prompt, ...]:
    """The prompts that `output` has no answer for. A half-written last line is none: see `cut_last_line`.

    Raises:
        ConfigError: the file exists and resume is off, it cannot be written, or it answers other prompts.
    """
    if not os.access(output if output.exists() else output.parent, os.W_OK):
        raise ConfigError(f"output_file={output} cannot be written: {output.parent} must be a folder of yours.")
    if output.is_dir():
        raise ConfigError(
            f"output_file={output} is a folder. Name a file in it: output_file={output / 'answers.jsonl'}."
        )
    if not output.exists() or output.is_char_device() or output.stat().st_size == 0:
        return prompts
    if not resume:
        raise ConfigError(
            f"output_file={output} exists. Add resume=true output_file={output} to complete it, or name another file."
        )
    *lines, rest = output.read_bytes().split(b"\n")
    if not (rest.startswith(ANSWER_START) or ANSWER_START.startswith(rest)):
        raise ConfigError(
            f"output_file={output}, line {len(lines) + 1} is not an answer, nor the beginning of one. Remove it, or "
            "name another file."
        )
    done = {read_answer(output, number, line, prompts) for number, line in enumerate(lines, start=1)}
    return tuple(prompt for prompt in prompts if prompt.index not in done)


def cut_last_line(output: Path) -> None:
    """Removes what a run that was killed wrote of its last answer; for those who have the file to themselves."""
    if output.is_file():
        os.truncate(output, output.read_bytes().rfind(b"\n") + 1)


def read_answer(output: Path, number: int, line: bytes, prompts: tuple[Prompt, ...]) -> int:
    """The index of the prompt that a line of `output` answers.

    Raises:
        ConfigError: the line is no answer, or answers another prompt than the one with that index, or by another seed.
    """
    try:
        answer = json.loads(line)
        index, key, seed = int(answer["index"]), answer["prompt"], answer.get("seed")
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"output_file={output}, line {number} is not an answer: {error!r}. Remove that line, and its prompt is "
            "answered again; or name another file."
        ) from error
    if not 0 <= index < len(prompts) or prompt_key(prompts[index]) != key:
        raise ConfigError(
            f"output_file={output}, line {number} answers another prompt than prompts_file has. Take the prompts_file "
            "that it was begun with, or name another output_file."
        )
    if prompts[index].seed != seed:
        raise ConfigError(
            f"output_file={output}, line {number} has seed={json.dumps(seed)}, and this run draws that answer with "
            f"seed={json.dumps(prompts[index].seed)}, as prompts_file and sampling.temperature say."
        )
    return index
