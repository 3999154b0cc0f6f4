"""Speculative decoding: answers stay what they are without it, and drafts that are right are taken."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig

from parallel.communicator import Communicator
from parallel.engine.answer import Answer, StopRules
from parallel.engine.generate import Result, generate
from parallel.engine.limits import EngineLimits
from parallel.engine.paged_model import PagedModel
from parallel.engine.rows import Rows
from parallel.engine.sampling import Sampler, SamplingParams, VocabularyShards, sequence_key
from parallel.engine.speculation.acceptance import Acceptance, join
from parallel.engine.speculation.choice import open_speculator
from parallel.engine.speculation.speculator import Speculation, Speculator, count_right
from parallel.engine.step_timer import time_steps
from parallel.transports.solo import Solo
from tests.parallel.engine.speculation.draft_models import write_truncated
from tests.parallel.ranks import CPU, demo_tokenizer, make_engine, numbered, run_on_ranks
from tests.parallel.small_models import DEMO, prompts_of, write_model

NGRAM, DRAFT = Speculation("ngram"), Speculation("draft", num_drafts=3)
SAMPLED = SamplingParams(temperature=0.8, top_k=20, top_p=0.95, seed=3)
EOS = 1
# The larger model's drafts come true as text goes, and so need fewer.
NUM_TOKENS = {"llama": 23, "demo": 18}
KINDS = {"ngram": NGRAM, "draft": DRAFT, "same": Speculation("draft", num_drafts=5)}


@dataclass(frozen=True)
class Case:
    """A run: which prompts of `name`, and how they are answered."""

    name: str
    rules: StopRules
    sampling: SamplingParams | None = None
    speculation: Speculation | None = None
    draft: Path | None = None
    repeats: int = 1
    max_context: int = 128


def answer(communicator: Communicator, folder: Path, cases: list[Case]) -> list[tuple[list[Answer], Acceptance]]:
    """Two rows for four prompts of different lengths or more: they join and leave while others go on."""
    found = []
    for case in cases:
        engine = make_engine(
            communicator,
            folder,
            max_context=case.max_context,
            batch_size=2,
            prefill_chunk=16,
            sampling=case.sampling,
            speculation=case.speculation,
            draft=case.draft,
        )
        # Repeats give n-grams something to find.
        prompts = [prompt * case.repeats for prompt in prompts_of(case.name)]
        result = generate(engine, numbered(prompts), demo_tokenizer(), case.rules)
        assert engine.pages.num_free == engine.limits.num_pages - 1, "pages were not given back"
        check_times(result, engine.speculator)
        found.append((result.answers, result.acceptance))
    return found


def check_times(result: Result, speculator: Speculator | None) -> None:
    assert len(result.token_ms) == sum(len(each.token_ids) - 1 for each in result.answers)
    assert all(ms > 0 for ms in result.token_ms)
    if speculator is None:
        assert not result.acceptance.lengths
        # A token waits for its step, and for what came between that and its answer's token before.
        tokens, steps = set(result.token_ms), set(result.step_ms)
        assert bool(tokens) == bool(steps)
        assert not tokens or (min(tokens) >= min(steps) and tokens & steps)
        # Where all ends are foreseen, no step is in vain: else the longest may have given no token.
        is_foreseen = {each.finish_reason for each in result.answers} <= {"length", "context"}
        assert not (tokens and is_foreseen) or max(tokens) >= max(steps)


@pytest.fixture(scope="module")
def drafts(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """(kind, target) -> the folder of its draft model."""
    root = tmp_path_factory.mktemp("drafts")
    small = AutoConfig.from_pretrained(folders["llama"])
    small.num_hidden_layers, small.hidden_size, small.intermediate_size = 1, 64, 96
    return {
        ("draft", "demo"): write_truncated(DEMO, root / "demo", 2),
        ("draft", "llama"): write_model(small, root / "llama", seed=7),
        ("same", "demo"): DEMO,
        ("same", "llama"): folders["llama"],
    }


@pytest.mark.parametrize("name", ("llama", "demo"))
def test_answers_are_those_without_drafts(
    name: str, folders: dict[str, Path], drafts: dict[tuple[str, str], Path]
) -> None:
    """Greedy and sampled, token for token; a model accepts all its own drafts."""
    rules = StopRules(NUM_TOKENS[name])
    plain = [Case(name, rules), Case(name, rules, SAMPLED)]
    guessed = [
        replace(case, speculation=speculation, draft=drafts.get((kind, name)))
        for case in plain
        for kind, speculation in KINDS.items()
    ]
    (greedy, _), (sampled, _), *found = run_on_ranks(answer, 1, folders[name], [*plain, *guessed])[0]
    assert greedy != sampled
    assert [answers for answers, _ in found] == [greedy] * 3 + [sampled] * 3
    for _, same in (found[2], found[5]):
        assert same.accepted == same.drafted > 0
    assert all(acceptance.drafted > 0 for _, acceptance in (found[1], found[4]))
    # Random weights say nothing twice.
    assert name == "llama" or all(0 < found.accepted < found.drafted for _, found in (found[0], found[3]))


@pytest.mark.parametrize("kind", ("draft", "same"))
def test_answers_end_at_any_place_of_a_step(
    kind: str, folders: dict[str, Path], drafts: dict[tuple[str, str], Path]
) -> None:
    """At max_tokens and where the context is full, of prompts of 3, 17, 9 and 30 tokens."""
    plain = [*(Case("llama", StopRules(num)) for num in (1, 2, 3, 6)), Case("llama", StopRules(99), max_context=45)]
    guessed = [replace(case, speculation=KINDS[kind], draft=drafts[kind, "llama"]) for case in plain]
    found = [answers for answers, _ in run_on_ranks(answer, 1, folders["llama"], [*plain, *guessed])[0]]
    assert found[:5] == found[5:]
    assert [len(each.token_ids) for each in found[-1]] == [42, 28, 36, 15]
    assert {each.finish_reason for each in found[-1]} == {"context"}


@pytest.mark.parametrize(("name", "world_size"), [("demo", 2), ("llama", 3)])
def test_ranks_answer_as_one(
    name: str, world_size: int, folders: dict[str, Path], drafts: dict[tuple[str, str], Path]
) -> None:
    plain = [Case(name, StopRules(9)), Case(name, StopRules(9), SAMPLED)]
    looked_up = replace(plain[0], speculation=NGRAM)
    drawn = replace(plain[1], speculation=DRAFT, draft=drafts["draft", name])
    greedy, sampled = [answers for answers, _ in run_on_ranks(answer, 1, folders[name], plain)[0]]
    for found in run_on_ranks(answer, world_size, folders[name], [looked_up, drawn]):
        assert [answers for answers, _ in found] == [greedy, sampled]


def test_truncated_model_is_right_now_and_then(drafts: dict[tuple[str, str], Path]) -> None:
    case = Case("demo", StopRules(40), speculation=DRAFT, draft=drafts["draft", "demo"])
    ((_, acceptance),) = run_on_ranks(answer, 1, DEMO, [case])[0]
    assert 0 < acceptance.accepted < acceptance.drafted


def check_lookup(speculation: Speculation, longest: int) -> None:
    """What follows a prompt that says everything three times; nothing in it comes twice but that."""
    plain = Case("demo", StopRules(30), repeats=3, max_context=256)
    guess = replace(plain, speculation=speculation)
    (greedy, _), (guessed, acceptance) = run_on_ranks(answer, 1, DEMO, [plain, guess])[0]
    assert guessed == greedy
    assert acceptance.accepted >= 5
    assert max(acceptance.lengths) == longest


def test_repeated_text_is_looked_up() -> None:
    check_lookup(NGRAM, longest=NGRAM.num_drafts)


def check_ends(speculation: Speculation, draft: Path | None) -> None:
    """EOS inside an accepted run: what was accepted behind it is dropped, and never counted."""
    plain = Case("demo", StopRules(60, frozenset({EOS, demo_tokenizer().token_to_id("x")}), texts=("\n\n",)))
    guess = replace(plain, speculation=speculation, draft=draft)
    (answers, _), (guessed, acceptance) = run_on_ranks(answer, 1, DEMO, [plain, guess])[0]
    assert guessed == answers
    assert {each.finish_reason for each in answers} > {"length"}
    assert acceptance.accepted + acceptance.lengths.total() == sum(len(each.token_ids) - 1 for each in answers)


@pytest.mark.parametrize("kind", ("ngram", "same"))
def test_nothing_follows_an_end_of_sequence(kind: str, drafts: dict[tuple[str, str], Path]) -> None:
    check_ends(KINDS[kind], drafts.get((kind, "demo")))


def timed_steps(communicator: Communicator, folder: Path, speculation: Speculation) -> list[list[float]]:
    """Milliseconds of timed steps between two runs, whose answers must be equal."""
    engine = make_engine(communicator, folder, speculation=speculation, draft=folder)
    before = generate(engine, numbered(prompts_of("llama")), demo_tokenizer(), StopRules(9))
    times = [time_steps(engine, contexts, 2, communicator) for contexts in ([64, 5, 17], [63], [2])]
    after = generate(engine, numbered(prompts_of("llama")), demo_tokenizer(), StopRules(9))
    assert before.answers == after.answers
    return times


@pytest.mark.parametrize("speculation", [NGRAM, DRAFT], ids=str)
def test_timed_steps_leave_the_engine_as_it_was(speculation: Speculation, folders: dict[str, Path]) -> None:
    times = run_on_ranks(timed_steps, 1, folders["llama"], speculation)[0]
    assert all(len(each) == 2 and min(each) > 0 for each in times)


def order_of(communicator: Communicator, folder: Path) -> list[str]:
    """What is queued of a prompt in two chunks and a step, in turn."""
    engine = make_engine(communicator, folder, speculation=DRAFT, draft=folder, prefill_chunk=16)
    found: list[str] = []

    def noted(name: str, call: Callable[..., object]) -> Callable[..., object]:
        return lambda *args: found.append(name) or call(*args)

    assert engine.speculator is not None
    for owner, name in (
        (engine, "hidden_states"),
        (engine, "start_answers"),
        (engine.speculator, "prefill"),
        (engine, "step"),
    ):
        setattr(owner, name, noted(name, getattr(owner, name)))
    generate(engine, numbered([list(range(5, 30))]), demo_tokenizer(), StopRules(2))
    return found


def test_first_tokens_do_not_wait_for_the_draft_model(folders: dict[str, Path]) -> None:
    assert run_on_ranks(order_of, 1, folders["llama"])[0] == [
        *("hidden_states", "prefill", "hidden_states", "start_answers", "prefill", "step")
    ]


# Scripted logits: what comes next depends on the newest token alone.

VOCABULARY = 6


@dataclass(frozen=True)
class Chain:
    """Stands for a model: logits [VOCABULARY, VOCABULARY] of what follows each token. Keeps what it was asked."""

    logits: Tensor
    asked: list[Rows] = field(default_factory=list)

    def row_logits(self, rows: Rows) -> Tensor:
        self.asked.append(rows)
        return self.logits[rows.tokens]


@dataclass(frozen=True)
class ChainDrafter:
    """Draws drafts from a chain with a sampler, as DraftModel does from a model."""

    chain: Chain
    sampler: Sampler
    num_drafts: int

    def propose(self, rows: Rows, history: Tensor) -> Tensor:
        drafts, tokens = [], rows.tokens
        for offset in range(self.num_drafts):
            asked = rows.spread(tokens.unsqueeze(1), offset)
            tokens = self.sampler(self.chain.row_logits(asked), asked.keys, asked.positions + 1)
            drafts.append(tokens)
        return torch.stack(drafts, dim=1)


def random_logits(seed: int) -> Tensor:
    return 1.5 * torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def run_chain(target: Tensor, draft: Tensor, params: SamplingParams, num_rows: int) -> tuple[Tensor, Tensor]:
    """One step of many rows that all stand at token 0 of position 1: what was given, and how many drafts there were."""
    sampler = Sampler(params, VocabularyShards((VOCABULARY,)), Solo(CPU))
    speculator = Speculator(
        ChainDrafter(Chain(draft), sampler, 3),
        3,
        EngineLimits(9, num_rows, 9),
        sampler,
        CPU,  # type: ignore[arg-type]
    )
    rows = Rows.empty(num_rows, 1, CPU)
    rows.positions.fill_(1)
    rows.active.fill_(1)
    rows.ends.fill_(8)
    rows.keys.copy_(torch.tensor([sequence_key(params.seed, row) for row in range(num_rows)]))
    speculator.step(rows, Chain(target).row_logits)
    return speculator.given[:, 1 : 2 + speculator.num_drafts], speculator.given[:, 0]


PARAMS = [SamplingParams(1.0, seed=1), SamplingParams(0.7, top_k=4, seed=2), SamplingParams(1.3, top_p=0.8, seed=3)]


def probabilities(logits: Tensor, params: SamplingParams) -> Tensor:
    """Of each next token after each token, by the definitions, in float64."""
    weights = (logits.double() / params.temperature).softmax(-1)
    order = weights.argsort(-1, descending=True)
    ranks = order.argsort(-1)
    if params.top_k:
        weights = weights.masked_fill(ranks >= params.top_k, 0)
        weights = weights / weights.sum(-1, keepdim=True)
    before = weights.gather(-1, order).cumsum(-1) - weights.gather(-1, order)
    weights = weights.masked_fill(before.gather(-1, ranks) >= params.top_p, 0)
    return weights / weights.sum(-1, keepdim=True)


def assert_counts(counts: Counter[tuple[int, ...]], exact: dict[tuple[int, ...], float], total: int) -> None:
    for outcome, p in exact.items():
        assert abs(counts[outcome] - total * p) <= 5 * (total * p * (1 - p)) ** 0.5 + 1e-9, (outcome, p, counts)


@pytest.mark.parametrize("params", PARAMS, ids=str)
def test_given_tokens_are_of_the_models_distribution(params: SamplingParams) -> None:
    """Pairs of first tokens within five standard deviations of what the model alone makes of them.

    The second token is given where the first draft was right, else in the next step: those rows are drawn on.
    """
    num_rows, target, draft = 20000, random_logits(1), random_logits(2)
    given, _ = run_chain(target, draft, params, num_rows)
    exact = probabilities(target, params)
    singles = Counter((int(token),) for token in given[:, 0])
    assert_counts(singles, {(a,): float(exact[0, a]) for a in range(VOCABULARY)}, num_rows)
    # Given the first token and that there is a second, it is drawn after the first alone.
    for first in range(VOCABULARY):
        seconds = given[(given[:, 0] == first) & (given[:, 1] >= 0)][:, 1]
        assert_counts(
            Counter((int(token),) for token in seconds),
            {(b,): float(exact[first, b]) for b in range(VOCABULARY)},
            len(seconds),
        )


@pytest.mark.parametrize("params", PARAMS, ids=str)
def test_drafts_are_accepted_as_often_as_the_coupling_promises(params: SamplingParams) -> None:
    """Exactly: two races with common noise have the same winner i with 1 / sum_j max(p_j / p_i, q_j / q_i)."""
    num_rows, target, draft = 20000, random_logits(1), random_logits(2)
    given, drafted = run_chain(target, draft, params, num_rows)
    p, q = probabilities(target, params)[0], probabilities(draft, params)[0]
    both = [i for i in range(VOCABULARY) if p[i] > 0 and q[i] > 0]
    expected = sum(float(1 / torch.maximum(p / p[i], q / q[i]).sum()) for i in both)
    distance = float((p - q).abs().sum() / 2)
    assert expected >= (1 - distance) / (1 + distance) - 1e-12
    assert drafted.tolist() == [3] * num_rows
    assert_counts(Counter({(1,): int((given[:, 1] >= 0).sum())}), {(1,): expected}, num_rows)


def test_count_right_stops_at_the_first_wrong_draft_and_at_the_end() -> None:
    drafts = torch.tensor([[5, 6, 7], [5, 0, 7], [0, 6, 7], [5, 6, 7], [5, 6, 7], [-1, -1, -1]])
    drawn = torch.tensor([[5, 6, 7, 8]] * 6)
    active = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    assert count_right(drafts, drawn, active).tolist() == [4, 2, 1, 2, 0, 1]


def test_spread_rows_are_active_where_tokens_are_to_be_cached() -> None:
    rows = Rows.empty(3, 2, CPU)
    rows.positions.copy_(torch.tensor([4, 6, 0]))
    rows.active.copy_(torch.tensor([1, 1, 0]))
    rows.ends.copy_(torch.tensor([6, 6, 0]))
    rows.block_table.copy_(torch.tensor([[3, 4], [5, 6], [0, 0]]))
    spread = rows.spread(torch.arange(9).view(3, 3), 0)
    assert spread.tokens.tolist() == list(range(9))
    assert spread.active.tolist() == [1, 1, 0, 0, 0, 0, 0, 0, 0]
    assert spread.positions.tolist() == [4, 5, 5, 5, 5, 5, 0, 0, 0]
    assert spread.inputs().slots.tolist() == [3 * 64 + 4, 3 * 64 + 5, 0, 0, 0, 0, 0, 0, 0]
    assert spread.lengths().tolist() == [5, 6, 0, 0, 0, 0, 0, 0, 0]


def test_unknown_kind_lists_the_known_ones() -> None:
    sampler = Sampler(SamplingParams(), VocabularyShards((4,)), Solo(CPU))
    with pytest.raises(ValueError, match=r"speculation\.kind=guess is none of ngram, draft"):
        open_speculator(Speculation("guess"), EngineLimits(9, 1, 9), sampler, PagedModel(None, []), None, CPU)  # type: ignore[arg-type]


def test_acceptance_adds_up() -> None:
    first, second = Acceptance(), Acceptance()
    for num_drafts, accepted in ((4, 4), (4, 0), (2, 1)):
        first.add(num_drafts, accepted)
    second.add(4, 4)
    whole = join([first, second])
    assert (whole.drafted, whole.accepted, whole.accepted_per_step) == (14, 9, 9 / 4)
    assert whole.histogram(4) == [1, 1, 0, 0, 2]
    assert first.histogram(4) == [1, 1, 0, 0, 1]
    assert Acceptance().accepted_per_step is None
