import pytest

from petals_win.engines.base import (
    GenerationRequest,
    ModelCard,
    ModelNotFound,
    SwarmUnavailable,
    block_ranges,
    find_model,
)


@pytest.mark.parametrize(
    ("blocks", "expected"), [([], ""), ([3], "3:4"), ([0, 1, 2, 7], "0:3, 7:8"), ([9, 8, 1], "1:2, 8:10")]
)
def test_blocks_are_written_as_ranges(blocks, expected):
    assert block_ranges(blocks) == expected


def test_a_request_has_messages_or_a_prompt():
    GenerationRequest(model="m", prompt="")
    for bad in ({}, {"prompt": "a", "messages": ()}):
        with pytest.raises(ValueError, match="either messages or a prompt"):
            GenerationRequest(model="m", **bad)


def test_errors_say_what_is_missing():
    assert "blocks 15:30 of the model" in str(SwarmUnavailable(range(15, 30)))
    assert "Ask for one of: a, b." in str(ModelNotFound("c", ["a", "b"]))


@pytest.mark.parametrize(
    ("names", "asked", "found"),
    [
        (["Owner/Some-Model"], "Owner/Some-Model", "Owner/Some-Model"),
        (["Owner/Some-Model"], "owner/some-model", "Owner/Some-Model"),
        (["Owner/Some-Model"], "SOME-MODEL", "Owner/Some-Model"),
        (["Some-Model"], "Owner/Some-Model", "Some-Model"),
        (["Owner/Some-Model"], "Other/Some-Model", None),
        (["Owner/Some-Model"], "Owner", None),
        (["Owner/Some-Model"], "Owner/", None),
        (["Owner/Some-Model"], "", None),
        (["a/m", "b/m"], "m", None),
        (["a/m", "b/m"], "B/M", "b/m"),
        (["a/m", "m"], "m", "m"),
        (["M", "m"], "m", "m"),
    ],
)
def test_a_model_by_its_name(names, asked, found):
    cards = [ModelCard(name, 0, 100) for name in names]
    if found:
        assert find_model(asked, cards).id == found
    else:
        with pytest.raises(ModelNotFound, match=names[0]):
            find_model(asked, cards)
