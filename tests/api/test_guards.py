"""Who may ask: keys, origins, host names."""

import logging
import os
import re
from pathlib import Path

import httpx
import pytest
from typer.main import get_command

from api.serving import Served, eventually, serving
from petals_win.api import settings
from petals_win.api.settings import KeyFile
from petals_win.cli.main import app
from petals_win.errors import UserError

SITE = "https://baremetalrt.example"


def preflight(url: str, origin: str, **headers: str) -> httpx.Response:
    asked = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
    }
    return httpx.options(f"{url}/v1/chat/completions", headers={**asked, **headers})


def test_keys_guard_everything_but_the_open_paths():
    with serving(api_keys=("key",)) as served:
        for path in ("/health", "/", "/chat.js", "/chat.css", "/docs", "/openapi.json"):
            assert httpx.get(served.url + path).status_code == 200, path
        for path in ("/ready", "/v1/models", "/v1/models/x", "/v1%2Fmodels", "/nothing", "/health/", "//v1/models"):
            response = httpx.get(served.url + path)
            assert (response.status_code, response.headers["www-authenticate"]) == (401, "Bearer"), path
            assert "Send 'Authorization: Bearer KEY'" in response.json()["error"]["message"]
        assert httpx.get(f"{served.url}/ready", headers={"Authorization": "Bearer key"}).status_code == 200


def test_wrong_keys():
    with serving(api_keys=("key", "other")) as served:
        for value in ("", "Bearer", "key", "Basic key", "Bearer key2", "Bearer ke", "Bearer KEY", b"Bearer k\xe9y"):
            response = httpx.get(f"{served.url}/v1/models", headers={"Authorization": value})
            assert response.status_code == 401, value


def test_every_key_is_compared(monkeypatch):
    compared = []
    monkeypatch.setattr("hmac.compare_digest", lambda given, key: compared.append(key) or given == key)
    with serving(api_keys=("one", "two", "three")) as served:
        assert httpx.get(f"{served.url}/v1/models", headers={"authorization": "bearer one"}).status_code == 200
    assert compared == [b"one", b"two", b"three"]


def test_keys_are_not_logged(caplog):
    caplog.set_level(logging.DEBUG)
    with serving(api_keys=("secret-key",)) as served:
        for key in ("secret-key", "guessed-key"):
            httpx.get(f"{served.url}/v1/models", headers={"Authorization": f"Bearer {key}"})
        httpx.post(f"{served.url}/v1/completions", json={}, headers={"Authorization": "Bearer secret-key"})
    assert "secret-key" not in caplog.text
    assert "guessed-key" not in caplog.text


def test_an_allowed_origin_may_ask_and_read():
    with serving(api_keys=("key",), cors_origins=(SITE,)) as served:
        response = preflight(served.url, SITE)
        assert response.status_code == 200
        assert response.headers["access-control-allow-origin"] == SITE
        assert "x-stainless-os" in response.headers["access-control-allow-headers"]
        assert "access-control-allow-credentials" not in response.headers
        asked = {"Origin": SITE, "Authorization": "Bearer key"}
        response = httpx.post(f"{served.url}/v1/chat/completions", json=served.chat("Hi"), headers=asked)
        assert response.status_code == 200
        assert response.headers["access-control-allow-origin"] == SITE
        assert "Origin" in response.headers["vary"]
        # The page must be able to tell a missing key and a missing swarm from a broken network.
        response = httpx.get(f"{served.url}/v1/models", headers={"Origin": SITE})
        assert (response.status_code, response.headers["access-control-allow-origin"]) == (401, SITE)
        response = httpx.post(f"{served.url}/v1/chat/completions", json=served.chat("missing"), headers=asked)
        assert (response.status_code, response.headers["access-control-allow-origin"]) == (503, SITE)
        assert "Retry-After" in response.headers["access-control-expose-headers"]


def test_what_chrome_asked_for_before_142_is_no_reason_to_refuse():
    """It took no answer for a yes; browsers of today ask their users (tests/web/test_local_network.py)."""
    with serving(api_keys=("key",), cors_origins=(SITE,)) as served:
        response = preflight(served.url, SITE, **{"Access-Control-Request-Private-Network": "true"})
        assert (response.status_code, response.headers["access-control-allow-origin"]) == (200, SITE)
        assert "access-control-allow-private-network" not in response.headers
        other = preflight(served.url, "https://evil.example", **{"Access-Control-Request-Private-Network": "true"})
        assert other.status_code == 403


