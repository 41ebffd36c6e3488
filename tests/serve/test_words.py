"""Text token by token: its parts add up to the whole, characters are not cut, and stop strings end it."""

from hypothesis import given
from hypothesis import strategies as st

from jaxmodels.data.tokenizer import Bytes
from jaxmodels.serve.words import Words


def written(prompt, text, stops):
    """The parts of a text that is fed byte by byte."""
    words, parts = Words(Bytes(), list(prompt.encode()), stops), []
    for byte in text.encode():
        parts.append(words.add(byte))
        if words.stopped:
            return parts, True
    return [*parts, words.rest()], words.stopped


@given(
    st.text(max_size=8), st.text(alphabet="ab é🙂\n", max_size=30), st.lists(st.text("ab é", min_size=1, max_size=4))
)
def test_parts_add_up_to_the_text_before_the_first_stop(prompt, text, stops):
    parts, stopped = written(prompt, text, stops)
    # the earliest end of a stop string decides, since nothing behind it is read
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    read = text[: min(ends)] if ends else text
    begins = [read.find(stop) for stop in stops if stop in read]
    assert "".join(parts) == (read[: min(begins)] if ends else text)
    assert stopped == bool(ends)


@given(st.lists(st.sampled_from([*"a谰🙂".encode(), 0x80, 0xFF]), max_size=40))
def test_parts_of_broken_bytes_add_up_to_what_all_of_them_say(data):
    words = Words(Bytes(), [])
    assert "".join([*map(words.add, data), words.rest()]) == Bytes().decode(data)


def test_a_character_is_told_when_it_is_whole():
    assert written("x", "é🙂", [])[0] == ["", "é", "", "", "", "🙂", ""]


def test_what_may_become_a_stop_string_is_held_back():
    assert written("", "abcab", ["bcd", "zz"])[0] == ["a", "", "", "bca", "", "b"]
