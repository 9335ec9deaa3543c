"""The user's front-end case: a page of another origin asks the API through a real browser."""

from api.fake_engine import MODEL, FakeEngine
from api.serving import serving

from web.frontend import ask_from, site


def test_an_allowed_page_with_a_key_streams_the_answer(browser):
    with site() as origin, serving(FakeEngine(pace=0.05), api_keys=("the-key",), cors_origins=(origin,)) as served:
        outcome = ask_from(browser, origin, url=served.url, key="the-key", model=MODEL, question="count 40")
    assert (outcome.status, outcome.error) == (200, None)
    assert outcome.text == " ".join(map(str, range(1, 41)))
    assert outcome.pieces >= 5, "the text comes in pieces while it is computed"


def test_without_the_key_it_is_refused_and_told_so(browser):
    with site() as origin, serving(api_keys=("the-key",), cors_origins=(origin,)) as served:
        for key, message in ((None, "needs a key"), ("another-key", "not valid")):
            outcome = ask_from(browser, origin, url=served.url, key=key, model=MODEL, question="Hi")
            assert (outcome.status, outcome.text) == (401, "")
            assert message in outcome.error
        assert served.engine.requests == []


def test_from_an_origin_that_is_not_allowed_the_browser_lets_nothing_through(browser):
    with site() as origin, site() as other:
        for keys in (("the-key",), ()):
            with serving(api_keys=keys, cors_origins=(other,)) as served:
                outcome = ask_from(browser, origin, url=served.url, key="the-key", model=MODEL, question="Hi")
                assert (outcome.status, outcome.text, outcome.error) == (None, "", "Failed to fetch")
                assert served.engine.requests == []
                assert ask_from(browser, other, url=served.url, key="the-key", model=MODEL, question="Hi").text
