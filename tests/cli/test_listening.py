"""The options of `up` and `api` that open the API: the same in both, and what they say together."""

import pytest
from typer.main import get_command

from petals_win.cli.listening import settings_of
from petals_win.cli.main import app
from petals_win.errors import UserError


def test_up_and_api_take_the_same():
    up, api = (get_command(app).commands[name] for name in ("up", "api"))  # type: ignore[attr-defined]
    for name in (
        "host",
        "port",
        "api_key_file",
        "insecure",
        "cors_origin",
        "allow_host",
        "alias",
        "any_model",
        "blanks_ahead",
    ):
        one, other = (next(p for p in command.params if p.name == name) for command in (up, api))
        assert (one.opts, one.help, one.default, one.multiple) == (
            other.opts,
            other.help,
            other.default,
            other.multiple,
        )


def test_what_they_say(tmp_path):
    file = tmp_path / "keys.txt"
    file.write_text("key\n")
    settings = settings_of("0.0.0.0", 81, file, False, ["https://example.org"], ["llm.example.org"])
    assert (settings.host, settings.port, settings.keys()) == ("0.0.0.0", 81, ("key",))
    assert (settings.cors_origins, settings.allow_hosts) == (("https://example.org",), ("llm.example.org",))
    assert settings_of("127.0.0.1", 80, None, False, None, None).keys() == ()
    named = settings_of("127.0.0.1", 80, None, False, None, None, ["gpt-4o", "b"], any_model=True, blanks_ahead=True)
    assert (named.aliases, named.any_model, named.blanks_ahead) == (("gpt-4o", "b"), True, True)


def test_what_they_must_not_say(tmp_path):
    with pytest.raises(UserError, match="--api-key-file FILE.*--insecure"):
        settings_of("0.0.0.0", 80, None, False, None, None)
    with pytest.raises(UserError, match="cannot be read"):
        settings_of("0.0.0.0", 80, tmp_path / "none.txt", False, None, None)
