"""The random model of the measurements: its answers end as it was asked for, and depend on tokens that are far back."""

from __future__ import annotations

import pytest

from petals_win.bench.tiny_model import TinyShape, make_tiny_model
from petals_win.errors import UserError


def test_what_it_is_made_as(tmp_path):
    import torch

    from petals_win.models.source import open_model

    source = open_model(str(make_tiny_model(tmp_path / "tiny", TinyShape(2048, heads=2, heads_of_keys=1, ends=2))))
    assert source.context_length == 2048
    tokenizer, generation = source.tokenizer(), source.generation_config()
    turn = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    assert text == "user: Hi\nassistant: " == tokenizer.decode(tokenizer(text)["input_ids"])
    assert generation is not None and generation.eos_token_id == [0, 1] and generation.do_sample

    # What comes next depends on tokens that are far back.
    model, chance = source.whole_model(), torch.Generator().manual_seed(1)
    ids = torch.randint(60, 90, (1, 1600), generator=chance)
    other = torch.cat([torch.randint(60, 90, (1, 800), generator=chance), ids[:, 800:]], dim=1)
    settings = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False}
    answers = [model.generate(each, **settings)[0, 1600:].tolist() for each in (ids, other)]
    assert answers[0] != answers[1]


def test_a_shape_that_no_model_has(tmp_path):
    with pytest.raises(UserError, match="could not be made"):
        make_tiny_model(tmp_path / "tiny", TinyShape(heads=3))
