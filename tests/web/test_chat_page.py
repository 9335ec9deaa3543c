"""The chat page in a real browser, with a scripted engine behind it."""

import pytest
from api.fake_engine import FakeEngine
from api.serving import eventually, serving
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from petals_win.engines.base import Finished, Thought, Token

PHONE = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}


class Page:
    """The chat page of a server, as a user sees it."""

    def __init__(self, browser, url: str):
        self.browser = browser
        browser.get(url)

    def one(self, selector: str):
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def texts(self, selector: str) -> list[str]:
        script = "return [...document.querySelectorAll(arguments[0])].map((element) => element.textContent)"
        return self.browser.execute_script(script, selector)

    def wait(self, condition):
        return WebDriverWait(self.browser, 60, poll_frequency=0.03).until(lambda _: condition())

    def ready(self) -> None:
        self.wait(lambda: self.one("#status").get_attribute("data-state") == "ready")

    def ask(self, question: str) -> None:
        self.one("#prompt").send_keys(question, Keys.ENTER)

    def answers(self, count: int = 1) -> list[str]:
        """Wait until so many answers are complete."""
        self.wait(lambda: len(self.texts('.assistant[aria-busy="false"] .text')) == count)
        return self.texts(".assistant .text")

    def complaints(self) -> list[str]:
        """What the browser's console holds: errors of the script, violations of the content policy."""
        return [entry["message"] for entry in self.browser.get_log("browser") if entry["level"] == "SEVERE"]


def test_it_streams_an_answer_and_remembers_the_conversation(browser):
    with serving(FakeEngine(pace=0.05)) as served:
        page = Page(browser, served.url)
        page.ready()
        assert page.one("#status").text == "Ready · 1 node"
        assert page.one("#model").get_attribute("value") == served.model
        assert not page.one("#send").is_enabled(), "there is nothing to send"
        page.ask("count 60")
        seen = set()
        page.wait(lambda: seen.add(page.texts(".assistant .text")[0]) or len(seen) > 2)
        assert page.one(".assistant").get_attribute("aria-busy") == "true"
        assert page.answers() == [" ".join(str(n) for n in range(1, 61))]
        [facts] = page.texts(".facts")
        assert facts.startswith("60 tokens · ")
        assert 2 < float(facts.split()[3]) < 25, "tokens/s at one token every 50 ms"

        page.ask("Really?")
        assert page.answers(2)[1] == "You said: Really?"
        roles = [message["role"] for message in served.engine.requests[-1].messages]
        assert roles == ["user", "assistant", "user"]

        page.one("#new-chat").click()
        assert page.texts(".message") == []
        page.ask("Again")
        page.answers()
        assert len(served.engine.requests[-1].messages) == 1
        assert page.complaints() == []


def test_stop_ends_the_generation(browser):
    with serving(FakeEngine(pace=0.02)) as served:
        page = Page(browser, served.url)
        page.ready()
        for end in (lambda: page.one("#stop").click(), lambda: page.one("#prompt").send_keys(Keys.ESCAPE)):
            before = served.engine.cancelled
            page.ask("count 10000")
            page.wait(lambda: "3" in "".join(page.texts(".assistant:last-of-type .text")))
            end()
            assert eventually(lambda before=before: served.engine.cancelled == before + 1)
            page.wait(lambda: page.one("#send").is_displayed())
            assert not page.one("#stop").is_displayed()
            assert page.texts(".facts")[-1].endswith(" · stopped")
        assert served.engine.completed == 0
        page.ask("say more")
        assert page.answers(3)[-1] == "more"
        page.ask("count 10000")
        page.wait(lambda: len(page.texts(".assistant")) == 4)
        page.one("#new-chat").click()
        assert eventually(lambda: served.engine.cancelled == 3)
        assert page.complaints() == []


def test_markup_in_an_answer_is_shown_and_not_run(browser):
    with serving() as served:
        page = Page(browser, served.url)
        page.ready()
        markup = "<img src=x onerror=alert(1)><script>alert(2)</script> & <b>"
        page.ask(f"say {markup}")
        assert page.answers() == [markup]
        assert page.texts("#log img, #log script, #log b") == []
        assert page.complaints() == []


def test_missing_blocks_are_named_and_the_question_is_not_lost(browser):
    with serving(FakeEngine(missing_blocks=tuple(range(15, 30)))) as served:
        page = Page(browser, served.url)
        page.wait(lambda: page.one("#status").get_attribute("data-state") == "missing")
        assert page.one("#status").text == "No node serves blocks 15:30. (1 node online)"
        page.ask("missing please")
        page.wait(lambda: page.texts('.error[role="alert"]'))
        assert "blocks 15:30 of the model" in page.one(".error").text
        assert page.texts(".message") == []
        assert page.one("#prompt").get_attribute("value") == "missing please"
        page.one("#prompt").clear()
        page.ask("break")
        page.wait(lambda: page.texts('.assistant[aria-busy="false"]'))
        page.wait(lambda: page.texts(".error"))
        assert page.texts(".assistant .text") == ["two tokens"], "what was answered before it broke stays"


