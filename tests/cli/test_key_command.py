"""`petals-win key`: what it shows, and what it keeps."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from petals_win.api.created_keys import CreatedKeys
from petals_win.cli.main import app
from petals_win.errors import UserError

pytestmark = pytest.mark.usefixtures("home")


def run(*arguments: str):
    return CliRunner().invoke(app, ["key", *arguments])


def test_a_key_is_made_listed_and_revoked():
    assert run("list").stdout == ""
    made = run("create", "laptop", "--requests-per-minute", "20", "--tokens-per-minute", "5000")
    assert made.exit_code == 0
    key = made.stdout.strip()
    found = CreatedKeys().find(key.encode())
    assert found is not None
    assert (found.name, found.requests_per_minute, found.tokens_per_minute) == ("laptop", 20, 5000)
    run("create", "phone")
    first, second = run("list").stdout.splitlines()
    assert first.startswith("laptop  20") and first.endswith("  20 requests a minute, 5000 tokens a minute")
    assert second.startswith("phone  ") and second.endswith("  no limits")
    assert key not in first
    assert run("revoke", "laptop").exit_code == 0
    assert CreatedKeys().find(key.encode()) is None
    assert [key.name for key in CreatedKeys().all()] == ["phone"]


def test_what_cannot_be_done_is_said():
    for arguments, message in ((["revoke", "phone"], "no key 'phone'"), (["create", "a b"], "cannot be the name")):
        refused = run(*arguments)
        assert isinstance(refused.exception, UserError) and message in str(refused.exception)
    assert run("create", "x", "--requests-per-minute", "0").exit_code == 2
