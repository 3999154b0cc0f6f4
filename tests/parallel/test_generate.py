"""When an answer ends, what its text is, and that the rows of a batch do not disturb each other."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from parallel.communicator import Communicator
from parallel.engine.engine import Engine
from parallel.engine.generate import Answer, BatchResult, StopRules, generate_batch
from parallel.engine.sampling import Sampler
from tests.parallel.ranks import CPU, demo_tokenizer, greedy_sampler, load, run_on_ranks
from tests.parallel.small_models import DEMO, load_whole, prompts_of

EOS = 1
TOKENIZER = demo_tokenizer()


@dataclass
class ScriptedEngine:
    """An engine and sampler whose tokens are written beforehand: row i says scripts[i], then only 'x'."""

    scripts: Sequence[Sequence[int]]
    max_context: int = 1000
    fed: list[list[int]] = field(default_factory=list)
    taken: int = 0

    def prefill(self, prompts: Sequence[Sequence[int]], *, on_progress: Callable[[int, int], None]) -> Tensor:
        on_progress(max(map(len, prompts)), max(map(len, prompts)))
        return torch.empty(0)

    def decode(self, tokens: Tensor) -> Tensor:
        self.fed.append(tokens.tolist())
        return torch.empty(0)

    def sample(self, logits: Tensor) -> Tensor:
        filler = TOKENIZER.token_to_id("x")
        self.taken += 1
        return torch.tensor([([*script, *[filler] * self.taken])[self.taken - 1] for script in self.scripts])


def encode(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False).ids


def answer_scripts(
    scripts: Sequence[Sequence[int]], rules: StopRules, *, max_context: int = 1000, prompt_lengths: Sequence[int] = ()
) -> tuple[BatchResult, list[tuple[int, str]], ScriptedEngine]:
    """The result, all pieces of text as they were shown, and the engine."""
    engine, shown = ScriptedEngine(scripts, max_context), []
    result = generate_batch(
        cast(Engine, engine),
        [[0] * length for length in prompt_lengths or [1] * len(scripts)],
        cast(Sampler, engine.sample),
        cast(Tokenizer, TOKENIZER),
        rules,
        on_text=lambda row, text: shown.append((row, text)),
    )
    return result, shown, engine


def answer(text_ids: Sequence[int], rules: StopRules) -> Answer:
    result, shown, _ = answer_scripts([text_ids], rules)
    assert "".join(text for _, text in shown) == result.answers[0].text
    assert all(text for _, text in shown)
    return result.answers[0]


def test_end_of_sequence_ends_an_answer_and_is_no_text() -> None:
    ids = [*encode("all of it"), EOS]
    assert answer([*ids, *encode("more")], StopRules(99, frozenset({EOS}))) == Answer(ids, "all of it", "eos")


def test_any_of_several_end_tokens_ends_an_answer() -> None:
    ids = encode("a b")
    assert answer([*ids, 2, EOS], StopRules(99, frozenset({EOS, 2}))) == Answer([*ids, 2], "a b", "eos")


def test_end_of_sequence_is_a_token_like_any_other_where_no_rule_names_it() -> None:
    assert answer([EOS, *encode("on")], StopRules(2)).finish_reason == "length"


def test_length_ends_an_answer() -> None:
    ids = encode("one two three four five six")
    found = answer(ids, StopRules(4))
    assert found == Answer(ids[:4], TOKENIZER.decode(ids[:4]), "length")


def test_end_of_sequence_as_the_last_token_that_is_allowed_is_eos() -> None:
    ids = encode("one")
    assert answer([*ids, EOS], StopRules(len(ids) + 1, frozenset({EOS}))).finish_reason == "eos"


def test_stop_text_over_several_tokens_is_cut_and_its_tokens_kept() -> None:
    ids = encode("value = 1\n\nclass Other")
    found = answer(ids, StopRules(99, texts=("\n\nclass",)))
    assert (found.text, found.finish_reason) == ("value = 1", "stop")
    assert found.token_ids == ids[: len(found.token_ids)]
    assert "\n\nclass" in TOKENIZER.decode(found.token_ids)
    assert "\n\nclass" not in TOKENIZER.decode(found.token_ids[:-1])


def test_stop_text_in_the_last_token_that_is_allowed_is_stop() -> None:
    ids = encode("a\n\nb")
    found = answer(ids, StopRules(len(ids) - 1, texts=("\n\n",)))
    assert (found.text, found.finish_reason) == ("a", "stop")


@pytest.mark.parametrize(("end", "reason"), [([], "length"), ([EOS], "eos")])
def test_text_held_back_for_a_stop_text_is_shown_at_the_end(end: list[int], reason: str) -> None:
    ids = [*encode("one\n\n"), *end]
    found = answer(ids, StopRules(len(ids), frozenset({EOS}), texts=("\n\n\n",)))
    assert (found.text, found.finish_reason) == ("one\n\n", reason)


@pytest.mark.parametrize("room", (1, 2, 5))
def test_full_context_ends_an_answer(room: int) -> None:
    """Prompt and answer together fill max_context, counted from the longest prompt of the batch."""
    ids = encode("one two three four five six seven")
    result, _, engine = answer_scripts([ids, ids], StopRules(99), max_context=30 + room, prompt_lengths=(30, 7))
    assert [found.token_ids for found in result.answers] == [ids[:room], ids[:room]]
    assert {found.finish_reason for found in result.answers} == {"context"}
    assert len(engine.fed) == room - 1


def test_length_is_the_reason_where_the_context_ends_with_it() -> None:
    result, _, _ = answer_scripts([encode("one two three")], StopRules(3), max_context=13, prompt_lengths=(10,))
    assert result.answers[0].finish_reason == "length"


def test_rows_end_on_their_own_and_the_batch_with_the_last() -> None:
    short, cut, long = [*encode("no"), EOS], encode("yes\n\n\nand"), encode("one two three four five")
    rules = StopRules(9, frozenset({EOS}), texts=("\n\n",))
    result, shown, _ = answer_scripts([short, cut, long], rules)
    assert [found.finish_reason for found in result.answers] == ["eos", "stop", "length"]
    assert [found.text for found in result.answers] == ["no", "yes", TOKENIZER.decode([*long, *encode("x") * 9][:9])]
    assert result.answers[0].token_ids == short
    for row, found in enumerate(result.answers):
        assert "".join(text for of_row, text in shown if of_row == row) == found.text
    assert len(result.answers[2].token_ids) == 9 == 1 + len(result.step_ms)
    assert result.ttft_ms > 0
    assert min(result.step_ms) > 0


def test_each_step_is_fed_the_tokens_of_the_one_before() -> None:
    scripts = [encode("one two three"), encode("four five six")]
    result, _, engine = answer_scripts(scripts, StopRules(3))
    assert engine.fed == [list(tokens) for tokens in zip(*scripts, strict=False)][:2]
    assert result.last_tokens.tolist() == [script[2] for script in scripts]


def answer_demo(communicator: Communicator, rules: StopRules) -> tuple[list[Answer], list[tuple[int, int]]]:
    engine, progress = Engine(load(communicator, DEMO), CPU, max_context=128, prefill_chunk=16), []
    prompts = prompts_of("demo")
    sample = greedy_sampler(engine, communicator, len(prompts))
    result = generate_batch(
        engine, prompts, sample, demo_tokenizer(), rules, on_prefill=lambda *columns: progress.append(columns)
    )
    return result.answers, progress


def test_demo_model_answers_as_generate_does_up_to_its_end_of_sequence(folders: dict[str, Path]) -> None:
    model, expected = load_whole(DEMO), []
    for prompt in prompts_of("demo"):
        ids = torch.tensor([prompt])
        output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24)
        expected.append(output[0, len(prompt) :].tolist())
    assert {tokens[-1] == EOS for tokens in expected} == {True, False}
    for answers, progress in run_on_ranks(answer_demo, 2, StopRules(24, frozenset({EOS}))):
        assert [found.token_ids for found in answers] == expected
        for found in answers:
            assert found.finish_reason == ("eos" if found.token_ids[-1] == EOS else "length")
            assert found.text == demo_tokenizer().decode(found.token_ids)
        longest = max(map(len, prompts_of("demo")))
        assert progress == [(min(done, longest), longest) for done in range(4, longest + 4, 4)]
