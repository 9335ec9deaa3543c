"""What lies between a client and the API: TLS, proxies with and without a prefix, names of the local network, too many connections."""

from __future__ import annotations

import hashlib
import socket
import ssl
import stat
import sys
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from api.serving import Served, eventually, serving
from petals_win.api.settings import Settings
from petals_win.errors import UserError
from petals_win.host import tls
from petals_win.host.tls import Tls, own_names, self_signed


@pytest.fixture
def certificate(tmp_path: Path) -> Tls:
    return self_signed(tmp_path / "tls")


# ---- TLS ----


def test_https_with_the_certificate_that_signs_itself(certificate):
    trusting = ssl.create_default_context(cafile=str(certificate.cert))
    trusting.verify_flags |= ssl.VERIFY_X509_STRICT  # as Python does by itself from 3.13 on
    with serving(tls=certificate) as served:
        assert served.api.url == f"https://127.0.0.1:{served.port}"
        with httpx.Client(verify=trusting) as client:
            for name in ("127.0.0.1", "localhost"):
                assert client.get(f"https://{name}:{served.port}/health").status_code == 200
            url = f"{served.api.url}/v1/chat/completions"
            own = {"Origin": served.api.url}
            answer = client.post(url, json=served.chat("say yes", stream=True), headers=own)
            assert answer.status_code == 200 and '"yes"' in answer.text
        with pytest.raises(httpx.ConnectError, match="self.signed certificate"):
            httpx.get(f"{served.api.url}/health")
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"http://127.0.0.1:{served.port}/health")
        with socket.create_connection(("127.0.0.1", served.port)) as raw:
            unverified = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            unverified.check_hostname, unverified.verify_mode = False, ssl.CERT_NONE
            with unverified.wrap_socket(raw) as wrapped:
                shown = hashlib.sha256(wrapped.getpeercert(True) or b"").hexdigest()
    assert certificate.fingerprint.replace(":", "").lower() == shown


def test_it_is_made_once_and_kept_for_this_user_alone(tmp_path, certificate):
    again = self_signed(tmp_path / "tls")
    assert again.fingerprint == certificate.fingerprint
    if sys.platform != "win32":
        assert stat.S_IMODE(certificate.key.stat().st_mode) == 0o600
    assert {"localhost", socket.gethostname().lower(), "127.0.0.1", "::1"} <= set(certificate.names)
    assert set(certificate.names) == set(own_names())


def test_it_is_made_anew_when_it_ends_or_is_damaged(tmp_path, certificate, monkeypatch):
    before = certificate.fingerprint
    monkeypatch.setattr(tls, "_RENEW_DAYS", 100_000)
    renewed = self_signed(tmp_path / "tls").fingerprint
    assert renewed != before
    monkeypatch.undo()
    certificate.cert.write_text("nothing")
    assert self_signed(tmp_path / "tls").fingerprint not in (before, renewed)


def test_files_that_are_none_are_refused_without_a_question(tmp_path, certificate):
    with pytest.raises(UserError, match="--tls-cert.*cannot be read"):
        Tls(tmp_path / "none.pem", certificate.key)
    with pytest.raises(UserError, match="no certificate and its private key"):
        Tls(certificate.key, certificate.cert)
    other = self_signed(tmp_path / "other")
    with pytest.raises(UserError, match="no certificate and its private key"):
        Tls(certificate.cert, other.key)
    key = serialization.load_pem_private_key(certificate.key.read_bytes(), None)
    locked = tmp_path / "locked.pem"
    scheme = serialization.BestAvailableEncryption(b"secret")
    locked.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, scheme))
    with pytest.raises(UserError, match="without a passphrase"):
        Tls(certificate.cert, locked)


def test_the_certificate_is_good_for_servers_alone(certificate):
    found = x509.load_pem_x509_certificate(certificate.cert.read_bytes())
    assert found.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
    assert (found.not_valid_after_utc - found.not_valid_before_utc).days < 825


# ---- proxies ----


@pytest.mark.parametrize("left", ["/llm", ""], ids=["left by the proxy", "taken away by the proxy"])
def test_everything_is_there_behind_a_prefix(left):
    with serving(root_path="/llm", api_keys=("key",)) as served:
        for path in ("/health", "/", "/chat.js", "/docs", "/docs/swagger-ui.js", "/openapi.json"):
            assert httpx.get(served.url + left + path).status_code == 200, path
        assert httpx.get(f"{served.url}{left}/v1/models").status_code == 401
        key = {"Authorization": "Bearer key"}
        assert httpx.get(f"{served.url}{left}/v1/models/{served.model}", headers=key).status_code == 200
        answer = httpx.post(f"{served.url}{left}/v1/chat/completions", json=served.chat("say x"), headers=key)
        assert answer.status_code == 200
        assert httpx.get(f"{served.url}{left}/openapi.json").json()["servers"] == [{"url": "/llm"}]


def test_a_prefix_is_whole_and_its_page_is_seen_from_its_last_slash():
    with serving(root_path="/llm") as served:
        moved = httpx.get(f"{served.url}/llm")
        assert (moved.status_code, moved.headers["location"]) == (308, "/llm/")
        assert httpx.get(f"{served.url}/llmx/health").status_code == 404


def test_pages_go_by_relative_paths(served):
    for path in ("/", "/docs", "/chat.js"):
        text = httpx.get(served.url + path).text
        for absolute in ('href="/', 'src="/', "url: '/", 'url: "/', 'call("/', "fetch('/"):
            assert absolute not in text, f"{path} has {absolute}"


