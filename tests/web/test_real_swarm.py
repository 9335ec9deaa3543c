"""The chat page in a real browser, in front of a real swarm: tiny models that people's PCs could not hold at full length."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tiny_chat import tiny_chat_model

from web.test_chat_page import Page


@contextmanager
def up(folder: Path) -> Iterator[str]:
    """`petals-win up` without any other setting; gives the address of its page."""
    command = [sys.executable, "-m", "petals_win.cli.main", "up", "--model", str(folder), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8")
    lines: list[str] = []
    try:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                yield found[0]
                break
        else:
            raise AssertionError("up ended: " + "".join(lines))
    finally:
        process.terminate()
        process.wait(30)


def through(page: Page, turn: int) -> bool:
    """Whether the tab has the answer of this turn, or an error. A model that draws its tokens may end at once: it is asked again."""
    errors = page.texts(".error")
    if any("before the first word" in error for error in errors):
        page.ask("")  # the question is still there
        return False
    return bool(errors) or len(page.texts('.assistant[aria-busy="false"] .text')) == turn


@pytest.mark.parametrize(
    ("family", "changes"),
    [("llama", {"context": 131_072}), ("gpt2", {"context": 32_768})],
    ids=["a context of 131,072", "no grouped heads"],
)
def test_three_tabs_at_once_are_answered_without_any_setting(browser, tmp_path, family, changes):
    with up(tiny_chat_model(tmp_path / "tiny", family, ends=8, **changes)) as url:
        first, tabs = browser.current_window_handle, []
        try:
            for _ in range(3):
                browser.switch_to.new_window("tab")
                tabs.append((browser.current_window_handle, Page(browser, url)))
                tabs[-1][1].ready()
            for turn in range(1, 3):
                for number, (handle, page) in enumerate(tabs):
                    browser.switch_to.window(handle)
                    page.ask(f"Tell me about the number {number}.")
                for handle, page in tabs:
                    browser.switch_to.window(handle)
                    page.wait(lambda page=page, turn=turn: through(page, turn))
                    assert page.texts(".error") == []
                    assert len(page.texts(".facts")) == turn
                    assert page.complaints() == []
        finally:
            for handle, _ in tabs:
                browser.switch_to.window(handle)
                browser.close()
            browser.switch_to.window(first)
