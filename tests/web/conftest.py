import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
from selenium import webdriver

from web.frontend import SITE_HOST

StartChrome = Callable[..., AbstractContextManager[webdriver.Chrome]]


@pytest.fixture(scope="session")
def start_chrome(tmp_path_factory: pytest.TempPathFactory) -> StartChrome:
    """Starts a browser without a window, with further arguments of its command line, for the length of a with block."""
    browser = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")
    driver = shutil.which("chromedriver")
    if not browser:
        pytest.skip("no browser: the package chromium (or google-chrome) is missing")
    if not driver:
        pytest.skip("no chromedriver: the package chromium-driver is missing")

    @contextmanager
    def start(*arguments: str) -> Iterator[webdriver.Chrome]:
        options = webdriver.ChromeOptions()
        options.binary_location = browser
        for argument in (
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            f"--user-data-dir={tmp_path_factory.mktemp('chrome')}",
            f"--host-resolver-rules=MAP {SITE_HOST} 127.0.0.1",
            *arguments,
        ):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
        try:
            chrome.set_page_load_timeout(60)
            chrome.set_script_timeout(120)
            yield chrome
        finally:
            chrome.quit()

    return start


@pytest.fixture(scope="session")
def _chrome(start_chrome: StartChrome) -> Iterator[webdriver.Chrome]:
    with start_chrome() as chrome:
        yield chrome


@pytest.fixture
def browser(_chrome: webdriver.Chrome) -> Iterator[webdriver.Chrome]:
    """A real browser without a window, on an empty page, with an empty console log."""
    _chrome.get_log("browser")
    yield _chrome
    _chrome.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    _chrome.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})
    _chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    _chrome.get("about:blank")
