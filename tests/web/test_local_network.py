"""A page on the internet asks the API of its visitor's own PC: https to http, with the permission that Chrome asks the user for.

The command line of the browser makes the address of the page a public one.
"""

from __future__ import annotations

import urllib.parse
from contextlib import ExitStack

from api.fake_engine import MODEL
from api.serving import serving

from petals_win.host.tls import self_signed
from web.frontend import ask_from, site


def test_a_page_on_the_internet_may_ask_if_the_user_lets_it(start_chrome, tmp_path):
    with ExitStack() as held:
        origin = held.enter_context(site(self_signed(tmp_path)))
        served = held.enter_context(serving(api_keys=("the-key",), cors_origins=(origin,)))
        port = urllib.parse.urlsplit(origin).port
        public = f"--ip-address-space-overrides=127.0.0.1:{port}=public"
        browser = held.enter_context(start_chrome("--ignore-certificate-errors", public))

        def ask(setting: str, space: str):
            permission = {"origin": origin, "permission": {"name": "loopback-network"}, "setting": setting}
            browser.execute_cdp_cmd("Browser.setPermission", permission)
            asked = {"url": served.url, "key": "the-key", "model": MODEL, "question": "say hello"}
            return ask_from(browser, origin, **asked, space=space)

        refused = ask("denied", "loopback")
        assert (refused.status, refused.error) == (None, "Failed to fetch")
        assert "Permission was denied" in "".join(entry["message"] for entry in browser.get_log("browser"))
        assert served.engine.requests == []
        let_in = ask("granted", "loopback")
        assert (let_in.status, let_in.text, let_in.error) == (200, "hello", None)
        assert ask("granted", "local").error == "Failed to fetch", "this PC is no other one of the network"