@pytest.mark.parametrize("keys", [(), ("key",)])
def test_other_origins_are_refused(keys):
    with serving(api_keys=keys, cors_origins=(SITE,)) as served:
        for origin in (
            "https://evil.example",
            "http://baremetalrt.example",
            f"{SITE}:444",
            f"{SITE}.evil.example",
            "https://sub.baremetalrt.example",
            "null",
            "http://localhost:1",
            "",
        ):
            # Also without a preflight: what a form or a script of mode "no-cors" can send.
            headers = {"Origin": origin, "Authorization": "Bearer key", "Content-Type": "text/plain"}
            plain = httpx.post(f"{served.url}/v1/chat/completions", json=served.chat("Hi"), headers=headers)
            for response in (preflight(served.url, origin), plain):
                assert response.status_code == 403, origin
                assert "access-control-allow-origin" not in response.headers
        assert served.engine.requests == []


def test_the_own_page_may_ask(served):
    for host in (f"127.0.0.1:{served.port}", f"localhost:{served.port}", "[::1]:8000", "localhost"):
        headers = {"Origin": f"http://{host}", "Host": host}
        response = httpx.post(f"{served.url}/v1/chat/completions", json=served.chat("Hi"), headers=headers)
        assert response.status_code == 200, host


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "localhost.evil.example", "192.168.1.5", "[", ""]
)
def test_without_keys_only_local_names_are_answered(served, host):
    response = httpx.get(f"{served.url}/v1/models", headers={"Host": host})
    assert response.status_code == 403
    assert "does not answer under the name" in response.json()["error"]["message"]
    # A page whose own name was resolved to this machine: origin and host agree.
    response = httpx.post(
        f"{served.url}/v1/chat/completions",
        json=served.chat("Hi"),
        headers={"Host": host, "Origin": f"http://{host}"},
    )
    assert response.status_code == 403
    assert served.engine.requests == []


@pytest.mark.parametrize("name", ["host.docker.internal", "host.containers.internal", "HOST.docker.internal"])
def test_programs_in_containers_may_ask(served, name):
    for host in (name, f"{name}:{served.port}"):
        response = httpx.post(f"{served.url}/v1/chat/completions", json=served.chat("Hi"), headers={"Host": host})
        assert response.status_code == 200


def test_but_no_page_by_a_containers_name_for_this_machine(served):
    """Whoever runs a visitor's name server could have the name resolved to anything."""
    for origin in ("http://host.docker.internal", f"http://host.docker.internal:{served.port}"):
        headers = {"Host": origin.removeprefix("http://"), "Origin": origin}
        response = httpx.post(f"{served.url}/v1/chat/completions", json=served.chat("Hi"), headers=headers)
        assert response.status_code == 403
    for name in ("docker.internal", "evil.docker.internal", "host.docker.internal.evil.example", "evil.internal"):
        assert httpx.get(f"{served.url}/v1/models", headers={"Host": name}).status_code == 403
    assert served.engine.requests == []


def test_other_names_can_be_allowed():
    with serving(allow_hosts=("llm.example", "192.168.1.5", "::7")) as served:
        for host in ("llm.example", "LLM.Example:80", "192.168.1.5:8000", "[::7]:8000", "localhost"):
            assert httpx.get(f"{served.url}/v1/models", headers={"Host": host}).status_code == 200, host
        own = {"Host": "llm.example", "Origin": "https://llm.example"}
        assert httpx.post(f"{served.url}/v1/chat/completions", json=served.chat("Hi"), headers=own).status_code == 200
        for host in ("evil.example", "sub.llm.example", "llm.example.evil.example", "192.168.1.6"):
            assert httpx.get(f"{served.url}/v1/models", headers={"Host": host}).status_code == 403, host
        foreign = {"Host": "llm.example", "Origin": "https://evil.example"}
        assert httpx.get(f"{served.url}/v1/models", headers=foreign).status_code == 403


def test_refusals_name_options_that_both_commands_have(served):
    """The advice is followed: what it names is an option, and with it the request is answered."""
    options = {
        name: {option for parameter in command.params for option in parameter.opts}
        for name, command in get_command(app).commands.items()  # type: ignore[attr-defined]
        if name in ("up", "api")
    }
    assert len(options) == 2
    for headers, setting in (({"Host": "llm.example"}, "allow_hosts"), ({"Origin": SITE}, "cors_origins")):
        response = httpx.get(f"{served.url}/v1/models", headers=headers)
        assert response.status_code == 403
        [(option, value)] = re.findall(r"(--[a-z-]+) (\S+)", response.json()["error"]["message"])
        assert all(option in known for known in options.values())
        with serving(**{setting: (value.rstrip("."),)}) as allowed:
            assert httpx.get(f"{allowed.url}/v1/models", headers=headers).status_code == 200


