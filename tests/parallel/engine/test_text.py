"""Text appears in whole characters, adds up to the full decode, and never shows part of a stop text."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models

from parallel.engine.text import TextStream
from tests.parallel.ranks import demo_tokenizer

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
TEXTS = [
    "def main() -> None:\n    print('hello')\n",
    "Grüße aus Köln, naïve façade",
    "你好世界。日本語のテキスト",
    "🙂 and 👩‍👩‍👧 and 🏳️‍🌈.",
    "  spaces,\ttabs\r\n\n\nand lines  ",
    "mixed: a🙂b漢c\u0301d",
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return demo_tokenizer()


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_add_up_to_the_full_decode_in_whole_characters(tokenizer: Tokenizer, text: str) -> None:
    ids = encode(tokenizer, text)
    stream, shown = TextStream(tokenizer), ""
    for token in ids:
        piece = stream.add(token)
        assert UNFINISHED not in piece
        shown += piece
        assert text.startswith(shown)
    assert shown == tokenizer.decode(ids) == text
    assert stream.finish() == ""


def test_character_appears_with_its_last_token_and_not_before(tokenizer: Tokenizer) -> None:
    ids = encode(tokenizer, "🙂")
    assert len(ids) > 2, "the tokenizer knows the character whole: nothing is tested"
    stream = TextStream(tokenizer)
    assert [stream.add(token) for token in ids] == [*[""] * (len(ids) - 1), "🙂"]


def test_character_that_stays_unfinished_is_not_shown(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer)
    shown = [stream.add(token) for token in (*encode(tokenizer, "ab"), *encode(tokenizer, "漢")[:-1])]
    assert "".join(shown) + stream.finish() == "ab"


def byte_tokenizer() -> Tokenizer:
    """As Llama 2 and Mistral have it: what is in no word is written byte by byte, a line break too."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\N{LOWER ONE EIGHTH BLOCK}on", "a", "é"]
    tokenizer = Tokenizer(models.BPE({word: at for at, word in enumerate(words)}, [], byte_fallback=True))
    spaces = decoders.Replace("\N{LOWER ONE EIGHTH BLOCK}", " ")
    tokenizer.decoder = decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return tokenizer


def test_bytes_that_are_no_character_leave_what_was_shown_before_them() -> None:
    """Of which the full decode makes none, either."""
    tokenizer = byte_tokenizer()
    ids = [tokenizer.token_to_id(word) for word in ("a", "<0x0A>", "<0xE4>", "\N{LOWER ONE EIGHTH BLOCK}on", "a")]
    assert tokenizer.decode(ids) == f"a{UNFINISHED}{UNFINISHED} ona"
    stream = TextStream(tokenizer)
    assert [stream.add(token) for token in ids] == ["a", "\n", "", f"{UNFINISHED} on", "a"]


def test_words_among_any_bytes_are_shown() -> None:
    tokenizer, draw = byte_tokenizer(), random.Random(0)
    others = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in (10, *range(128, 256))]
    words = range(257, tokenizer.get_vocab_size())
    for _ in range(200):
        ids = [draw.choice((others[0], draw.choice(others), draw.choice(words))) for _ in range(40)]
        stream = TextStream(tokenizer)
        shown = "".join(map(stream.add, ids)) + stream.finish()
        for word in ("on", "a", "é"):
            assert shown.count(word) == tokenizer.decode(ids).count(word), ids


def test_special_tokens_show_nothing(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer)
    specials = [token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special]
    assert specials
    assert [stream.add(token) for token in specials] == [""] * len(specials)
    assert "".join(map(stream.add, encode(tokenizer, "after"))) == "after"


def stream_text(tokenizer: Tokenizer, text: str, stop: tuple[str, ...]) -> tuple[str, bool]:
    """What is shown of `text` up to a stop text or the end, and whether it stopped."""
    stream, shown = TextStream(tokenizer, stop), ""
    for token in encode(tokenizer, text):
        shown += stream.add(token)
        if stream.stopped:
            return shown, True
    return shown + stream.finish(), False


@pytest.mark.parametrize(
    ("text", "stop", "shown"),
    [
        ("one\n\n\ntwo", ("\n\n\n",), "one"),
        ("a long answer. End of the answer. More", ("End of the answer",), "a long answer. "),
        ("return x\n\nclass Next", ("\n\nclass ",), "return x"),
        ("你好世界再见", ("世界",), "你好"),
        ("ok 🙂🙃 no", ("🙃",), "ok 🙂"),
        ("aaaab", ("aab",), "aa"),
        ("first second third", ("third", "second"), "first "),
    ],
)
def test_stop_text_over_several_tokens_is_cut(
    tokenizer: Tokenizer, text: str, stop: tuple[str, ...], shown: str
) -> None:
    assert max(len(encode(tokenizer, one)) for one in stop) > 1
    assert stream_text(tokenizer, text, stop) == (shown, True)


def test_earliest_of_two_stop_texts_in_one_token_wins(tokenizer: Tokenizer) -> None:
    assert len(encode(tokenizer, "return")) == 1
    assert stream_text(tokenizer, "return", ("urn", "tur")) == ("re", True)


@pytest.mark.parametrize("text", ["one\n\ntwo", "End of the ans", "the End of the answ and more"])
def test_beginning_of_a_stop_text_is_shown_once_it_turns_out_to_be_none(tokenizer: Tokenizer, text: str) -> None:
    assert stream_text(tokenizer, text, ("\n\n\n", "End of the answer")) == (text, False)


def expected_so_far(text: str, stop: tuple[str, ...]) -> str:
    """All of `text` before the first stop text, or all but the longest end that could become one."""
    found = [text.find(one) for one in stop if one in text]
    if found:
        return text[: min(found)]
    beginnings = [one[:size] for one in stop for size in range(1, len(one)) if text.endswith(one[:size])]
    return text[: len(text) - max(map(len, beginnings), default=0)]


def test_random_texts_show_all_that_cannot_be_a_stop_text_and_no_more(tokenizer: Tokenizer) -> None:
    draw, num_stopped = random.Random(0), 0
    letters = {letter: tokenizer.token_to_id(letter) for letter in "ab"}
    for _ in range(400):
        stop = tuple("".join(draw.choices("ab", k=draw.randint(1, 6))) for _ in range(draw.randint(0, 3)))
        stream, text, shown = TextStream(tokenizer, stop), "", ""
        for letter in draw.choices("ab", k=24):
            text += letter
            shown += stream.add(letters[letter])
            assert shown == expected_so_far(text, stop), (text, stop)
            assert stream.stopped == any(one in text for one in stop)
            if stream.stopped:
                num_stopped += 1
                break
        else:
            assert shown + stream.finish() == text
    assert 100 < num_stopped < 350
