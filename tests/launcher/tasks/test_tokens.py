"""Models and prompts of which only facts are known: the family that is built, and tokens without a tokenizer."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.config import ModelFacts, WeightsKind, WorkloadConfig
from launcher.job import Job
from launcher.models.draft import Draft
from launcher.models.shape import shape_from_config, shape_from_facts
from launcher.prompts import Prompt
from launcher.tasks.tokens import (
    check_known,
    check_lengths,
    encode_prompt,
    encode_prompts,
    eos_token_ids,
    has_tokenizer,
    load_tokenizer,
    text_tokenizer,
)
from launcher.tasks.weights import Source, config_of, config_of_shape
from tests.launcher.demo_model import DEMO, copy_demo
from tests.launcher.jobs import make_job, make_run

FACTS = ModelFacts(64, 256, 2, 8, 4, 16, 512, 2048)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("qkv_bias", [False, True])
def test_config_of_facts_has_their_shape(tmp_path: Path, qkv_bias: bool, tied: bool) -> None:
    """What transformers writes down is read as the facts it came from."""
    shape = shape_from_facts(replace(FACTS, qkv_bias=qkv_bias, tied_embeddings=tied))
    config_of_shape(shape).save_pretrained(tmp_path)
    read = shape_from_config(tmp_path)
    assert read.model_type == ("qwen2" if qkv_bias else "llama")
    assert replace(read, model_type=shape.model_type, source=shape.source) == shape


def dummy_job(tmp_path: Path, prompts: tuple[Prompt, ...], max_context: int = 2000, **workload: Any) -> Job:
    run = make_run(workload=WorkloadConfig(**workload))
    run.model.weights = WeightsKind.dummy
    plan: Any = SimpleNamespace(max_context=max_context)
    return replace(make_job(tmp_path, run=run), plan=plan, shape=shape_from_facts(FACTS), prompts=prompts)


@pytest.mark.parametrize(
    ("max_context", "workload", "expected"),
    [(2000, {}, 512), (2000, {"prompt_tokens": 700}, 700), (100, {"output_tokens": 40}, 60), (4, {}, 1)],
)
def test_random_prompts_have_the_length_of_the_workload(
    tmp_path: Path, max_context: int, workload: dict[str, int], expected: int
) -> None:
    prompts = (Prompt(0, text="a"), Prompt(1, messages=({"role": "user", "content": "b"},)))
    job = dummy_job(tmp_path, prompts, max_context, **workload)
    assert load_tokenizer(job) is None
    first, second = encode_prompts(job, None)
    assert len(first) == len(second) == expected
    assert first != second or expected < 3
    assert all(0 <= token < FACTS.vocab_size for token in first + second)
    assert encode_prompts(job, None) == [first, second]


def test_dummy_weights_use_the_tokenizer_that_is_there_and_no_end_of_text(tmp_path: Path) -> None:
    job = replace(dummy_job(tmp_path, (Prompt(0, text="import os"),)), model_folder=str(DEMO))
    tokenizer = load_tokenizer(job)
    assert tokenizer is not None
    assert text_tokenizer(tokenizer).decode(encode_prompts(job, tokenizer)[0]) == "import os"
    assert eos_token_ids(job, tokenizer) == frozenset()


def test_checkpoints_end_with_their_end_of_text(tmp_path: Path) -> None:
    job = replace(make_job(tmp_path), model_folder=str(DEMO), shape=shape_from_facts(FACTS))
    assert eos_token_ids(job, load_tokenizer(job)) == frozenset([1])


def job_with_eos(tmp_path: Path, eos: Any) -> Job:
    folder = copy_demo(tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    return replace(make_job(tmp_path), model_folder=str(folder), shape=shape_from_facts(FACTS))


@pytest.mark.parametrize(("eos", "ids"), [(0, [0]), ([511, 7], [7, 511]), ([7, 512], [7, 512]), (None, [1]), ([], [1])])
def test_end_of_text_is_that_of_the_generation_config_else_the_tokenizers(
    tmp_path: Path, eos: Any, ids: list[int]
) -> None:
    job = job_with_eos(tmp_path, eos)
    assert eos_token_ids(job, load_tokenizer(job)) == frozenset(ids)


@pytest.mark.parametrize("eos", [512, -1, "</s>", [7, None], [7, "7"], 1.5, True, [[7]], {}])
def test_end_of_text_that_no_answer_can_come_to_is_refused(tmp_path: Path, eos: Any) -> None:
    job = job_with_eos(tmp_path, eos)
    words = f"eos_token_id={eos!r} must be a token that the model has, from 0 to 511,"
    with pytest.raises(ValueError, match=re.escape(words)):
        eos_token_ids(job, None)


def test_without_a_tokenizer_no_token_has_text() -> None:
    assert text_tokenizer(None).decode([0, 7, 511]) == ""


def test_folder_with_a_config_only_has_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert not has_tokenizer(str(tmp_path))
    assert has_tokenizer(str(DEMO))
    assert not has_tokenizer(None)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("tokenizer.json", "{}"),
        ("tokenizer.json", '{"version": "1.0", "added_'),
        ("tokenizer_config.json", '{"'),
        ("tokenizer.json", None),
    ],
)
def test_tokenizer_that_cannot_be_read_is_named_with_its_folder(tmp_path: Path, file: str, text: str | None) -> None:
    folder = copy_demo(tmp_path / "model")
    (folder / file).unlink()
    if text is not None:
        (folder / file).write_text(text)
    with pytest.raises(ValueError, match=rf"^the tokenizer.*{file}.* in {folder} cannot be used .*download them again"):
        load_tokenizer(replace(make_job(tmp_path), model_folder=str(folder)))


def test_generation_config_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    folder = copy_demo(tmp_path / "model")
    (folder / "generation_config.json").write_text('{"')
    with pytest.raises(ValueError, match=f"^generation_config.json in {folder} cannot be used"):
        eos_token_ids(replace(make_job(tmp_path), model_folder=str(folder)), None)


def test_config_that_transformers_refuses_is_named_and_not_the_tokenizer(tmp_path: Path) -> None:
    folder = copy_demo(tmp_path / "model", rms_norm_eps="a")
    refusal = f"^config.json in {folder} cannot be used .*rms_norm_eps"
    with pytest.raises(ValueError, match=refusal):
        config_of(Source(str(folder), shape_from_facts(FACTS), None))
    with pytest.raises(ValueError, match=refusal):
        load_tokenizer(replace(make_job(tmp_path), model_folder=str(folder)))


def test_tokens_of_another_models_tokenizer_are_refused(tmp_path: Path) -> None:
    job = dummy_job(tmp_path, tuple(Prompt(index, text="", line=5 + index) for index in range(2)))
    check_known(job, [[], [0, FACTS.vocab_size - 1]])
    with pytest.raises(ValueError, match=r"^line 6 has token 512, and the model knows 512 .*another model's"):
        check_known(job, [[1], [0, FACTS.vocab_size]])


def test_messages_that_the_template_refuses_are_named(tmp_path: Path) -> None:
    job = replace(make_job(tmp_path), model_folder=str(DEMO))
    tokenizer = load_tokenizer(job)
    assert tokenizer is not None
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    refusal = r": the model's chat template refuses .*: roles must alternate\. "
    with pytest.raises(ValueError, match="^the prompt" + refusal + "Use chat=false"):
        encode_prompt(job, tokenizer, Prompt(0, text="b"))
    job = replace(job, run=make_run(prompts_file="a.jsonl"))
    with pytest.raises(ValueError, match="^prompts_file=a.jsonl, line 5" + refusal + "Change the messages"):
        encode_prompt(job, tokenizer, Prompt(3, messages=({"role": "user", "content": "b"},), line=5))


@pytest.mark.parametrize(
    ("lengths", "words"),
    [
        (
            (3, 10, 12),
            "^prompts_file=a.txt, line 2 has 10 tokens, line 4 has 12 tokens; prompt and answer must fit "
            "engine.max_context=10",
        ),
        ((0, 3, 0), "^prompts_file=a.txt, line 1, line 4 without tokens.*Leave them out"),
    ],
)
def test_prompts_that_cannot_be_answered_are_named_at_once(
    tmp_path: Path, lengths: tuple[int, ...], words: str
) -> None:
    prompts = tuple(Prompt(index, text="", line=line) for index, line in enumerate((1, 2, 4)))
    job = dummy_job(tmp_path, prompts, max_context=10)
    job = replace(job, run=replace(job.run, prompts_file="a.txt"))
    check_lengths(job, [[5]] * 3)
    with pytest.raises(ValueError, match=words):
        check_lengths(job, [[5] * length for length in lengths])


def test_prompts_beyond_the_draft_model_are_not_told_to_raise_the_context(tmp_path: Path) -> None:
    draft = Draft(shape_from_facts(replace(FACTS, max_positions=10)), "folder")
    job = replace(dummy_job(tmp_path, (Prompt(0, text=""),), max_context=10), draft=draft)
    with pytest.raises(ValueError, match=r"must fit the draft model's limit of 10 positions\. Shorten the prompts\.$"):
        check_lengths(job, [[5] * 10])
