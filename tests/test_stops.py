"""Stop strings: against a search over the whole text, for any pieces that the text may come in."""

import random

import pytest

from edgellama.generate.stops import StopFinder
from fakes import fake_llama


def whole_text_search(text: str, stops: list[str]) -> tuple[str, str | None]:
    """(the text before the first character that completes a stop string, the longest one that ends there)."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


def in_pieces(rng: random.Random, text: str) -> list[str]:
    pieces = []
    while text:
        size = rng.randrange(5)
        pieces.append(text[:size])
        text = text[size:]
    return pieces


def may_become_a_stop(text: str, stops: list[str]) -> int:
    """How many characters at the end of `text` are the beginning of a stop string, at most."""
    return max((n for stop in stops for n in range(len(stop)) if text.endswith(stop[:n])), default=0)


def test_random_texts_stops_and_pieces():
    rng = random.Random(0)
    n_found = 0
    for _ in range(20_000):
        letters = "ab" if rng.random() < 0.6 else "abé "
        text = "".join(rng.choices(letters, k=rng.randrange(12)))
        stops = ["".join(rng.choices(letters, k=rng.randrange(1, 6))) for _ in range(rng.randrange(4))]
        expected, stop = whole_text_search(text, stops)
        finder, said, seen = StopFinder(stops), "", ""
        for piece in in_pieces(rng, text):
            said += finder.push(piece)
            seen += piece
            assert expected.startswith(said), "something leaked"
            if finder.found is None:  # exactly what may still become a stop string is held back
                assert len(said) == len(seen) - may_become_a_stop(seen, stops)
        said += finder.flush()
        assert (said, finder.found) == (expected, stop), (text, stops)
        n_found += stop is not None
    assert 5000 < n_found < 15_000


def test_a_long_stop_string_costs_no_more_for_each_character():
    stop = "a" * 20_000 + "b"
    finder = StopFinder([stop])
    assert finder.push("a" * 100_000) == "a" * 80_000
    assert finder.push("b") == "" and finder.found == stop


# -- in a reply ------------------------------------------------------------------------------------------------------

LETTER = {letter: 2 + index for index, letter in enumerate("abcdefghijklmnopqrstuvwxyz")}
HALVES = [28, 29]  # of "é"


def ids_of(text: str) -> list[int]:
    return [index for letter in text for index in (HALVES if letter == "é" else [LETTER[letter]])]


def test_streams_of_random_texts_never_leak():
    rng = random.Random(1)
    for _ in range(500):
        text = "".join(rng.choices("abé", k=rng.randrange(1, 10)))
        stops = ["".join(rng.choices("abé", k=rng.randrange(1, 4))) for _ in range(rng.randrange(1, 3))]
        expected, stop = whole_text_search(text, stops)
        ids = ids_of(text)
        stream = fake_llama(ids).generate("a", len(ids), stop=stops, temperature=0, stream=True)
        said = ""
        for piece in stream:
            said += piece
            assert expected.startswith(said)
        result = stream.result
        assert (said, result.text, result.stop) == (expected, expected, stop), (text, stops)
        assert result.finish_reason == ("stop" if stop else "length")
        assert ids[: len(result.token_ids)] == result.token_ids


def test_a_stop_string_over_three_tokens_ends_the_reply_at_once():
    llm = fake_llama(ids_of("xabcyz"))
    stream = llm.generate("a", 6, stop="abc", temperature=0, stream=True)
    assert list(stream) == ["x"]
    assert stream.result.token_ids == ids_of("xabc") and stream.result.stop == "abc"
    assert len(llm.backend.calls) == 4


def test_what_was_held_back_comes_when_it_is_no_stop_string():
    assert list(fake_llama(ids_of("xabq")).generate("a", 4, stop=["abc"], temperature=0, stream=True)) == ["x", "abq"]
    assert list(fake_llama(ids_of("xab")).generate("a", 3, stop=["abc"], temperature=0, stream=True)) == ["x", "ab"]
    assert fake_llama([*ids_of("ab"), 1]).generate("a", 9, stop="abc", temperature=0).text == "ab"  # end of text


def test_a_character_that_the_end_cuts_in_two_may_complete_a_stop_string():
    result = fake_llama([*ids_of("xa"), 28]).generate("a", 3, stop="a\ufffd", temperature=0)
    assert (result.text, result.stop, result.finish_reason) == ("x", "a\ufffd", "stop")


@pytest.mark.parametrize(
    ("stop", "error"), [("", ValueError), (["a", ""], ValueError), (3, TypeError), ([3], TypeError)]
)
def test_stop_strings_that_are_none(stop, error):
    with pytest.raises(error, match="stop"):
        fake_llama().generate("a", stop=stop)
