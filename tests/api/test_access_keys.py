"""Keys that `petals-win key` makes: kept as hashes, taken and refused without a restart, with limits of their own."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import stat
import sys
from pathlib import Path

import httpx
import pytest

from api.serving import Served, eventually, serving
from petals_win.api import callers, created_keys
from petals_win.api.callers import Allowance
from petals_win.api.created_keys import CreatedKeys
from petals_win.api.guards import RequireKey, TrustedPages
from petals_win.api.settings import Settings
from petals_win.errors import UserError


@pytest.fixture
def keys(tmp_path: Path) -> CreatedKeys:
    return CreatedKeys(tmp_path / "api")


@pytest.fixture
def read_each_time(monkeypatch):
    monkeypatch.setattr(created_keys, "_FRESH_S", 0)


def ask(served: Served, key: str, text: str = "say yes", **fields) -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.post(f"{served.url}/v1/chat/completions", json=served.chat(text, **fields), headers=headers)


def test_only_the_hash_is_kept_and_only_the_user_can_read_it(keys, tmp_path):
    key = keys.create("laptop")
    assert len(key) == 46 and key.startswith("pw-")
    file = tmp_path / "api" / "keys.json"
    content = file.read_text()
    assert key not in content and key[3:] not in content
    assert hashlib.sha256(key.encode()).hexdigest() in content
    assert key not in repr(keys.all()) and hashlib.sha256(key.encode()).hexdigest() not in repr(keys.all())
    if sys.platform != "win32":
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


def test_every_hash_is_compared_in_constant_time(keys, monkeypatch):
    made = [keys.create(name) for name in ("a", "b", "c")]
    compared = []
    monkeypatch.setattr("hmac.compare_digest", lambda given, kept: compared.append(kept) or given == kept)
    found = keys.find(made[0].encode())
    assert found is not None and found.name == "a"
    assert compared == [hashlib.sha256(key.encode()).hexdigest().encode() for key in made]
    assert keys.find(b"") is None and keys.find(made[0][:-1].encode()) is None


@pytest.mark.usefixtures("read_each_time")
def test_keys_come_and_go_without_a_restart(keys, tmp_path):
    """The file is another process's to change: `petals-win key`."""
    elsewhere = CreatedKeys(tmp_path / "api")
    first = elsewhere.create("first")
    with serving(created_keys=keys) as served:
        assert httpx.get(f"{served.url}/v1/models").status_code == 401
        assert ask(served, first).status_code == 200
        second = elsewhere.create("second")
        assert ask(served, second).status_code == 200
        elsewhere.revoke("first")
        assert (ask(served, first).status_code, ask(served, second).status_code) == (401, 200)
        elsewhere.revoke("second")
        assert ask(served, second).status_code == 401, "no key left is nobody"
        (tmp_path / "api" / "keys.json").unlink()
        assert httpx.get(f"{served.url}/v1/models").status_code == 401, "nor everybody"


def test_a_change_counts_within_seconds(keys, tmp_path):
    with serving(created_keys=keys) as served:
        key = CreatedKeys(tmp_path / "api").create("late")
        assert eventually(lambda: ask(served, key).status_code == 200)


@pytest.mark.usefixtures("read_each_time")
def test_a_damaged_file_leaves_the_keys_as_they_were(keys, tmp_path, caplog):
    key = keys.create("laptop")
    file = tmp_path / "api" / "keys.json"
    with serving(created_keys=keys) as served:
        for damage in ("[", '[{"name": 1}]', file.read_text().replace('"sha256": "', '"sha256": "ü')):
            file.write_text(damage)
            assert (ask(served, key).status_code, ask(served, "pw-other").status_code) == (200, 401)
        with pytest.raises(UserError, match="is damaged. Delete it"):
            CreatedKeys(tmp_path / "api")
        with pytest.raises(UserError, match="is damaged"):
            keys.create("another")
    assert len([record for record in caplog.records if "stay valid" in record.message]) == 1


def test_names(keys):
    keys.create("Jörg's-PC".replace("'", "."))
    for name in ("", "a b", "-x", "x" * 65, "a/b"):
        with pytest.raises(UserError, match="cannot be the name of a key"):
            keys.create(name)
    keys.create("laptop")
    with pytest.raises(UserError, match="There is a key 'laptop' already"):
        keys.create("laptop")
    with pytest.raises(UserError, match="There is no key 'phone'"):
        keys.revoke("phone")