def test_with_keys_any_name_is_answered():
    with serving(api_keys=("key",)) as served:
        headers = {"Host": "llm.example", "Authorization": "Bearer key"}
        assert httpx.get(f"{served.url}/v1/models", headers=headers).status_code == 200


def test_insecure_answers_in_the_local_network_but_not_to_strangers_domains():
    with serving(host="0.0.0.0", insecure=True) as served:
        for host, status in (
            ("192.168.1.5:8000", 200),
            ("gaming-pc:8000", 200),
            ("gaming-pc.local", 200),
            ("localhost", 200),
            ("evil.example", 403),
        ):
            assert httpx.get(f"{served.url}/v1/models", headers={"Host": host}).status_code == status, host
        foreign = {"Origin": "https://evil.example"}
        assert httpx.get(f"{served.url}/v1/models", headers=foreign).status_code == 403


def test_the_page_can_load_and_reach_nothing_else(served):
    response = httpx.get(served.url)
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self';" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert response.headers["x-content-type-options"] == "nosniff"


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    file = tmp_path / "keys.txt"
    file.write_text("first-key\nsecond-key\n")
    return file


def status(served: Served, key: str) -> int:
    return httpx.get(f"{served.url}/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code


def test_a_key_that_is_removed_is_refused_within_seconds(keys):
    with serving(key_file=KeyFile(keys)) as served:
        assert (status(served, "first-key"), status(served, "second-key"), status(served, "third-key")) == (
            200,
            200,
            401,
        )
        keys.write_text("second-key\nthird-key\n")
        assert eventually(lambda: status(served, "first-key") == 401)
        assert (status(served, "second-key"), status(served, "third-key")) == (200, 200)


def test_the_same_size_and_time_do_not_hide_a_change(keys):
    with serving(key_file=KeyFile(keys)) as served:
        before = keys.stat()
        keys.write_text("First-key\nsecond-key\n")
        os.utime(keys, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert eventually(lambda: status(served, "first-key") == 401)


@pytest.fixture
def read_each_time(monkeypatch):
    monkeypatch.setattr(settings, "_KEYS_FRESH_S", 0)


@pytest.mark.usefixtures("read_each_time")
def test_no_key_left_is_nobody_and_not_everybody(keys, caplog):
    with serving(key_file=KeyFile(keys)) as served:
        for content in ("", "# none\n"):
            keys.write_text(content)
            for headers in ({}, {"Authorization": "Bearer"}, {"Authorization": "Bearer first-key"}):
                assert httpx.get(f"{served.url}/v1/models", headers=headers).status_code == 401
        assert [record.message for record in caplog.records if "no key any more" in record.message] == [
            f"The key file {keys} holds no key any more: nobody can use the API."
        ]
        keys.write_text("third-key\n")
        assert (status(served, "first-key"), status(served, "third-key")) == (401, 200)


@pytest.mark.usefixtures("read_each_time")
@pytest.mark.parametrize("damage", ["gone", "folder", "no text"])
def test_a_file_that_cannot_be_read_leaves_the_keys_as_they_were(keys, caplog, damage):
    with serving(key_file=KeyFile(keys)) as served:
        keys.unlink()
        if damage == "folder":
            keys.mkdir()
        elif damage == "no text":
            keys.write_bytes(b"\xff\xff\xff")
        for _ in range(3):
            assert (status(served, "first-key"), status(served, "third-key"), status(served, "x")) == (200, 401, 401)
        assert len([record for record in caplog.records if "stay valid" in record.message]) == 1


@pytest.mark.usefixtures("read_each_time")
def test_a_bad_line_does_not_bring_removed_keys_back(keys, caplog):
    with serving(key_file=KeyFile(keys)) as served:
        keys.write_text("second-key\nnot a key\n")
        assert (status(served, "first-key"), status(served, "second-key")) == (401, 200)
    assert "Line 2 of the key file" in caplog.text
    assert "not a key\n" not in caplog.text.replace("is not a key", "")
    assert "second-key" not in caplog.text


def test_a_key_file_opens_no_host_without_it(keys):
    assert settings.Settings(host="0.0.0.0", key_file=KeyFile(keys)).needs_key
    assert "first-key" not in repr(settings.Settings(key_file=KeyFile(keys)))


@pytest.mark.parametrize(
    "name", ["http://llm.example", "llm.example:80", "llm.example/x", "*", "", "a b", "*.example"]
)
def test_allowed_hosts_are_names(name):
    with pytest.raises(UserError, match="--allow-host as llm.example.org"):
        settings.Settings(allow_hosts=(name,))
