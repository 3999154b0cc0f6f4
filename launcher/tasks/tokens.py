"""Prompts as token ids: by the model's tokenizer, or random ones where dummy weights come without."""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from launcher.config import RANDOM_PROMPT_TOKENS, WeightsKind
from launcher.job import Job
from launcher.plan.limits import context_limit
from launcher.prompts import Prompt, prompt_key, where_from
from launcher.tasks.model_texts import read_config, read_texts

# Any of TOKENIZER_FILES is a tokenizer.
GENERATION = "generation_config.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def load_tokenizer(job: Job) -> PreTrainedTokenizerFast | None:
    """None: weights are dummies and the model brings no tokenizer.

    Raises:
        ValueError: there is none, or its files or the model's config.json cannot be used.
    """
    folder = job.model_folder
    if job.run.model.weights == WeightsKind.dummy and not has_tokenizer(folder):
        return None
    assert folder is not None, "only dummy weights come without a folder"
    # Transformers reads it for the tokenizer, too, whose fault it would seem to be.
    read_config(folder)
    what = "the tokenizer (tokenizer.json, tokenizer_config.json)"
    if not has_tokenizer(folder):
        what = f"the tokenizer, of which no file is there ({', '.join(TOKENIZER_FILES)}),"
    return read_texts(AutoTokenizer.from_pretrained, folder, what)


def has_tokenizer(folder: str | None) -> bool:
    return folder is not None and any((Path(folder) / name).is_file() for name in TOKENIZER_FILES)


def text_tokenizer(tokenizer: PreTrainedTokenizerFast | None) -> Tokenizer:
    """What turns tokens of an answer into text; without a tokenizer none of them has any."""
    backend: Tokenizer = Tokenizer(WordLevel({}, unk_token="")) if tokenizer is None else tokenizer.backend_tokenizer
    return backend


def eos_token_ids(job: Job, tokenizer: PreTrainedTokenizerFast | None) -> frozenset[int]:
    """Every token that ends an answer: those of generation_config.json, else the tokenizer's.

    None end those of dummy weights: they come at random, and would end what is to be measured.

    Raises:
        ValueError: generation_config.json cannot be read, or names no token that the model has.
    """
    if job.run.model.weights == WeightsKind.dummy or job.model_folder is None:
        return frozenset()
    if (Path(job.model_folder) / GENERATION).exists():
        ids = read_texts(GenerationConfig.from_pretrained, job.model_folder, GENERATION).eos_token_id
        if ids not in (None, []):
            return check_eos(job, ids)
    eos_id = None if tokenizer is None else tokenizer.eos_token_id
    return frozenset() if eos_id is None else frozenset([eos_id])


def check_eos(job: Job, value: Any) -> frozenset[int]:
    """The ids in `value`, a number or a list of them. Ids beyond the model's among others do no harm: none is drawn.

    Raises:
        ValueError: it is something else, or with it no answer would ever end.
    """
    assert job.shape is not None
    ids, size = value if isinstance(value, list) else [value], job.shape.vocab_size
    if not all(type(each) is int for each in ids) or not any(0 <= each < size for each in ids):
        raise ValueError(
            f"{GENERATION} in {job.model_folder}: eos_token_id={value!r} must be a token that the model has, from 0 to "
            f"{size - 1}, or a list of them. Take the file that belongs to the weights, or correct it."
        )
    return frozenset(ids)


def encode_prompts(job: Job, tokenizer: PreTrainedTokenizerFast | None) -> list[list[int]]:
    """Token ids of the job's prompts.

    Raises:
        ValueError: chat messages for a model without a chat template, or that the template refuses.
    """
    if tokenizer is None:
        return [random_prompt(job, prompt) for prompt in job.prompts]
    return [encode_prompt(job, tokenizer, prompt) for prompt in job.prompts]


def random_prompt(job: Job, prompt: Prompt) -> list[int]:
    """workload.prompt_tokens tokens that the prompt's text decides."""
    assert job.plan is not None and job.shape is not None
    room = max(1, job.plan.max_context - job.run.workload.output_tokens)
    length = job.run.workload.prompt_tokens or min(RANDOM_PROMPT_TOKENS, room)
    draw = random.Random(zlib.crc32(prompt_key(prompt).encode()))
    return [draw.randrange(job.shape.vocab_size) for _ in range(length)]


def encode_prompt(job: Job, tokenizer: PreTrainedTokenizerFast, prompt: Prompt) -> list[int]:
    """Token ids, in the chat template where the model has one and the run asks for it."""
    has_template, name = bool(tokenizer.chat_template), f"{where_from(job.run)}{prompt.name}"
    if prompt.messages is not None and not has_template:
        raise ValueError(f'{name} is chat messages, but the model has no chat template. Use "prompt".')
    if prompt.text is not None and not (job.run.chat and has_template):
        return list(tokenizer(prompt.text)["input_ids"])
    messages = list(prompt.messages or ({"role": "user", "content": str(prompt.text)},))
    try:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # What a template raises is jinja's, or whatever its expressions run into.
        knob = (
            "Use chat=false, or other" if prompt.messages is None else 'Change the messages, or use "prompt" and other'
        )
        raise ValueError(
            f"{name}: the model's chat template refuses its messages: {error}. {knob} tokenizer files."
        ) from error
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def check_known(job: Job, token_ids: Sequence[Sequence[int]]) -> None:
    """Raises ValueError: a prompt has tokens that the model has no embedding for, which it would read as nothing."""
    assert job.shape is not None
    size = job.shape.vocab_size
    for prompt, ids in zip(job.prompts, token_ids, strict=True):
        if ids and max(ids) >= size:
            raise ValueError(
                f"{where_from(job.run)}{prompt.name} has token {max(ids)}, and the model knows {size} (config.json: "
                f"vocab_size): the tokenizer in {job.model_folder} is another model's. Take the files that belong to "
                "the weights."
            )


def check_lengths(job: Job, token_ids: Sequence[Sequence[int]]) -> None:
    """Refuses the prompts of the job that cannot be answered, all at once, before any is.

    Raises:
        ValueError: prompts without a token, or with as many as the context has.
    """
    assert job.plan is not None and job.shape is not None
    limit, limit_reason = context_limit(job.shape, None if job.draft is None else job.draft.shape)
    max_context, where = job.plan.max_context, where_from(job.run)
    sizes = [(prompt.name, len(ids)) for prompt, ids in zip(job.prompts, token_ids, strict=True)]
    if empty := [name for name, size in sizes if size == 0]:
        which = f"{where}{_listed(empty)}"
        raise ValueError(f"{which} without tokens: the tokenizer adds none to an empty text. Leave them out.")
    if long := [f"{name} has {size} tokens" for name, size in sizes if size >= max_context]:
        room = f"engine.max_context={max_context}. Raise engine.max_context or shorten the prompts."
        if max_context >= limit:
            room = f"{limit_reason}. Shorten the prompts."
        raise ValueError(f"{where}{_listed(long)}; prompt and answer must fit {room}")


def _listed(texts: Sequence[str], most: int = 4) -> str:
    return ", ".join([*texts[:most], *(["..."] if len(texts) > most else [])])
