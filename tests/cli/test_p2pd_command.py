"""`petals-win p2pd`, against the program that runs here."""

import sys

import pytest
from typer.testing import CliRunner

from petals_win import __version__
from petals_win.cli.p2pd import app
from petals_win.daemon.binary import find_p2pd
from petals_win.daemon.build import this_target
from petals_win.errors import UserError


def test_locate_says_which_and_why():
    done = CliRunner().invoke(app, ["locate"])
    path, why = done.output.splitlines()
    assert done.exit_code == 0 and path == str(find_p2pd().path) and why == find_p2pd().why


def test_version_is_this_distributions():
    done = CliRunner().invoke(app, ["version"])
    assert done.exit_code == 0 and done.output.startswith(f"p2pd {__version__} (commit ")


@pytest.mark.skipif(sys.platform == "win32", reason="a script that can be run like a program is POSIX")
def test_a_program_that_does_not_tell_its_version(monkeypatch, tmp_path):
    other = tmp_path / "p2pd"
    other.write_text("#!/bin/sh\nexit 2\n")
    other.chmod(0o755)
    monkeypatch.setenv("PETALS_WIN_P2PD", str(other))
    assert CliRunner().invoke(app, ["locate"]).output.splitlines()[0] == str(other)
    error = CliRunner().invoke(app, ["version"]).exception
    assert isinstance(error, UserError) and str(other) in str(error)


@pytest.mark.wine_lacks("what pip asks of the certificate store, so that Go cannot be fetched")
def test_build_writes_the_file_asked_for(tmp_path):
    output = tmp_path / "p2pd"
    done = CliRunner().invoke(app, ["build", "--output", str(output)])
    assert done.exit_code == 0 and done.output.strip() == str(output) and output.stat().st_size > 10_000_000


def test_build_for_an_unknown_system(tmp_path):
    error = CliRunner().invoke(app, ["build", "--os", "plan9", "--output", str(tmp_path / "p2pd")]).exception
    assert isinstance(error, UserError) and this_target() in str(error) and not list(tmp_path.iterdir())
