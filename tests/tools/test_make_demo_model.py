"""The demo model's recipe, and the model that the repository carries."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tools.demo import corpus as packer
from tools.demo.corpus import Corpus, collect, is_held_out, pack, unpack
from tools.demo.ngram import FALLBACK_DISCOUNT, discounts, fit_trigram
from tools.demo.tokenizer import BOS_ID, EOS_ID, PAD_ID, VOCAB_SIZE, encode_stream
from tools.demo.training import TrainingPlan, evaluate, learning_rate_factor
from tools.make_demo_model import main

SHIPPED = Path(__file__).parents[2] / "launcher" / "models" / "demo"
UNTIDY = "def f(x):\n\treturn  x  # Grüße, 你好 🙂 \r\n\n\n   \x00end  "


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return collect()


def test_split_is_disjoint_complete_and_repeatable(corpus: Corpus) -> None:
    train, held_out = corpus.split()
    assert not train.keys() & held_out.keys()
    assert train | held_out == corpus.texts
    assert 0.01 < len(held_out) / len(corpus.texts) < 0.10
    assert collect().facts() == corpus.facts()


def test_held_out_files_do_not_change() -> None:
    """The shipped model was trained under this split: to change the hash is to test on what it was trained on."""
    assert all(map(is_held_out, ("heapq.py", "mailbox.py", "random.py", "selectors.py", "wave.py")))
    assert not any(map(is_held_out, ("argparse.py", "dataclasses.py", "json/decoder.py", "typing.py")))


def test_collect_leaves_out_what_is_not_library_text(tmp_path: Path) -> None:
    for path in ("b.py", "a/c.py", "site-packages/d.py", "encodings/cp1.py", "_sysconfigdata_x.py", "copy_of_b.py"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text("same\n" if "b.py" in path else f"# {path}\n")
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n")
    (tmp_path / "blank.py").write_text("\n")
    assert list(collect(tmp_path).texts) == ["a/c.py", "b.py"]


def test_pack_round_trips(tmp_path: Path) -> None:
    small = Corpus({"a.py": "é\n", "b/c.py": "x = 1\n"}, "3.12.0")
    pack(small, tmp_path / "corpus.json.gz")
    assert unpack(tmp_path / "corpus.json.gz") == small


def test_trigram_is_a_distribution_for_seen_and_unseen_contexts() -> None:
    size = 50
    stream = (np.random.default_rng(0).zipf(1.5, 4000) % size).astype(np.int64)
    trigram = fit_trigram(stream, size)
    contexts = [(stream[10], stream[11]), (3, size - 1), (size - 1, size - 1)]
    for before_last, last in contexts:
        probability = trigram.probability(*(np.full(size, c) for c in (before_last, last)), np.arange(size))
        assert (probability > 0).all()
        assert probability.sum() == pytest.approx(1.0, abs=1e-12)


def test_trigram_loss_of_a_hand_example() -> None:
    """0 1 0 1 2, all discounts 0.75 (too few counts). Trigrams 010 101 012 once each.

    Unigram level: distinct bigrams end once in 0, once in 1, once in 2: (1 - d)/3 + d/3 = 1/3 each.
    Bigram level: after 0 only 1, after 1 both 0 and 2.   Trigram level: after 01 both 0 and 2, after 10 only 1.
    """
    d = FALLBACK_DISCOUNT
    trigram = fit_trigram(np.array([0, 1, 0, 1, 2]), 3)
    half = (1 - d) / 2 + d * ((1 - d) / 2 + d / 3)
    certain = (1 - d) + d * ((1 - d) + d / 3)
    assert trigram.loss(np.array([0, 1, 0])) == pytest.approx(-np.log(half))
    assert trigram.loss(np.array([1, 0, 1])) == pytest.approx(-np.log(certain))
    assert trigram.loss(np.array([0, 1, 0, 1])) == pytest.approx(-(np.log(half) + np.log(certain)) / 2)
    assert trigram.loss(np.array([2, 2, 1])) == pytest.approx(np.log(3))  # unseen context: the unigram level


def test_discounts_follow_chen_and_goodman() -> None:
    counts = np.repeat([1, 2, 3, 4, 9], [8, 4, 2, 1, 5])
    ratio = 8 / (8 + 2 * 4)
    expected = [0, 1 - 2 * ratio * 4 / 8, 2 - 3 * ratio * 2 / 4, 3 - 4 * ratio * 1 / 2]
    assert discounts(counts) == pytest.approx(expected)


def test_schedule_follows_whichever_budget_is_nearer_its_end() -> None:
    plan = TrainingPlan(steps=100, minutes=1.0, batch=1, sequence=8, lr=1.0, weight_decay=0.0, seed=0)
    assert plan.progress(50, 6.0) == 0.5
    assert plan.progress(10, 45.0) == 0.75
    assert plan.progress(10, 90.0) == 1.0
    factors = [learning_rate_factor(done) for done in (0.001, 0.01, 0.02, 0.5, 1.0)]
    assert factors[2] == pytest.approx(1.0)
    assert factors[0] < factors[1] < factors[2] > factors[3] > factors[4] > 0


def test_command_line_wants_an_end(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([])
    assert "--minutes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--steps 0", "--steps 0 must be at least 1"),
        ("--minutes 0", "--minutes 0 must be above 0"),
        ("--max-files 0", "--max-files 0 must be at least 1"),
        ("--max-held-out-tokens 2", "--max-held-out-tokens 2 must be at least 3"),
        ("--batch 0", "--batch 0 must be at least 1"),
    ],
)
def test_sizes_that_train_or_score_nothing_are_refused(
    capsys: pytest.CaptureFixture[str], option: str, words: str
) -> None:
    with pytest.raises(SystemExit):
        main(f"--steps 1 {option}".split())
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ({"argparse.py": "x = 1\n", "typing.py": "y = 2\n"}, "none of the 2 files is held out; raise --max-files"),
        ({"argparse.py": "x = 1\n", "wave.py": "y = 2\n"}, "of 4096 tokens: too little text; raise --max-files"),
    ],
)
def test_too_little_text_is_told_in_a_line(tmp_path: Path, texts: dict[str, str], words: str) -> None:
    pack(Corpus(texts, "3.12.0"), tmp_path / "corpus.json.gz")
    with pytest.raises(SystemExit, match=words):
        main(["--steps", "1", "--corpus", str(tmp_path / "corpus.json.gz"), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_three_steps_give_a_folder_that_transformers_loads(tmp_path: Path, corpus: Corpus) -> None:
    packed, out = tmp_path / "corpus.json.gz", tmp_path / "demo"
    pack(corpus.first(60), packed)
    sizes = "--max-held-out-tokens 600 --steps 3 --batch 2 --sequence 64"
    main([*sizes.split(), "--device", "cpu", "--corpus", str(packed), "--out", str(out)])

    _check_folder(out)
    facts = json.loads((out / "training.json").read_text())
    losses = [loss for _, loss in facts["training"]["held_out_history"]]
    assert len(losses) == 3
    assert min(losses) == losses[-1] < np.log(VOCAB_SIZE)
    assert facts["model"]["nats_per_token"] == pytest.approx(losses[-1], abs=0.01)  # bf16 rounding and no more
    assert f"{facts['trigram']['nats_per_token']:.3f}" in (out / "README.md").read_text()


def test_shipped_model_is_small_and_whole() -> None:
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) <= 16 * 2**20
    _check_folder(SHIPPED)


def test_shipped_model_says_it_beats_the_trigram() -> None:
    facts = json.loads((SHIPPED / "training.json").read_text())
    for unit in ("nats_per_token", "bits_per_byte", "perplexity"):
        assert facts["model"][unit] < facts["trigram"][unit]
    assert facts["num_parameters"] < 8e6


def test_shipped_model_beats_the_recorded_trigram_on_this_pythons_text(corpus: Corpus) -> None:
    """Recomputed here, so that a damaged weight file or tokenizer cannot hide behind the recorded number.

    The text is of this Python, so the loss differs a little from the recorded one; the margin is far wider than that.
    """
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    names = [name for name in ("heapq.py", "random.py", "selectors.py", "wave.py") if name in corpus.texts]
    slices = [encode_stream(tokenizer, [corpus.texts[name]])[1:702] for name in names]
    stream = np.concatenate([np.array([EOS_ID]), *slices])
    loss = evaluate(AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32), stream, sequence=701)
    assert loss < json.loads((SHIPPED / "training.json").read_text())["trigram"]["nats_per_token"]


def _check_folder(folder: Path) -> None:
    """Loads with the Auto classes, in bf16, with the ids in both configurations, and no machine's paths in it."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    for config in (model.config, model.generation_config):
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (BOS_ID, EOS_ID, PAD_ID)
    assert model.generation_config.do_sample is False
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == VOCAB_SIZE
    assert tokenizer.chat_template is None
    ids = tokenizer(UNTIDY)["input_ids"]
    assert ids[0] == BOS_ID
    assert BOS_ID not in ids[1:]
    assert tokenizer.decode(ids, skip_special_tokens=True) == UNTIDY
    for file in folder.glob("*.[jm][sd]*"):
        if file.name != "tokenizer.json":
            assert not re.search(r"[\"' ]/\w|/root|/tmp|/home", file.read_text()), file.name


def test_asking_for_help_packs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        packer.main(["--help"])
    assert ended.value.code == 0 and not list(tmp_path.iterdir())
