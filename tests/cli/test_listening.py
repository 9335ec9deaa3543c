"""The options of `up` and `api` that open the API: the same in both, and what they say together."""

from dataclasses import fields

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from petals_win.api.created_keys import CreatedKeys
from petals_win.cli.listening import Listening, tell_certificate
from petals_win.cli.main import app
from petals_win.errors import UserError

pytestmark = pytest.mark.usefixtures("home")


def test_up_and_api_take_the_same():
    up, api = (get_command(app).commands[name] for name in ("up", "api"))  # type: ignore[attr-defined]
    for name in (field.name for field in fields(Listening)):
        one, other = (next(p for p in command.params if p.name == name) for command in (up, api))
        assert (one.opts, one.help, one.default, one.multiple) == (
            other.opts,
            other.help,
            other.default,
            other.multiple,
        )
        assert one.help and one.opts[0].startswith("--")


def test_what_they_say(tmp_path):
    file = tmp_path / "keys.txt"
    file.write_text("key\n")
    settings = Listening(
        host="0.0.0.0",
        port=81,
        api_key_file=file,
        cors_origin=["https://example.org"],
        allow_host=["llm.example.org"],
        root_path="/llm",
        trusted_proxy=["172.16.0.0/12"],
    ).settings()
    assert (settings.host, settings.port, settings.keys()) == ("0.0.0.0", 81, ("key",))
    assert (settings.cors_origins, settings.allow_hosts) == (("https://example.org",), ("llm.example.org",))
    assert (settings.root_path, settings.trusted_proxies, settings.tls) == ("/llm", ("172.16.0.0/12",), None)
    assert Listening(port=80).settings().keys() == ()
    named = Listening(alias=["gpt-4o", "b"], any_model=True, blanks_ahead=True).settings()
    assert (named.aliases, named.any_model, named.blanks_ahead) == (("gpt-4o", "b"), True, True)


def test_what_they_must_not_say(tmp_path):
    with pytest.raises(UserError, match="--api-key-file FILE.*petals-win key create NAME.*--insecure"):
        Listening(host="0.0.0.0").settings()
    with pytest.raises(UserError, match="cannot be read"):
        Listening(host="0.0.0.0", api_key_file=tmp_path / "none.txt").settings()
    with pytest.raises(UserError, match="There is no key yet.*petals-win key create"):
        Listening(keys=True).settings()
    with pytest.raises(UserError, match="--tls off is unknown"):
        Listening(tls="off").settings()
    for options in ({"tls_cert": file} for file in (tmp_path,)):
        with pytest.raises(UserError, match="--tls-cert together with --tls-key"):
            Listening(**options).settings()


def test_which_keys_are_asked_for(tmp_path, monkeypatch):
    """On this PC alone none unless asked for; in a network the created ones, if nothing else was said."""
    file = tmp_path / "keys.txt"
    file.write_text("key\n")
    CreatedKeys().create("laptop")
    assert not Listening().settings().needs_key
    assert Listening(keys=True).settings().created_keys is not None
    assert Listening(host="0.0.0.0").settings().created_keys is not None
    assert Listening(host="0.0.0.0", api_key_file=file).settings().created_keys is None
    assert Listening(host="0.0.0.0", api_key_file=file, keys=True).settings().created_keys is not None
    assert not Listening(host="0.0.0.0", insecure=True).settings().needs_key
    monkeypatch.setenv("PETALS_WIN_API_KEYS", " one,two  three,")
    settings = Listening(host="0.0.0.0").settings()
    assert (settings.api_keys, settings.created_keys) == (("one", "two", "three"), None)
    assert Listening().settings().needs_key, "who sets keys wants them asked for"
    monkeypatch.setenv("PETALS_WIN_API_KEYS", "schlüssel")
    with pytest.raises(UserError, match="PETALS_WIN_API_KEYS has a key that is none") as caught:
        Listening().settings()
    assert "schl" not in str(caught.value)


def test_the_certificate_is_told_of():
    told: list[str] = []
    settings = Listening(tls="self-signed").settings()
    assert settings.tls is not None
    tell_certificate(settings, told.append)
    assert settings.tls.fingerprint in told[0] and "localhost" in told[0]
    assert len(told) == 1
    tell_certificate(Listening().settings(), told.append)
    assert len(told) == 1


@pytest.mark.parametrize("command", [["up"], ["api", "--model", "any"]], ids=["up", "api"])
def test_the_commands_heed_them(command):
    """Before anything slow: what is wrong with them is said at once."""
    for options, message in (
        (["--tls", "off"], "--tls off is unknown"),
        (["--keys"], "There is no key yet"),
        (["--root-path", "llm"], "Write --root-path as /llm"),
        (["--trusted-proxy", "192.168.1.5", "--trusted-proxy", "proxy"], "'proxy' is no address"),
        (["--host", "0.0.0.0", "--cors-origin", "https://example.org"], "--insecure"),
    ):
        refused = CliRunner().invoke(app, [*command, *options])
        assert isinstance(refused.exception, UserError) and message in str(refused.exception)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "Which model"),
        (["--model", "m", "--base-url", "http://127.0.0.1:1/v1"], "are for --engine openai"),
        (["--engine", "openai"], "Which server?"),
        (
            ["--engine", "openai", "--base-url", "http://127.0.0.1:1/v1", "--upstream-key-file", "none.txt"],
            "cannot be read",
        ),
    ],
)
def test_which_engine_needs_what(options, message):
    result = CliRunner().invoke(app, ["api", "--port", "0", *options])
    assert isinstance(result.exception, UserError) and message in str(result.exception)
