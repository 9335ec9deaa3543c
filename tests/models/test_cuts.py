"""Where models may be cut, and what is said of other places."""

from __future__ import annotations

import pytest
from span.families import config_of

from petals_win.errors import UserError
from petals_win.models.cuts import Cuts, sources_of_choices, sources_of_keys


def test_most_models_may_be_cut_anywhere():
    cuts = Cuts.of(config_of("llama"))
    assert cuts.anywhere and cuts.places == (0, 1, 2, 3, 4) and cuts.halves == [(0, 2), (2, 4)]
    assert cuts.allow(1, 3) and cuts.fewest_together == 1
    assert cuts.run_from(1, 2) == 3 and cuts.run_from(3, 9) == 4 and cuts.run_from(1, 0) == 1


@pytest.mark.parametrize("family", ["gemma3n_text", "gemma4"])
def test_keys_are_not_parted_from_those_who_use_them(family):
    """Blocks 5 to 7 have none: block 4 makes those of the windows, block 2 those of all tokens."""
    config = config_of(family)
    cuts = Cuts.of(config)
    assert sources_of_keys(config.get_text_config()) == {5: 2, 6: 4, 7: 2}
    assert cuts.places == (0, 1, 2, 8) and not cuts.anywhere and cuts.num_blocks == 8
    assert cuts.halves == [(0, 2), (2, 8)] and cuts.fewest_together == 1
    assert (cuts.before(5), cuts.after(5), cuts.before(2), cuts.after(2), cuts.after(99)) == (2, 8, 2, 2, 8)
    assert [cuts.run_from(start, most) for start, most in ((0, 5), (2, 5), (2, 6), (1, 7))] == [2, 2, 8, 8]
    with pytest.raises(UserError, match="2:8 use the keys.* Serve blocks up to 2, or with all of 2:8"):
        cuts.check(4, 8)
    with pytest.raises(UserError, match="The blocks 1:5 of this model need others"):
        cuts.check(1, 5)
    cuts.check(1, 8)


def test_choices_are_not_parted_from_those_who_use_them():
    config = config_of("glm_moe_dsa")
    assert sources_of_choices(config) == {1: 0, 4: 3, 5: 3}
    assert Cuts.of(config).places == (0, 2, 3, 6)


def test_a_model_in_one_piece():
    cuts = Cuts((0, 5))
    assert cuts.halves == [(0, 5)] and cuts.fewest_together == 5
    with pytest.raises(UserError, match="Serve blocks with all of 0:5"):
        cuts.check(0, 2)