def test_what_a_model_thinks_is_apart_from_its_answer(browser):
    engine = FakeEngine(pace=0.02)
    engine.script = [*(Thought(f"{number} ") for number in range(50)), Token("Yes"), Token(".")]
    engine.script.append(Finished("stop"))
    with serving(engine) as served:
        page = Page(browser, served.url)
        page.ready()
        page.ask("Is it?")
        page.wait(lambda: page.texts(".thoughts p") and page.texts(".facts"))  # long before a word is said
        assert page.texts(".assistant .text") == [""] and not page.one(".thoughts p").is_displayed()
        page.one(".thoughts summary").click()
        assert page.one(".thoughts p").is_displayed()
        assert page.answers() == ["Yes."]
        assert page.texts(".thoughts p") == ["".join(f"{number} " for number in range(50))]
        page.ask("Really?")
        page.answers(2)
        assert served.engine.requests[-1].messages[1] == {"role": "assistant", "content": "Yes."}
        assert page.complaints() == []


def test_an_answer_without_a_word_is_told(browser):
    engine = FakeEngine()
    engine.script = [Finished("stop")]
    with serving(engine) as served:
        page = Page(browser, served.url)
        page.ready()
        page.ask("Anything?")
        page.wait(lambda: page.texts('.error[role="alert"]'))
        assert "before the first word" in page.one(".error").text
        assert page.texts(".message") == [] and page.one("#prompt").get_attribute("value") == "Anything?"
        engine.script = []
        page.ask("")
        assert page.answers() == ["You said: Anything?"] and page.texts(".error") == []
        assert page.complaints() == []


def test_it_asks_for_a_key_where_one_is_needed(browser):
    with serving(api_keys=("the-key",)) as served:
        page = Page(browser, served.url)
        page.wait(lambda: page.one("#key-dialog").is_displayed())
        page.one("#key").send_keys("wrong", Keys.ENTER)
        page.wait(lambda: page.one("#key-title").text == "This key is not valid")
        page.one("#key-cancel").click()
        page.ask("say yes")
        page.wait(lambda: page.one("#key-dialog").is_displayed())
        page.one("#key").send_keys("the-key", Keys.ENTER)
        assert page.answers() == ["yes"]
        page.ready()
        browser.refresh()
        page.ready()
        assert not page.one("#key-dialog").is_displayed(), "the key lasts as long as the tab"
        assert browser.execute_script("return localStorage.length") == 0
        assert "the-key" not in browser.current_url


def test_it_says_when_the_server_is_gone(browser):
    with serving() as served:
        page = Page(browser, served.url)
        page.ready()
    page.ask("Hello?")
    page.wait(lambda: page.texts(".error"))
    assert "cannot be reached" in page.one(".error").text
    page.wait(lambda: page.one("#status").get_attribute("data-state") == "broken")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone(browser, scheme):
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", PHONE)
    browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
    media = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
    with serving() as served:
        page = Page(browser, served.url)
        page.ready()
        for count, question in enumerate(("say " + "Donaudampfschifffahrtsgesellschaft" * 5, "Tell me more."), 1):
            page.one("#prompt").send_keys(question)
            page.one("#send").click()
            page.answers(count)
        height = page.one("#prompt").size["height"]
        page.one("#prompt").send_keys("one\ntwo\nthree")
        assert len(page.texts(".user")) == 2, "on a phone the Enter key makes a new line"
        assert page.one("#prompt").size["height"] > height + 30, "the field grows with its text"

        widths = """const boxes = [document.documentElement, document.getElementById("scroller")];
            return [innerWidth, ...boxes.flatMap((box) => [box.clientWidth, box.scrollWidth])]"""
        assert browser.execute_script(widths) == [360] * 5, "no scrolling to the side"
        overflowing = """return [...document.querySelectorAll("body *")].filter((element) => {
            const box = element.getBoundingClientRect();
            return box.width > 1 && (box.right > innerWidth + 0.5 || box.left < -0.5);
        }).map((element) => element.outerHTML)"""
        assert browser.execute_script(overflowing) == []
        bottom = browser.execute_script("return document.getElementById('composer').getBoundingClientRect().bottom")
        assert bottom <= 740, "what to write in is always in view"
        for selector in ("#send", "#new-chat", "#model", "#prompt"):
            size = page.one(selector).size
            assert size["height"] >= 44 and size["width"] >= 44, f"{selector} is hard to hit: {size}"
        background = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert (background == "rgb(23, 20, 23)") == (scheme == "dark")
        assert page.complaints() == []


def test_docs_work_without_the_internet(browser):
    with serving() as served:
        page = Page(browser, f"{served.url}/docs")
        page.wait(lambda: "/v1/chat/completions" in "".join(page.texts(".opblock-summary-path")))
        assert page.complaints() == []