@pytest.mark.parametrize("prefix", ["llm", "/llm/", "/", "//x", "/a b", "http://x/y", "/a?b"])
def test_prefixes_that_are_none(prefix):
    with pytest.raises(UserError, match="Write --root-path as /llm"):
        Settings(root_path=prefix)


def asked_through(served: Served, **headers: str) -> int:
    return httpx.get(f"{served.url}/v1/models", headers=headers).status_code


FORWARDED = {"X-Forwarded-Host": "llm.example", "X-Forwarded-Proto": "https", "X-Forwarded-For": "203.0.113.9"}


def test_a_trusted_proxy_says_who_is_asked():
    with serving(trusted_proxies=("127.0.0.0/8",), allow_hosts=("llm.example",)) as served:
        assert asked_through(served, **FORWARDED, Origin="https://llm.example") == 200
        assert asked_through(served, **{**FORWARDED, "X-Forwarded-Host": "evil.example"}) == 403
        # A client wrote the first, the proxy added the second.
        assert asked_through(served, **{**FORWARDED, "X-Forwarded-Host": "llm.example, evil.example"}) == 403
        assert asked_through(served, **{**FORWARDED, "X-Forwarded-Host": "evil.example, llm.example"}) == 200
        assert asked_through(served, **FORWARDED, Origin="https://evil.example") == 403
        assert asked_through(served) == 200


def test_nobody_else_is_believed():
    for proxies in ((), ("192.168.1.5",)):
        with serving(trusted_proxies=proxies, allow_hosts=("llm.example",)) as served:
            assert asked_through(served, **FORWARDED, Origin="https://llm.example") == 403
            assert asked_through(served, **{**FORWARDED, "X-Forwarded-Host": "evil.example"}) == 200


@pytest.mark.parametrize("address", ["proxy.example", "*", "", "192.168.1.0/99", "192.168.1.5/24"])
def test_proxies_are_addresses(address):
    with pytest.raises(UserError, match="--trusted-proxy as 192.168.1.5"):
        Settings(trusted_proxies=(address,))


def test_which_addresses_are_trusted():
    settings = Settings(trusted_proxies=("192.168.1.5", "fd00::/8"))
    assert settings.trusts("192.168.1.5") and settings.trusts("fd00::1")
    assert not settings.trusts("192.168.1.6") and not settings.trusts("") and not settings.trusts("testclient")


# ---- names ----

LOCAL_NAMES = ("pc.local", "pc.lan", "pc.internal", "PC.home.arpa", "pc.fritz.box", "pc.tail1234.ts.net", "pc")


def test_names_of_the_local_network_where_it_may_ask():
    with serving(host="0.0.0.0", insecure=True) as served:
        for name in LOCAL_NAMES:
            assert asked_through(served, Host=f"{name}:8000", Origin=f"http://{name}:8000") == 200, name
        for name in ("local.example", "lan", "pclan.example", "pc.lan.example", "fritz.box.example", "xts.net"):
            assert asked_through(served, Host=name) == (200 if "." not in name else 403), name


def test_but_not_where_only_this_pc_may_ask(served):
    for name in LOCAL_NAMES:
        assert asked_through(served, Host=name) == 403, name


# ---- limits ----


def test_heads_are_limited_in_number_and_size(served):
    many = {f"X-Header-{number}": "x" for number in range(101)}
    for headers, path in ((many, ""), ({"X-Long": "x" * 33_000}, ""), ({}, "?" + "x" * 33_000)):
        refused = httpx.get(f"{served.url}/health{path}", headers=headers)
        assert refused.status_code == 431
        assert "bytes are allowed" in refused.json()["error"]["message"]
    fair = {f"X-Header-{number}": "x" * 300 for number in range(80)}
    assert httpx.get(f"{served.url}/health", headers=fair).status_code == 200


def test_a_head_without_an_end_is_not_kept(served):
    with socket.create_connection(("127.0.0.1", served.port), timeout=30) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n")
        with pytest.raises(OSError):  # it answers 400 and closes
            for _ in range(10_000):
                client.sendall(b"X-More: " + b"x" * 1000 + b"\r\n")
    assert httpx.get(f"{served.url}/health").status_code == 200


def test_connections_are_limited_in_all():
    with serving(max_connections=5) as served:
        with ExitStack() as opened:
            for _ in range(5):
                opened.enter_context(socket.create_connection(("127.0.0.1", served.port), timeout=30))
            with socket.create_connection(("127.0.0.1", served.port), timeout=30) as sixth:
                answer = b""
                while piece := sixth.recv(65536):
                    answer += piece
                assert answer.startswith(b"HTTP/1.1 503 ") and b"Retry-After: " in answer
                assert b"too many open connections" in answer
        assert eventually(lambda: httpx.get(f"{served.url}/health").status_code == 200)


def test_connections_are_limited_for_each_address(monkeypatch):
    """Loopback has no such limit, so that this PC stands for another one here."""
    monkeypatch.setattr("petals_win.api.server.is_loopback_host", lambda address: False)
    for proxies, last in (((), 503), (("127.0.0.1",), 200)):
        with serving(max_connections_each=3, trusted_proxies=proxies) as served, ExitStack() as opened:
            for _ in range(3):
                opened.enter_context(socket.create_connection(("127.0.0.1", served.port), timeout=30))
            assert eventually(lambda served=served, last=last: health(served) == last)


def health(served: Served) -> int:
    try:
        return httpx.get(f"{served.url}/health").status_code
    except httpx.HTTPError:
        return 503  # closed before the request was written
