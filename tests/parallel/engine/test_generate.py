"""When an answer ends, what its text is, and that the rows of a batch do not disturb each other."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import cast

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from parallel.communicator import Communicator, TransportError
from parallel.engine.answer import Answer, StopRules
from parallel.engine.engine import Engine
from parallel.engine.generate import Listener, Prompt, Result, generate
from parallel.engine.limits import EngineLimits
from parallel.engine.page_allocator import PageAllocator
from parallel.engine.sampling import Sampler, SamplingParams, VocabularyShards
from parallel.engine.sequence import Part, TokenSequence
from parallel.transports.solo import Solo
from tests.parallel.ranks import CPU, demo_tokenizer, make_engine, numbered, run_on_ranks
from tests.parallel.small_models import DEMO, load_whole, prompts_of

EOS = 1
TOKENIZER = demo_tokenizer()


@dataclass
class ScriptedEngine:
    """An engine whose tokens are written beforehand: the prompt of index i is answered scripts[i], then only 'x'."""

    scripts: Sequence[Sequence[int]]
    limits: EngineLimits
    stepped: list[list[int]] = field(default_factory=list)
    most_rows: int = 0
    # Nothing is drafted.
    plan = None
    looks_first: bool = False
    fresh: dict[TokenSequence, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.pages = PageAllocator(1 + self.limits.batch_size * self.limits.pages_per_sequence)
        self.sampler = Sampler(SamplingParams(), VocabularyShards((10,)), Solo(CPU))

    def reset(self) -> None:
        self.pages.reset()

    def prefill(self, parts: Sequence[Part]) -> Tensor:
        assert sum(len(part) for part in parts) <= self.limits.prefill_chunk
        for part in parts:
            assert part.start == part.sequence.num_prefilled
            part.sequence.num_prefilled = part.end
        return torch.empty(0)

    def prefill_drafts(self, parts: Sequence[Part]) -> None:
        """There is no draft model."""

    def start_answers(self, sequences: Sequence[TokenSequence], logits: Tensor) -> Tensor:
        return self.next_tokens(sequences)

    def step(self, sequences: Sequence[TokenSequence]) -> Tensor:
        self.stepped.append([sequence.index for sequence in sequences])
        assert len(sequences) <= self.limits.batch_size
        return self.next_tokens(sequences)

    def next_tokens(self, sequences: Sequence[TokenSequence]) -> Tensor:
        filler, tokens = TOKENIZER.token_to_id("x"), []
        for sequence in sequences:
            script = self.scripts[sequence.index]
            tokens.append(script[sequence.num_sampled] if sequence.num_sampled < len(script) else filler)
            sequence.num_sampled += 1
        return torch.tensor(tokens)


def encode(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False).ids


def answer_scripts(
    scripts: Sequence[Sequence[int]],
    rules: StopRules,
    *,
    max_context: int = 1000,
    prompt_lengths: Sequence[int] = (),
    batch_size: int = 8,
    prefill_chunk: int = 64,
    looks_first: bool = False,
) -> tuple[Result, list[tuple[int, str]], ScriptedEngine]:
    """The result, all pieces of text as they were shown, and the engine."""
    limits, shown = EngineLimits(max_context, batch_size, prefill_chunk), []
    engine = ScriptedEngine(scripts, limits, looks_first=looks_first)
    lengths = prompt_lengths or [1] * len(scripts)
    result = generate(
        cast(Engine, engine),
        [Prompt(index, [0] * length) for index, length in enumerate(lengths)],
        cast(Tokenizer, TOKENIZER),
        rules,
        Listener(on_text=lambda row, text: shown.append((row, text))),
    )
    assert engine.pages.num_free == batch_size * engine.limits.pages_per_sequence, "pages were not given back"
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


class Clock:
    now = 100.0

    def perf_counter(self) -> float:
        return self.now


def timed_engine(clock: Clock, scripts: Sequence[Sequence[int]], limits: EngineLimits) -> ScriptedEngine:
    """Passes of prompts take 2 s, steps 5."""

    class TimedEngine(ScriptedEngine):
        def prefill(self, parts: Sequence[Part]) -> Tensor:
            clock.now += 2.0
            return super().prefill(parts)

        def step(self, sequences: Sequence[TokenSequence]) -> Tensor:
            clock.now += 5.0
            return super().step(sequences)

    return TimedEngine(scripts, limits)


def test_times_are_those_at_which_the_host_computed_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks at tokens a pass later: that is no part of the first one's time, nor does the last step take none."""
    clock = Clock()
    monkeypatch.setattr("parallel.engine.pending.time", clock)
    monkeypatch.setattr("parallel.engine.generate.time", clock)
    engine = timed_engine(clock, [encode("one two three")], EngineLimits(100, 1, 64))
    result = generate(cast(Engine, engine), [Prompt(0, [0])], cast(Tokenizer, TOKENIZER), StopRules(3))
    assert (result.ttft_ms, result.step_ms) == ([2000.0], [5000.0, 5000.0])