def test_a_key_may_come_as_anthropics_clients_send_it(keys):
    key = keys.create("laptop")
    with serving(created_keys=keys, api_keys=("plain",)) as served:
        for sent, status in ((key, 200), ("plain", 200), ("pw-other", 401)):
            assert httpx.get(f"{served.url}/v1/models", headers={"X-Api-Key": sent}).status_code == status
        refused = httpx.get(f"{served.url}/v1/models", headers={"X-Api-Key": "pw-other"})
        assert "not valid" in refused.json()["error"]["message"]


def test_requests_of_a_key_are_limited(keys):
    limited, free = keys.create("limited", requests_per_minute=2), keys.create("free")
    with serving(created_keys=keys) as served:
        assert [ask(served, limited).status_code for _ in range(2)] == [200, 200]
        for stream in (False, True):
            refused = ask(served, limited, stream=stream)
            assert refused.status_code == 429
            assert refused.json()["error"]["code"] == "rate_limit_exceeded"
            assert "requests" in refused.json()["error"]["message"]
            assert 1 <= int(refused.headers["retry-after"]) <= 30
        assert ask(served, free).status_code == 200
        # What generates nothing does not count.
        headers = {"Authorization": f"Bearer {limited}"}
        assert [httpx.get(f"{served.url}/ready", headers=headers).status_code for _ in range(5)] == [200] * 5


def test_tokens_of_a_key_are_limited(keys):
    key = keys.create("limited", tokens_per_minute=60)
    with serving(created_keys=keys) as served:
        assert ask(served, key, "count 70").status_code == 200, "nobody is cut off in the middle"
        refused = ask(served, key)
        assert refused.status_code == 429 and "tokens" in refused.json()["error"]["message"]
        # 2 of the prompt and 70 of the answer: 12 too many, and one has to be left.
        assert 11 <= int(refused.headers["retry-after"]) <= 13


def test_an_answer_that_is_given_up_is_not_free(keys):
    key = keys.create("limited", tokens_per_minute=30)
    with serving(created_keys=keys) as served:
        served.engine.pace = 0.005
        body, headers = served.chat("count 1000", stream=True), {"Authorization": f"Bearer {key}"}
        with httpx.stream("POST", f"{served.url}/v1/chat/completions", json=body, headers=headers) as response:
            for number, _ in enumerate(response.iter_lines()):
                if number > 120:
                    break
        assert eventually(lambda: served.engine.running == 0)
        assert ask(served, key).status_code == 429


def test_what_breaks_costs_nothing(keys):
    key = keys.create("limited", tokens_per_minute=20)
    with serving(created_keys=keys) as served:
        for _ in range(5):
            assert ask(served, key, "missing " + "x" * 60).status_code == 503
        assert ask(served, key).status_code == 200


def test_an_allowance_comes_back_evenly(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(callers.time, "monotonic", lambda: now[0])
    allowance = Allowance(30)
    allowance.take(30)
    assert allowance.seconds_until_one() == pytest.approx(2)
    now[0] += 2
    assert allowance.seconds_until_one() == 0
    allowance.take(31)
    assert allowance.seconds_until_one() == pytest.approx(62)
    now[0] += 1000
    assert allowance.seconds_until_one() == 0
    allowance.take(30)
    assert allowance.seconds_until_one() == pytest.approx(2), "no more than a minute's is saved up"


def test_neither_keys_nor_names_are_logged(keys, caplog):
    caplog.set_level(logging.DEBUG)
    key = keys.create("secret-name", requests_per_minute=1)
    with serving(created_keys=keys) as served:
        ask(served, key), ask(served, key), ask(served, key + "x")
    assert key not in caplog.text and "secret-name" not in caplog.text


@pytest.mark.parametrize(
    ("headers", "let_in"),
    [
        ([(b"authorization", b"Bearer key")], True),
        ([], False),
        ([(b"authorization", b"Bearer key"), (b"origin", b"https://evil.example")], False),
    ],
    ids=["with the key", "without it", "from a foreign page"],
)
def test_websockets_pass_the_same_guards(headers, let_in):
    """A page may open one to any address, and no preflight asks before."""
    reached, sent = [], []

    async def app(scope, receive, send) -> None:
        reached.append(scope["type"])

    async def receive() -> dict:
        return {"type": "websocket.connect"}

    async def send(message) -> None:
        sent.append(message["type"])

    settings = Settings(api_keys=("key",))
    guarded = TrustedPages(RequireKey(app, settings, open_paths=()), settings)
    scope = {"type": "websocket", "path": "/x", "headers": [(b"host", b"localhost"), *headers]}
    asyncio.run(guarded(scope, receive, send))
    refused = ["websocket.http.response.start", "websocket.http.response.body"]  # instead of the handshake
    assert (reached, sent) == ((["websocket"], []) if let_in else ([], refused))
