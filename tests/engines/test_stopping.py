import itertools
import random

import pytest

from petals_win.engines.stopping import StopStrings, WithoutRepeat


def shown(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    scanner = StopStrings(stops)
    text = "".join(scanner.feed(piece) for piece in pieces)
    return text + scanner.flush(), scanner.stopped


@pytest.mark.parametrize(
    ("pieces", "stops", "expected"),
    [
        (["Hello", " world"], [], ("Hello world", False)),
        (["Hello", " world"], ["lo w"], ("Hel", True)),
        (["a", "\n", "\n", "b"], ["\n\n"], ("a", True)),
        (["a\n", "b\n"], ["\n\n"], ("a\nb\n", False)),
        (["END"], ["END"], ("", True)),
        (["aab"], ["ab"], ("a", True)),
        (["a", "a", "b"], ["aab", "b"], ("", True)),
        (["abc"], ["abc", "b"], ("a", True)),
        (["a", "b", "c"], ["abc", "b"], ("a", True)),
        (["x", "", "y"], [""], ("xy", False)),
    ],
)
def test_text_ends_before_the_first_stop_string(pieces, stops, expected):
    assert shown(pieces, stops) == expected


@pytest.mark.parametrize(
    ("pieces", "stops", "met"),
    [
        (["a", "b"], ["b", "ab"], "ab"),
        (["abc"], ["abc", "b"], "b"),
        (["a", "b"], ["x", "bc"], None),
        (["a"], [], None),
        (["a", "a"], ["a"], "a"),
    ],
)
def test_which_stop_string_it_was(pieces, stops, met):
    scanner = StopStrings(stops)
    for piece in pieces:
        scanner.feed(piece)
    scanner.flush()
    assert scanner.met == met and scanner.stopped is (met is not None)


def test_only_a_possible_beginning_is_held_back():
    scanner = StopStrings(["</end>"])
    assert scanner.feed("a < b") == "a < b"
    assert scanner.feed(" </en") == " "
    assert scanner.feed("try") == "</entry"
    assert scanner.flush() == ""


def test_nothing_is_shown_after_the_stop():
    scanner = StopStrings(["X"])
    assert scanner.feed("aXb") == "a"
    assert scanner.stopped
    assert scanner.feed("c") == ""
    assert scanner.flush() == ""


def test_the_cuts_between_pieces_do_not_matter():
    dice = random.Random(4)
    for _ in range(2000):
        text = "".join(dice.choices("abé", k=dice.randint(0, 9)))
        stops = ["".join(dice.choices("abé", k=dice.randint(1, 4))) for _ in range(dice.randint(0, 3))]
        cuts = sorted(dice.choices(range(len(text) + 1), k=dice.randint(0, 4)))
        pieces = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
        ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)]
        expected = text
        if ends:
            expected = text[: ends[0] - max(len(stop) for stop in stops if text[: ends[0]].endswith(stop))]
        assert shown(pieces, stops) == (expected, bool(ends))


@pytest.mark.parametrize(
    ("known", "pieces", "new"),
    [
        (" ", [" Paris", "."], "Paris."),
        (" ", ["Paris", " "], "Paris "),
        ("  ", [" ", " ", " x"], " x"),
        ("  ", [" x", " y"], "x y"),
        ("\t ", ["", "\t", "", " a"], "a"),
        ("", [" a"], " a"),
        (" ", ["\n a"], "\n a"),
    ],
)
def test_what_the_reader_has_already_is_left_out(known, pieces, new):
    beginning = WithoutRepeat(known)
    assert "".join(beginning.feed(piece) for piece in pieces) == new