def test_a_token_is_timed_from_the_one_before_it_whatever_came_between(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt that joins, and has its first token, between two of another answer makes the latter wait."""
    clock = Clock()
    monkeypatch.setattr("parallel.engine.pending.time", clock)
    monkeypatch.setattr("parallel.engine.generate.time", clock)
    scripts = [encode("one two three four"), encode("five six")]
    engine = timed_engine(clock, scripts, EngineLimits(100, 2, 1))
    result = generate(cast(Engine, engine), [Prompt(0, [0]), Prompt(1, [1])], cast(Tokenizer, TOKENIZER), StopRules(3))
    # First tokens after 2 s and, with a step between, 9; the first answer's second token at 7, its third at 14.
    assert result.ttft_ms == [2000.0, 9000.0]
    assert sorted(result.token_ms) == [5000.0, 5000.0, 5000.0, 7000.0]


@pytest.mark.parametrize("room", (1, 2, 5))
def test_full_context_ends_an_answer(room: int) -> None:
    """Prompt and answer together fill max_context; a shorter prompt leaves more room."""
    ids = encode("one two three four five six seven eight nine")
    result, _, _ = answer_scripts([ids, ids], StopRules(99), max_context=30 + room, prompt_lengths=(30, 29))
    assert [found.token_ids for found in result.answers] == [ids[:room], ids[: room + 1]]
    assert {found.finish_reason for found in result.answers} == {"context"}


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
    assert len(result.answers[2].token_ids) == 9
    assert len(result.ttft_ms) == 3
    assert min(*result.ttft_ms, *result.step_ms) > 0


def test_answer_of_known_length_takes_no_step_too_many() -> None:
    result, _, engine = answer_scripts([encode("one two three four"), encode("a b")], StopRules(4))
    assert engine.stepped == [[0, 1]] * 3
    assert len(result.step_ms) == 3


def test_host_is_one_step_behind_an_end_of_sequence() -> None:
    """The step that was queued before the host saw the end is the only one wasted."""
    _, _, engine = answer_scripts([[*encode("no"), EOS]], StopRules(99, frozenset({EOS})))
    assert engine.stepped == [[0]] * (len(encode("no")) + 1)


def test_host_that_looks_first_shows_a_token_before_the_next_step() -> None:
    """The first too; and no step follows an end."""
    ids, events = encode("one two three"), []

    class KeepingEngine(ScriptedEngine):
        def step(self, sequences: Sequence[TokenSequence]) -> Tensor:
            events.append("step")
            return super().step(sequences)

    engine = KeepingEngine([[*ids, EOS]], EngineLimits(100, 1, 64), looks_first=True)
    rules, show = StopRules(99, frozenset({EOS})), lambda row, text: events.append("text")
    generate(cast(Engine, engine), [Prompt(0, [0])], cast(Tokenizer, TOKENIZER), rules, Listener(on_text=show))
    assert events == ["text", "step"] * len(ids)


class Lost(Solo):
    """A transport whose third collective a peer did not answer."""

    num_checks = 0

    def check(self) -> None:
        self.num_checks += 1
        if self.num_checks == 3:
            raise TransportError("rank 1 did not answer")


def test_tokens_of_a_step_that_lost_a_peer_are_not_believed() -> None:
    ids, shown = encode("one two three four"), []
    engine = ScriptedEngine([ids], EngineLimits(100, 1, 64))
    engine.sampler = Sampler(SamplingParams(), VocabularyShards((10,)), Lost(CPU))
    with pytest.raises(TransportError, match="rank 1 did not answer"):
        generate(
            cast(Engine, engine),
            [Prompt(0, [0])],
            cast(Tokenizer, TOKENIZER),
            StopRules(4),
            Listener(on_text=lambda row, text: shown.append(text)),
        )
    assert "".join(shown) == TOKENIZER.decode(ids[:2])


@pytest.mark.parametrize("looks_first", [False, True])
def test_sequences_join_when_others_leave(looks_first: bool) -> None:
    """Two rows for five prompts: the waiting ones are answered as rows come free, each as it would be alone."""
    texts = ["one two three four five six", "a", "b c", "seven eight nine ten", "d"]
    scripts = [[*encode(text), EOS] for text in texts]
    rules, lengths = StopRules(50, frozenset({EOS})), (3, 70, 1, 5, 64)
    result, _, engine = answer_scripts(
        scripts, rules, batch_size=2, prompt_lengths=lengths, prefill_chunk=8, looks_first=looks_first
    )
    assert [found.text for found in result.answers] == texts
    assert {tuple(sorted(set(rows))) for rows in engine.stepped} <= {(i,) for i in range(5)} | {
        (i, j) for i in range(5) for j in range(i + 1, 5)
    }
    assert any(len(rows) == 2 for rows in engine.stepped)


def test_prompt_waits_for_pages_too() -> None:
    """Rows enough for all, pages for one long answer at a time."""
    scripts = [encode("one two three"), encode("four five six")]
    engine = ScriptedEngine(scripts, EngineLimits(max_context=128, batch_size=2, prefill_chunk=200))
    engine.pages = PageAllocator(1 + 2)
    prompts = [Prompt(index, [0] * 120) for index in range(2)]
    result = generate(cast(Engine, engine), prompts, cast(Tokenizer, TOKENIZER), StopRules(3))
    assert [found.token_ids for found in result.answers] == [script[:3] for script in scripts]
    assert all(len(rows) == 1 for rows in engine.stepped)


@pytest.mark.parametrize(
    ("lengths", "words"), [((2, 0), "prompt 2 of 2 has no tokens"), ((1, 40), "engine.max_context=40")]
)
def test_prompt_that_is_empty_or_too_long_is_refused(lengths: tuple[int, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        answer_scripts([[5], [5]], StopRules(3), max_context=40, prompt_lengths=lengths)


def answer_demo(communicator: Communicator, rules: StopRules) -> tuple[list[Answer], list[tuple[int, int]]]:
    engine, progress = make_engine(communicator, DEMO, max_context=128, batch_size=2, prefill_chunk=16), []
    result = generate(
        engine,
        numbered(prompts_of("demo")),
        demo_tokenizer(),
        rules,
        Listener(on_prefill=lambda *tokens: progress.append(tokens)),
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
        total = sum(map(len, prompts_of("demo")))
        assert progress[-1] == (total, total)
        assert all(0 < after - before <= 16 for (before, _), (after, _) in pairwise(progress))
